//! What happened, for people and programs that follow along. Every transition is an event with a cause.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    id::{EnvironmentId, InstanceId, ReleaseNumber, ResourceId, RunId},
    time::UnixMillis,
};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Position in the journal; grows by one per event of the state directory. 0 before it is stored.
    pub sequence: u64,
    /// When, by the wall clock. 0 before it is stored.
    pub at: UnixMillis,
    /// Where.
    pub environment: EnvironmentId,
    /// What.
    pub kind: EventKind,
    /// Resource it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<ResourceId>,
    /// Instance it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// Release it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<ReleaseNumber>,
    /// Run that it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// Why, in words: `ready check passed`, `exit code 1`, `replaced by release 4`.
    pub cause: String,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A run began.
    RunStarted,
    /// A run reached its goal.
    RunSucceeded,
    /// A run turns back, and why.
    RunReverting,
    /// A run ended without its goal; the cause says what was reverted.
    RunFailed,
    /// A run was cancelled; the cause says what was reverted.
    RunCancelled,
    /// A step began.
    StepStarted,
    /// A step is done.
    StepSucceeded,
    /// A step failed.
    StepFailed,
    /// A step waits, and for what.
    StepWaiting,
    /// A release was recorded.
    ReleaseCreated,
    /// A release is in force as a whole.
    ReleaseStable,
    /// A rollout began, with its strategy.
    RolloutStarted,
    /// A rollout took a step.
    RolloutStep,
    /// A rollout waits for a person, and what happens if nobody comes.
    RolloutPaused,
    /// A person moved a rollout on.
    RolloutResumed,
    /// The new set has taken over.
    RolloutPromoted,
    /// A verdict was given.
    Verdict,
    /// A flag was switched, and why.
    FlagSwitched,
    /// New requests to a service wait, and for whom and how long.
    TrafficPaused,
    /// New requests to a service go on, and why.
    TrafficResumed,
    /// A hook was asked, or answered.
    Hook,
    /// The number of instances was changed by the autoscaler, and why.
    Scaled,
    /// The time of a preview began anew.
    PreviewRenewed,
    /// The time of a preview will soon be over.
    PreviewExpiring,
    /// The time of a preview is over.
    PreviewExpired,
    /// An instance waits for its start (back-off, dependency).
    InstancePending,
    /// An instance is being launched.
    InstanceLaunching,
    /// An instance's process runs.
    InstanceStarting,
    /// An instance is ready.
    InstanceReady,
    /// An instance runs but is not ready any more.
    InstanceUnready,
    /// An instance gets no new requests and finishes what it has.
    InstanceDraining,
    /// An instance was told to stop.
    InstanceStopping,
    /// An instance's process ended.
    InstanceExited,
    /// Nothing is left of an instance.
    InstanceGone,
    /// An instance was given up.
    InstanceFailed,
    /// An instance was found running and is supervised again.
    InstanceAdopted,
    /// What a service depends on was lost, or came back.
    DependencyLost,
    /// See above.
    DependencyRestored,
    /// A port with TLS shows another certificate.
    CertificateServed,
    /// The files of a port's certificate cannot be used, and what is shown instead.
    CertificateProblem,
    /// The server started.
    ServerStarted,
    /// The proxy was lost and is being replaced.
    ProxyLost,
    /// The proxy serves.
    ProxyServing,
}

impl EventKind {
    /// The word used in JSON and on the screen.
    pub fn as_str(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
    }
}
