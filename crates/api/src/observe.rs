//! What was: releases and lines of output.

use orchestra_model::{InstanceId, ReleaseNumber, RunId, record::ReleaseState, time::UnixMillis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::payload::Payload;

/// One line about a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReleaseSummary {
    /// Number.
    pub number: ReleaseNumber,
    /// When it was made.
    pub created_at: UnixMillis,
    /// Run that made it.
    pub run: RunId,
    /// Why.
    pub reason: String,
    /// How it fared.
    pub state: ReleaseState,
}

/// A line of output, exactly as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LogLine {
    /// Who wrote it.
    pub instance: InstanceId,
    /// In which of its starts.
    pub attempt: u32,
    /// Where to.
    pub stream: LogStream,
    /// When it arrived.
    pub at: UnixMillis,
    /// Its bytes, with the line feed if there was one. Very long lines come in pieces.
    pub line: Payload,
}

/// Where a line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}
