//! A data plane that has nothing to route.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use orchestra_model::route::{EndpointKey, RouteTable, Standing};
use tokio::sync::mpsc;

use crate::{Applied, BoxFuture, DataPlane, DataPlaneError, DataPlaneEvent};

/// Accepts every table, gives no route an address, and reports nothing: for stacks that publish no port.
#[derive(Debug)]
pub struct NoRoutes {
    /// Taken once.
    events: Mutex<Option<mpsc::Receiver<DataPlaneEvent>>>,
    /// Keeps the channel open.
    _sender: mpsc::Sender<DataPlaneEvent>,
}

impl Default for NoRoutes {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(1);
        Self { events: Mutex::new(Some(receiver)), _sender: sender }
    }
}

impl DataPlane for NoRoutes {
    fn apply(&self, table: RouteTable) -> BoxFuture<'_, Result<Applied, DataPlaneError>> {
        Box::pin(async move { Ok(Applied { version: table.version, addresses: BTreeMap::new() }) })
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
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
