//! Open-loop load for measuring latency in microseconds.
//!
//! Requests arrive as a Poisson process, whatever became of those before, and the latency of each is counted from the
//! instant at which it was due: a system that stalls is charged for everything that had to wait ("coordinated omission",
//! Tene 2013). The sequence of arrivals is fixed by a seed, so that all systems under test get the same one.
//!
//! Common generators either send the next request when the last one is answered, or keep time with timers of one
//! millisecond, which is more than what is measured here. Arrivals come from a `timerfd`, everything runs on one thread.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    fmt, io,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::{
    io::unix::AsyncFd,
    net::TcpStream,
    task::{JoinSet, LocalSet},
};

use crate::random::Random;

/// What to send.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where.
    pub address: SocketAddr,
    /// Path of every request.
    pub path: String,
    /// How.
    pub wire: Wire,
    /// Requests per second.
    pub rate: f64,
    /// For so long, of which the first fifth does not count.
    pub time: Duration,
    /// Connections that are kept (not with [`Wire::Fresh`]).
    pub connections: usize,
    /// Seed of the arrivals.
    pub seed: u64,
}

/// How requests travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// HTTP/1.1 over kept connections, one request at a time on each.
    Kept,
    /// HTTP/1.1, each request over a connection of its own.
    Fresh,
    /// HTTP/2 by prior knowledge, requests spread evenly over the connections.
    Http2,
}

/// What came of it. Times are from the instant when a request was due to the last byte of its answer.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests that were answered.
    pub answered: usize,
    /// Requests that failed, and one of the reasons.
    pub failed: usize,
    /// Why one of them failed.
    pub reason: String,
    /// Percentiles 50, 99 and 99.9, and the maximum.
    pub latency: [Duration; 4],
    /// Percentile 99 within each [`WINDOW`], and of these the median. A machine that stands still for some milliseconds a
    /// second decides the percentile 99 of the whole; it spoils few windows.
    pub window_p99: Duration,
    /// The same as `latency` of how late the generator itself was: where this is not far below it, the generator is measured.
    pub lateness: [Duration; 4],
}

/// What is due within so long is looked at by itself.
const WINDOW: Duration = Duration::from_millis(100);

/// JSON, times in microseconds.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = |times: [Duration; 4]| times.map(|time| time.as_micros());
        let (latency, lateness) = (micros(self.latency), micros(self.lateness));
        write!(
            f,
            "{{\"answered\": {}, \"failed\": {}, \"reason\": {:?}, \"latency\": {latency:?}, \"window_p99\": {}, \
             \"lateness\": {lateness:?}}}",
            self.answered,
            self.failed,
            self.reason,
            self.window_p99.as_micros()
        )
    }
}

/// Runs a plan on the calling thread.
pub fn run(plan: &Plan) -> io::Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, pace(plan))
}

type Body = Empty<Bytes>;

/// What all requests share.
struct Shared {
    plan: Plan,
    uri: Uri,
    host: HeaderValue,
    /// Kept connections that carry nothing.
    idle: RefCell<Vec<http1::SendRequest<Body>>>,
    /// Kept connections there are.
    kept: Cell<usize>,
    /// Requests that are due and have no connection.
    waiting: RefCell<VecDeque<Instant>>,
    /// When each was due, since the first that counts, and how long it took.
    latencies: RefCell<Vec<(Duration, Duration)>>,
    failed: Cell<usize>,
    reason: RefCell<String>,
    /// What is due from here on counts.
    counts_from: Instant,
}

