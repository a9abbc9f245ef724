//! What it costs to ask for the usage of a hundred instances at once, with and without control groups.
//!
//! Half of them are single processes and half are a shell with two children, so that shared pages have to be told apart.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use orchestra_model::{
    desired::{Resources, Signal},
    launch::{Launch, LaunchKey, ProviderEvent, Termination},
    quantity::Timespan,
};
use orchestra_provider::Provider as _;
use orchestra_provider_process::{Cgroups, Options, ProcessProvider};
use orchestra_task::TaskTree;

const INSTANCES: u32 = 100;
const SAMPLES: usize = 50;

fn launch(ordinal: u32) -> Launch {
    let sleep = "/bin/sleep 1000";
    let script = if ordinal.is_multiple_of(2) { format!("exec {sleep}") } else { format!("{sleep} & {sleep} & wait") };
    Launch {
        key: LaunchKey {
            environment: "bench/dev".parse().expect("an environment"),
            instance: format!("api-r1-{ordinal}").parse().expect("an instance"),
            attempt: 1,
        },
        command: ["/bin/sh", "-c", &script].map(str::to_owned).to_vec(),
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

/// CPU time of this process.
fn cpu() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), u32::try_from(used.tv_nsec).unwrap_or(0))
}

async fn measure(name: &str, cgroups: Cgroups) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut options = Options::below(dir.path(), env!("CARGO_BIN_EXE_orchestra-shim"));
    options.shim_args.clear();
    options.cgroups = cgroups;
    let provider = ProcessProvider::open(options, TaskTree::new()).expect("the folders can be made");
    let mut events = provider.take_events().expect("nobody took them");
    let keys: Vec<LaunchKey> = (1..=INSTANCES).map(|ordinal| launch(ordinal).key).collect();
    for ordinal in 1..=INSTANCES {
        provider.start(launch(ordinal)).await.expect("the start is recorded");
    }
    // The shells have forked when all are there.
    let all = u32::try_from(keys.len()).expect("few") * 2;
    loop {
        let usage = provider.usage(keys.clone()).await;
        if usage.iter().map(|(_, usage)| usage.processes).sum::<u32>() == all {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut times = Vec::new();
    let before = cpu();
    for _ in 0..SAMPLES {
        let begin = Instant::now();
        assert_eq!(provider.usage(keys.clone()).await.len(), keys.len());
        times.push(begin.elapsed());
    }
    let used = cpu().saturating_sub(before) / u32::try_from(SAMPLES).expect("few");
    times.sort();
    eprintln!(
        "{name}: {INSTANCES} instances: p50 {:?}, max {:?}, CPU {used:?} per sample",
        times[SAMPLES / 2],
        times[SAMPLES - 1]
    );
    let how = Termination { signal: Signal::Kill, grace: Timespan::millis(0) };
    for key in &keys {
        provider.terminate(key.clone(), how).await.expect("it is stopped");
    }
    let mut gone = 0;
    while gone < keys.len() {
        let (_, event) = events.recv().await.expect("the provider lives");
        gone += usize::from(event == ProviderEvent::Gone);
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        measure("control groups", Cgroups::Auto).await;
        measure("no control groups", Cgroups::Off).await;
    });
}
