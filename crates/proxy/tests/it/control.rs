//! Tables in, reports out.

use std::os::unix::fs::PermissionsExt as _;

use http::Request;
use http_body::Frame;
use http_body_util::BodyExt as _;
use orchestra_model::{
    desired::Protocol,
    id::ReleaseNumber,
    route::{ApplyError, Backend, ProxyEvent, Route, RouteTable},
    traffic::Arm,
};
use orchestra_provider::{DataPlane as _, DataPlaneError, DataPlaneEvent};
use orchestra_proxy::{OpenError, ProxyHandle};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::*;

fn refused<T: std::fmt::Debug>(result: Result<T, DataPlaneError>) -> ApplyError {
    match result {
        Err(DataPlaneError::Refused(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn stale_tables_are_refused() {
    let world = World::new().await;
    let table = |version| RouteTable { version, routes: Vec::new() };
    assert_eq!(world.handle.apply(table(5)).await.unwrap().version, 5);
    for offered in [5, 4] {
        assert_eq!(refused(world.handle.apply(table(offered)).await), ApplyError::Stale { offered, current: 5 });
    }
    // A new server on a living proxy knows what is in force.
    let world = world.reopen().await;
    assert_eq!(refused(world.handle.apply(table(5)).await), ApplyError::Stale { offered: 5, current: 5 });
    assert_eq!(world.handle.apply(table(6)).await.unwrap().version, 6);
}

#[tokio::test]
async fn an_address_in_use_names_its_holder_and_changes_nothing() {
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("old") }).await;
    let old = route("old", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(old.clone()).await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let holder = TcpListener::bind(taken).await.unwrap();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let moved = Route { listen: free, ..route("moved", Protocol::Http, vec![endpoint(2, instance.address)]) };
    let blocked = Route { listen: taken, ..route("blocked", Protocol::Http, vec![]) };
    let foreign = Route { listen: "192.0.2.1:80".parse().unwrap(), ..route("foreign", Protocol::Http, vec![]) };
    let error = refused(world.try_apply(vec![moved, blocked.clone(), foreign.clone()]).await);
    let pid = std::process::id();
    let ApplyError::Bind { addresses } = &error else { panic!("{error:?}") };
    assert_eq!(addresses.len(), 2, "{error}");
    assert!(addresses[0].0 == taken && addresses[0].1.ends_with(&format!("(pid {pid})")), "{error}");
    assert_eq!(addresses[1], (foreign.listen, "no such address on this machine".to_owned()));
    // The old route is still served, and the free address of the refused table is free.
    assert_eq!(get(address, "/").await.unwrap().text(), "old");
    assert!(TcpStream::connect(free).await.is_err());
    // Twice the same address is told before anything is bound.
    let twice = [Route { listen: free, ..old.clone() }, Route { listen: free, ..blocked.clone() }];
    assert!(refused(world.try_apply(twice.to_vec()).await).to_string().contains("asked for by both"));
    drop(holder);
    world.apply(vec![old, blocked]).await;
    assert!(TcpStream::connect(taken).await.is_ok());
}

#[tokio::test]
async fn chosen_ports_stay_with_their_route() {
    let mut world = World::new().await;
    let routes = || vec![route("a", Protocol::Http, vec![]), route("b", Protocol::Tcp, vec![])];
    let first = world.apply(routes()).await.addresses;
    assert_eq!(first.len(), 2);
    assert_eq!(world.apply(routes()).await.addresses, first);
    world = world.reopen().await;
    assert_eq!(world.apply(routes()).await.addresses, first);
    kill(world.handle.pid().unwrap(), rustix::process::Signal::KILL);
    world.until(|event| matches!(event, DataPlaneEvent::Lost { .. })).await;
    world.until(|event| matches!(event, DataPlaneEvent::Serving { .. })).await;
    assert_eq!(world.apply(routes()).await.addresses, first);
    assert_eq!(world.handle.table().await.unwrap().unwrap().1.addresses, first);
}

#[tokio::test]
async fn a_route_that_comes_back_gets_its_port_again_if_nobody_took_it() {
    // Bound and not listening: keeps other tests from taking the ports while nobody listens there, and no longer.
    let reserve = |address: &std::net::SocketAddr| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(*address).map(|()| socket)
    };
    let routes = || vec![route("a", Protocol::Http, vec![]), route("b", Protocol::Tcp, vec![])];
    let mut world = World::new().await;
    'ports: for _ in 0..10 {
        let first = world.apply(routes()).await.addresses;
        for reopen in [false, true] {
            world.apply(vec![]).await;
            let reserved: Result<Vec<_>, _> = first.values().map(reserve).collect();
            // Taken in between: with another port.
            let Ok(reserved) = reserved else { continue 'ports };
            if reopen {
                world = world.reopen().await;
            }
            assert_eq!(world.apply(routes()).await.addresses, first);
            drop(reserved);
        }
        return;
    }
    panic!("the ports were taken ten times");
}

#[tokio::test]
async fn addresses_change_hands_without_closing() {
    let world = World::new().await;
    let instances = [Instance::http(|_| async { text("one") }).await, Instance::http(|_| async { text("two") }).await];
    let (a, b) = (endpoint(1, instances[0].address), endpoint(2, instances[1].address));
    let address = world.serve(route("one", Protocol::Http, vec![a.clone()])).await;
    // An open connection stays open and is routed anew when a renamed route takes the address.
    let mut client = Client::h1(address).await.unwrap();
    assert_eq!(client.get("/").await.unwrap().text(), "one");
    let renamed = Route { listen: address, ..route("two", Protocol::Http, vec![b.clone()]) };
    assert_eq!(world.serve(renamed.clone()).await, address);
    assert_eq!(client.get("/").await.unwrap().text(), "two");
    // From one address to all addresses of the same port: they overlap, and still there is no gap.
    let wide = Route { listen: ([0, 0, 0, 0], address.port()).into(), ..renamed };
    assert_eq!(world.serve(wide).await.port(), address.port());
    assert_eq!(get(address, "/").await.unwrap().text(), "two");
}

#[tokio::test]
async fn a_removed_route_closes_its_address_and_finishes_what_is_in_flight() {
    let mut world = World::new().await;
    let (instance, sender) = Instance::busy().await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let mut busy = Client::h1(address).await.unwrap();
    let response = busy.send(Request::get("/").body(empty()).unwrap()).await.unwrap();
    let mut h2 = Client::h2(address).await.unwrap();
    assert_eq!(h2.get("/").await.unwrap().text(), "short");
    world.apply(vec![]).await;
    soon("the address is closed", async { while TcpStream::connect(address).await.is_ok() {} }).await;
    // Idle connections are closed in good order; the one in use finishes.
    soon("GOAWAY", async { while h2.get("/").await.is_ok_and(|reply| reply.status == 503) {} }).await;
    sender.send(Frame::data("still here".into())).await.unwrap();
    drop(sender);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "still here");
    soon("Connection: close", async { while busy.get("/").await.is_ok_and(|reply| reply.status == 503) {} }).await;
    world.drained(&key(&only)).await;
}

#[tokio::test]
async fn drained_endpoints_are_reported_for_each_version() {
    let mut world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let (a, b) = (endpoint(1, instance.address), endpoint(2, instance.address));
    let routes = |endpoints| vec![route("api", Protocol::Http, endpoints)];
    let report = |e| DataPlaneEvent::Proxy(ProxyEvent::Drained { endpoint: key(e) });
    assert!(matches!(world.event().await, DataPlaneEvent::Serving { .. }));
    world.apply(routes(vec![a.clone(), b.clone()])).await;
    world.apply(routes(vec![draining(&a), b.clone()])).await;
    assert_eq!(world.event().await, report(&a));
    world.apply(routes(vec![draining(&a), draining(&b)])).await;
    assert_eq!(world.event().await, report(&a));
    assert_eq!(world.event().await, report(&b));
    // It may come back, and then leave the table without having drained first.
    world.apply(routes(vec![a.clone(), draining(&b)])).await;
    assert_eq!(world.event().await, report(&b));
    world.apply(routes(vec![draining(&b)])).await;
    let both = [world.event().await, world.event().await];
    assert!(both.contains(&report(&a)) && both.contains(&report(&b)), "{both:?}");
    // A server that missed a report gets it.
    world = world.reopen().await;
    world.drained(&key(&b)).await;
}

#[tokio::test]
async fn weights_split_traffic_and_releases_are_counted_apart() {
    let world = World::new().await;
    let stable = Instance::http(|_| async { text("stable") }).await;
    let canary = Instance::http(|_| async { text("canary") }).await;
    let empty_release = Backend { arm: Arm::Stable, release: ReleaseNumber(3), weight: 500, endpoints: vec![] };
    let backends = vec![
        Backend {
            arm: Arm::Stable,
            release: ReleaseNumber(1),
            weight: 450,
            endpoints: vec![endpoint(1, stable.address)],
        },
        Backend {
            arm: Arm::Stable,
            release: ReleaseNumber(2),
            weight: 50,
            endpoints: vec![endpoint(2, canary.address)],
        },
        // No instance: its share goes to the others.
        empty_release,
    ];
    let address = world.serve(Route { backends, ..route("api", Protocol::Http, vec![]) }).await;
    let mut client = Client::h1(address).await.unwrap();
    for _ in 0..1000 {
        assert_eq!(client.get("/").await.unwrap().status, 200);
    }
    assert!((50..150).contains(&canary.requests()), "{}", canary.requests());
    assert_eq!(stable.requests() + canary.requests(), 1000);
    let page = world.handle.metrics().await.unwrap();
    let counted = samples(&page, "orchestra_proxy_requests_total");
    let of = |release| counted.iter().find(|(l, _)| l.contains(&format!("release=\"{release}\""))).unwrap().1;
    assert_eq!((*of(1), *of(2)), (f64::from(stable.requests()), f64::from(canary.requests())));
}

#[tokio::test]
async fn one_server_at_a_time_and_nobody_else() {
    let world = World::new().await;
    let socket = world.home().join("proxy/control.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(world.home().join("proxy")).unwrap().permissions().mode() & 0o777, 0o700);
    let options = orchestra_proxy::Options { patience: std::time::Duration::from_millis(300), ..options(world.home()) };
    let error = ProxyHandle::open(options, &world.tree).await.unwrap_err();
    assert!(matches!(error, OpenError::Busy { .. }), "{error:?}");
    assert!(error.to_string().contains("another server steers it"));
    world.apply(vec![]).await;
}

#[tokio::test]
async fn a_program_that_cannot_be_a_proxy_is_named() {
    let home = tempfile::tempdir().unwrap();
    let tree = orchestra_task::TaskTree::new();
    let options = |program: &str| orchestra_proxy::Options::new(home.path(), program);
    let error = ProxyHandle::open(options("/no/such/program"), &tree).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/program: No such file"), "{error}");
    let error = ProxyHandle::open(options("/bin/false"), &tree).await.unwrap_err();
    assert!(error.to_string().contains("exit status: 1"), "{error}");
}

#[tokio::test]
async fn an_address_can_be_bound_anew_as_soon_as_its_route_is_gone() {
    let world = World::new().await;
    // Reserved for this test: see above.
    let reserved = tokio::net::TcpSocket::new_v4().unwrap();
    reserved.set_reuseaddr(true).unwrap();
    reserved.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listen = reserved.local_addr().unwrap();
    for _ in 0..50 {
        world.apply(vec![Route { listen, ..route("api", Protocol::Http, vec![]) }]).await;
        world.apply(vec![]).await;
    }
}
