//! What a supervised start costs over a raw one.
//!
//! `raw` spawns `/bin/true` and waits for it. `provider` starts the same under a shim, up to the event `Started` (the
//! program executes) and up to `Gone` (it ended, its logs are complete, and that is recorded). The overhead of a start is
//! `provider/started` minus `raw`, though `raw` also contains the program's whole life.
//!
//! With `ORCHESTRA_BIN=…/orchestra` shims come from that binary, as in production, instead of from the small one of this
//! crate. `-- none` leaves the groups out and takes the 500 pairs at the end alone.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use orchestra_model::{
    desired::Resources,
    launch::{Launch, LaunchKey, ProviderEvent},
};
use orchestra_provider::Provider as _;
use orchestra_provider_process::{Options, ProcessProvider};
use orchestra_task::TaskTree;
use tokio::sync::mpsc;

fn launch(ordinal: u32) -> Launch {
    Launch {
        key: LaunchKey {
            environment: "bench/dev".parse().expect("an environment"),
            instance: format!("api-r1-{ordinal}").parse().expect("an instance"),
            attempt: 1,
        },
        command: vec!["/bin/true".into()],
        directory: "/".into(),
        env: BTreeMap::new(),
        secrets: BTreeMap::new(),
        user: None,
        umask: 0o022,
        limits: BTreeMap::new(),
        resources: Resources::default(),
        ports: BTreeMap::new(),
        ready_line: None,
        notify: false,
        watchdog: None,
        log_max_bytes: 1 << 20,
        log_keep: 1,
    }
}

struct Bench {
    provider: ProcessProvider,
    events: mpsc::Receiver<(LaunchKey, ProviderEvent)>,
    next: u32,
}

impl Bench {
    /// Starts one instance; returns the times to `Started` and to `Gone`.
    async fn start(&mut self) -> (Duration, Duration) {
        self.next += 1;
        let launch = launch(self.next);
        let key = launch.key.clone();
        let begin = Instant::now();
        self.provider.start(launch).await.expect("the start is recorded");
        let mut started = Duration::ZERO;
        loop {
            match self.events.recv().await.expect("the provider lives").1 {
                ProviderEvent::Started { .. } => started = begin.elapsed(),
                ProviderEvent::Gone => break,
                _ => {}
            }
        }
        let gone = begin.elapsed();
        self.provider.forget(key).await.expect("it is gone");
        (started, gone)
    }
}

fn starts(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let mut bench = runtime.block_on(async { open(dir.path()) });
    let mut group = criterion.benchmark_group("start");
    group.bench_function("raw", |b| {
        b.iter(|| Command::new("/bin/true").env_clear().spawn().expect("it spawns").wait().expect("it ends"));
    });
    group.bench_function("shim_only", |b| {
        // The shim's program itself, refusing its arguments: exec and dynamic linking of a second program.
        b.iter(|| Command::new(env!("CARGO_BIN_EXE_orchestra-shim")).env_clear().spawn().expect("it spawns").wait());
    });
    for (name, pick) in [("provider/started", 0), ("provider/gone", 1)] {
        group.bench_function(name, |b| {
            b.iter_custom(|count| {
                runtime.block_on(async {
                    let mut sum = Duration::ZERO;
                    for _ in 0..count {
                        let (started, gone) = bench.start().await;
                        sum += if pick == 0 { started } else { gone };
                    }
                    sum
                })
            });
        });
    }
    group.finish();
    let (mut raw, mut started): (Vec<Duration>, Vec<Duration>) = (Vec::new(), Vec::new());
    for _ in 0..500 {
        let begin = Instant::now();
        Command::new("/bin/true").env_clear().spawn().expect("it spawns").wait().expect("it ends");
        raw.push(begin.elapsed());
        started.push(runtime.block_on(bench.start()).0);
    }
    raw.sort();
    started.sort();
    for (name, percent) in [("p50", 50), ("p99", 99)] {
        let (raw, started) = (raw[raw.len() * percent / 100], started[started.len() * percent / 100]);
        eprintln!("{name}: raw {raw:?}, provider to Started {started:?}, overhead {:?}", started.saturating_sub(raw));
    }
}

fn open(state: &Path) -> Bench {
    let mut options = Options::below(state, env!("CARGO_BIN_EXE_orchestra-shim"));
    options.shim_args.clear();
    // The shim of production is a role of a binary twenty times as large.
    if let Some(program) = std::env::var_os("ORCHESTRA_BIN") {
        options.shim_program = program.into();
        options.shim_args.push("shim".into());
    }
    let provider = ProcessProvider::open(options, TaskTree::new()).expect("the folders can be made");
    let events = provider.take_events().expect("nobody took them");
    Bench { provider, events, next: 0 }
}

criterion_group!(benches, starts);
criterion_main!(benches);
