//! Copies of requests.

use std::{sync::Mutex, time::Duration};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use orchestra_model::{
    desired::Protocol,
    route::Route,
    traffic::{Arm, Mirror, Permille, Split},
};
use orchestra_provider::DataPlane as _;

use crate::{harness::*, protocols::echo, traffic::*};

fn mirrored(stable: &Instance, canary: &Instance, mirror: Mirror) -> Route {
    Route {
        split: Split { canary: Some(Permille::ZERO), mirror: Some(mirror), watch: Some(watch(1)), ..Split::default() },
        backends: vec![
            backend(1, Arm::Stable, 1, vec![endpoint(1, stable.address)]),
            backend(2, Arm::Canary, 1, vec![endpoint(2, canary.address)]),
        ],
        ..route("api", Protocol::Http, vec![])
    }
}

fn all(unsafe_methods: bool, limit: u32) -> Mirror {
    Mirror { share: Permille::ALL, unsafe_methods, limit }
}

/// Waits until so many copies were compared; returns how many agreed and how many did not.
async fn compared(world: &mut World, count: u32) -> (u32, u32) {
    let (mut agreed, mut differed) = (0, 0);
    soon("comparisons", async {
        while agreed + differed < count {
            let report = report(world).await;
            agreed += report.mirrored.0;
            differed += report.mirrored.1;
        }
    })
    .await;
    (agreed, differed)
}

async fn outcome(world: &World, outcome: &str) -> f64 {
    let counted = samples(&world.handle.metrics().await.unwrap(), "orchestra_proxy_mirrored_total");
    let of_it = |(labels, _): &(&String, &f64)| labels.contains(&format!("outcome=\"{outcome}\""));
    counted.iter().find(of_it).map_or(0.0, |(_, count)| *count)
}

#[tokio::test]
async fn copies_are_compared_and_never_seen() {
    let mut world = World::new().await;
    let heard = std::sync::Arc::new(Mutex::new(Vec::new()));
    let answer = |name: &'static str| {
        let heard = std::sync::Arc::clone(&heard);
        move |request: Request<hyper::body::Incoming>| {
            let heard = std::sync::Arc::clone(&heard);
            async move {
                let mirror = request.headers().get("orchestra-mirror").map(|v| v.to_str().unwrap().to_owned());
                let (method, path) = (request.method().to_string(), request.uri().to_string());
                let body = request.into_body().collect().await.unwrap().to_bytes();
                heard.lock().unwrap().push((name, mirror, method, path.clone(), body.len()));
                match (&*path, name) {
                    ("/status", "canary") => Response::builder().status(500).body(full("same")).unwrap(),
                    ("/body", name) => text(name),
                    ("/long", name) => text(name.repeat(20_000)),
                    _ => text("same"),
                }
            }
        }
    };
    let (stable, canary) = (Instance::http(answer("stable")).await, Instance::http(answer("canary")).await);
    let address = world.serve(mirrored(&stable, &canary, all(false, 100))).await;
    let mut client = Client::h1(address).await.unwrap();
    // A client cannot claim to be a copy.
    let request = Request::get("/same").header("orchestra-mirror", "1").body(empty()).unwrap();
    assert_eq!(whole(client.send(request).await.unwrap()).await.unwrap().text(), "same");
    for (path, expected) in [("/same", "same"), ("/status", "same"), ("/body", "stable")] {
        let reply = client.get(path).await.unwrap();
        assert_eq!(
            (reply.status, reply.text(), &reply.headers["orchestra-release"]),
            (200, expected, &"1".parse().unwrap())
        );
    }
    // Too long to compare, so only the status counts.
    assert_eq!(client.get("/long").await.unwrap().body.len(), 120_000);
    assert_eq!(client.post("/same", full("x")).await.unwrap().text(), "same");
    assert_eq!(compared(&mut world, 5).await, (3, 2));
    {
        let heard = heard.lock().unwrap();
        let of = |name| heard.iter().filter(|h| h.0 == name).collect::<Vec<_>>();
        assert!(of("stable").iter().all(|h| h.1.is_none()) && of("canary").iter().all(|h| h.1.as_deref() == Some("1")));
        assert!(of("canary").iter().all(|h| h.2 == "GET"), "{heard:?}");
        assert_eq!((of("stable").len(), of("canary").len()), (6, 5));
    }
    assert_eq!((outcome(&world, "agreed").await, outcome(&world, "differed").await), (3.0, 2.0));
    // Told otherwise: with the body.
    world.serve(mirrored(&stable, &canary, all(true, 100))).await;
    assert_eq!(client.post("/same", full(vec![7; 60_000])).await.unwrap().text(), "same");
    assert_eq!(compared(&mut world, 1).await, (1, 0));
    assert!(heard.lock().unwrap().contains(&("canary", Some("1".into()), "POST".into(), "/same".into(), 60_000)));
    // Too long to be kept: no copy.
    assert_eq!(client.post("/same", full(vec![7; 70_000])).await.unwrap().text(), "same");
    soon("the skipped copy", async { while outcome(&world, "skipped").await < 1.0 {} }).await;
    assert_eq!(canary.requests(), 6);
}

#[tokio::test]
async fn a_canary_that_hangs_slows_nobody_down_and_its_drain_waits_for_the_copy() {
    let mut world = World::new().await;
    let stable = Instance::http(echo).await;
    let canary = Instance::http(|_| std::future::pending::<Response<AnyBody>>()).await;
    let address = world.serve(mirrored(&stable, &canary, all(false, 3))).await;
    let mut client = Client::h1(address).await.unwrap();
    for _ in 0..10 {
        assert_eq!(client.get("/").await.unwrap().status, 200);
    }
    // No more than the limit are under way.
    soon("three copies", async {
        while canary.requests() < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    soon("seven without", async { while outcome(&world, "skipped").await < 7.0 {} }).await;
    let leaving = endpoint(2, canary.address);
    let mut route = mirrored(&stable, &canary, all(false, 3));
    route.backends[1].endpoints = vec![draining(&leaving)];
    world.serve(route).await;
    let early = tokio::time::timeout(Duration::from_millis(300), world.drained(&key(&leaving))).await;
    assert!(early.is_err(), "copies are in flight");
    // Nothing is copied to an instance that leaves.
    assert_eq!(client.get("/").await.unwrap().status, 200);
    world.handle.cut(key(&leaving)).await.unwrap();
    world.drained(&key(&leaving)).await;
    assert_eq!(canary.requests(), 3);
}
