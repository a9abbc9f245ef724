//! Server, shim and program killed at any time: what survives goes on, what is gone is known.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use orchestra_model::{
    launch::{Exit, LaunchKey, ProviderEvent},
    quantity::Timespan,
};
use orchestra_provider::conformance::{Program, Server, term};
use orchestra_provider_process::Cgroups;

use crate::world::{self, BOTH, Processes, bench, joined, kill_nine, lines, survivors, torture};

fn exit_of(seen: &[ProviderEvent]) -> Exit {
    let find = |event: &ProviderEvent| if let ProviderEvent::Exited { exit, .. } = event { Some(*exit) } else { None };
    seen.iter().find_map(find).unwrap()
}

/// Number that the counting program last got rid of.
fn counted(file: &Path) -> u64 {
    fs::read(file).ok().and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// The log must hold 1, 2, 3 … without a gap, at least up to what was counted. Lines are sorted because the program
/// writes to two pipes, which keep no order between each other.
fn check_count(log: &[u8], file: &Path) {
    let text = std::str::from_utf8(log).unwrap();
    let mut numbers: Vec<u64> = text.lines().map(|line| line.parse().expect("whole numbers only")).collect();
    numbers.sort_unstable();
    for (index, number) in numbers.iter().enumerate() {
        assert_eq!(*number, index as u64 + 1, "each number once, none missing");
    }
    let counted = counted(file);
    assert!(numbers.len() as u64 >= counted, "{} lines of {counted}", numbers.len());
    assert!(counted > 0);
}

async fn counts_on(file: &Path) {
    let before = counted(file);
    world::eventually("it goes on counting", || counted(file) > before + 10).await;
}

async fn start_counting(
    server: &mut Server,
    world: &Processes,
    bench: &orchestra_provider::conformance::Bench,
) -> (LaunchKey, u32, PathBuf) {
    let file = world.dir.path().join("counted");
    let mut launch = bench.launch(1, Program::Run);
    launch.command = torture(&["count", file.to_str().unwrap(), "2"]);
    launch.log_max_bytes = 100_000;
    launch.log_keep = 1_000_000;
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    let pid = server.started(&key).await;
    counts_on(&file).await;
    (key, pid, file)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_is_replaced_and_nothing_is_lost() {
    for cgroups in BOTH {
        let (world, bench) = bench("shim", cgroups);
        let mut server = bench.serve();
        let (key, pid, file) = start_counting(&mut server, &world, &bench).await;
        let marker = world::marker(&world, &key);
        for _ in 0..5 {
            let shim = world::shim_of(&world, &key);
            kill_nine(shim);
            world::eventually("another shim takes over", || world::shim_of(&world, &key) != shim).await;
            counts_on(&file).await;
            assert!(world::lives(pid));
            let entry = PathBuf::from(format!("/proc/{shim}"));
            world::eventually("the killed shim is reaped", || !entry.exists()).await;
        }
        // Its exit is known although its parent is gone.
        kill_nine(pid);
        assert_eq!(exit_of(&server.gone(&key).await), Exit::Signal(9));
        assert_eq!(survivors(&marker), [] as [u32; 0]);
        check_count(&joined(&lines(&*server.provider, &key, None).await), &file);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_while_no_shim_lives_is_known() {
    for cgroups in BOTH {
        let (world, bench) = bench("no-shim", cgroups);
        let mut server = bench.serve();
        let (key, pid, file) = start_counting(&mut server, &world, &bench).await;
        // In this order the program outlives its shim by an instant at most, and whoever takes over is too late.
        kill_nine(world::shim_of(&world, &key));
        kill_nine(pid);
        let seen = server.gone(&key).await;
        assert_eq!(exit_of(&seen), Exit::Signal(9), "{seen:?}");
        assert!(!format!("{seen:?}").contains("missing"), "{seen:?}");
        check_count(&joined(&lines(&*server.provider, &key, None).await), &file);
    }
}

/// The limit of what is kept: the pipes of a program that ends when neither server nor shim is there go with it.
#[tokio::test(flavor = "multi_thread")]
async fn an_exit_that_nobody_watched_says_what_may_be_missing() {
    let (world, bench) = bench("nobody", Cgroups::Auto);
    let launch = bench.launch(1, Program::PrintAndRun("kept\n".into()));
    let key = launch.key.clone();
    let file = world.dir.path().join("launch");
    fs::write(&file, serde_json::to_vec(&launch).unwrap()).unwrap();
    let mut served = Served::start(&world.state, &file, "watch", Cgroups::Auto);
    served.until("Started");
    let (shim, pid) = (world::shim_of(&world, &key), recorded(&world, &key, "pid").unwrap());
    let logs = world.state.join("logs").join(key.environment.to_string()).join(key.instance.to_string());
    let written = || fs::read(logs.join("1/000001.stdout")).is_ok_and(|text| text == b"kept\n");
    world::eventually("the line is written", written).await;
    served.kill();
    for process in [shim, pid] {
        kill_nine(process);
        world::eventually("it is dead", || !world::lives(process)).await;
    }
    let mut server = bench.serve();
    server.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    let seen = server.gone(&key).await;
    // Known as long as nobody has reaped it, which is up to the machine's process 1.
    assert!(matches!(exit_of(&seen), Exit::Unknown | Exit::Signal(9)), "{seen:?}");
    let said = |event: &ProviderEvent| match event {
        ProviderEvent::Exited { message, .. } => message.as_ref().is_some_and(|text| text.contains("64 KiB")),
        _ => false,
    };
    assert!(seen.iter().any(said), "{seen:?}");
    assert_eq!(joined(&lines(&*server.provider, &key, None).await), b"kept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_was_begun_goes_on_without_the_server_and_the_shim() {
    let (world, bench) = bench("stop-goes-on", Cgroups::Auto);
    let mut first = bench.serve();
    let (key, pid, file) = start_counting(&mut first, &world, &bench).await;
    first.provider.terminate(key.clone(), term(Timespan::millis(700))).await.unwrap();
    drop(first);
    world.close().await;
    kill_nine(world::shim_of(&world, &key));
    assert!(world::lives(pid), "it ignores SIGTERM");
    let mut second = bench.serve();
    let found = second.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    assert_eq!(found.pid, Some(pid));
    // Nobody asks again.
    assert_eq!(exit_of(&second.gone(&key).await), Exit::Signal(9));
    check_count(&joined(&lines(&*second.provider, &key, None).await), &file);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_that_was_written_but_never_run_never_was() {
    let (world, bench) = bench("never", Cgroups::Auto);
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Run);
    launch.command = torture(&["print", "ran\n", "", "0"]);
    let key = launch.key.clone();
    // As a server leaves it that was killed between writing and spawning.
    fs::create_dir_all(world::folder(&world, &key)).unwrap();
    fs::write(world::folder(&world, &key).join("launch.json"), b"{}").unwrap();
    assert_eq!(server.provider.find_by_intent(key.clone()).await.unwrap(), None);
    fs::write(world::folder(&world, &key).join("launch.json"), b"{}").unwrap();
    server.provider.start(launch).await.unwrap();
    assert_eq!(exit_of(&server.gone(&key).await), Exit::Code(0));
    assert_eq!(joined(&lines(&*server.provider, &key, None).await), b"ran\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_machine_everything_is_gone() {
    let (world, bench) = bench("reboot", Cgroups::Auto);
    let mut first = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    first.provider.start(launch).await.unwrap();
    let pid = first.started(&key).await;
    drop(first);
    world.close().await;
    kill_nine(world::shim_of(&world, &key));
    kill_nine(pid);
    world::eventually("the shim is gone", || !world::lives(world::shim_of(&world, &key))).await;
    let mut status = world::status(&world, &key);
    status["boot"] = "another".into();
    fs::write(world::folder(&world, &key).join("status.json"), status.to_string()).unwrap();
    let second = bench.serve();
    let found = second.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    assert_eq!((found.exit, found.gone), (Some(Exit::Unknown), true));
    assert!(found.message.unwrap().contains("restarted"));
    // A real restart takes the control group along.
    let launch: serde_json::Value =
        serde_json::from_slice(&fs::read(world::folder(&world, &key).join("launch.json")).unwrap()).unwrap();
    if let Some(group) = launch["cgroup"].as_str() {
        // The killed program may still be on its way out of it.
        world::eventually("the control group is empty", || fs::remove_dir(group).is_ok()).await;
    }
}

/// A server in a process of its own.
pub(crate) struct Served {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Served {
    pub(crate) fn start(state: &Path, launch: &Path, how: &str, cgroups: Cgroups) -> Self {
        let mut command = Command::new(world::TORTURE);
        command.arg("serve").arg(state).arg(world::SHIM).arg(launch).arg(how).stdout(Stdio::piped());
        if cgroups == Cgroups::Off {
            command.env("TORTURE_NO_CGROUPS", "1");
        }
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// Reads what it says up to a line that contains this.
    pub(crate) fn until(&mut self, wanted: &str) -> Vec<String> {
        let mut seen = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the server ended before `{wanted}`: {seen:?}");
            let found = line.contains(wanted);
            seen.push(line.trim_end().to_owned());
            if found {
                return seen;
            }
        }
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// xorshift64*: a seed gives the same order of kills again.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound
    }
}

/// Kills server, shim and program again and again in random order, with random pauses, and starts the server again.
/// The one order in which output can be lost is left out: the program killed last, with neither server nor shim alive
/// to have what is in its pipes.
#[test]
fn everything_is_killed_in_random_order() {
    let seed = std::env::var("ORCHESTRA_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x0BAD_5EED_u64);
    let rounds: u32 = std::env::var("ORCHESTRA_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(48);
    eprintln!("replay with ORCHESTRA_SEED={seed} ORCHESTRA_ROUNDS={rounds}");
    let mut random = Random(seed);
    let mut kills = [0_u32; 3];
    for round in 0..rounds {
        let cgroups = if round % 2 == 0 { Cgroups::Auto } else { Cgroups::Off };
        let (world, bench) = bench("chaos", cgroups);
        let counted_file = world.dir.path().join("counted");
        let mut launch = bench.launch(1, Program::Run);
        launch.command = torture(&["count", counted_file.to_str().unwrap(), "2"]);
        launch.log_max_bytes = 50_000;
        launch.log_keep = 1_000_000;
        let key = launch.key.clone();
        let launch_file = world.dir.path().join("launch");
        fs::write(&launch_file, serde_json::to_vec(&launch).unwrap()).unwrap();
        let mut server = Some(Served::start(&world.state, &launch_file, "watch", cgroups));
        let pause = |random: &mut Random| std::thread::sleep(Duration::from_micros(random.below(3000)));
        // Killed before it had begun, or in the midst of beginning, or later.
        let patience = random.below(12_000);
        std::thread::sleep(Duration::from_micros(patience));
        let mut dead = false;
        for _ in 0..=random.below(4) {
            match random.below(3) {
                0 => {
                    if let Some(server) = server.take() {
                        server.kill();
                        kills[0] += 1;
                    }
                }
                1 => {
                    if let Some(shim) = recorded(&world, &key, "shim") {
                        kill_nine(shim);
                        kills[1] += 1;
                        if server.is_none() {
                            // Whoever would have what the program still prints; see above.
                            server = Some(Served::start(&world.state, &launch_file, "watch", cgroups));
                            server.as_mut().unwrap().until("serving");
                        }
                    }
                }
                _ => {
                    if let Some(pid) = recorded(&world, &key, "pid") {
                        if server.is_none() && !recorded(&world, &key, "shim").is_some_and(world::lives) {
                            continue;
                        }
                        kill_nine(pid);
                        kills[2] += 1;
                        dead = true;
                    }
                }
            }
            pause(&mut random);
        }
        if let Some(server) = server {
            server.kill();
        }
        // The next server finishes it unattended.
        let mut last = Served::start(&world.state, &launch_file, "terminate", cgroups);
        let seen = last.until("Gone");
        last.child.wait().unwrap();
        let exited = seen.iter().rfind(|line| line.contains("Exited")).expect("Exited before Gone");
        if dead {
            assert!(exited.contains(r#""signal":9"#) || exited.contains("unknown"), "round {round}: {exited}");
        }
        let marker = world::marker(&world, &key);
        assert_eq!(survivors(&marker), [] as [u32; 0], "round {round}: {seen:?}");
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = bench.serve();
            let found = server.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
            assert!(found.gone && found.exit.is_some());
            let log = joined(&lines(&*server.provider, &key, None).await);
            if counted(&counted_file) > 0 {
                check_count(&log, &counted_file);
            }
        });
        assert!(!world::folder(&world, &key).join("stdout").exists(), "round {round}: nothing is left behind");
        let launch: serde_json::Value =
            serde_json::from_slice(&fs::read(world::folder(&world, &key).join("launch.json")).unwrap()).unwrap();
        if let Some(group) = launch["cgroup"].as_str() {
            assert!(!Path::new(group).exists(), "round {round}: {group} is left behind");
        }
    }
    eprintln!("{rounds} rounds; killed: {} servers, {} shims, {} programs", kills[0], kills[1], kills[2]);
}

fn recorded(world: &Processes, key: &LaunchKey, field: &str) -> Option<u32> {
    let text = fs::read(world::folder(world, key).join("status.json")).ok()?;
    let status: serde_json::Value = serde_json::from_slice(&text).ok()?;
    status[field].as_u64().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| world::lives(*pid))
}
