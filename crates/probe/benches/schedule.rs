//! Cost and punctuality of the prober: 10,000 HTTP checks every 10 s against one responder in a process of its own.
//!
//! ```text
//! cargo bench -p orchestra-probe                      30 s after a warm-up of one interval
//! cargo bench -p orchestra-probe -- --seconds 600     a long run
//!     --tcp              TCP checks instead of HTTP
//!     --threads N        worker threads of the prober's runtime (2)
//!     --targets N        how many targets (10000)
//! ```
//!
//! The warm-up holds the burst of first checks, which is reported apart: ten thousand targets never appear in one instant
//! in earnest. CPU time is that of this process alone, from the process clock of the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use orchestra_model::{
    EnvironmentId,
    launch::{Exec, ExecOutcome, Launch, LaunchKey, Observed, ProviderEvent, Termination},
};
use orchestra_probe::{HttpCheck, Leaf, Limits, ProbeId, Prober, Target};
use orchestra_provider::{BoxFuture, Error, LogLine, LogQuery, Provider};
use orchestra_task::TaskTree;
use rustix::time::{ClockId, clock_gettime};
use tokio::{sync::mpsc, time::Instant};

const EVERY: Duration = Duration::from_secs(10);

struct Options {
    seconds: u64,
    threads: usize,
    targets: u64,
    tcp: bool,
}

fn main() {
    let mut options = Options { seconds: 30, threads: 2, targets: 10_000, tcp: false };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse::<u64>().ok()).expect("a number follows");
        match argument.as_str() {
            "--responder" => return respond(true),
            "--acceptor" => return respond(false),
            "--seconds" => options.seconds = number(),
            "--threads" => options.threads = usize::try_from(number()).expect("a small number"),
            "--targets" => options.targets = number(),
            "--tcp" => options.tcp = true,
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(options.threads)
        .enable_all()
        .build()
        .expect("a runtime starts");
    runtime.block_on(measure(&options));
}

async fn measure(options: &Options) {
    let responder = Responder::start(if options.tcp { "--acceptor" } else { "--responder" });
    let tree = TaskTree::new();
    let (prober, mut outcomes) = Prober::new(Arc::new(NoCommands), &tree, Limits::default());
    for id in 0..options.targets {
        prober.set(Target {
            id: ProbeId(id),
            leaf: if options.tcp {
                Leaf::Tcp { address: responder.address }
            } else {
                Leaf::Http(HttpCheck {
                    address: responder.address,
                    method: "GET".to_owned(),
                    path: "/ready".to_owned(),
                    headers: BTreeMap::new(),
                    body: None,
                    status: BTreeSet::new(),
                    contains: None,
                })
            },
            every: EVERY,
            timeout: Duration::from_secs(3),
        });
    }
    let warm = Instant::now() + EVERY;
    let (mut passed, mut failed) = (0u64, BTreeMap::<String, u64>::new());
    while let Ok(Some(outcome)) = tokio::time::timeout_at(warm, outcomes.recv()).await {
        if !outcome.passed {
            *failed.entry(outcome.detail).or_default() += 1;
        }
    }
    let before = prober.lateness();
    println!(
        "burst of {} first checks: p50 {:?} p99 {:?} max {:?}, failed {failed:?}",
        before.first.count(),
        before.first.quantile(0.5),
        before.first.quantile(0.99),
        before.first.max(),
    );
    failed.clear();
    let (cpu, begun) = (cpu_time(), Instant::now());
    let end = begun + Duration::from_secs(options.seconds);
    let mut took = Vec::new();
    while let Ok(Some(outcome)) = tokio::time::timeout_at(end, outcomes.recv()).await {
        took.push(outcome.took);
        if outcome.passed {
            passed += 1;
        } else {
            *failed.entry(outcome.detail).or_default() += 1;
        }
    }
    let (cpu, wall) = (cpu_time().saturating_sub(cpu).as_secs_f64(), begun.elapsed().as_secs_f64());
    let after = prober.lateness();
    let repeated = after.repeated.since(&before.repeated);
    took.sort_unstable();
    let took =
        |q: usize| took.get((took.len() * q / 100).min(took.len().saturating_sub(1))).copied().unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "a report")]
    let per_check = cpu * 1e6 / (passed + failed.values().sum::<u64>()).max(1) as f64;
    println!(
        "{} {} checks every {EVERY:?}, {} threads, {wall:.1} s: passed {passed}, failed {failed:?}, left out {}",
        options.targets,
        if options.tcp { "TCP" } else { "HTTP" },
        options.threads,
        after.skipped - before.skipped,
    );
    println!(
        "lateness: p50 {:?} p99 {:?} p99.9 {:?} max {:?} ({} checks)",
        repeated.quantile(0.5),
        repeated.quantile(0.99),
        repeated.quantile(0.999),
        repeated.max(),
        repeated.count(),
    );
    println!("answer: p50 {:?} p99 {:?}", took(50), took(99));
    println!("CPU: {:.1} % of one core, {per_check:.0} us per check; {}", cpu * 100.0 / wall, memory());
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("below a second"))
}

fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS")).collect::<Vec<_>>().join(", ")
}

// === the responder, a child of this process so that its CPU time counts apart ===

struct Responder {
    child: Child,
    address: SocketAddr,
}

impl Responder {
    fn start(role: &str) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let mut child = Command::new(program)
            .arg(role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program starts again");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("the responder says its address");
        let address = line.trim().parse().expect("an address");
        Self { child, address }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers every connection with 200, or merely accepts it, until standard input ends; plain blocking code, one
/// connection after the other.
fn respond(answers: bool) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    println!("{}", listener.local_addr().expect("bound"));
    std::io::stdout().flush().expect("the parent reads");
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        // The parent is gone.
        std::process::abort();
    });
    let mut buffer = [0; 1_024];
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        if answers && stream.read(&mut buffer).is_ok_and(|n| n > 0) {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nok\n");
        }
    }
}

/// Has no commands to run.
struct NoCommands;

impl Provider for NoCommands {
    fn start(&self, _: Launch) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(std::future::pending())
    }
    fn terminate(&self, _: LaunchKey, _: Termination) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(std::future::pending())
    }
    fn find_by_intent(&self, _: LaunchKey) -> BoxFuture<'_, Result<Option<Observed>, Error>> {
        Box::pin(std::future::pending())
    }
    fn observe(&self, _: EnvironmentId) -> BoxFuture<'_, Result<Vec<Observed>, Error>> {
        Box::pin(std::future::pending())
    }
    fn forget(&self, _: LaunchKey) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(std::future::pending())
    }
    fn exec(&self, _: Exec) -> BoxFuture<'_, Result<ExecOutcome, Error>> {
        Box::pin(std::future::pending())
    }
    fn create_volume(&self, _: String) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(std::future::pending())
    }
    fn volume_exists(&self, _: String) -> BoxFuture<'_, Result<bool, Error>> {
        Box::pin(std::future::pending())
    }
    fn delete_volume(&self, _: String) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(std::future::pending())
    }
    fn logs(&self, _: LogQuery) -> BoxFuture<'_, Result<mpsc::Receiver<LogLine>, Error>> {
        Box::pin(std::future::pending())
    }
    fn take_events(&self) -> Option<mpsc::Receiver<(LaunchKey, ProviderEvent)>> {
        None
    }
}
