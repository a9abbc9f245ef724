//! The hand-over under load: instances come, drain and are stopped the moment they are reported drained, while requests
//! arrive at a rate of their own. One lost request is a failure.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use orchestra_model::{
    desired::Protocol,
    route::{Endpoint, EndpointKey, ProxyEvent},
};
use orchestra_provider::DataPlaneEvent;
use orchestra_task::TaskKind;

use crate::harness::*;

const REQUESTS: usize = 24_000;
/// Per second. A machine that cannot do that much gets at most [`OUTSTANDING`] at once: this is no benchmark.
const RATE: u32 = 2_500;
const OUTSTANDING: usize = 64;

async fn instance() -> Instance {
    Instance::http(|request| async move {
        use http_body_util::BodyExt as _;
        // Some work, so that requests are in flight when the table changes.
        let slow = request.uri().path() == "/slow";
        let size = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
        tokio::time::sleep(Duration::from_millis(if slow { 20 } else { 1 })).await;
        text(format!("got {size}"))
    })
    .await
}

/// Clients that keep their connections, a free one for each request.
#[derive(Default)]
struct Clients(Mutex<Vec<Client>>);

impl Clients {
    async fn request(&self, address: std::net::SocketAddr, number: usize) -> Result<(), String> {
        let pooled = self.0.lock().unwrap().pop();
        let mut client = match pooled {
            Some(client) => client,
            None if number.is_multiple_of(3) => Client::h2(address).await?,
            None => Client::h1(address).await?,
        };
        let reply = match number % 4 {
            0 | 1 => client.get("/").await?,
            2 => client.post("/", full("12345")).await?,
            _ => client.post("/slow", full("12345")).await?,
        };
        let expected = if number % 4 < 2 { "got 0" } else { "got 5" };
        if reply.status != 200 || reply.text() != expected {
            return Err(format!("{}: {}", reply.status, reply.text()));
        }
        // One in ten leaves its connection.
        if !number.is_multiple_of(10) {
            self.0.lock().unwrap().push(client);
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_while_instances_come_and_go() {
    let mut world = World::new().await;
    let mut living: BTreeMap<u32, (Instance, Endpoint)> = BTreeMap::new();
    for ordinal in 1..=3 {
        let instance = instance().await;
        let endpoint = endpoint(ordinal, instance.address);
        living.insert(ordinal, (instance, endpoint));
    }
    let active = |living: &BTreeMap<u32, (Instance, Endpoint)>| living.values().map(|(_, e)| e.clone()).collect();
    let address = world.serve(route("api", Protocol::Http, active(&living))).await;

    let (done, failures) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
    let began = Instant::now();
    let load = world.tree.start(TaskKind::Connection, "load", {
        let (done, failures, tree) = (Arc::clone(&done), Arc::clone(&failures), world.tree.clone());
        async move {
            let clients = Arc::new(Clients::default());
            let places = Arc::new(tokio::sync::Semaphore::new(OUTSTANDING));
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
            for number in 0..REQUESTS {
                ticks.tick().await;
                let place = Arc::clone(&places).acquire_owned().await.unwrap();
                let (clients, done, failures) = (Arc::clone(&clients), Arc::clone(&done), Arc::clone(&failures));
                tree.start(TaskKind::Connection, "request", async move {
                    let result = tokio::time::timeout(DEADLINE, clients.request(address, number)).await;
                    if let Err(error) = result.unwrap_or_else(|_| Err("no answer".to_owned())) {
                        failures.lock().unwrap().push(format!("request {number}: {error}"));
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                    drop(place);
                });
            }
        }
    });

    let mut next = 4;
    let (mut late, mut flips) = (0, 0);
    let mut leaving: BTreeMap<EndpointKey, (Instance, Endpoint)> = BTreeMap::new();
    while done.load(Ordering::SeqCst) < REQUESTS {
        // A new one in, the oldest out, several of those draining at a time.
        let fresh = instance().await;
        let endpoint = endpoint(next, fresh.address);
        living.insert(next, (fresh, endpoint));
        next += 1;
        let (_, oldest) = living.pop_first().unwrap();
        leaving.insert(key(&oldest.1), oldest);
        let mut endpoints: Vec<Endpoint> = active(&living);
        endpoints.extend(leaving.values().map(|(_, endpoint)| draining(endpoint)));
        world.apply(vec![route("api", Protocol::Http, endpoints)]).await;
        flips += 1;
        while let Some(event) = if leaving.len() < 8 { world.event_now() } else { Some(world.event().await) } {
            let DataPlaneEvent::Proxy(ProxyEvent::Drained { endpoint }) = event else { continue };
            // An endpoint that has left the table is reported once more.
            let Some((old, _)) = leaving.remove(&endpoint) else { continue };
            let at_drain = old.requests();
            old.stop();
            // Whatever was not counted would arrive now and be lost.
            late += old.requests() - at_drain;
        }
    }
    soon("the load", load).await.unwrap();
    let failures = failures.lock().unwrap();
    println!(
        "{REQUESTS} requests in {:?}, {flips} flips, {} failed, {late} arrived after drained",
        began.elapsed(),
        failures.len()
    );
    assert!(failures.is_empty(), "{:#?}", &failures[..failures.len().min(10)]);
    assert_eq!(late, 0);
    assert!(flips > 50, "{flips}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn balancing_follows_load() {
    let world = World::new().await;
    let slow_in_flight = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&slow_in_flight);
    let slow = Instance::http(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            text("slow")
        }
    })
    .await;
    let quick = Instance::http(|_| async { text("quick") }).await;
    let endpoints = vec![endpoint(1, slow.address), endpoint(2, quick.address)];
    let address = world.serve(route("api", Protocol::Http, endpoints)).await;
    let clients = (0..10).map(|_| async {
        let mut client = Client::h1(address).await.unwrap();
        for _ in 0..50 {
            assert_eq!(client.get("/").await.unwrap().status, 200);
        }
    });
    soon("500 requests", futures_util::future::join_all(clients)).await;
    // An even split would have sent 250 to the slow one. On a busy machine the quick one is not so quick either.
    assert!(slow.requests() < 100 && quick.requests() > 400, "{} {}", slow.requests(), quick.requests());
}
