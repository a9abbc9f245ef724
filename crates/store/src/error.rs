//! What can go wrong, one enum per operation, and its form for users.

use std::{fmt, io, path::PathBuf, sync::Arc};

use orchestra_model::{
    Code, Diagnostic, EnvironmentId, Generation, InstanceId, ReleaseNumber, ResourceId, RunId,
    record::{ReleaseState, RunState},
};

/// A row that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub(crate) table: &'static str,
    pub(crate) key: String,
    pub(crate) what: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row `{}` of `{}` is damaged: {}", self.key.escape_debug(), self.table, self.what)
    }
}

impl std::error::Error for Damage {}

/// Why the state could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the lock.
    #[error("another server{} owns the state in {}", owner(*.pid), .home.display())]
    Locked {
        /// The state directory.
        home: PathBuf,
        /// Its process, as the lock file names it.
        pid: Option<u32>,
    },
    /// The state has a format that this version does not read.
    #[error("the state in {} has format {found}; this version of Orchestra reads format {supported}", .home.display())]
    Format {
        /// The state directory.
        home: PathBuf,
        /// Format found.
        found: i64,
        /// Newest format that this version knows.
        supported: i64,
    },
    /// What is there is not a state that Orchestra wrote.
    #[error("the state in {} is damaged: {what}", .home.display())]
    Damaged {
        /// The state directory.
        home: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The directory or a file in it cannot be made, written or locked.
    #[error("cannot {operation} {}", .path.display())]
    Write {
        /// What was tried.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The database refused.
    #[error("cannot open the state in {}", .home.display())]
    Database {
        /// The state directory.
        home: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
}

fn owner(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

impl OpenError {
    /// The error as a user sees it.
    pub fn diagnostic(&self) -> Diagnostic {
        let diagnostic = |code| Diagnostic::error(code, self.to_string()).caused_by_source(self);
        match self {
            Self::Locked { pid, .. } => diagnostic(Code::STATE_LOCKED).help(match pid {
                Some(pid) => format!("talk to that server, or stop it first: kill {pid}"),
                None => "talk to that server, or stop it first".to_owned(),
            }),
            Self::Format { found, supported, .. } => diagnostic(Code::STATE_FORMAT).help(if found > supported {
                "use the version of Orchestra that wrote it, or a newer one"
            } else {
                "start the server once (`orchestra server`): it brings the state up to date"
            }),
            Self::Damaged { home, .. } => diagnostic(Code::STATE_DAMAGED).help(format!(
                "nothing was changed; restore {0} from a copy, or move it away (`mv {0} {0}.damaged`) and start anew",
                home.display()
            )),
            Self::Write { .. } => diagnostic(Code::STATE_WRITE)
                .help("make room on the disk, or give the user of the server the right to write there"),
            Self::Database { source, .. } => diagnostic(code_of(source))
                .help("check that the disk is not full and that the files belong to the user of the server"),
        }
    }
}

trait CausedBySource {
    fn caused_by_source(self, error: &(dyn std::error::Error + 'static)) -> Self;
}

impl CausedBySource for Diagnostic {
    fn caused_by_source(self, error: &(dyn std::error::Error + 'static)) -> Self {
        match error.source() {
            Some(source) => self.caused_by(source),
            None => self,
        }
    }
}

/// Whether the database says that its content is broken, as against that it could not be reached or written.
pub(crate) fn is_corrupt(error: &rusqlite::Error) -> bool {
    use rusqlite::{Error, ErrorCode};
    match error {
        // Our statements fit our tables, and our tables hold what we put in.
        Error::SqlInputError { .. }
        | Error::InvalidColumnType(..)
        | Error::IntegralValueOutOfRange(..)
        | Error::FromSqlConversionFailure(..)
        | Error::Utf8Error(..) => true,
        other => {
            matches!(other.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
        }
    }
}

fn code_of(error: &rusqlite::Error) -> Code {
    if is_corrupt(error) { Code::STATE_DAMAGED } else { Code::STATE_WRITE }
}

/// Why a question could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A row is not what was written.
    #[error("the state is damaged")]
    Damaged(#[source] Damage),
    /// The database refused.
    #[error("cannot read the state")]
    Database(#[source] rusqlite::Error),
    /// The state was replaced by one that cannot be opened.
    #[error("cannot open the state again")]
    Open(#[source] Box<OpenError>),
    /// The runtime that should have run the query is shutting down.
    #[error("the query was given up because the program is shutting down")]
    ShuttingDown,
}

impl ReadError {
    /// The error as a user sees it.
    pub fn diagnostic(&self) -> Diagnostic {
        if let Self::Open(error) = self {
            return error.diagnostic();
        }
        Diagnostic::error(Code::STATE_DAMAGED, self.to_string())
            .caused_by_source(self)
            .help("restore the state directory from a copy, or move it away and start anew")
    }
}

impl From<rusqlite::Error> for ReadError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

impl From<Damage> for ReadError {
    fn from(damage: Damage) -> Self {
        Self::Damaged(damage)
    }
}

/// Why nothing of a commit was written.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// The changes contradict what is there, or one another.
    #[error("the changes were refused, because they contradict the state")]
    Refused(#[source] Violation),
    /// The disk is full, read-only or broken. What was committed before is unharmed.
    #[error("cannot write the state")]
    Write(#[source] Arc<rusqlite::Error>),
    /// The state turned out to be damaged.
    #[error("the state is damaged")]
    Damaged(#[source] Damage),
    /// A write failed in a way after which the disk cannot be trusted; nothing more is written until the state is
    /// opened again.
    #[error("the state is not written any more since an earlier failure: {0}")]
    Stopped(String),
    /// The store was closed.
    #[error("the state is closed")]
    Closed,
}

impl CommitError {
    /// The error as a user sees it.
    pub fn diagnostic(&self) -> Diagnostic {
        let code = match self {
            Self::Refused(_) => Code::INTERNAL,
            Self::Write(source) => code_of(source),
            Self::Stopped(_) | Self::Closed => Code::STATE_WRITE,
            Self::Damaged(_) => Code::STATE_DAMAGED,
        };
        let diagnostic = Diagnostic::error(code, self.to_string()).caused_by_source(self);
        match self {
            Self::Write(_) => diagnostic.help("make room on the disk; nothing that was recorded before is lost"),
            Self::Stopped(_) => diagnostic.help("check the disk, then restart the server (`orchestra server`)"),
            Self::Damaged(_) => diagnostic.help("restore the state directory from a copy, or move it away"),
            Self::Refused(_) | Self::Closed => diagnostic,
        }
    }
}

/// An invariant that a commit would have broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "fields are the subjects that the messages name")]
pub enum Violation {
    /// Fencing: a run of an older generation writes.
    #[error("{run} holds generation {held} of {environment}, which is at {current} by now", held = .held.0, current = .current.0)]
    Fenced { environment: EnvironmentId, run: RunId, held: Generation, current: Generation },
    /// The fencing number of an environment would go down.
    #[error("the generation of {environment} would go from {from} to {to}", from = .from.0, to = .to.0)]
    GenerationDecreases { environment: EnvironmentId, from: Generation, to: Generation },
    /// A new run has a generation that was given out before.
    #[error("{run} of {environment} has generation {generation}, which is not a new one", generation = .generation.0)]
    GenerationReused { environment: EnvironmentId, run: RunId, generation: Generation },
    /// The last release number would go down.
    #[error("the last release of {environment} would go from {from} to {to}")]
    ReleaseDecreases { environment: EnvironmentId, from: ReleaseNumber, to: ReleaseNumber },
    /// A new release has a number that is not above all earlier ones.
    #[error("release {number} of {environment} is not newer than release {newest}")]
    ReleaseNotNew { environment: EnvironmentId, number: ReleaseNumber, newest: ReleaseNumber },
    /// A release number that was not given out.
    #[error("release {number} of {environment} is beyond the last one, {last}")]
    ReleaseBeyondLast { environment: EnvironmentId, number: ReleaseNumber, last: ReleaseNumber },
    /// More than the state of a release would change.
    #[error("release {number} of {environment} is immutable, but its {field} would change")]
    ReleaseImmutable { environment: EnvironmentId, number: ReleaseNumber, field: &'static str },
    /// A release cannot go from one state to the other.
    #[error("release {number} of {environment} cannot go from {from:?} to {to:?}")]
    ReleaseTransition { environment: EnvironmentId, number: ReleaseNumber, from: ReleaseState, to: ReleaseState },
    /// Two releases would be in force.
    #[error("releases {first} and {second} of {environment} would both be stable")]
    TwoStable { environment: EnvironmentId, first: ReleaseNumber, second: ReleaseNumber },
    /// `stable` names a release that is not.
    #[error("release {number} is named as the stable one of {environment}, but it is not stable")]
    NotStable { environment: EnvironmentId, number: ReleaseNumber },
    /// A final run would go on.
    #[error("{run} has ended as {from:?} and cannot become {to:?}")]
    RunReopens { run: RunId, from: RunState, to: RunState },
    /// A run cannot go from one state to the other.
    #[error("{run} cannot go from {from:?} to {to:?}")]
    RunTransition { run: RunId, from: RunState, to: RunState },
    /// What identifies a run would change.
    #[error("the {field} of {run} cannot change")]
    RunImmutable { run: RunId, field: &'static str },
    /// Two runs of one environment would go on.
    #[error("{first} and {second} of {environment} would both go on")]
    TwoRuns { environment: EnvironmentId, first: RunId, second: RunId },
    /// A step of a run that has ended.
    #[error("{run} has ended, but its step {resource} would change")]
    StepOfEndedRun { run: RunId, resource: ResourceId },
    /// Something refers to an environment that does not exist.
    #[error("there is no environment {environment}, to which {subject} would belong")]
    NoEnvironment { environment: EnvironmentId, subject: String },
    /// Something refers to a release that does not exist.
    #[error("there is no release {number} of {environment}")]
    NoRelease { environment: EnvironmentId, number: ReleaseNumber },
    /// Something refers to a run that does not exist, or that belongs to another environment.
    #[error("there is no {run}{}", environment.as_ref().map(|e| format!(" of {e}")).unwrap_or_default())]
    NoRun { run: RunId, environment: Option<EnvironmentId> },
    /// What identifies an instance would change.
    #[error("the {field} of instance {instance} of {environment} cannot change")]
    InstanceImmutable { environment: EnvironmentId, instance: InstanceId, field: &'static str },
    /// The attempt of an instance would go down.
    #[error("instance {instance} of {environment} would go from attempt {from} to {to}")]
    AttemptDecreases { environment: EnvironmentId, instance: InstanceId, from: u32, to: u32 },
    /// An instance that is not known is written as if it had a past: it was forgotten before.
    #[error("instance {instance} of {environment} is not known, but is written with a past")]
    InstanceForgotten { environment: EnvironmentId, instance: InstanceId },
    /// A record contradicts itself.
    #[error("the record of {subject} contradicts itself: {what}")]
    Inconsistent { subject: String, what: &'static str },
    /// An outcome without an intent.
    #[error("the journal has no open intent `{key}` to which an outcome could belong")]
    NoIntent { key: String },
}
