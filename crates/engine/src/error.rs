//! What the engine refuses, in the form that users read.

use orchestra_model::{Code, Diagnostic, EnvironmentId, RunId};

/// A request that was not carried out. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// It means nothing that can be done; all reasons at once.
    #[error("{}", .0.first().map(ToString::to_string).unwrap_or_default())]
    Refused(Vec<Diagnostic>),
    /// Another run of the environment goes on.
    #[error("{run} of {environment} is in progress")]
    Busy {
        /// Where.
        environment: EnvironmentId,
        /// Which.
        run: RunId,
    },
    /// There is no such thing.
    #[error("there is no {0}")]
    NotFound(String),
    /// A saved plan does not fit any more.
    #[error("the saved plan does not fit any more")]
    Stale(Vec<Diagnostic>),
    /// The state cannot be read.
    #[error("the state cannot be read")]
    Read(#[from] orchestra_store::ReadError),
    /// The state cannot be written.
    #[error("the state cannot be written")]
    Write(#[from] orchestra_store::CommitError),
    /// The control plane is shutting down.
    #[error("the control plane is shutting down")]
    ShuttingDown,
}

impl EngineError {
    /// The form that users read.
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        match self {
            Self::Refused(diagnostics) | Self::Stale(diagnostics) => diagnostics.clone(),
            Self::Busy { environment, run } => vec![
                Diagnostic::error(Code::RUN_IN_PROGRESS, format!("{run} of {environment} is in progress"))
                    .help("wait for it to end (`orchestra status` shows what it waits for), or turn it back: `orchestra abort`"),
            ],
            Self::NotFound(what) => {
                vec![
                    Diagnostic::error(Code::NOT_FOUND, format!("there is no {what}")).help(if what.starts_with("release") {
                        "`orchestra history` lists the releases"
                    } else {
                        "`orchestra status` lists what there is"
                    }),
                ]
            }
            Self::Read(error) => vec![Diagnostic::error(Code::STATE_DAMAGED, "the state cannot be read").caused_by(error)],
            Self::Write(error) => vec![Diagnostic::error(Code::STATE_WRITE, "the state cannot be written").caused_by(error)],
            Self::ShuttingDown => vec![
                Diagnostic::error(Code::SERVER_UNREACHABLE, "the server is shutting down").help("try again; the next command starts it anew"),
            ],
        }
    }
}
