//! Runs as a client follows them.

use orchestra_model::{
    Diagnostic, EnvironmentId, Event, ReleaseNumber, ResourceId, RunId,
    plan::Action,
    record::{RunKind, RunRecord, RunState},
    time::UnixMillis,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::environment::Waiting;

/// A run that was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StartedRun {
    /// The run. If there was nothing to do, its plan is empty and it has succeeded already.
    pub run: RunRecord,
    /// What is probably not meant.
    pub warnings: Vec<Diagnostic>,
}

/// A run without its plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RunSummary {
    /// Which.
    pub id: RunId,
    /// Where.
    pub environment: EnvironmentId,
    /// Why.
    pub kind: RunKind,
    /// Release that it puts into force.
    pub release: Option<ReleaseNumber>,
    /// Where it stands.
    pub state: RunState,
    /// When it began.
    pub started_at: UnixMillis,
    /// When it ended.
    pub ended_at: Option<UnixMillis>,
}

impl From<&RunRecord> for RunSummary {
    fn from(run: &RunRecord) -> Self {
        Self {
            id: run.id,
            environment: run.environment.clone(),
            kind: run.kind.clone(),
            release: run.release,
            state: run.state,
            started_at: run.started_at,
            ended_at: run.ended_at,
        }
    }
}

/// What a follower of a run is told. As server-sent events: `event:` is the variant's name, and an [`RunEvent::Event`]
/// carries its sequence number as `id:`, so that a follower who reconnects with `Last-Event-ID` misses nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunEvent {
    /// Something happened.
    Event(Event),
    /// Where one resource stands; replaces what was said of it before. Sent for every step of the plan on connecting.
    Progress(Progress),
    /// The run has ended. Always last.
    Done(Box<RunRecord>),
}

impl RunEvent {
    /// The variant's name, as in `event:`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Event(_) => "event",
            Self::Progress(_) => "progress",
            Self::Done(_) => "done",
        }
    }

    /// The value of `id:`.
    pub const fn id(&self) -> Option<u64> {
        match self {
            Self::Event(event) => Some(event.sequence),
            Self::Progress(_) | Self::Done(_) => None,
        }
    }
}

/// Where one resource of a run stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// Which.
    pub resource: ResourceId,
    /// What is done with it.
    pub action: Action,
    /// Where it stands.
    pub state: ProgressState,
    /// Instances of the new release that are ready.
    pub ready: u32,
    /// Instances of the new release that are wanted; 0 for what has no instances.
    pub desired: u32,
    /// Milliseconds since its step began, or that it took; 0 before.
    pub elapsed_ms: u64,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits_for: Vec<Waiting>,
    /// What there is to say of it: the last thing that went wrong, or `draining 3 streams`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Where a resource of a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProgressState {
    /// Its step has not begun; `waits_for` says why.
    Waiting,
    /// Its step goes on.
    Running,
    /// Its step is done.
    Succeeded,
    /// Its step failed.
    Failed,
    /// Its step is being put back.
    Reverting,
    /// Its step was put back.
    Reverted,
}

impl ProgressState {
    /// Whether nothing more happens unless the run turns back.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Reverted)
    }
}
