//! A data plane whose development certificates exist.
//!
//! A table that asks for development certificates is passed on as one that names files, after those were issued. Whether
//! that succeeded or not, the path is the same: a certificate that comes later is found by the proxy as any file that
//! changed, and the table need not be applied once more.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use orchestra_model::{
    route::{EndpointKey, RouteId, RouteTable, Standing},
    traffic::Tls,
};
use orchestra_provider::{Applied, BoxFuture, DataPlane, DataPlaneError, DataPlaneEvent};
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{Notify, mpsc};

use crate::{
    authority::Authority,
    issued::{self, For, ensure},
};

/// How often everything that was issued is looked at. A machine that slept makes up for it at the next look.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// After something could not be issued.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// A data plane with a development authority in front of it.
pub struct CertifiedDataPlane {
    inner: Arc<dyn DataPlane>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for CertifiedDataPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertifiedDataPlane").finish_non_exhaustive()
    }
}

struct Shared {
    home: PathBuf,
    /// `None` while it could not be opened.
    authority: Mutex<Option<Authority>>,
    /// What the table in force asks for.
    wanted: Mutex<BTreeMap<RouteId, Wanted>>,
    failed: Notify,
}

#[derive(Clone, Debug)]
struct Wanted {
    names: BTreeSet<String>,
    listen: IpAddr,
}

impl CertifiedDataPlane {
    /// Stands in front of a data plane. The authority of this state directory is opened, and made the first time, so that
    /// programs find its certificate from the start; if that fails it is tried again, and everything without TLS works.
    pub fn new(inner: Arc<dyn DataPlane>, home: PathBuf, tree: &TaskTree) -> Self {
        let shared =
            Arc::new(Shared { home, authority: Mutex::default(), wanted: Mutex::default(), failed: Notify::new() });
        shared.open();
        tree.start(TaskKind::Loop, "certificates", Arc::clone(&shared).renew());
        Self { inner, shared }
    }
}

impl Shared {
    fn open(&self) -> bool {
        let mut authority = self.authority.lock().unwrap_or_else(PoisonError::into_inner);
        if authority.is_none() {
            match Authority::open(&self.home, SystemTime::now()) {
                Ok(opened) => *authority = Some(opened),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::error!(%error, cause, "there is no development authority");
                }
            }
        }
        authority.is_some()
    }

    /// Issues what is not there or does not last. Returns whether all of it is there. Blocks.
    fn issue(&self) -> bool {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if wanted.is_empty() || !self.open() {
            return wanted.is_empty();
        }
        let authority = self.authority.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(authority) = &*authority else { return false };
        let mut all = true;
        let each = wanted.iter().flat_map(|wanted| For::ALL.map(|whom| (wanted, whom)));
        for ((route, Wanted { names, listen }), whom) in each {
            match ensure(authority, &self.home, (route, whom), names, *listen, SystemTime::now()) {
                Ok(false) => {}
                Ok(true) => tracing::info!(%route, ?whom, "a development certificate was issued"),
                Err(error) => {
                    all = false;
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::error!(%route, %error, cause, "no development certificate; trying again");
                }
            }
        }
        all
    }

    /// Looks again and again; never ends.
    async fn renew(self: Arc<Self>) {
        let mut pause = LOOK_EVERY;
        loop {
            // Losing the race loses nothing: both lead to the same look.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.failed.notified() => tokio::time::sleep(LOOK_AGAIN).await,
            }
            let shared = Arc::clone(&self);
            let all = tokio::task::spawn_blocking(move || shared.issue()).await.unwrap_or(false);
            pause = if all { LOOK_EVERY } else { LOOK_AGAIN };
        }
    }

    /// The table as the proxy gets it, with every development certificate as a file, and these files.
    fn resolve(&self, mut table: RouteTable) -> (RouteTable, BTreeSet<PathBuf>) {
        let (mut wanted, mut used) = (BTreeMap::new(), BTreeSet::new());
        for route in &mut table.routes {
            let Some(Tls::Development { names }) = &route.policy.tls else { continue };
            wanted.insert(route.id.clone(), Wanted { names: names.clone(), listen: route.listen.ip() });
            let [named, addressed] = For::ALL.map(|whom| {
                let path = issued::path(&self.home, &route.id, whom);
                // The server starts only in a state directory with a name in UTF-8.
                let text = path.to_string_lossy().into_owned();
                used.insert(path);
                text
            });
            route.policy.tls = Some(Tls::Files { certificate: addressed.clone(), key: addressed, named: Some(named) });
        }
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
        if !self.issue() {
            self.failed.notify_one();
        }
        (table, used)
    }
}

impl DataPlane for CertifiedDataPlane {
    fn apply(&self, table: RouteTable) -> BoxFuture<'_, Result<Applied, DataPlaneError>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let resolved = tokio::task::spawn_blocking(move || shared.resolve(table)).await;
            let (table, used) = resolved.map_err(|error| DataPlaneError::Unavailable(std::io::Error::other(error)))?;
            let applied = self.inner.apply(table).await?;
            // Not before: a table that is refused leaves the one before in force.
            issued::sweep(&self.shared.home, &used);
            Ok(applied)
        })
    }

    fn cut(&self, endpoint: EndpointKey) -> BoxFuture<'_, Result<(), DataPlaneError>> {
        self.inner.cut(endpoint)
    }

    fn metrics(&self) -> BoxFuture<'_, Result<String, DataPlaneError>> {
        self.inner.metrics()
    }

    fn standing(&self) -> BoxFuture<'_, Result<Standing, DataPlaneError>> {
        self.inner.standing()
    }

    fn take_events(&self) -> Option<mpsc::Receiver<DataPlaneEvent>> {
        self.inner.take_events()
    }
}
