//! The death of either side, and of both.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use orchestra_model::desired::Protocol;
use orchestra_provider::{DataPlane as _, DataPlaneEvent};
use orchestra_proxy::ProxyHandle;
use orchestra_task::{TaskKind, TaskTree};
use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

use crate::{harness::*, protocols::websocket_echo};

fn is_alive(pid: u32) -> bool {
    // A process that was not reaped yet is dead all the same.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

async fn gone(pid: u32) {
    soon("the proxy is gone", async {
        while is_alive(pid) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// Requests under way at a time; some of them are torn by each kill.
const IN_FLIGHT: u32 = 64;

/// Opens new connections at a steady rate, whatever becomes of those before; only a machine that cannot keep up at all
/// slows it down.
struct Load {
    in_flight: AtomicU32,
    refused: AtomicU32,
    /// Began after the last kill and failed, or failed in a way that a kill does not explain.
    failed: AtomicU32,
    /// Were in flight in the process that was killed.
    torn: AtomicU32,
    fine: AtomicU32,
    stop: AtomicBool,
    killed_at: std::sync::Mutex<Vec<Instant>>,
}

impl Load {
    async fn run(self: Arc<Self>, address: std::net::SocketAddr, tree: TaskTree) {
        let mut ticks = tokio::time::interval(Duration::from_millis(2));
        let mut tasks = Vec::new();
        while !self.stop.load(Ordering::SeqCst) {
            ticks.tick().await;
            if self.in_flight.load(Ordering::SeqCst) >= IN_FLIGHT {
                continue;
            }
            self.in_flight.fetch_add(1, Ordering::SeqCst);
            let load = Arc::clone(&self);
            tasks.push(tree.start(TaskKind::Connection, "load", async move {
                load.one(address).await;
                load.in_flight.fetch_sub(1, Ordering::SeqCst);
            }));
        }
        for task in tasks {
            soon("a request of the load", task).await.unwrap();
        }
    }

    async fn one(&self, address: std::net::SocketAddr) {
        let began = Instant::now();
        let Ok(tcp) = TcpStream::connect(address).await else {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return;
        };
        drop(tcp);
        let reply = async { Client::h1(address).await?.get("/").await }.await;
        match reply {
            Ok(reply) if reply.status == 200 => self.fine.fetch_add(1, Ordering::SeqCst),
            Err(error) if error.starts_with("connect") => self.refused.fetch_add(1, Ordering::SeqCst),
            other => {
                let killed = self.killed_at.lock().unwrap().iter().any(|k| (began..Instant::now()).contains(k));
                if !killed {
                    eprintln!("failed without a kill: {other:?}");
                }
                let counter = if killed { &self.torn } else { &self.failed };
                counter.fetch_add(1, Ordering::SeqCst)
            }
        };
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_proxy_refuses_no_connection_and_is_replaced() {
    let mut world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let load = Arc::new(Load {
        in_flight: AtomicU32::new(0),
        refused: AtomicU32::new(0),
        failed: AtomicU32::new(0),
        torn: AtomicU32::new(0),
        fine: AtomicU32::new(0),
        stop: AtomicBool::new(false),
        killed_at: std::sync::Mutex::default(),
    });
    let running = world.tree.start(TaskKind::Connection, "load", Arc::clone(&load).run(address, world.tree.clone()));
    let mut longest = Duration::ZERO;
    for round in 1..=8 {
        let before = load.fine.load(Ordering::SeqCst);
        soon("load", async {
            while load.fine.load(Ordering::SeqCst) < before + 100 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        let pid = world.handle.pid().unwrap();
        let began = Instant::now();
        load.killed_at.lock().unwrap().push(began);
        kill(pid, Signal::KILL);
        let lost = world.until(|event| matches!(event, DataPlaneEvent::Lost { .. })).await;
        assert!(matches!(lost, DataPlaneEvent::Lost { cause } if cause == "the proxy process ended"), "{round}");
        let serving = world.until(|event| matches!(event, DataPlaneEvent::Serving { .. })).await;
        assert!(matches!(serving, DataPlaneEvent::Serving { pid: new } if new != pid && is_alive(new)));
        longest = longest.max(began.elapsed());
    }
    load.stop.store(true, Ordering::SeqCst);
    soon("the end of the load", running).await.unwrap();
    let count = |counter: &AtomicU32| counter.load(Ordering::SeqCst);
    println!(
        "8 kills: {} fine, {} torn in flight, {} refused, {} failed otherwise; longest gap {longest:?}",
        count(&load.fine),
        count(&load.torn),
        count(&load.refused),
        count(&load.failed)
    );
    assert_eq!((count(&load.refused), count(&load.failed)), (0, 0));
    // A kill tears what it finds in flight, and nothing that waits for the successor.
    assert!(count(&load.torn) <= 8 * IN_FLIGHT && count(&load.fine) >= 800);
}

#[tokio::test]
async fn streams_and_sockets_outlive_the_server() {
    let world = World::new().await;
    let (events, sender) = Instance::fed(false, "text/event-stream").await;
    let sockets = Instance::http(websocket_echo).await;
    let routes = |world: &World| {
        let _ = world;
        vec![
            route("sse", Protocol::Http, vec![endpoint(1, events.address)]),
            route("ws", Protocol::Http, vec![endpoint(2, sockets.address)]),
        ]
    };
    let applied = world.apply(routes(&world)).await;
    let at = |name: &str| applied.addresses[&format!("demo/dev/{name}:main")];
    let mut client = Client::h1(at("sse")).await.unwrap();
    let mut stream = client.send(Request::get("/").body(empty()).unwrap()).await.unwrap().into_body();
    let tcp = TcpStream::connect(at("ws")).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("ws://test.example/", tcp).await.unwrap();
    let pid = world.handle.pid();
    let mut world = Some(world);
    for round in 0..3 {
        // Without a server.
        let (home, old) = (world.as_ref().unwrap().home().to_owned(), world.take().unwrap());
        let (address, name) = (at("ws"), format!("{round}"));
        let next = async {
            let reopened = old.reopen().await;
            assert_eq!(reopened.home(), home);
            reopened
        };
        let (reopened, ()) = tokio::join!(next, async {
            sender.send(Frame::data(Bytes::from(format!("data: {name}\n\n")))).await.unwrap();
            let frame = soon("an event", stream.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), format!("data: {name}\n\n"));
            socket.send(Message::text(name.clone())).await.unwrap();
            assert_eq!(soon("an echo", socket.next()).await.unwrap().unwrap(), Message::text(name.clone()));
            assert!(TcpStream::connect(address).await.is_ok());
        });
        assert_eq!(reopened.handle.pid(), pid);
        assert_eq!(reopened.apply(routes(&reopened)).await.addresses, applied.addresses);
        world = Some(reopened);
    }
    drop(sender);
    assert!(soon("the end", stream.frame()).await.is_none());
}

/// On a full disk nothing can be logged, and that is no reason to let go of anybody: not when the server dies, nor when
/// the next one comes.
#[tokio::test]
async fn a_log_that_cannot_be_written_ends_nothing() {
    let mut world = World::with(|home| {
        let folder = home.join("proxy");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink("/dev/full", folder.join("proxy.log")).unwrap();
        options(home)
    })
    .await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let pid = world.handle.pid();
    let mut client = Client::h1(address).await.unwrap();
    for _ in 0..3 {
        assert_eq!(client.get("/").await.unwrap().text(), "x");
        let home = world.close();
        assert_eq!(client.get("/").await.unwrap().text(), "x");
        world = home.open().await;
        assert_eq!(world.handle.pid(), pid);
    }
    assert_eq!(client.get("/").await.unwrap().text(), "x");
}

#[tokio::test]
async fn a_new_server_can_replace_the_proxy_before_any_table_was_applied() {
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut world = world.reopen().await;
    kill(world.handle.pid().unwrap(), Signal::KILL);
    world.until(|event| matches!(event, DataPlaneEvent::Lost { .. })).await;
    world.until(|event| matches!(event, DataPlaneEvent::Serving { .. })).await;
    assert_eq!(get(address, "/").await.unwrap().text(), "x");
}

#[tokio::test]
async fn when_both_died_a_table_starts_anew() {
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let one = || route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    world.serve(one()).await;
    let pid = world.handle.pid().unwrap();
    kill(pid, Signal::KILL);
    // The handle goes before it can react.
    let world = world.reopen().await;
    assert_ne!(world.handle.pid(), Some(pid));
    let version = world.handle.table().await.unwrap();
    assert_eq!(version, None);
    let address = world.serve(one()).await;
    assert_eq!(get(address, "/").await.unwrap().text(), "x");
}

#[tokio::test]
async fn what_left_the_table_counts_as_drained_when_its_proxy_dies() {
    let mut world = World::new().await;
    let instance = Instance::http(|_| std::future::pending::<Response<AnyBody>>()).await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let mut client = Client::h1(address).await.unwrap();
    let request = client.send(Request::get("/").body(empty()).unwrap());
    let steps = async {
        soon("the request", async {
            while instance.requests() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        world.apply(vec![route("api", Protocol::Http, vec![])]).await;
        kill(world.handle.pid().unwrap(), Signal::KILL);
        world.drained(&key(&only)).await;
    };
    let (reply, ()) = tokio::join!(request, steps);
    assert!(reply.is_err());
}

#[tokio::test]
async fn a_terminated_proxy_finishes_beside_its_successor() {
    let mut world = World::new().await;
    let (instance, sender) = Instance::busy().await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let mut client = Client::h1(address).await.unwrap();
    let response = client.send(Request::get("/").body(empty()).unwrap()).await.unwrap();
    let old = world.handle.pid().unwrap();
    kill(old, Signal::TERM);
    world.until(|event| matches!(event, DataPlaneEvent::Lost { .. })).await;
    world.until(|event| matches!(event, DataPlaneEvent::Serving { .. })).await;
    assert_ne!(world.handle.pid(), Some(old));
    assert_eq!(get(address, "/").await.unwrap().text(), "short");
    assert!(is_alive(old));
    // Drained means: in both.
    world.apply(vec![route("api", Protocol::Http, vec![draining(&only)])]).await;
    let early = tokio::time::timeout(Duration::from_millis(300), world.drained(&key(&only))).await;
    assert!(early.is_err(), "the old proxy still has a stream");
    sender.send(Frame::data("done".into())).await.unwrap();
    drop(sender);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "done");
    world.drained(&key(&only)).await;
    gone(old).await;
}

#[tokio::test]
async fn shutdown_finishes_and_ends_for_good() {
    let world = World::new().await;
    let instance = Instance::http(|_| async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        text("finished")
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let pid = world.handle.pid().unwrap();
    let end = async {
        soon("the request", async {
            while instance.requests() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert!(world.handle.shutdown(DEADLINE).await.unwrap());
    };
    let (reply, ()) = tokio::join!(get(address, "/"), end);
    assert_eq!(reply.unwrap().text(), "finished");
    gone(pid).await;
    assert!(TcpStream::connect(address).await.is_err());
    assert!(world.handle.metrics().await.is_err());
}

#[tokio::test]
async fn a_deep_home_has_a_control_socket_too() {
    let root = tempfile::tempdir().unwrap();
    let deep = root.path().join("x".repeat(120)).join("y".repeat(120));
    let tree = TaskTree::new();
    let handle = soon("open", ProxyHandle::open(options(&deep), &tree)).await.unwrap();
    let pid = handle.pid();
    drop(handle);
    let handle = soon("open again", ProxyHandle::open(options(&deep), &tree)).await.unwrap();
    assert_eq!(handle.pid(), pid);
    assert!(handle.shutdown(DEADLINE).await.unwrap());
}

#[tokio::test]
async fn a_proxy_that_serves_nothing_and_nobody_steers_ends_itself() {
    let world = World::new().await;
    let pid = world.handle.pid().unwrap();
    let socket = world.home().join("proxy/control.sock");
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let _home = world.close();
    gone(pid).await;
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_err());
}

#[tokio::test]
async fn an_idle_proxy_uses_no_cpu() {
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h1(address).await.unwrap();
    client.get("/").await.unwrap();
    let pid = world.handle.pid().unwrap();
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    // The idle connection to the instance is given up first.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let before = ticks();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(ticks() - before <= 1, "{} ticks of 10 ms in 5 s", ticks() - before);
}

#[tokio::test]
async fn a_proxy_has_nothing_of_the_servers_environment() {
    let world = World::new().await;
    assert!(std::env::vars_os().count() > 0);
    let environment = std::fs::read(format!("/proc/{}/environ", world.handle.pid().unwrap())).unwrap();
    assert_eq!(String::from_utf8_lossy(&environment), "");
}
