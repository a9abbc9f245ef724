//! kill -9 at any point: everything acknowledged is there, nothing is half there, the lock is free at once.
//!
//! The child is this test binary, told by a variable to be one. A seed makes the points repeatable:
//! `ORCHESTRA_STORE_SEED=n ORCHESTRA_STORE_POINTS=n cargo test -p orchestra-store crash`.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use orchestra_model::record::Change;
use orchestra_store::{EventFilter, OpenError, Store, open_read_only};

use crate::fixture::{environment, id, launch, open};

const CHILD: &str = "ORCHESTRA_STORE_TEST_CHILD";

/// Body of the child: `HOME FIRST COUNT THREADS`; commits numbered launches and says which are acknowledged.
#[test]
fn child() {
    let Ok(arguments) = std::env::var(CHILD) else { return };
    let mut arguments = arguments.split(' ');
    let home = arguments.next().unwrap();
    let [first, count, threads] = [(); 3].map(|()| arguments.next().unwrap().parse::<u32>().unwrap());
    let store = open(Path::new(home));
    say("open");
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let next = AtomicU32::new(first);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= first + count {
                        return;
                    }
                    store.commit_blocking(launch(number)).unwrap();
                    say(&number.to_string());
                }
            });
        }
    });
}

/// One line, past the test harness, which would keep it back.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("@{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// The command that runs the child, behind `wrapper` if there is one.
fn child_command(wrapper: &[&str], home: &Path, first: u32, count: u32, threads: u32) -> Command {
    let me = std::env::current_exe().unwrap();
    let mut command = match wrapper {
        [] => Command::new(&me),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(&me);
            command
        }
    };
    command
        .args(["--exact", "crash::child", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{} {first} {count} {threads}", home.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// What a child said, until its end.
fn lines(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    let out = BufReader::new(child.stdout.take().unwrap());
    // The harness writes `test crash::child ... ` in front of the first line.
    out.lines().map_while(Result::ok).filter_map(|line| Some(line.split_once('@')?.1.to_owned()))
}

/// Checks that each launch is there as a whole or not at all, and returns the numbers of those that are.
pub(crate) fn whole_launches(store: &Store) -> BTreeSet<u32> {
    store.reader().verify().unwrap();
    let Some(state) = store.reader().state(&id()).unwrap() else { return BTreeSet::new() };
    let instances: BTreeSet<u32> = state.instances.keys().map(|id| id.ordinal).collect();
    let number = |text: &str| text.split(['-', '#', ' ']).filter_map(|part| part.parse().ok()).next_back().unwrap();
    let intents: BTreeSet<u32> = store
        .reader()
        .open_intents()
        .unwrap()
        .iter()
        .map(|line| number(line.entry.key.rsplit_once('#').unwrap().0))
        .collect();
    let events = store.reader().events(&EventFilter { limit: usize::MAX, ..EventFilter::default() }).unwrap();
    for (at, event) in (1..).zip(&events) {
        assert_eq!(event.sequence, at, "the sequence has a gap");
    }
    let events: BTreeSet<u32> = events.iter().map(|event| number(&event.cause)).collect();
    assert_eq!(instances, intents, "instances and intents differ");
    assert_eq!(instances, events, "instances and events differ");
    instances
}

/// Opens at once, although the owner died this instant.
fn open_at_once(home: &Path) -> Store {
    match Store::open(home, || 0) {
        Ok(store) => store,
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

/// Xorshift, as in <https://www.jstatsoft.org/article/view/v008i14>.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn number_from(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    let seed = number_from("ORCHESTRA_STORE_SEED", 1);
    let points = number_from("ORCHESTRA_STORE_POINTS", 80);
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut home = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeSet::new();
    let (mut first, mut total) = (1, 0);
    for point in 0..points {
        // A new state every ten points, so that its creation is hit as well.
        if point % 10 == 0 {
            home = tempfile::tempdir().unwrap();
            acknowledged.clear();
            first = 1;
        }
        let early = point % 10 == 0 && point % 20 == 10;
        let threads = [1, 4, 16][usize::try_from(random.below(3)).unwrap()];
        let mut child = child_command(&[], home.path(), first, 100_000, threads).spawn().unwrap();
        let mut said = lines(&mut child);
        if early {
            thread::sleep(Duration::from_micros(random.below(8_000)));
        } else {
            assert_eq!(said.next().as_deref(), Some("open"), "seed {seed}, point {point}: the child did not open");
            let wanted = random.below(120);
            for _ in 0..wanted {
                acknowledged.insert(said.next().unwrap().parse::<u32>().unwrap());
            }
            // Into the middle of the next commit: spinning hits finer than the timer's resolution.
            let (begun, pause) = (Instant::now(), Duration::from_micros(random.below(400)));
            while begun.elapsed() < pause {
                std::hint::spin_loop();
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        acknowledged.extend(said.filter_map(|line| line.parse::<u32>().ok()));
        // What a command without the lock sees must be the same.
        let looked = open_read_only(home.path())
            .unwrap()
            .map(|reader| reader.state(&id()).unwrap().map_or(0, |state| state.instances.len()));
        let store = open_at_once(home.path());
        let there = whole_launches(&store);
        assert_eq!(looked.unwrap_or(0), there.len(), "seed {seed}, point {point}: read-only shows another state");
        let lost: Vec<_> = acknowledged.difference(&there).collect();
        assert!(lost.is_empty(), "seed {seed}, point {point}: lost {lost:?}");
        total += acknowledged.len();
        first = there.last().map_or(1, |last| last + 1).max(first);
    }
    assert!(total > 0, "no commit was acknowledged");
}

#[test]
fn every_system_call_that_writes_may_be_the_last() {
    const CALLS: &str = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,ftruncate,unlink,fallocate";
    let strace = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    if !strace.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: strace is not installed or not allowed here");
        return;
    }
    // strace counts by thread. In an empty directory the calls of the thread that makes the state come first; in one
    // with a state those of the writer do.
    let empty = tempfile::tempdir().unwrap();
    let with_state = tempfile::tempdir().unwrap();
    open(with_state.path()).commit_blocking(vec![Change::Environment(environment())]).unwrap();
    for (before, at_least) in [(empty, 20), (with_state, 30)] {
        let mut killed = 0;
        for when in 1.. {
            let home = tempfile::tempdir().unwrap();
            for file in std::fs::read_dir(before.path()).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), home.path().join(file.file_name())).unwrap();
            }
            let trace = format!("trace={CALLS}");
            let inject = format!("inject={CALLS}:signal=KILL:when={when}");
            let wrapper = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
            let mut child = child_command(&wrapper, home.path(), 1, 8, 1).spawn().unwrap();
            let acknowledged: BTreeSet<u32> = lines(&mut child).filter_map(|line| line.parse().ok()).collect();
            let ended_well = child.wait().unwrap().success();
            let there = whole_launches(&open_at_once(home.path()));
            assert!(acknowledged.is_subset(&there), "call {when}: {acknowledged:?} acknowledged, {there:?} found");
            // One after the other: at most the one that was being written is there beyond.
            assert!(there.len() <= acknowledged.len() + 1, "call {when}: {there:?} found");
            if ended_well {
                break;
            }
            killed += 1;
        }
        println!("killed at {killed} system calls");
        assert!(killed >= at_least, "only {killed} points were hit: does strace inject?");
    }
}

#[test]
fn the_lock_of_a_killed_owner_is_free_and_that_of_a_living_one_is_not() {
    let home = tempfile::tempdir().unwrap();
    let mut child = child_command(&[], home.path(), 1, 1_000_000, 1).spawn().unwrap();
    let mut said = lines(&mut child);
    assert_eq!(said.next().as_deref(), Some("open"));
    let Err(error) = Store::open(home.path(), || 0) else { panic!("opened twice") };
    let OpenError::Locked { pid, .. } = &error else { panic!("{error}") };
    assert_eq!(*pid, Some(child.id()));
    assert!(error.to_string().contains(&child.id().to_string()), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    open_at_once(home.path());
}
