//! The control protocol between provider and shim: one JSON object per line, in both directions.
//!
//! A shim sends its whole state on connect, then events. The state carries the version; requests carry an id, which
//! comes back in the reply.

use std::io;

use orchestra_model::launch::{Exit, ProviderEvent};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::folder::Status;

/// Longest line that either side reads.
pub(crate) const MAX_LINE: usize = 1 << 20;

/// What a shim says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FromShim {
    /// First message on each connection.
    State(Box<Status>),
    /// Something happened. `Started`, `Exited` and `Gone` come once per shim.
    Event(ProviderEvent),
    /// Output could not be written and was dropped; said once.
    LogsLost { message: String },
    /// A request was carried out.
    Done { id: u64 },
    /// A request was not carried out.
    Refused { id: u64, message: String },
    /// A command came to its end.
    Executed { id: u64, exit: Option<Exit>, output: String },
}

/// What a shim is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToShim {
    /// Begin to end the launch, or shorten the grace.
    Terminate { id: u64, signal: i32, grace_ms: u64 },
    /// Run a command beside the program.
    Exec { id: u64, command: Vec<String>, timeout_ms: u64 },
    /// Answer.
    Ping { id: u64 },
}

/// Appends a message with its line feed.
pub(crate) fn encode<T: Serialize>(message: &T, out: &mut Vec<u8>) {
    serde_json::to_writer(&mut *out, message).expect("messages have string keys only");
    out.push(b'\n');
}

/// Takes the first complete line out of `buffer`.
pub(crate) fn decode<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else {
        if buffer.len() > MAX_LINE {
            return Err(io::Error::other("a message of the control protocol is too long"));
        }
        return Ok(None);
    };
    let message = serde_json::from_slice(&buffer[..end])?;
    buffer.drain(..=end);
    Ok(Some(message))
}
