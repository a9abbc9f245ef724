//! A data plane without a proxy, as strict as the real one: stale tables are refused, addresses that somebody else has
//! cannot be bound, all or nothing, and a draining endpoint is reported once per table.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use orchestra_model::route::{ApplyError, EndpointKey, EndpointState, ProxyEvent, RouteTable, Standing};
use orchestra_provider::{Applied, BoxFuture, DataPlane, DataPlaneError, DataPlaneEvent};
use tokio::sync::mpsc;

/// What outlives a control plane.
#[derive(Default)]
pub(crate) struct Network {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    table: RouteTable,
    taken: BTreeSet<SocketAddr>,
    chosen: BTreeMap<String, u16>,
    refused: u32,
}

impl Network {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Another program listens there from now on.
    pub(crate) fn take_address(&self, address: SocketAddr) {
        self.state().taken.insert(address);
    }

    /// The table in force.
    pub(crate) fn table(&self) -> RouteTable {
        self.state().table.clone()
    }

    /// Tables that were refused.
    pub(crate) fn refused(&self) -> u32 {
        self.state().refused
    }
}

/// The side that a control plane holds.
pub(crate) struct FakeDataPlane {
    network: Arc<Network>,
    reports: mpsc::Sender<DataPlaneEvent>,
    receiver: Mutex<Option<mpsc::Receiver<DataPlaneEvent>>>,
}

impl FakeDataPlane {
    pub(crate) fn open(network: &Arc<Network>) -> Self {
        let (reports, receiver) = mpsc::channel(10_000);
        Self { network: network.clone(), reports, receiver: Mutex::new(Some(receiver)) }
    }

    fn put(&self, table: RouteTable) -> Result<(Applied, Vec<EndpointKey>), DataPlaneError> {
        let mut state = self.network.state();
        if table.version <= state.table.version {
            state.refused += 1;
            return Err(ApplyError::Stale { offered: table.version, current: state.table.version }.into());
        }
        let bound: BTreeSet<SocketAddr> = state.table.routes.iter().map(|r| r.listen).collect();
        let conflicts: Vec<(SocketAddr, String)> = table
            .routes
            .iter()
            .filter(|r| state.taken.contains(&r.listen) && !bound.contains(&r.listen))
            .map(|r| (r.listen, "in use by another program".to_owned()))
            .collect();
        if !conflicts.is_empty() {
            state.refused += 1;
            return Err(ApplyError::Bind { addresses: conflicts }.into());
        }
        let mut applied = Applied { version: table.version, addresses: BTreeMap::new() };
        for route in &table.routes {
            let next = 40_000 + u16::try_from(state.chosen.len()).unwrap();
            let port = match route.listen.port() {
                0 => *state.chosen.entry(route.id.to_string()).or_insert(next),
                port => port,
            };
            applied.addresses.insert(route.id.to_string(), SocketAddr::new(route.listen.ip(), port));
        }
        let drained = table
            .routes
            .iter()
            .flat_map(|route| route.backends.iter().flat_map(move |b| b.endpoints.iter().map(move |e| (route, e))))
            .filter(|(_, e)| e.state == EndpointState::Draining)
            .map(|(route, e)| EndpointKey {
                environment: route.id.environment.clone(),
                instance: e.instance.clone(),
                attempt: e.attempt,
            })
            .collect();
        state.table = table;
        Ok((applied, drained))
    }
}

impl DataPlane for FakeDataPlane {
    fn apply(&self, table: RouteTable) -> BoxFuture<'_, Result<Applied, DataPlaneError>> {
        Box::pin(async move {
            let (applied, drained) = self.put(table)?;
            for endpoint in drained {
                let _ = self.reports.send(DataPlaneEvent::Proxy(ProxyEvent::Drained { endpoint })).await;
            }
            Ok(applied)
        })
    }

    fn cut(&self, _: EndpointKey) -> BoxFuture<'_, Result<(), DataPlaneError>> {
        Box::pin(async { Ok(()) })
    }

    fn metrics(&self) -> BoxFuture<'_, Result<String, DataPlaneError>> {
        Box::pin(async { Ok(String::new()) })
    }

    fn standing(&self) -> BoxFuture<'_, Result<Standing, DataPlaneError>> {
        Box::pin(async { Ok(Standing::default()) })
    }

    fn take_events(&self) -> Option<mpsc::Receiver<DataPlaneEvent>> {
        self.receiver.lock().unwrap().take()
    }
}
