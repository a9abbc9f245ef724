//! The desired state: what the spec says after layering, interpolation, defaults and validation.
//!
//! It is complete (no optional value means "some default"), ordered (maps are sorted, so digests are stable), and
//! independent of where the stack file lies, except for absolute paths that were resolved against its folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::rollout::{Rollout, Strategy};
use crate::{
    autoscale::Autoscale,
    consult::Exporter,
    flag::FlagSet,
    id::{Digest, EnvironmentId, Name, ResourceId, ResourceKind},
    preview::Preview,
    quantity::{ByteSize, Cpu, Timespan},
    secret::SecretSource,
    text::{Reference, Text},
    traffic::PortPolicy,
};

/// Everything that should exist in one environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Desired {
    /// Stack and environment.
    pub environment: EnvironmentId,
    /// The provider that runs its workloads.
    pub target: Target,
    /// Resources by id. Every edge in it points to another resource in it, and edges form no cycle.
    pub resources: BTreeMap<ResourceId, Resource>,
    /// Feature flags that its programs ask for.
    #[serde(default, skip_serializing_if = "FlagSet::is_empty")]
    pub flags: FlagSet,
    /// What makes it a preview, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<Box<Preview>>,
    /// Where the secrets come from that its programs get.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<Name, SecretSource>,
}

/// Worlds that a stack can run in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Processes of this machine, each under a shim.
    #[default]
    Process,
}

/// A node of the graph with all that is desired of it.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every resource is a service: a box would cost more than it saves"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// A directory that outlives instances.
    Volume(Volume),
    /// A program that runs to completion.
    Job(Job),
    /// A program that is kept running.
    Service(Service),
}

impl Resource {
    /// Its kind.
    pub fn kind(&self) -> ResourceKind {
        match self {
            Self::Volume(_) => ResourceKind::Volume,
            Self::Job(_) => ResourceKind::Job,
            Self::Service(_) => ResourceKind::Service,
        }
    }

    /// The service in it.
    pub fn as_service(&self) -> Option<&Service> {
        if let Self::Service(service) = self { Some(service) } else { None }
    }

    /// The program it runs, if it is a workload.
    pub fn program(&self) -> Option<&Program> {
        match self {
            Self::Volume(_) => None,
            Self::Job(job) => Some(&job.program),
            Self::Service(service) => Some(&service.program),
        }
    }

    /// What it waits for: declared dependencies, and volumes and addresses that its texts refer to.
    pub fn dependencies(&self) -> BTreeMap<ResourceId, Dependency> {
        match self {
            Self::Volume(_) => BTreeMap::new(),
            Self::Job(job) => job.depends_on.clone(),
            Self::Service(service) => service.depends_on.clone(),
        }
    }

    /// Digest of the whole: any difference is a change.
    pub fn digest(&self) -> Digest {
        Digest::of(self)
    }
}

/// A directory that outlives instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Volume {
    /// Absolute path.
    pub path: String,
    /// Whether the path was chosen by Orchestra, so that `down --volumes` may delete it.
    pub managed: bool,
}

/// How a workload's process is started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Program {
    /// Program and arguments; never empty. A program without `/` is looked up in the `PATH` that it gets.
    pub command: Vec<Text>,
    /// Absolute working directory.
    pub directory: String,
    /// Variables, beside the documented minimum.
    pub env: BTreeMap<String, Text>,
    /// User to run as; `None` is the user of the server.
    pub user: Option<String>,
    /// File mode creation mask; `None` is 0o022.
    pub umask: Option<u32>,
    /// Resource limits of the process (`setrlimit`).
    pub limits: BTreeMap<Limit, u64>,
    /// Ports on which the program listens, by name; each instance gets its own number.
    pub ports: BTreeSet<Name>,
    /// Limits of the control group, where the machine allows one.
    pub resources: Resources,
    /// Line of output that a `log` check waits for; the shim watches for it.
    pub ready_line: Option<String>,
    /// Whether the program gets a `NOTIFY_SOCKET`.
    pub notify: bool,
    /// Interval at which the program must send `WATCHDOG=1`, given to it as `WATCHDOG_USEC`.
    pub watchdog: Option<Timespan>,
}

/// Process limits that can be set; values are in the unit of `setrlimit(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Open files.
    Nofile,
    /// Processes of the user.
    Nproc,
    /// Bytes of a core file.
    Core,
    /// Bytes of address space.
    As,
    /// Bytes of locked memory.
    Memlock,
    /// Bytes of stack.
    Stack,
    /// Bytes of a file.
    Fsize,
    /// Seconds of CPU time.
    Cpu,
}

