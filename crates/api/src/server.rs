//! What the server says of itself, and the forms that every answer shares.

use orchestra_model::{Diagnostic, time::UnixMillis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Version {
    /// Version of Orchestra, such as `0.1.0`.
    pub version: String,
    /// Version of the API that it speaks.
    pub api: u32,
    /// Its process id.
    pub pid: u32,
    /// Absolute path of its state directory.
    pub home: String,
    /// TCP address that it listens on beside its socket, such as `127.0.0.1:7070`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// When it was started.
    pub started_at: UnixMillis,
}

/// Every answer with a status of 400 or above: what is wrong, complete enough to act on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// At least one.
    pub errors: Vec<Diagnostic>,
}

/// An answer that says nothing more than that it was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Empty {}

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "{T}Page")]
pub struct Page<T> {
    /// The items of this part, in the order of the list.
    pub items: Vec<T>,
    /// Value of `after` that asks for the next part; missing on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// What `orchestra doctor` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DoctorReport {
    /// One per thing that was looked at, in a fixed order.
    pub checks: Vec<DoctorCheck>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DoctorCheck {
    /// What was looked at, in two or three words: `state directory`.
    pub name: String,
    /// How it is.
    pub outcome: CheckOutcome,
    /// What was found, in one line.
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

/// How a thing is that the doctor looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// As it should be.
    Ok,
    /// Orchestra works, but does something less well than it could.
    Warning,
    /// Orchestra cannot work like this.
    Failed,
}

impl DoctorCheck {
    /// A check that found nothing wrong.
    pub fn ok(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), outcome: CheckOutcome::Ok, detail: detail.into(), help: None }
    }

    /// A check that found something that is not as good as it could be.
    pub fn warning(name: impl Into<String>, detail: impl Into<String>, help: impl Into<String>) -> Self {
        let outcome = CheckOutcome::Warning;
        Self { name: name.into(), outcome, detail: detail.into(), help: Some(help.into()) }
    }

    /// A check that found something that stands in the way.
    pub fn failed(name: impl Into<String>, detail: impl Into<String>, help: impl Into<String>) -> Self {
        let outcome = CheckOutcome::Failed;
        Self { name: name.into(), outcome, detail: detail.into(), help: Some(help.into()) }
    }
}
