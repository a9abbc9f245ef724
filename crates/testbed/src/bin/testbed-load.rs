//! Puts open-loop load on an address and prints raw counts.
//!
//! `testbed-load ADDRESS [SECONDS]`, with rates from the environment: `GET`, `POST`, `FRESH`, `H2C` (per second),
//! `STREAMS`, `WEBSOCKETS` (open at every moment), `SESSION_MS`. Exits with 1 if anything failed.

use std::{
    io::{self, Write},
    net::SocketAddr,
    process::ExitCode,
    time::Duration,
};

use orchestra_testbed::load::{Load, Plan};

fn main() -> io::Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let usage = || io::Error::other("usage: testbed-load ADDRESS [SECONDS]");
    let address: SocketAddr = arguments.next().and_then(|text| text.parse().ok()).ok_or_else(usage)?;
    let seconds = arguments.next().map_or(Some(10), |text| text.parse().ok()).ok_or_else(usage)?;
    let rate = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let plan = Plan {
        get: rate("GET", 100),
        post: rate("POST", 50),
        fresh: rate("FRESH", 20),
        h2c: rate("H2C", 0),
        streams: rate("STREAMS", 4),
        websockets: rate("WEBSOCKETS", 4),
        session: Duration::from_millis(u64::from(rate("SESSION_MS", 1000))),
        ..Plan::to(address)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let report = runtime.block_on(async {
        let load = Load::start(plan);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        load.stop().await
    });
    write!(io::stdout(), "{report}")?;
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
