//! Why a command ends early.

use std::io;

use orchestra_api::ClientError;
use orchestra_model::{Code, Diagnostic};

use crate::exit::Exit;

/// A command that did not do what was asked, or that has nothing more to say.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something to tell the user; the exit code follows from it.
    Told(Vec<Diagnostic>),
    /// Everything was said.
    Silent(Exit),
    /// Nobody reads the output any more.
    OutputClosed,
}

pub(crate) type Result<T = (), E = Failure> = std::result::Result<T, E>;

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Told(error.into_diagnostics())
    }
}

impl From<Vec<Diagnostic>> for Failure {
    fn from(diagnostics: Vec<Diagnostic>) -> Self {
        Self::Told(diagnostics)
    }
}

impl From<Diagnostic> for Failure {
    fn from(diagnostic: Diagnostic) -> Self {
        Self::Told(vec![diagnostic])
    }
}

/// Of writing to standard output; every other I/O is given its own message where it happens.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::OutputClosed;
        }
        Self::Told(vec![Diagnostic::error(Code::INTERNAL, "the output cannot be written").caused_by(&error)])
    }
}
