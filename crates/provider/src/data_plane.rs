//! The data plane port: route tables in, acknowledgements and drain reports out.

use std::{collections::BTreeMap, net::SocketAddr};

use orchestra_model::route::{ApplyError, EndpointKey, ProxyEvent, RouteId, RouteTable, Standing};
use tokio::sync::mpsc;

use crate::BoxFuture;

/// What carries requests to instances.
///
/// The implementation keeps the data plane alive: it starts it again when it dies, hands the same listening sockets to
/// the new one, and applies the last table to it before it reports [`DataPlaneEvent::Serving`].
pub trait DataPlane: Send + Sync + 'static {
    /// Puts a table into force as a whole. On success every new request is routed by it, and no existing stream was
    /// touched. Routes with port 0 get a port from the machine.
    fn apply(&self, table: RouteTable) -> BoxFuture<'_, Result<Applied, DataPlaneError>>;

    /// Ends what is still in flight to an endpoint, in the way each protocol announces it (SSE: a final event;
    /// WebSocket: close 1012; HTTP/2: reset; TCP: close). `Drained` follows.
    fn cut(&self, endpoint: EndpointKey) -> BoxFuture<'_, Result<(), DataPlaneError>>;

    /// Metrics in Prometheus text format.
    fn metrics(&self) -> BoxFuture<'_, Result<String, DataPlaneError>>;

    /// Instances that get no requests for a while because they failed too many, and requests that wait.
    fn standing(&self) -> BoxFuture<'_, Result<Standing, DataPlaneError>>;

    /// Takes the receiver of all reports. `None` after the first call.
    fn take_events(&self) -> Option<mpsc::Receiver<DataPlaneEvent>>;
}

/// A table that is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Applied {
    /// Its version.
    pub version: u64,
    /// Where each route listens.
    pub addresses: BTreeMap<String, SocketAddr>,
}

impl Applied {
    /// Where a route listens.
    pub fn address(&self, route: &RouteId) -> Option<SocketAddr> {
        self.addresses.get(&route.to_string()).copied()
    }
}

/// What a data plane reports by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataPlaneEvent {
    /// A report about an endpoint.
    Proxy(ProxyEvent),
    /// The data plane was lost; connections wait in its listening sockets.
    Lost {
        /// Why, in words.
        cause: String,
    },
    /// The data plane serves the last table (first start, or again).
    Serving {
        /// Process id.
        pid: u32,
    },
}

/// Why the data plane did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DataPlaneError {
    /// The table was refused.
    #[error("the route table was refused")]
    Refused(#[from] ApplyError),
    /// The data plane does not answer. The table will be applied when it does again.
    #[error("the proxy does not answer")]
    Unavailable(#[source] std::io::Error),
}
