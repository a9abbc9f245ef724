//! Tells the server about traffic: evidence of watched routes, load of metered ones.
//!
//! Nothing is reported without a server; marks and counts just go on, and the next server gets them. A server that is
//! connected but does not read is sent a few reports, and no more until it has read them.

use std::sync::Arc;

use orchestra_model::route::ProxyEvent;
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    state::{Link, Proxy, Report},
    table::RoutePlan,
    wire::Response,
};

/// Reports on their way to a server that has not read them.
const AHEAD: usize = 4;

/// Reports; never ends.
pub(crate) async fn run(proxy: Arc<Proxy>) {
    let room = Arc::new(Semaphore::new(AHEAD));
    let mut next: Option<Instant> = None;
    loop {
        let timer = async {
            match next {
                Some(time) => tokio::time::sleep_until(time).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = proxy.traffic.notified() => {}
            () = timer => {}
        }
        next = None;
        let plans = proxy.table.load_full();
        if plans.reported.is_empty() {
            continue;
        }
        let Some((version, link)) = proxy.linked() else { continue };
        let mut connection = Outlet { version, link, room: &room };
        for plan in &plans.reported {
            for due in [connection.traffic(plan).await, connection.load(plan).await].into_iter().flatten() {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
            }
        }
    }
}

/// A connection to a server.
struct Outlet<'a> {
    version: u64,
    link: Link,
    room: &'a Arc<Semaphore>,
}

impl Outlet<'_> {
    /// Reports evidence if it is time; returns when to look again. The end of the connection wakes the loop anew.
    async fn traffic(&mut self, plan: &RoutePlan) -> Option<Instant> {
        let watching = plan.watch.as_ref()?;
        if let Err(later) = watching.is_due(Instant::now()) {
            return Some(later);
        }
        let permit = Arc::clone(self.room).acquire_owned().await.ok()?;
        let event = ProxyEvent::Traffic(watching.tally.report());
        let body = Response::Event { version: self.version, event };
        if let Err(unsent) = self.link.send(Report { body, permit: Some(permit) }).await {
            if let Response::Event { event: ProxyEvent::Traffic(report), .. } = &unsent.0.body {
                watching.tally.take_back(report);
            }
            return None;
        }
        watching.is_due(Instant::now()).err()
    }

    /// The same for load.
    async fn load(&mut self, plan: &RoutePlan) -> Option<Instant> {
        let meter = plan.meter.as_ref()?;
        if let Err(later) = meter.is_due(Instant::now()) {
            return Some(later);
        }
        let permit = Arc::clone(self.room).acquire_owned().await.ok()?;
        let held = plan.shared.holding.load(std::sync::atomic::Ordering::Acquire);
        let (report, before) = meter.report(&plan.id, held);
        let body = Response::Event { version: self.version, event: ProxyEvent::Load(report) };
        if self.link.send(Report { body, permit: Some(permit) }).await.is_err() {
            meter.take_back(before);
            return None;
        }
        meter.is_due(Instant::now()).err()
    }
}
