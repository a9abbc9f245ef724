//! Waiting for an instance.

use std::time::Duration;

use orchestra_model::{desired::Protocol, quantity::Timespan, route::Route};
use orchestra_provider::DataPlane as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::*;

pub(crate) async fn holding(world: &World, count: u32) {
    soon("requests that wait", async {
        loop {
            let page = world.handle.metrics().await.unwrap();
            if page.lines().any(|line| line == format!("orchestra_proxy_holding {count}")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn requests_wait_for_an_instance_and_go_on() {
    let world = World::new().await;
    let address = world.serve(route("api", Protocol::Http, vec![])).await;
    let instance = Instance::http(|_| async { text("late") }).await;
    let waiting = futures_util::future::join_all((0..20).map(|_| get(address, "/")));
    let bring = async {
        holding(&world, 20).await;
        assert_eq!(instance.requests(), 0);
        world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    };
    let (replies, ()) = tokio::join!(waiting, bring);
    assert!(replies.iter().all(|reply| reply.as_ref().unwrap().text() == "late"));
    holding(&world, 0).await;
}

#[tokio::test]
async fn waiting_ends_with_503_and_is_limited() {
    let world = World::new().await;
    let short = Route { hold: Timespan::millis(400), hold_limit: 2, ..route("api", Protocol::Http, vec![]) };
    let address = world.serve(short).await;
    let replies = futures_util::future::join_all((0..5).map(|_| get(address, "/"))).await;
    let mut kinds: Vec<String> = Vec::new();
    for reply in replies {
        let reply = reply.unwrap();
        assert_eq!((reply.status, &reply.headers["retry-after"]), (503, &http::HeaderValue::from_static("1")));
        assert!(reply.text().starts_with("api: no instance"), "{}", reply.text());
        kinds.push(reply.headers["x-orchestra-error"].to_str().unwrap().to_owned());
    }
    kinds.sort();
    assert_eq!(kinds, ["hold_full", "hold_full", "hold_full", "hold_timeout", "hold_timeout"]);
    // gRPC hears it in its own words.
    let mut grpc = Client::h2(address).await.unwrap();
    let request = http::Request::post("/s/c").header("content-type", "application/grpc").body(empty()).unwrap();
    let reply = whole(grpc.send(request).await.unwrap()).await.unwrap();
    assert_eq!((reply.status, &reply.headers["grpc-status"]), (200, &http::HeaderValue::from_static("14")));
    assert_eq!(reply.headers["grpc-message"], "api: no instance became ready within 400ms");
}

#[tokio::test]
async fn an_instance_that_refuses_connections_is_waited_for_too() {
    let world = World::new().await;
    let gone = Instance::http(|_| async { text("never") }).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, gone.address)])).await;
    gone.stop();
    soon("the instance's listener is closed", async { while TcpStream::connect(gone.address).await.is_ok() {} }).await;
    let next = Instance::http(|_| async { text("next") }).await;
    let bring = async {
        holding(&world, 1).await;
        world.serve(route("api", Protocol::Http, vec![endpoint(2, next.address)])).await;
    };
    let (reply, ()) = tokio::join!(get(address, "/"), bring);
    assert_eq!(reply.unwrap().text(), "next");
}

#[tokio::test]
async fn of_two_instances_the_living_one_answers() {
    let world = World::new().await;
    let dead = Instance::http(|_| async { text("never") }).await;
    dead.stop();
    soon("the instance's listener is closed", async { while TcpStream::connect(dead.address).await.is_ok() {} }).await;
    let alive = Instance::http(|_| async { text("alive") }).await;
    let no_hold = Route {
        hold: Timespan::millis(0),
        ..route("api", Protocol::Http, vec![endpoint(1, dead.address), endpoint(2, alive.address)])
    };
    let address = world.serve(no_hold).await;
    let mut client = Client::h1(address).await.unwrap();
    for _ in 0..50 {
        // A connection that failed sent nothing: also a POST goes elsewhere.
        assert_eq!(client.post("/", full("x")).await.unwrap().text(), "alive");
    }
    assert_eq!(alive.requests(), 50);
    alive.stop();
    soon("the instance's listener is closed", async { while TcpStream::connect(alive.address).await.is_ok() {} }).await;
    let reply = get(address, "/").await.unwrap();
    assert_eq!((reply.status, &reply.headers["x-orchestra-error"]), (502, &http::HeaderValue::from_static("connect")));
}

#[tokio::test]
async fn tcp_connections_wait_as_well() {
    let world = World::new().await;
    let address = world.serve(route("db", Protocol::Tcp, vec![])).await;
    let instance = Instance::raw(|mut tcp| async move {
        let _ = tcp.write_all(b"hello").await;
    })
    .await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    holding(&world, 1).await;
    world.serve(route("db", Protocol::Tcp, vec![endpoint(1, instance.address)])).await;
    let mut answer = String::new();
    soon("the answer", tcp.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "hello");
}