/// What a workload asks for and may use at most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Resources {
    /// CPU that it needs.
    pub cpu: Option<Cpu>,
    /// Memory that it needs.
    pub memory: Option<ByteSize>,
    /// CPU that it may use.
    pub cpu_limit: Option<Cpu>,
    /// Memory that it may use.
    pub memory_limit: Option<ByteSize>,
}

/// Most instances of a service.
pub const MAX_REPLICAS: u32 = 10_000;

/// A program that is kept running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Service {
    /// What runs.
    pub program: Program,
    /// How many instances, at most [`MAX_REPLICAS`]; with `scale` only to begin with.
    pub replicas: u32,
    /// How the number of instances follows the load. Never part of the launch digest: scaling replaces nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Autoscale>,
    /// Where its instances export metrics; present if somebody looks at them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Exporter>,
    /// Counts `orchestra restart`s: a change replaces the instances though nothing else changed.
    pub restarts: u64,
    /// Stable addresses in front of the instances, by port name.
    pub ports: BTreeMap<Name, Port>,
    /// What it waits for.
    pub depends_on: BTreeMap<ResourceId, Dependency>,
    /// How it is known to work.
    pub health: Health,
    /// What happens when an instance exits by itself.
    pub restart: Restart,
    /// How an instance is stopped.
    pub stop: Stop,
    /// How instances are replaced.
    pub rollout: Rollout,
}

impl Service {
    /// Digest of all that an instance is born with: instances with another one must be replaced.
    pub fn launch_digest(&self) -> Digest {
        Digest::of(&(&self.program, self.restarts))
    }
}

/// A program that runs to completion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Job {
    /// What runs.
    pub program: Program,
    /// What it waits for.
    pub depends_on: BTreeMap<ResourceId, Dependency>,
    /// How often it may be tried again after a failure.
    pub retries: u32,
    /// Longest run of one try.
    pub timeout: Timespan,
    /// Pause before the first retry; doubles each time.
    pub backoff: Timespan,
    /// How it is stopped.
    pub stop: Stop,
}

/// A stable address in front of the instances of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Port {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; `None` lets the machine choose once, and keeps the choice.
    pub port: Option<u16>,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// How requests to it are treated.
    #[serde(default, skip_serializing_if = "PortPolicy::is_default")]
    pub policy: PortPolicy,
}

impl Port {
    /// The URL of this port, once `port` is known; its scheme says whether TLS is spoken. Unspecified addresses are
    /// reached over loopback.
    pub fn url(&self, port: u16) -> String {
        let host = match self.host {
            IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) if ip.is_unspecified() => "[::1]".to_owned(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let scheme = match (self.protocol, &self.policy.tls) {
            (Protocol::Http | Protocol::H2c, Some(_)) => "https",
            (Protocol::Grpc, Some(_)) => "grpcs",
            (Protocol::Tcp, Some(_)) => "tls",
            (protocol, _) => protocol.scheme(),
        };
        format!("{scheme}://{host}:{port}")
    }
}

/// Protocols that the proxy understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1 or HTTP/2 from clients, HTTP/1.1 to instances; WebSocket and SSE included.
    Http,
    /// HTTP/2 without TLS to instances.
    H2c,
    /// gRPC: HTTP/2 with trailers, errors as gRPC statuses.
    Grpc,
    /// Bytes.
    Tcp,
}

impl Protocol {
    /// Scheme of its URLs.
    pub const fn scheme(self) -> &'static str {
        match self {
            Self::Http | Self::H2c => "http",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        }
    }
}

/// An edge of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Dependency {
    /// What must be true before the dependent starts.
    pub until: Condition,
    /// What happens to the dependent when that stops being true.
    pub on_loss: OnLoss,
}

/// What a dependent waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Its processes run (a volume: it exists).
    Started,
    /// All its instances are ready.
    Ready,
    /// The job has ended with success.
    Completed,
}

/// What happens when a dependency is lost after the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// Nothing.
    #[default]
    Ignore,
    /// The dependent keeps running, counts as not ready, and gets no requests until the dependency is back.
    Hold,
    /// The dependent is stopped, and started again when the dependency is back.
    Stop,
}

/// How a service is known to work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Health {
    /// Readiness routes: an instance that fails it gets no requests. `None`: ready once its process runs.
    pub ready: Option<Probe>,
    /// Liveness restarts: an instance that fails it is stopped and started again. Begins once the instance is ready.
    pub live: Option<Probe>,
    /// Longest time from process start to first readiness.
    pub start_deadline: Timespan,
}

