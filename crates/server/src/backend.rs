//! What stands behind the handlers: a living control plane, or only what is recorded.

use std::sync::Arc;

use orchestra_engine::{ControlPlane, EngineError};
use orchestra_model::{Code, Diagnostic, time::UnixMillis};
use orchestra_store::Reader;
use orchestra_task::TaskTree;
use tokio::sync::Notify;

/// Facts about the server that answers.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Version of Orchestra.
    pub version: String,
    /// State directory, absolute.
    pub home: String,
    /// Folder of managed volumes, absolute.
    pub volumes: String,
    /// TCP address that it listens on beside its socket.
    pub listen: Option<std::net::SocketAddr>,
    /// When it was started.
    pub started_at: UnixMillis,
}

/// What answers.
#[derive(Clone)]
pub enum Backend {
    /// A living control plane.
    Live(ControlPlane),
    /// What is recorded, if anything; nothing can be started.
    Recorded(Option<Reader>),
}

/// State of the handlers.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) backend: Backend,
    pub(crate) facts: Arc<Facts>,
    pub(crate) tree: TaskTree,
    /// Notified when somebody asks the server to stop.
    pub(crate) stop: Arc<Notify>,
}

impl App {
    /// The control plane, or an error that says how to get one.
    pub(crate) fn live(&self) -> Result<&ControlPlane, EngineError> {
        match &self.backend {
            Backend::Live(control) => Ok(control),
            Backend::Recorded(_) => Err(EngineError::Refused(vec![
                Diagnostic::error(Code::SERVER_UNREACHABLE, "no server is running")
                    .help("start one: `orchestra server start`"),
            ])),
        }
    }

    /// A reader of what is recorded.
    pub(crate) fn reader(&self) -> Option<Reader> {
        match &self.backend {
            Backend::Live(control) => Some(control.store().reader().clone()),
            Backend::Recorded(reader) => reader.clone(),
        }
    }

    /// Asks what is recorded, off the async threads. `None` if nothing is.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Reader) -> Result<T, orchestra_store::ReadError> + Send + 'static,
    ) -> Result<Option<T>, EngineError> {
        let Some(reader) = self.reader() else { return Ok(None) };
        match tokio::task::spawn_blocking(move || question(&reader)).await {
            Ok(answer) => Ok(Some(answer?)),
            Err(_) => Err(EngineError::ShuttingDown),
        }
    }
}
