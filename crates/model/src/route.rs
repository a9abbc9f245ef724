//! The route table: what the proxy listens on and where it sends what arrives. Versioned; replaced as a whole.

use std::{net::SocketAddr, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    desired::{Drain, Protocol},
    flag::ServedFlags,
    id::{EnvironmentId, InstanceId, Name, ReleaseNumber},
    quantity::Timespan,
    traffic::{Arm, CertificateReport, LoadReport, PortPolicy, Split, TrafficReport},
};

/// Everything the proxy does. A table with a version that is not newer than the last one is refused as stale.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RouteTable {
    /// Grows with every table, also across restarts of the server.
    pub version: u64,
    /// Routes; no two listen on the same address.
    pub routes: Vec<Route>,
}

/// Identity of a route: one published port of one service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct RouteId {
    /// Stack and environment.
    pub environment: EnvironmentId,
    /// Service.
    pub service: Name,
    /// Port.
    pub port: Name,
}

impl RouteId {
    /// Name that stands for the flags of an environment among its services; no service may have it.
    pub const FLAGS: &str = "orchestra-flags";

    /// The route on which the flags of an environment are served.
    pub fn flags(environment: EnvironmentId) -> Self {
        let name = |text: &str| text.parse().expect("written by us, and a name");
        Self { environment, service: name(Self::FLAGS), port: name("ofrep") }
    }

    /// Whether it is [`RouteId::flags`] of an environment.
    pub fn is_flags(&self) -> bool {
        self.service.as_str() == Self::FLAGS
    }
}

impl std::fmt::Display for RouteId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}:{}", self.environment, self.service, self.port)
    }
}

/// One listening address and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Route {
    /// Which.
    pub id: RouteId,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// What is spoken.
    pub protocol: Protocol,
    /// Requests that find no ready instance wait this long, so that a restart is a delay and not an error.
    pub hold: Timespan,
    /// At most this many wait at one time; more are answered 503.
    pub hold_limit: u32,
    /// What leaving instances may still finish.
    pub drain: Drain,
    /// What the stack says of the port.
    #[serde(default)]
    pub policy: PortPolicy,
    /// How a rollout splits the traffic.
    #[serde(default)]
    pub split: Split,
    /// Whether [`ProxyEvent::Load`] is wanted.
    #[serde(default)]
    pub metered: bool,
    /// Groups of instances, one per release and arm. Traffic is split by `split`, then by weight; a group without ready
    /// instances gets none.
    pub backends: Vec<Backend>,
    /// Flags that the proxy itself answers with on this address; there are no backends then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flags: Option<Arc<ServedFlags>>,
}

/// The instances of one release behind a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Backend {
    /// Release.
    pub release: ReleaseNumber,
    /// Side of the rollout that it is on.
    #[serde(default)]
    pub arm: Arm,
    /// Share of the traffic of its arm, or of the route if nothing splits it; the proxy divides by the sum.
    pub weight: u32,
    /// Its instances.
    pub endpoints: Vec<Endpoint>,
}

/// One instance behind a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Endpoint {
    /// Which.
    pub instance: InstanceId,
    /// Which start of it: a restarted instance is a new endpoint.
    pub attempt: u32,
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether it gets new requests.
    pub state: EndpointState,
}

/// Whether an endpoint gets new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndpointState {
    /// It does.
    Active,
    /// It finishes what it has; once that is nothing, the proxy reports it drained.
    Draining,
}

/// Names an endpoint in reports of the proxy, over all routes that lead to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct EndpointKey {
    /// Stack and environment.
    pub environment: EnvironmentId,
    /// Which.
    pub instance: InstanceId,
    /// Which start of it.
    pub attempt: u32,
}

/// An instance that gets no requests of a route for a while, because it failed too many in a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ejection {
    /// The route.
    pub route: RouteId,
    /// Which.
    pub instance: InstanceId,
    /// How long yet.
    pub left: Timespan,
}

/// Requests of a route that wait: for an instance, or for the end of a pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// The route.
    pub route: RouteId,
    /// How many wait.
    pub length: u32,
    /// How many may; more are answered 503.
    pub limit: u32,
}

/// Whom a data plane keeps from whom at this moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// Instances that get no requests, by route.
    pub ejected: Vec<Ejection>,
    /// Requests that get no instance, by route; only where there are some.
    pub queues: Vec<Queue>,
}

/// What the proxy reports by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyEvent {
    /// Nothing is in flight to an endpoint that is draining (or that the table does not have any more).
    /// Reported once per table version in which it is true, so a report cannot be missed across a reconnect.
    Drained {
        /// Which.
        endpoint: EndpointKey,
    },
    /// What is still in flight to a draining endpoint changed.
    Draining {
        /// Which.
        endpoint: EndpointKey,
        /// Requests in flight.
        requests: u32,
        /// Streams and connections in flight.
        streams: u32,
    },
    /// What went through a watched route.
    Traffic(TrafficReport),
    /// How much a metered route carries.
    Load(LoadReport),
    /// What a route with TLS shows to clients is another certificate, or there is a problem with it.
    Certificate(CertificateReport),
}

/// Refused route tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum ApplyError {
    /// Some addresses cannot be listened on; the old table is still in force.
    #[error("cannot listen on {}", addresses.iter().map(|(a, e)| format!("{a}: {e}")).collect::<Vec<_>>().join(", "))]
    Bind {
        /// Address and reason of each.
        addresses: Vec<(SocketAddr, String)>,
    },
    /// A newer table is in force.
    #[error("route table {offered} is stale: {current} is in force")]
    Stale {
        /// Version offered.
        offered: u64,
        /// Version in force.
        current: u64,
    },
}
