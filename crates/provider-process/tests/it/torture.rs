//! Programs that behave badly: nothing of them survives, and no byte of theirs is lost.

use std::time::Duration;

use orchestra_model::{
    launch::{Exit, ProviderEvent},
    quantity::Timespan,
};
use orchestra_provider::{
    LogStream,
    conformance::{Program, Server, term},
};
use orchestra_provider_process::Cgroups;

use crate::world::{self, BOTH, bench, joined, lines, survivors, torture};

fn exit_of(seen: &[ProviderEvent]) -> Exit {
    let find = |event: &ProviderEvent| if let ProviderEvent::Exited { exit, .. } = event { Some(*exit) } else { None };
    seen.iter().find_map(find).unwrap()
}

async fn armed(server: &mut Server, key: &orchestra_model::launch::LaunchKey) {
    server.until(key, "`armed`", |seen| seen.contains(&ProviderEvent::LineMatched)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_that_ignore_signals_do_not_survive() {
    for cgroups in BOTH {
        for (last, exit) in [("exit", Exit::Code(0)), ("stay", Exit::Signal(9))] {
            let (world, bench) = bench("daemons", cgroups);
            let mut server = bench.serve();
            let mut launch = bench.launch(1, Program::Run);
            launch.command = torture(&["daemons", "20", "and", last]);
            launch.ready_line = Some("armed".into());
            let key = launch.key.clone();
            server.provider.start(launch).await.unwrap();
            armed(&mut server, &key).await;
            let marker = world::marker(&world, &key);
            if last == "stay" {
                world::eventually("they are there", || survivors(&marker).len() > 20).await;
                server.provider.terminate(key.clone(), term(Timespan::millis(50))).await.unwrap();
            }
            assert_eq!(exit_of(&server.gone(&key).await), exit);
            assert_eq!(survivors(&marker), [] as [u32; 0]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_storm_does_not_survive() {
    for cgroups in BOTH {
        let (world, bench) = bench("storm", cgroups);
        let mut server = bench.serve();
        let mut launch = bench.launch(1, Program::Run);
        launch.command = torture(&["storm", "8"]);
        launch.ready_line = Some("armed".into());
        let key = launch.key.clone();
        server.provider.start(launch).await.unwrap();
        armed(&mut server, &key).await;
        let marker = world::marker(&world, &key);
        let shim = world::shim_of(&world, &key);
        server.provider.terminate(key.clone(), term(Timespan::millis(100))).await.unwrap();
        assert_eq!(exit_of(&server.gone(&key).await), Exit::Signal(9));
        assert_eq!(survivors(&marker), [] as [u32; 0]);
        assert_eq!(world::zombies_of(shim), [] as [u32; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_kept_byte_for_byte() {
    const BYTES: u64 = 50_000_000;
    let (world, bench) = bench("flood", Cgroups::Auto);
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Run);
    launch.command = torture(&["flood", &BYTES.to_string()]);
    launch.log_max_bytes = 7_000_001;
    launch.log_keep = 7;
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    assert_eq!(exit_of(&server.gone(&key).await), Exit::Code(0));
    let folder = world.state.join("logs").join(key.environment.to_string()).join(key.instance.to_string()).join("1");
    let mut sizes: Vec<(String, u64)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
        .filter(|(name, _)| name.ends_with("stdout"))
        .collect();
    sizes.sort();
    assert_eq!(sizes.len(), 8, "rotated by size: {sizes:?}");
    assert!(sizes[..7].iter().all(|(_, size)| *size == 7_000_001), "{sizes:?}");
    let read = joined(&lines(&*server.provider, &key, Some(LogStream::Stdout)).await);
    assert_eq!(read.len() as u64, BYTES);
    let mut block: Vec<u8> = (0..4099_u32).map(|at| (at * 31 + (at >> 8)).to_le_bytes()[0]).collect();
    for (number, part) in read.chunks(block.len()).enumerate() {
        block[..8].copy_from_slice(&(number as u64).to_le_bytes());
        assert_eq!(part, &block[..part.len()], "block {number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_logs_are_bounded_and_read_in_order() {
    let (world, bench) = bench("rotation", Cgroups::Auto);
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Run);
    launch.command =
        ["sh", "-c", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i; done"].map(str::to_owned).to_vec();
    launch.log_max_bytes = 1000;
    launch.log_keep = 2;
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    server.gone(&key).await;
    let folder = world.state.join("logs").join(key.environment.to_string()).join(key.instance.to_string()).join("1");
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 6, "three segments of two files: {files:?}");
    let text = String::from_utf8(joined(&lines(&*server.provider, &key, None).await)).unwrap();
    let whole: Vec<String> = (1..=2000).map(|i| format!("line {i}\n")).collect();
    assert!(text.len() > 2000 && whole.concat().ends_with(&text), "the newest, without a gap");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_without_a_line_feed_and_closed_streams() {
    let (_world, bench) = bench("closed", Cgroups::Auto);
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Run);
    launch.command = torture(&["close"]);
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    server.started(&key).await;
    // It has closed its output and lives on.
    let exec = orchestra_model::launch::Exec {
        key: key.clone(),
        command: torture(&["exit", "0"]),
        timeout: Duration::from_secs(10),
    };
    assert_eq!(server.provider.exec(exec).await.unwrap().exit, Some(Exit::Code(0)));
    assert!(server.provider.find_by_intent(key.clone()).await.unwrap().unwrap().exit.is_none());
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(&key).await;
    assert_eq!(joined(&lines(&*server.provider, &key, None).await), b"closing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_neither_stops_nor_kills_a_program() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can mount a small file system");
        return;
    }
    let mut world = world::Processes::new(Cgroups::Auto);
    let small = world.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted =
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "none"]).arg(&small).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a small file system cannot be mounted here");
        return;
    }
    // Dropped in reverse: server and world first, then the mount, then the folder it is in.
    let _dir = std::sync::Arc::clone(&world.dir);
    let _mounted = Mounted(small.clone());
    world.state = small.clone();
    let bench = orchestra_provider::conformance::Bench::new("full", Box::new(world));
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Run);
    launch.command = torture(&["flood", "3000000"]);
    launch.log_max_bytes = 1 << 30;
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    // Its end can be recorded only when there is space again; that it ran to its end is told at once.
    let exited = |seen: &[ProviderEvent]| seen.iter().any(|event| matches!(event, ProviderEvent::Exited { .. }));
    let seen = server.until(&key, "its exit", exited).await;
    assert_eq!(exit_of(&seen), Exit::Code(0));
    let logs = small.join("logs").join(key.environment.to_string()).join(key.instance.to_string()).join("1");
    std::fs::remove_file(logs.join("000001.stdout")).unwrap();
    let seen = server.gone(&key).await;
    let lost = |event: &ProviderEvent| matches!(event, ProviderEvent::Exited { message: Some(message), .. } if message.contains("No space left"));
    assert!(seen.iter().any(lost), "{seen:?}");
}

/// Unmounts when the test ends, however it ends.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}
