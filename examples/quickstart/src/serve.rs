//! How a program serves and how it ends.
//!
//! On SIGTERM (or Ctrl-C) readiness fails first, then new work is refused while what has begun goes on, and when the last
//! of it is done the listener closes and the program returns:
//!
//! ```text
//! serving --SIGTERM--> draining (ready: 503, new work: 503) --nothing in flight--> closed --> exit 0
//! ```

use std::{
    future::Future,
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use axum::Router;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::settings::{self, Error};

/// Counts what is in flight, and refuses more once the program ends. Clones are the same gate.
#[derive(Clone, Default)]
pub struct Gate(Arc<Inner>);

#[derive(Default)]
struct Inner {
    draining: AtomicBool,
    in_flight: watch::Sender<usize>,
}

/// A piece of work in flight, until it is dropped.
pub struct InFlight(Arc<Inner>);

impl Gate {
    /// Lets a piece of work in; `None` once the program ends.
    pub fn enter(&self) -> Option<InFlight> {
        // Counted before the look at the flag, so that the drain either sees the work or the work sees the drain.
        self.0.in_flight.send_modify(|n| *n += 1);
        let entered = InFlight(self.0.clone());
        (!self.is_draining()).then_some(entered)
    }

    /// Whether the program is ending.
    pub fn is_draining(&self) -> bool {
        self.0.draining.load(SeqCst)
    }

    /// How much is in flight.
    pub fn in_flight(&self) -> usize {
        *self.0.in_flight.borrow()
    }

    /// Refuses new work and waits until nothing is in flight.
    pub async fn drain(&self) {
        self.0.draining.store(true, SeqCst);
        // An error would mean that the sender is gone, and it is in `self`.
        let _ = self.0.in_flight.subscribe().wait_for(|n| *n == 0).await;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|n| *n -= 1);
    }
}

/// Completes at the first SIGTERM or Ctrl-C. Fails if the handlers cannot be installed.
pub fn termination() -> Result<impl Future<Output = ()>, Error> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    Ok(async move {
        // Both arms only wait.
        tokio::select! { _ = term.recv() => {} _ = int.recv() => {} }
    })
}

/// Serves on `$PORT` until `end` completes and the gate is empty.
pub async fn serve(router: Router, gate: Gate, end: impl Future<Output = ()> + Send + 'static) -> Result<(), Error> {
    let address = settings::address()?;
    let listener = TcpListener::bind(address).await.map_err(|error| format!("cannot listen on {address}: {error}"))?;
    log(format_args!("listening on http://{}", listener.local_addr()?));
    let drained = async move {
        end.await;
        log(format_args!("asked to end; {} in flight", gate.in_flight()));
        gate.drain().await;
    };
    axum::serve(listener, router).with_graceful_shutdown(drained).await?;
    log(format_args!("bye"));
    Ok(())
}

/// Writes a line to the log.
pub fn log(line: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // A log that nobody takes is no reason to end.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// Runs a program to its end; an error is logged and makes the exit code 1.
pub fn run(program: impl Future<Output = Result<(), Error>>) -> std::process::ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = runtime.map_err(Error::from).and_then(|runtime| runtime.block_on(program));
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            log(format_args!("error: {error}"));
            std::process::ExitCode::FAILURE
        }
    }
}
