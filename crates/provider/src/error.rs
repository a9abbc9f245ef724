//! Errors of a provider. Each says itself whether trying again can help, so that nobody upstairs guesses.

use std::time::Duration;

use orchestra_model::Code;

/// A provider call that did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Code for the user.
    pub code: Code,
    /// What failed, naming the subject, without its cause.
    pub message: String,
    /// Whether trying again can help.
    pub retry: Retry,
    /// What to do about it, if that is known.
    pub help: Option<String>,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It cannot.
    Never,
    /// It can, after this time.
    After(Duration),
    /// It can, once the spec or the world was changed by somebody.
    OnChange,
}

impl Error {
    /// An error without help or cause yet.
    pub fn new(code: Code, retry: Retry, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry, help: None, source: None }
    }

    /// Says what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}
