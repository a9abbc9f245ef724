//! The death of the proxy under load with TLS.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::process::Signal;

use super::*;

#[derive(Default)]
struct Seen {
    fine: AtomicU32,
    torn: AtomicU32,
    refused: AtomicU32,
    failed: AtomicU32,
    stop: AtomicBool,
    killed_at: std::sync::Mutex<Vec<Instant>>,
}

/// One request on a connection of its own.
async fn one(seen: &Seen, address: SocketAddr, config: &Arc<ClientConfig>) {
    let began = Instant::now();
    let reply = async { client(address, config).await?.get("/").await }.await;
    let counter = match reply {
        Ok(reply) if reply.status == 200 => &seen.fine,
        Err(error) if error.starts_with("connect") => &seen.refused,
        other => {
            let killed = seen.killed_at.lock().unwrap().iter().any(|k| (began..Instant::now()).contains(k));
            if !killed {
                eprintln!("failed without a kill: {:?}", other.map(|reply| reply.status));
            }
            if killed { &seen.torn } else { &seen.failed }
        }
    };
    counter.fetch_add(1, Ordering::SeqCst);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_proxy_refuses_no_connection() {
    const KILLS: u32 = 5;
    const CLIENTS: u32 = 16;
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let mut world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let config = certificates.client(&["http/1.1"]);
    let seen = Arc::new(Seen::default());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (seen, config) = (Arc::clone(&seen), Arc::clone(&config));
            world.tree.start(TaskKind::Connection, "client", async move {
                while !seen.stop.load(Ordering::SeqCst) {
                    one(&seen, address, &config).await;
                }
            })
        })
        .collect();
    for _ in 0..KILLS {
        let before = seen.fine.load(Ordering::SeqCst);
        soon("load", async {
            while seen.fine.load(Ordering::SeqCst) < before + 100 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        seen.killed_at.lock().unwrap().push(Instant::now());
        kill(world.handle.pid().unwrap(), Signal::KILL);
        world.until(|event| matches!(event, DataPlaneEvent::Serving { .. })).await;
    }
    let after = report(&mut world, |report| report.not_after.is_some()).await;
    assert_eq!(after.problem, None, "the successor has read the files");
    seen.stop.store(true, Ordering::SeqCst);
    for client in clients {
        soon("the end of a client", client).await.unwrap();
    }
    let count = |counter: &AtomicU32| counter.load(Ordering::SeqCst);
    println!(
        "{KILLS} kills under TLS: {} fine, {} torn in flight, {} refused, {} failed otherwise",
        count(&seen.fine),
        count(&seen.torn),
        count(&seen.refused),
        count(&seen.failed)
    );
    assert_eq!((count(&seen.refused), count(&seen.failed)), (0, 0));
    assert!(count(&seen.torn) <= KILLS * CLIENTS && count(&seen.fine) >= 100 * KILLS);
}