async fn pace(plan: &Plan) -> io::Result<Report> {
    let host = plan.address.to_string();
    let uri = if plan.wire == Wire::Http2 { format!("http://{host}{}", plan.path) } else { plan.path.clone() };
    let mut drivers = JoinSet::new();
    let mut idle = Vec::new();
    let mut multiplexed = Vec::new();
    for _ in 0..plan.connections {
        match plan.wire {
            Wire::Kept => idle.push(open(plan.address, &mut drivers).await.map_err(io::Error::other)?),
            Wire::Http2 => {
                let io = TokioIo::new(connect(plan.address).await?);
                let (sender, connection) =
                    http2::handshake(TokioExecutor::new(), io).await.map_err(io::Error::other)?;
                drivers.spawn_local(async move {
                    // Its end is seen by the requests on it.
                    let _ = connection.await;
                });
                multiplexed.push(sender);
            }
            Wire::Fresh => {}
        }
    }
    let begun = Instant::now();
    let shared = Rc::new(Shared {
        uri: uri.parse().map_err(io::Error::other)?,
        host: HeaderValue::from_str(&host).map_err(io::Error::other)?,
        kept: Cell::new(idle.len()),
        idle: RefCell::new(idle),
        waiting: RefCell::default(),
        latencies: RefCell::default(),
        failed: Cell::new(0),
        reason: RefCell::default(),
        counts_from: begun + plan.time / 5,
        plan: plan.clone(),
    });
    let timer = Timer::new()?;
    let mut random = Random::new(plan.seed);
    let mut due = begun;
    let mut turn = 0;
    let mut lateness = Vec::new();
    let mut requests = JoinSet::new();
    loop {
        due += Duration::from_secs_f64(exponential(&mut random) / plan.rate);
        if due > begun + plan.time {
            break;
        }
        timer.until(due).await?;
        if due >= shared.counts_from {
            lateness.push(due.elapsed());
        }
        let shared = Rc::clone(&shared);
        match plan.wire {
            Wire::Kept => {
                let Some(sender) = shared.idle.borrow_mut().pop() else {
                    shared.waiting.borrow_mut().push_back(due);
                    continue;
                };
                requests.spawn_local(kept(shared, sender, due));
            }
            Wire::Fresh => {
                requests.spawn_local(async move {
                    let result = fresh(&shared).await;
                    shared.note(due, result);
                });
            }
            Wire::Http2 => {
                turn = (turn + 1) % multiplexed.len();
                let mut sender = multiplexed[turn].clone();
                requests.spawn_local(async move {
                    let answer = sender.send_request(shared.request());
                    let result = read(answer.await).await;
                    shared.note(due, result);
                });
            }
        }
        while requests.try_join_next().is_some() {}
    }
    // What is in flight or waits is charged for all of its time, up to a bound.
    let _ =
        tokio::time::timeout(Duration::from_secs(10), async { while requests.join_next().await.is_some() {} }).await;
    let unfinished = requests.len() + shared.waiting.borrow().len();
    let answered = shared.latencies.take();
    let window_p99 = window_p99(&answered);
    let mut latencies: Vec<Duration> = answered.into_iter().map(|(_, latency)| latency).collect();
    Ok(Report {
        answered: latencies.len(),
        failed: shared.failed.get() + unfinished,
        reason: if unfinished > 0 { "no answer within 10 s".to_owned() } else { shared.reason.take() },
        latency: percentiles(&mut latencies),
        window_p99,
        lateness: percentiles(&mut lateness),
    })
}

impl Shared {
    fn request(&self) -> Request<Body> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = self.uri.clone();
        if self.plan.wire != Wire::Http2 {
            request.headers_mut().insert(header::HOST, self.host.clone());
        }
        if self.plan.wire == Wire::Fresh {
            request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        request
    }

    fn note(&self, due: Instant, result: Result<(), String>) {
        match result {
            Ok(()) if due >= self.counts_from => {
                self.latencies.borrow_mut().push((due - self.counts_from, due.elapsed()));
            }
            Ok(()) => {}
            Err(reason) => {
                self.failed.set(self.failed.get() + 1);
                *self.reason.borrow_mut() = reason;
            }
        }
    }
}

/// Sends what is due on a kept connection, and then what waits for one.
async fn kept(shared: Rc<Shared>, mut sender: http1::SendRequest<Body>, mut due: Instant) {
    loop {
        let result = read(sender.send_request(shared.request()).await).await;
        let lost = result.is_err() || sender.ready().await.is_err();
        shared.note(due, result);
        if lost {
            // Not made anew: a system that closes connections under load shows it as failures.
            shared.kept.set(shared.kept.get() - 1);
            if shared.kept.get() == 0 {
                shared.failed.set(shared.failed.get() + shared.waiting.take().len());
            }
            return;
        }
        let next = shared.waiting.borrow_mut().pop_front();
        match next {
            Some(next) => due = next,
            None => break,
        }
    }
    shared.idle.borrow_mut().push(sender);
}

async fn fresh(shared: &Shared) -> Result<(), String> {
    let mut drivers = JoinSet::new();
    let mut sender = open(shared.plan.address, &mut drivers).await?;
    read(sender.send_request(shared.request()).await).await
}

async fn open(address: SocketAddr, drivers: &mut JoinSet<()>) -> Result<http1::SendRequest<Body>, String> {
    let io = TokioIo::new(connect(address).await.map_err(|error| error.to_string())?);
    let (sender, connection) = http1::handshake(io).await.map_err(|error| error.to_string())?;
    drivers.spawn_local(async move {
        // Its end is seen by the requests on it.
        let _ = connection.await;
    });
    Ok(sender)
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

async fn read(answer: hyper::Result<http::Response<hyper::body::Incoming>>) -> Result<(), String> {
    let answer = answer.map_err(|error| error.to_string())?;
    let status = answer.status();
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        frame.map_err(|error| error.to_string())?;
    }
    if status == StatusCode::OK { Ok(()) } else { Err(format!("status {status}")) }
}

