//! What a machine wants done: first written down, then carried out.

use std::{collections::BTreeMap, net::SocketAddr};

use orchestra_model::{
    InstanceId, Name, ReleaseNumber, ResourceId,
    consult::Question,
    launch::{Launch, LaunchKey, Termination},
    quantity::Timespan,
    record::Change,
    rollout::Hook,
    route::{EndpointKey, Route},
};

use crate::rollout::judge::Due;

/// Changes and effects that belong together. The driver commits all changes durably, and only then begins the effects,
/// in order: an effect without its intent on disk cannot happen.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// To be committed as a whole.
    pub changes: Vec<Change>,
    /// To be begun afterwards. Their outcomes come back as events.
    pub effects: Vec<Effect>,
}

impl Batch {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.effects.is_empty()
    }

    /// Appends another batch.
    pub fn extend(&mut self, other: Batch) {
        self.changes.extend(other.changes);
        self.effects.extend(other.effects);
    }
}

/// Something that a driver does in the world.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Start an instance; answered by `Launched` or `LaunchFailed`, or `PortsTaken` if one of its ports is.
    Launch(Box<Launch>),
    /// Begin to end a launch; `Exited` and `Gone` follow from the provider.
    Terminate {
        /// Which.
        key: LaunchKey,
        /// How.
        how: Termination,
    },
    /// Drop the provider's record of a launch that is gone.
    Forget(LaunchKey),
    /// Put these routes of the environment into force; answered by `RoutesApplied` or `RoutesRefused`.
    SetRoutes {
        /// Grows with every set.
        revision: u64,
        /// All routes of the environment.
        routes: Vec<Route>,
    },
    /// End what is in flight to an endpoint.
    Cut(EndpointKey),
    /// Ask a leaf again and again, the first time at once; answered by `Probed`. Replaces an earlier one of this key.
    StartProbe {
        /// Identity.
        key: ProbeKey,
        /// What to ask.
        target: ProbeTarget,
        /// How often.
        every: Timespan,
        /// Longest wait for one answer.
        timeout: Timespan,
    },
    /// Stop asking.
    StopProbe(ProbeKey),
    /// Ask a hook; answered by `HookDone`.
    RunHook {
        /// Identity.
        key: HookKey,
        /// What to do.
        hook: Hook,
        /// Working directory of a command.
        directory: String,
        /// JSON document for it.
        document: String,
    },
    /// Ask one instance of each set of a rollout the same, at the same time; answered by `PairAnswered`.
    AskPair {
        /// Identity.
        key: PairKey,
        /// Of the set on trial.
        canary: SocketAddr,
        /// Of the one that it would replace.
        stable: SocketAddr,
        /// Path with query, asked with `GET`.
        path: String,
        /// Longest wait for an answer.
        timeout: Timespan,
    },
    /// Look at what these launches of a service use; answered by `Usage`.
    MeasureUsage {
        /// Whose.
        service: Name,
        /// Which.
        keys: Vec<LaunchKey>,
    },
    /// Ask for numbers from elsewhere; answered by `Consulted`.
    Consult {
        /// Identity.
        key: ConsultKey,
        /// What to ask.
        question: Question,
        /// Longest wait for each thing that is asked.
        timeout: Timespan,
    },
    /// Make sure a volume's directory exists; answered by `VolumeDone`.
    CreateVolume {
        /// Which.
        resource: ResourceId,
        /// Absolute path.
        path: String,
    },
    /// Delete a volume; answered by `VolumeDone`.
    DeleteVolume {
        /// Which.
        resource: ResourceId,
        /// Absolute path.
        path: String,
    },
}

/// Identity of one call of a hook.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HookKey {
    /// Service whose rollout it is about.
    pub service: Name,
    /// Release that the rollout leads to.
    pub release: ReleaseNumber,
    /// Step, from 0.
    pub step: u32,
    /// Call, from 1.
    pub call: u32,
}

/// Identity of a question about numbers from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConsultKey {
    /// Service that it is about.
    pub service: Name,
    /// What the answer is for.
    pub about: About,
    /// Grows with every question of an environment, so that a late answer is not taken for a newer one.
    pub number: u64,
}

/// What numbers from elsewhere are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum About {
    /// The verdict about a release.
    Verdict(ReleaseNumber, Due),
    /// The number of instances.
    Scale,
}

/// Identity of one pair of synthetic requests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairKey {
    /// Service whose rollout it is about.
    pub service: Name,
    /// Release that the rollout leads to.
    pub release: ReleaseNumber,
    /// From 1, anew with every server.
    pub number: u64,
}

/// Which of an instance's checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Which {
    /// Readiness: routes.
    Ready,
    /// Liveness: restarts.
    Live,
}

/// Identity of a leaf that is being asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbeKey {
    /// Instance.
    pub instance: InstanceId,
    /// Which start of it.
    pub attempt: u32,
    /// Which of its checks.
    pub which: Which,
    /// Position of the leaf in the check.
    pub leaf: usize,
}

/// A leaf with all texts filled and all ports known.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeTarget {
    /// The instance it asks.
    pub launch: LaunchKey,
    /// What.
    pub leaf: Leaf,
}

/// Leaves that a prober can ask.
#[derive(Clone, Debug, PartialEq)]
pub enum Leaf {
    /// HTTP/1.1 request.
    Http {
        /// Where.
        address: SocketAddr,
        /// `GET`, `HEAD` or `POST`.
        method: String,
        /// Path with query.
        path: String,
        /// Additional header fields.
        headers: BTreeMap<String, String>,
        /// Body.
        body: Option<String>,
        /// Accepted status codes; empty means 200 to 399.
        status: Vec<u16>,
        /// Text that the answer must contain.
        contains: Option<String>,
    },
    /// TCP connection.
    Tcp {
        /// Where.
        address: SocketAddr,
    },
    /// gRPC health protocol.
    Grpc {
        /// Where.
        address: SocketAddr,
        /// Service to ask about.
        service: String,
    },
    /// Command.
    Exec {
        /// Program and arguments.
        command: Vec<String>,
    },
}