/// A check with its timing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Probe {
    /// What is asked.
    pub check: Check,
    /// Interval.
    pub every: Timespan,
    /// Interval until the instance was ready for the first time.
    pub every_starting: Timespan,
    /// Longest wait for one answer.
    pub timeout: Timespan,
    /// Successes in a row that turn a failing check into a passing one.
    pub pass_after: u32,
    /// Failures in a row that turn a passing check into a failing one.
    pub fail_after: u32,
}

/// A question about an instance. Leaves are asked; the others combine their parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// HTTP/1.1 request to the instance.
    Http {
        /// Name of the instance's port.
        port: Name,
        /// `GET`, `HEAD` or `POST`.
        method: String,
        /// Path with query.
        path: String,
        /// Additional header fields.
        headers: BTreeMap<String, String>,
        /// Body to send.
        body: Option<String>,
        /// Accepted status codes; empty means 200 to 399, as Kubernetes has it.
        status: BTreeSet<u16>,
        /// Text that the first 64 KiB of the answer must contain.
        contains: Option<String>,
    },
    /// A TCP connection is accepted.
    Tcp {
        /// Name of the instance's port.
        port: Name,
    },
    /// The gRPC health protocol (grpc.health.v1.Health/Check) answers SERVING.
    Grpc {
        /// Name of the instance's port.
        port: Name,
        /// Service to ask about; empty is the whole server.
        service: String,
    },
    /// A command exits with 0; it runs with the instance's environment.
    Exec {
        /// Program and arguments.
        command: Vec<Text>,
    },
    /// A line of output matched `Program::ready_line`.
    Log,
    /// The program sent `READY=1`.
    Notify,
    /// Another service of the stack is ready.
    Dependency {
        /// Which.
        service: Name,
    },
    /// All parts pass.
    All(Vec<Check>),
    /// One part passes.
    Any(Vec<Check>),
    /// That many parts pass.
    AtLeast {
        /// How many.
        count: u32,
        /// Of these.
        of: Vec<Check>,
    },
}

/// What happens when an instance exits by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Restart {
    /// When it is started again.
    pub policy: RestartPolicy,
    /// Pause before the first restart; doubles each time, with up to 10 % jitter.
    pub backoff: Timespan,
    /// Longest pause.
    pub max_backoff: Timespan,
    /// Time of uninterrupted readiness after which pause and budget start anew.
    pub reset_after: Timespan,
    /// Restarts without such a time before it is given up as a crash loop; `None` never gives up.
    pub budget: Option<u32>,
}

/// When an instance that exited by itself is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Always.
    #[default]
    Always,
    /// If it exited with another code than 0, or by a signal.
    OnFailure,
    /// Never.
    Never,
}

/// How an instance is stopped: signal, grace, then SIGKILL for the whole tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Stop {
    /// Signal to the main process.
    pub signal: Signal,
    /// Time that it has to exit.
    pub grace: Timespan,
}

/// Signals that a stack may name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Signal {
    /// SIGTERM
    #[default]
    Term,
    /// SIGINT
    Int,
    /// SIGQUIT
    Quit,
    /// SIGHUP
    Hup,
    /// SIGUSR1
    Usr1,
    /// SIGUSR2
    Usr2,
    /// SIGKILL
    Kill,
}

impl Signal {
    /// Number on Linux.
    pub const fn number(self) -> i32 {
        match self {
            Self::Hup => 1,
            Self::Int => 2,
            Self::Quit => 3,
            Self::Kill => 9,
            Self::Usr1 => 10,
            Self::Usr2 => 12,
            Self::Term => 15,
        }
    }
}

/// How long an instance that leaves may go on with what it has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Drain {
    /// For requests.
    pub requests: Timespan,
    /// For streams: SSE, WebSocket, gRPC streams, TCP connections.
    pub streams: Timespan,
}

impl Desired {
    /// The service with this name.
    pub fn service(&self, name: &Name) -> Option<&Service> {
        self.resources.get(&ResourceId::new(ResourceKind::Service, name.clone()))?.as_service()
    }

    /// References of `text` that no resource of this state can satisfy.
    pub fn dangling<'a>(&'a self, text: &'a Text) -> impl Iterator<Item = &'a Reference> {
        text.references().filter(|reference| match reference {
            Reference::ServicePort { service, port } | Reference::ServiceUrl { service, port } => {
                !self.service(service).is_some_and(|s| s.ports.contains_key(port))
            }
            Reference::Secret { secret, version } => version.is_none() && !self.secrets.contains_key(secret),
            Reference::InstanceId | Reference::InstanceOrdinal | Reference::InstancePort { .. } => false,
        })
    }
}
