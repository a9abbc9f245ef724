//! Which release gets a request.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _, future::join_all};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use orchestra_model::{
    desired::Protocol,
    quantity::Timespan,
    route::{Backend, Endpoint, Route},
    traffic::{Arm, Permille, PortPolicy, RequestKey, RequestMatch, Split},
};
use orchestra_provider::DataPlane as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::Message;

use crate::{harness::*, protocols::websocket_echo, traffic::*};

/// An instance that answers with its name.
async fn named(name: &'static str) -> Instance {
    Instance::http(move |_| async move { text(name) }).await
}

fn share(thousandths: u16) -> Split {
    Split { canary: Some(Permille::new(thousandths)), salt: 2, ..Split::default() }
}

fn routed(split: Split, policy: PortPolicy, backends: Vec<Backend>) -> Route {
    Route { split, policy, backends, ..route("api", Protocol::Http, vec![]) }
}

fn two(stable: &Endpoint, canary: &Endpoint) -> Vec<Backend> {
    vec![backend(1, Arm::Stable, 1000, vec![stable.clone()]), backend(2, Arm::Canary, 1000, vec![canary.clone()])]
}

/// Sends a GET with these headers and returns the reply.
async fn ask(client: &mut Client, headers: &[(&str, &str)]) -> Reply {
    let mut request = Request::get("/").body(empty()).unwrap();
    for (name, value) in headers {
        request.headers_mut().append(http::HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
    }
    whole(soon("a response", client.send(request)).await.unwrap()).await.unwrap()
}

/// What a browser would keep of the cookies of a reply.
fn cookies(reply: &Reply) -> BTreeSet<String> {
    let set = reply.headers.get_all("set-cookie").iter().map(|value| value.to_str().unwrap());
    set.map(|cookie| cookie.strip_suffix("; Path=/; HttpOnly; SameSite=Lax").unwrap().to_owned()).collect()
}

#[tokio::test]
async fn the_share_of_the_canary_is_exact_and_so_is_the_report() {
    let mut world = World::new().await;
    let (stable, canary) = (named("stable").await, named("canary").await);
    let backends = two(&endpoint(1, stable.address), &endpoint(2, canary.address));
    let (mut before, total) = (0, 10_000_u32);
    for (round, thousandths) in [(0, 50_u16), (1, 1)] {
        let split = Split { watch: Some(watch(1 + round)), ..share(thousandths) };
        let address = world.serve(routed(split, PortPolicy::default(), backends.clone())).await;
        let client = || async {
            let mut client = Client::h1(address).await.unwrap();
            for _ in 0..total / 10 {
                let reply = client.get("/").await.unwrap();
                let release = if reply.text() == "canary" { "2" } else { "1" };
                assert_eq!(reply.headers["orchestra-release"], release);
                assert!(!reply.headers.contains_key("set-cookie"));
            }
        };
        join_all((0..10).map(|_| client())).await;
        let got = canary.requests() - before;
        before = canary.requests();
        let (expected, p) = (f64::from(total) * f64::from(thousandths) / 1000.0, f64::from(thousandths) / 1000.0);
        // Six standard deviations of a binomial.
        let bound = 6.0 * (expected * (1.0 - p)).sqrt();
        assert!((f64::from(got) - expected).abs() <= bound, "{thousandths}: {got} of {total}");
        let evidence = collect(&mut world, 1 + round, total).await;
        let of = |arm| evidence.cells.iter().filter(|c| c.arm == arm).map(|c| c.requests).sum::<u32>();
        assert_eq!((of(Arm::Canary), of(Arm::Stable)), (got, total - got));
        assert!(evidence.cells.iter().all(|c| c.canary == Permille::new(thousandths) && c.bad == 0), "{evidence:?}");
        assert_eq!(evidence.latency.total(), u64::from(total - got));
    }
    let page = world.handle.metrics().await.unwrap();
    let counted = samples(&page, "orchestra_proxy_requests_total");
    let of = |arm: &str| counted.iter().find(|(l, _)| l.contains(&format!("arm=\"{arm}\""))).unwrap().1;
    assert_eq!((*of("stable"), *of("canary")), (f64::from(stable.requests()), f64::from(canary.requests())));
}

#[tokio::test]
async fn sticky_clients_stay_where_they_are_as_the_share_grows() {
    let world = World::new().await;
    let (stable, canary) = (named("stable").await, named("canary").await);
    let backends = two(&endpoint(1, stable.address), &endpoint(2, canary.address));
    let policy = PortPolicy { sticky: Some(RequestKey::Cookie("sid".into())), ..PortPolicy::default() };
    let mut jars: Vec<String> = Vec::new();
    let mut before = BTreeSet::new();
    for thousandths in [50, 250, 600, 1000] {
        let address = world.serve(routed(share(thousandths), policy.clone(), backends.clone())).await;
        let mut client = Client::h1(address).await.unwrap();
        if jars.is_empty() {
            for _ in 0..200 {
                jars.extend(cookies(&ask(&mut client, &[]).await));
            }
            assert_eq!(jars.iter().collect::<BTreeSet<_>>().len(), 200);
        }
        let mut on = BTreeSet::new();
        for jar in &jars {
            let first = ask(&mut client, &[("cookie", jar)]).await;
            assert_eq!(cookies(&first).len(), 0);
            assert_eq!(ask(&mut client, &[("cookie", jar)]).await.body, first.body);
            if first.text() == "canary" {
                on.insert(jar.clone());
            }
        }
        assert!(on.is_superset(&before), "{thousandths}");
        let (expected, p) = (f64::from(thousandths) / 5.0, f64::from(thousandths) / 1000.0);
        let off = (f64::from(u32::try_from(on.len()).unwrap()) - expected).abs();
        assert!(off <= 5.0 * (expected * (1.0 - p)).sqrt(), "{thousandths}: {}", on.len());
        before = on;
    }
}

#[tokio::test]
async fn sticky_clients_keep_their_instance() {
    let world = World::new().await;
    let instances = join_all(["a", "b", "c"].map(named)).await;
    let endpoints: Vec<Endpoint> = instances.iter().zip(1..).map(|(i, n)| endpoint(n, i.address)).collect();
    let policy = PortPolicy { sticky: Some(RequestKey::Header("x-session".into())), ..PortPolicy::default() };
    let with = |endpoints| routed(Split::default(), policy.clone(), vec![backend(1, Arm::Stable, 1, endpoints)]);
    let address = world.serve(with(endpoints.clone())).await;
    let mut client = Client::h1(address).await.unwrap();
    let mut homes = Vec::new();
    for session in 0..60 {
        homes.push(ask(&mut client, &[("x-session", &format!("s{session}"))]).await.text().to_owned());
    }
    assert_eq!(homes.iter().collect::<BTreeSet<_>>().len(), 3);
    // The second leaves: only its clients move, and they come back to it.
    for (current, moved) in [(vec![endpoints[0].clone(), endpoints[2].clone()], true), (endpoints, false)] {
        world.serve(with(current)).await;
        for (session, home) in homes.iter().enumerate() {
            let now = ask(&mut client, &[("x-session", &format!("s{session}"))]).await.text().to_owned();
            assert_eq!(now != *home, moved && home == "b", "{session}");
        }
    }
}

#[tokio::test]
async fn a_pinned_client_stays_with_its_release_while_that_lives() {
    let world = World::new().await;
    let (old, new) = (named("old").await, named("new").await);
    let (first, second) = (endpoint(1, old.address), endpoint(2, new.address));
    let policy = || PortPolicy { pin: true, ..PortPolicy::default() };
    let address =
        world.serve(routed(Split::default(), policy(), vec![backend(1, Arm::Stable, 1, vec![first.clone()])])).await;
    let mut client = Client::h1(address).await.unwrap();
    let met = cookies(&ask(&mut client, &[]).await);
    let jar = met.first().unwrap().clone();
    assert!(met.len() == 1 && jar.starts_with("orchestra-release-") && jar.ends_with("=1"), "{jar}");
    // Through the whole rollout, to the end of which the old set is only kept warm.
    let stages = [(share(500), 1, 1), (share(1000), 1, 1), (Split::default(), 0, 1)];
    for (split, stable, canary) in stages {
        let all = split.canary != Some(Permille::new(500));
        let backends = vec![
            backend(1, Arm::Stable, stable, vec![first.clone()]),
            backend(2, Arm::Canary, canary, vec![second.clone()]),
        ];
        world.serve(routed(split, policy(), backends)).await;
        for _ in 0..20 {
            let reply = ask(&mut client, &[("cookie", &jar)]).await;
            assert_eq!((reply.text(), cookies(&reply).len()), ("old", 0));
            assert_eq!(ask(&mut client, &[("orchestra-release", "1")]).await.text(), "old");
            assert_eq!(ask(&mut client, &[("orchestra-release", "2")]).await.text(), "new");
            let fresh = ask(&mut client, &[]).await;
            assert!(!all || fresh.text() == "new");
            let release = fresh.headers["orchestra-release"].to_str().unwrap();
            assert!(cookies(&fresh).first().unwrap().ends_with(&format!("={release}")));
        }
    }
    // It leaves: whoever was pinned to it is pinned to the next.
    let last =
        vec![backend(1, Arm::Stable, 0, vec![draining(&first)]), backend(2, Arm::Stable, 1, vec![second.clone()])];
    world.serve(routed(Split::default(), policy(), last)).await;
    let reply = ask(&mut client, &[("cookie", &jar)]).await;
    assert_eq!(reply.text(), "new");
    assert!(cookies(&reply).first().unwrap().ends_with("=2"));
}

#[tokio::test]
async fn a_match_leads_to_the_canary_and_pins_nobody() {
    let world = World::new().await;
    let (stable, canary) = (named("stable").await, named("canary").await);
    let by_header = RequestMatch { headers: [("x-test".into(), "1".into())].into(), ..RequestMatch::default() };
    let by_cookie = RequestMatch { cookies: [("beta".into(), "on".into())].into(), ..RequestMatch::default() };
    let split = Split { matches: vec![by_header, by_cookie], ..share(0) };
    let policy = PortPolicy { pin: true, ..PortPolicy::default() };
    let backends = two(&endpoint(1, stable.address), &endpoint(2, canary.address));
    let address = world.serve(routed(split.clone(), policy.clone(), backends.clone())).await;
    let mut client = Client::h2(address).await.unwrap();
    for headers in [&[("x-test", "1")][..], &[("cookie", "beta=on")], &[("cookie", "a=b"), ("cookie", "beta=on")]] {
        let reply = ask(&mut client, headers).await;
        assert_eq!((reply.text(), cookies(&reply).len()), ("canary", 0), "{headers:?}");
    }
    assert_eq!(ask(&mut client, &[("x-test", "2"), ("cookie", "beta=off")]).await.text(), "stable");
    // Without a canary they get what there is.
    let alone = backends[..1].to_vec();
    world.serve(routed(split, policy, alone)).await;
    assert_eq!(ask(&mut client, &[("x-test", "1")]).await.text(), "stable");
}

#[tokio::test]
async fn an_arm_without_an_instance_gives_way_and_is_no_evidence() {
    let mut world = World::new().await;
    let stable = named("stable").await;
    // Bound, so that nobody else gets the address, and without a listener, so that connections are refused.
    let dead: Vec<TcpSocket> = (0..2)
        .map(|_| {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
            socket
        })
        .collect();
    let refusing = |index: usize| endpoint([2, 3][index], dead[index].local_addr().unwrap());
    let split = || Split { watch: Some(watch(1)), ..share(500) };
    let backends = two(&endpoint(1, stable.address), &refusing(0));
    let address = world.serve(routed(split(), PortPolicy::default(), backends)).await;
    let mut client = Client::h1(address).await.unwrap();
    for _ in 0..200 {
        assert_eq!(client.get("/").await.unwrap().text(), "stable");
    }
    // A canary that draws requests and cannot have them: those are answered, and are nobody's evidence.
    let seen = collect(&mut world, 1, 1).await;
    let more = heartbeat(&mut world, 1).await;
    let cells: Vec<_> = seen.cells.iter().chain(&more.cells).collect();
    let counted: u32 = cells.iter().map(|cell| cell.requests).sum();
    assert!((60..140).contains(&counted), "{counted}");
    assert!(cells.iter().all(|cell| cell.arm == Arm::Stable && cell.bad == 0));
    // Both gone: the one that was drawn is to blame.
    let gone = two(&refusing(1), &refusing(0));
    let hasty = Route { hold: Timespan::millis(0), ..routed(split(), PortPolicy::default(), gone) };
    world.serve(hasty).await;
    for _ in 0..40 {
        assert_eq!(client.get("/").await.unwrap().status, 502);
    }
    let blamed = collect(&mut world, 1, 40).await;
    assert!(blamed.cells.iter().all(|cell| cell.bad == cell.requests && cell.broken == cell.bad));
    let arms: BTreeSet<Arm> = blamed.cells.iter().map(|cell| cell.arm).collect();
    assert_eq!(arms.len(), 2);
}

#[tokio::test]
async fn a_paused_route_holds_and_goes_on() {
    let world = World::new().await;
    let instance = named("x").await;
    let only = endpoint(1, instance.address);
    let paused = |paused, hold| Route {
        split: Split { paused, ..Split::default() },
        hold: Timespan::millis(hold),
        hold_limit: 8,
        ..route("api", Protocol::Http, vec![only.clone()])
    };
    let address = world.serve(paused(true, 30_000)).await;
    let waiting = join_all((0..8).map(|_| get(address, "/")));
    let steps = async {
        soon("eight that wait", async {
            loop {
                let page = world.handle.metrics().await.unwrap();
                let holding = samples(&page, "orchestra_proxy_service_holding");
                if holding.get(r#"{stack="demo",environment="dev",service="api"}"#) == Some(&8.0) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert_eq!(instance.requests(), 0);
        let ninth = get(address, "/").await.unwrap();
        assert_eq!((ninth.status, &ninth.headers["retry-after"]), (503, &http::HeaderValue::from_static("1")));
        assert_eq!(ninth.text(), "api: the route is paused, and 8 requests wait already\n");
        world.serve(paused(false, 30_000)).await;
    };
    let (replies, ()) = tokio::join!(waiting, steps);
    assert!(replies.iter().all(|reply| reply.as_ref().unwrap().text() == "x"));
    world.serve(paused(true, 200)).await;
    let late = get(address, "/").await.unwrap();
    assert_eq!((late.status, &late.headers["retry-after"]), (503, &http::HeaderValue::from_static("1")));
    assert_eq!(late.headers["x-orchestra-error"], "hold_timeout");
    assert_eq!(late.text(), "api: the route is paused for longer than 200ms\n");
    let held = samples(&world.handle.metrics().await.unwrap(), "orchestra_proxy_service_holds_total");
    assert_eq!(held.values().copied().collect::<Vec<_>>(), [9.0]);
}

/// Streams of both arms live through every step of a rollout and its abort; a cut of one release announces itself and
/// touches nothing of the other.
#[tokio::test]
async fn streams_of_both_arms_outlive_weights_and_a_cut_touches_one_release() {
    let mut world = World::new().await;
    let streaming = || async {
        let (sender, body) = fed();
        let body = std::sync::Mutex::new(Some(body));
        let instance = Instance::http(move |request| {
            let body = if request.uri() == "/ws" { None } else { body.lock().unwrap().take() };
            async move {
                match body {
                    Some(body) => Response::builder().header("content-type", "text/event-stream").body(body).unwrap(),
                    None => websocket_echo(request).await,
                }
            }
        })
        .await;
        (instance, sender)
    };
    let ((stable, stable_events), (canary, canary_events)) = (streaming().await, streaming().await);
    let (first, second) = (endpoint(1, stable.address), endpoint(2, canary.address));
    let at = |thousandths| routed(share(thousandths), PortPolicy::default(), two(&first, &second));
    let mut bodies = Vec::new();
    let mut sockets = Vec::new();
    for (thousandths, release) in [(0, "1"), (1000, "2")] {
        let address = world.serve(at(thousandths)).await;
        let response = ask_stream(address).await;
        assert_eq!(response.headers()["orchestra-release"], release);
        bodies.push(response.into_body());
        let tcp = TcpStream::connect(address).await.unwrap();
        let (socket, upgraded) = tokio_tungstenite::client_async("ws://test.example/ws", tcp).await.unwrap();
        assert_eq!(upgraded.headers()["orchestra-release"], release);
        sockets.push(socket);
    }
    let senders = [stable_events, canary_events];
    let alive = async |bodies: &mut [hyper::body::Incoming], sockets: &mut [WebSocket], which: &[usize]| {
        for index in which.iter().copied() {
            senders[index].send(Frame::data(Bytes::from("data: x\n\n"))).await.unwrap();
            let frame = soon("an event", bodies[index].frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), "data: x\n\n");
            sockets[index].send(Message::text("x")).await.unwrap();
            assert_eq!(soon("an echo", sockets[index].next()).await.unwrap().unwrap(), Message::text("x"));
        }
    };
    for thousandths in [0, 1, 500, 999, 1000, 0] {
        world.serve(at(thousandths)).await;
        alive(&mut bodies, &mut sockets, &[0, 1]).await;
    }
    // Turned back: the canary drains, and is cut at the end of its budget.
    let back =
        vec![backend(1, Arm::Stable, 1, vec![first.clone()]), backend(2, Arm::Canary, 1, vec![draining(&second)])];
    world.serve(routed(Split::default(), PortPolicy::default(), back)).await;
    alive(&mut bodies, &mut sockets, &[0, 1]).await;
    world.handle.cut(key(&second)).await.unwrap();
    let rest = soon("the end of the stream", bodies.pop().unwrap().collect()).await.unwrap().to_bytes();
    assert!(rest.starts_with(b"event: orchestra-drain\n"), "{rest:?}");
    let closed = soon("the close", sockets.pop().unwrap().next()).await;
    assert!(matches!(closed, Some(Ok(Message::Close(Some(frame)))) if u16::from(frame.code) == 1012));
    world.drained(&key(&second)).await;
    alive(&mut bodies, &mut sockets, &[0]).await;
}

type WebSocket = tokio_tungstenite::WebSocketStream<TcpStream>;

async fn ask_stream(address: std::net::SocketAddr) -> Response<hyper::body::Incoming> {
    let mut client = Client::h1(address).await.unwrap();
    soon("a stream", client.send(Request::get("/").body(empty()).unwrap())).await.unwrap()
}
