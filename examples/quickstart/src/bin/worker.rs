//! Takes tasks from the queue, runs their tools, and stores the results. As many as one likes may run at one time.
//!
//! Environment: `PORT`, `DATA_DIR`; optional `LEASE_MS` (10000), `POLL_MS` (50), `RELEASE_LABEL`, `INSTANCE`.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use axum::{Json, Router, extract::State, http::StatusCode, routing::get};
use orchestra_quickstart::{
    serve::{Gate, log, run, serve, termination},
    settings::{self, Error},
    store::Store,
    tools,
};
use serde_json::{Value, json};
use tokio::sync::watch;

#[derive(Clone)]
struct Worker {
    store: Store,
    gate: Gate,
    done: Arc<AtomicU64>,
}

fn main() -> ExitCode {
    run(async {
        let end = termination()?;
        let worker =
            Worker { store: Store::open(&settings::database()?)?, gate: Gate::default(), done: Arc::default() };
        let router = Router::new()
            .route("/ready", get(ready))
            .route("/health", get(async || "ok\n"))
            .route("/version", get(version))
            .with_state(worker.clone());
        let (ending, ended) = watch::channel(false);
        let end = async move {
            end.await;
            ending.send_replace(true);
        };
        // Whichever fails ends the program; a worker that serves health but takes no tasks would be worse.
        tokio::try_join!(serve(router, worker.gate.clone(), end), work(&worker, ended))?;
        Ok(())
    })
}

async fn work(worker: &Worker, mut ended: watch::Receiver<bool>) -> Result<(), Error> {
    let lease = settings::millis("LEASE_MS", 10_000)?;
    let pause = settings::millis("POLL_MS", 50)?;
    let owner = format!("{}-{}", settings::text("INSTANCE").unwrap_or_else(|| "worker".to_owned()), std::process::id());
    let mut migrated = false;
    while !*ended.borrow() {
        let Some(in_flight) = worker.gate.enter() else { break };
        // Before the migration there is no queue; readiness says so.
        migrated = migrated || worker.store.run(Store::check).await.is_ok();
        let name = owner.clone();
        let task = if migrated { worker.store.run(move |store| store.lease(&name, lease)).await? } else { None };
        let Some(task) = task else {
            drop(in_flight);
            // SQLite tells no other process of a change, so this is a look at an index every now and then. Both arms
            // only wait.
            tokio::select! { () = tokio::time::sleep(pause) => {} _ = ended.changed() => {} }
            continue;
        };
        let result = tools::run(&task.tool, &task.input);
        let (id, name) = (task.id, owner.clone());
        if worker.store.run(move |store| store.complete(id, &name, &result)).await? {
            worker.done.fetch_add(1, Relaxed);
            log(format_args!("task {} {} attempt {} done", task.id, task.tool, task.attempt));
        } else {
            log(format_args!(
                "task {} {} attempt {} took too long; somebody else has it",
                task.id, task.tool, task.attempt
            ));
        }
    }
    Ok(())
}

async fn ready(State(worker): State<Worker>) -> (StatusCode, String) {
    if worker.gate.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "ending\n".to_owned());
    }
    match worker.store.run(Store::check).await {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
    }
}

async fn version(State(worker): State<Worker>) -> Json<Value> {
    Json(json!({
        "release": settings::text("RELEASE_LABEL"),
        "instance": settings::text("INSTANCE"),
        "tasks_done": worker.done.load(Relaxed),
    }))
}