/// Exponentially distributed with mean 1: the gaps of a Poisson process.
fn exponential(random: &mut Random) -> f64 {
    // 53 bits are what a float can hold; the half keeps the logarithm's argument above 0.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    let uniform = ((random.number() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -uniform.ln()
}

fn percentiles(times: &mut [Duration]) -> [Duration; 4] {
    times.sort_unstable();
    let at = |per_mille: usize| {
        // Nearest rank: the smallest value that so many do not exceed.
        let rank = (times.len() * per_mille).div_ceil(1000).max(1);
        times.get(rank - 1).copied().unwrap_or_default()
    };
    [at(500), at(990), at(999), at(1000)]
}

/// The median of the percentiles 99 of what was due within each window, from pairs of when and how long.
fn window_p99(answered: &[(Duration, Duration)]) -> Duration {
    let mut windows: BTreeMap<u128, Vec<Duration>> = BTreeMap::new();
    for (due, latency) in answered {
        windows.entry(due.as_micros() / WINDOW.as_micros()).or_default().push(*latency);
    }
    let mut tails: Vec<Duration> = windows.into_values().map(|mut window| percentiles(&mut window)[1]).collect();
    percentiles(&mut tails)[0]
}

/// Wakes to the microsecond; tokio's own timers have one millisecond.
struct Timer(AsyncFd<std::os::fd::OwnedFd>);

impl Timer {
    fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(unsafe_code, reason = "the runtime must be promised that the descriptor stays the same")]
        // SAFETY: an `OwnedFd` names one open descriptor until it is dropped, and nobody else gets hold of this one.
        Ok(Self(unsafe { AsyncFd::register(timer) }?))
    }

    async fn until(&self, due: Instant) -> io::Result<()> {
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The answers of others are read also while this is behind.
                tokio::task::yield_now().await;
                return Ok(());
            }
            let once = Itimerspec {
                it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
                it_value: Timespec::try_from(left).map_err(io::Error::other)?,
            };
            rustix::time::timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
            let mut guard = self.0.readable().await?;
            let _ = guard.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut [0_u8; 8])?));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut times: Vec<Duration> = (1..=1000).rev().map(Duration::from_micros).collect();
        assert_eq!(percentiles(&mut times), [500, 990, 999, 1000].map(Duration::from_micros));
        assert_eq!(percentiles(&mut [Duration::from_micros(7)]), [Duration::from_micros(7); 4]);
    }

    #[test]
    fn a_machine_that_stands_still_spoils_few_windows() {
        let ms = Duration::from_millis;
        // 20 windows of 100 requests, each 1 ms but for two of 3 ms; two windows stood still.
        let answered: Vec<_> = (0..2000_u32)
            .map(|n| {
                let latency = if n / 100 % 10 == 7 {
                    50
                } else if n % 50 == 0 {
                    3
                } else {
                    1
                };
                (ms(1) * n, ms(latency))
            })
            .collect();
        assert_eq!(window_p99(&answered), ms(3));
        assert_eq!(percentiles(&mut answered.iter().map(|(_, latency)| *latency).collect::<Vec<_>>())[1], ms(50));
        assert_eq!(window_p99(&[]), Duration::ZERO);
    }

    #[test]
    fn arrivals_have_the_mean_and_the_spread_of_a_poisson_process() {
        let mut random = Random::new(1);
        let gaps: Vec<f64> = (0..100_000).map(|_| exponential(&mut random)).collect();
        let mean = gaps.iter().sum::<f64>() / 1e5;
        let above = gaps.iter().filter(|gap| **gap > 2.0).count();
        assert!((0.98..1.02).contains(&mean), "{mean}");
        // e^-2 of them.
        assert!((13_000..14_000).contains(&above), "{above}");
    }

    #[test]
    fn a_server_that_stalls_is_charged_for_all_that_waits() {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut tcp, _) = listener.accept().unwrap();
            let (mut requests, mut buffer) = (0, [0; 4096]);
            while let Ok(1..) = tcp.read(&mut buffer) {
                requests += 1;
                if requests == 100 {
                    std::thread::sleep(Duration::from_millis(300));
                }
                tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
            }
        });
        let plan = Plan {
            address,
            path: "/".to_owned(),
            wire: Wire::Kept,
            rate: 200.0,
            time: Duration::from_secs(2),
            connections: 1,
            seed: 1,
        };
        let report = run(&plan).unwrap();
        server.join().unwrap();
        assert_eq!((report.failed, report.reason.as_str()), (0, ""));
        assert!((250..400).contains(&report.answered), "{report}");
        // A closed loop would have seen one slow request; here about 60 of 320 were due during the stall.
        assert!(
            report.latency[1] > Duration::from_millis(100) && report.latency[3] > Duration::from_millis(250),
            "{report}"
        );
    }
}
