//! Environments as they are: what runs, what is ready, and what everything else waits for.

use std::collections::BTreeMap;

use orchestra_model::{
    Diagnostic, EnvironmentId, InstanceId, Name, ReleaseNumber, ResourceId,
    desired::{Condition, Protocol, Target},
    launch::Exit,
    time::UnixMillis,
    traffic::PausedTraffic,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    preview::{PreviewStatus, UsageNow},
    rollout::RolloutStatus,
    run::RunSummary,
};

/// One line about an environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EnvironmentSummary {
    /// Which.
    pub id: EnvironmentId,
    /// Absolute path of the stack file that was last applied.
    pub source: String,
    /// How it is.
    pub health: EnvironmentHealth,
    /// Release in force.
    pub release: Option<ReleaseNumber>,
    /// Services of which all instances are ready.
    pub ready: u32,
    /// Services.
    pub services: u32,
    /// Run that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunSummary>,
    /// What makes it a preview, if it is or was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<PreviewStatus>,
    /// What it uses, if that was asked for and could be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageNow>,
}

/// How an environment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnvironmentHealth {
    /// Nothing of it runs and nothing should.
    Down,
    /// A run goes on.
    Changing,
    /// Everything is ready.
    Ready,
    /// Something is not ready, though no run goes on.
    Degraded,
}

/// Everything about an environment at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EnvironmentStatus {
    /// Which.
    pub id: EnvironmentId,
    /// Absolute path of the stack file that was last applied.
    pub source: String,
    /// Provider of its workloads.
    pub target: Target,
    /// How it is.
    pub health: EnvironmentHealth,
    /// Release in force as a whole.
    pub release: Option<ReleaseNumber>,
    /// When this was true.
    pub at: UnixMillis,
    /// Run that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunSummary>,
    /// What makes it a preview, if it is or was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<PreviewStatus>,
    /// Why nothing can be decided at the moment: the state cannot be written. Work goes on by itself once it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Services by name.
    pub services: Vec<ServiceStatus>,
    /// Jobs by name.
    pub jobs: Vec<JobStatus>,
    /// Volumes by name.
    pub volumes: Vec<VolumeStatus>,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceStatus {
    /// Name.
    pub name: Name,
    /// How it is.
    pub state: ServiceState,
    /// Release whose instances serve; of a rollout, the newer one.
    pub release: Option<ReleaseNumber>,
    /// Instances that should be ready.
    pub desired: u32,
    /// Instances that are: of the newer release alone while it takes over from another one, whose ready ones are in
    /// `rollout.baseline`.
    pub ready: u32,
    /// Where it is reached.
    pub addresses: Vec<Address>,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits_for: Vec<Waiting>,
    /// Its rollout, or the old set that is still kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
    /// Until when its new requests wait because a person said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic_paused: Option<PausedTraffic>,
    /// Requests that wait, by port; only where there are some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<Queue>,
    /// What the autoscaler decided last, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scaling: Vec<String>,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Diagnostic>,
    /// Its instances, oldest first.
    pub instances: Vec<InstanceStatus>,
}

/// Requests that wait at a port, for an instance or for the end of a pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Queue {
    /// The port.
    pub port: Name,
    /// How many wait.
    pub length: u32,
    /// How many may; more are answered 503.
    pub limit: u32,
}

/// How a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServiceState {
    /// It waits for something before its instances may start.
    Waiting,
    /// Its instances start.
    Starting,
    /// All its instances are ready.
    Ready,
    /// It is scaled to zero, and the next request starts an instance.
    Asleep,
    /// Some of its instances are not ready, or none is.
    Degraded,
    /// Its instances are being replaced.
    Rolling,
    /// Its rollout is paused.
    Paused,
    /// It keeps running, but gets no requests because a dependency was lost.
    Held,
    /// Its instances stop.
    Stopping,
    /// None of its instances runs, and none should.
    Stopped,
    /// It was given up.
    Failed,
}

/// A stable address in front of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Address {
    /// Name of the port.
    pub port: Name,
    /// What is spoken.
    pub protocol: Protocol,
    /// Where to connect.
    pub url: String,
}

/// Something that is waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Waiting {
    /// Resource that is waited for, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<ResourceId>,
    /// Condition that it must meet; missing if it must be gone, or if no resource is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Condition>,
    /// In words, to follow "waits for": `service.db to be ready`, `its ready check (HTTP 503)`.
    pub reason: String,
    /// When it is given up, if there is a deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<UnixMillis>,
    /// When it is over by itself, if it is a pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due: Option<UnixMillis>,
}

/// An instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceStatus {
    /// Which.
    pub id: InstanceId,
    /// Where it stands.
    pub phase: InstancePhase,
    /// Since when.
    pub since: UnixMillis,
    /// Which start of it, from 1.
    pub attempt: u32,
    /// Main process, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its own ports, behind the stable addresses.
    pub ports: BTreeMap<Name, u16>,
    /// How often it was started again.
    pub restarts: u32,
    /// How its last process ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<Exit>,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<Waiting>,
    /// Its readiness check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<HealthStatus>,
    /// Its liveness check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<HealthStatus>,
    /// What is still in flight to it, while it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<InFlight>,
    /// Ports over which it gets no requests for a while, because it failed too many in a row.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ejected: Vec<Ejected>,
    /// The last `STATUS=` that it sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_text: Option<String>,
}

/// That an instance is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ejected {
    /// Port of the service.
    pub port: Name,
    /// Until when.
    pub until: UnixMillis,
}

/// Where an instance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstancePhase {
    /// It waits for its launch: a dependency, or a pause after an exit.
    Pending,
    /// The provider was asked to start it.
    Launching,
    /// Its process runs and was not ready yet.
    Starting,
    /// It is ready.
    Ready,
    /// It was ready and is not any more.
    Unready,
    /// It gets no new requests and finishes what it has.
    Draining,
    /// It was told to stop.
    Stopping,
    /// Its main process ended; the rest of its tree and its logs are being finished.
    Exited,
    /// Nothing runs and nothing will be started again.
    Ended,
}

impl InstancePhase {
    /// The word used in JSON and on the screen.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Launching => "launching",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Unready => "unready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Exited => "exited",
            Self::Ended => "ended",
        }
    }
}

/// A check of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HealthStatus {
    /// How it is.
    pub state: CheckState,
    /// Answers of the same kind in a row; of a check with several parts, the fewest.
    pub streak: u32,
    /// What the last answer said, such as `HTTP 503`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// How a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    /// It was not answered often enough to say.
    Unknown,
    /// It passes.
    Passing,
    /// It fails.
    Failing,
}

/// What an instance has begun and not finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InFlight {
    /// Requests.
    pub requests: u32,
    /// Streams and connections.
    pub streams: u32,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JobStatus {
    /// Name.
    pub name: Name,
    /// How it is.
    pub state: JobState,
    /// Release that it ran for.
    pub release: Option<ReleaseNumber>,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits_for: Vec<Waiting>,
    /// How its last try ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<Exit>,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Diagnostic>,
    /// Its tries, oldest first.
    pub instances: Vec<InstanceStatus>,
}

/// How a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It waits for something before it may run.
    Waiting,
    /// It runs.
    Running,
    /// It ended with success.
    Completed,
    /// It failed and will not be tried again.
    Failed,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeStatus {
    /// Name.
    pub name: Name,
    /// How it is.
    pub state: VolumeState,
    /// Absolute path.
    pub path: String,
    /// Whether `down --volumes` deletes it.
    pub managed: bool,
}

/// How a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Its directory is there.
    Present,
    /// Its directory is not there.
    Missing,
}
