//! What a program gets, what it says, and what is told of it.

use std::{collections::BTreeMap, fs, os::unix::net::UnixDatagram, time::Duration};

use orchestra_model::{
    desired::Limit,
    launch::{Exec, Exit, ProviderEvent},
    quantity::Timespan,
};
use orchestra_provider::{
    LogStream, Provider as _,
    conformance::{PATIENCE, Program, term},
};
use orchestra_provider_process::Cgroups;

use crate::world::{self, BOTH, bench, joined, lines, torture};

fn exit_message(seen: &[ProviderEvent]) -> (Exit, String) {
    let found = seen.iter().rev().find_map(|event| match event {
        ProviderEvent::Exited { exit, message } => Some((*exit, message.clone().unwrap_or_default())),
        _ => None,
    });
    found.unwrap()
}

/// The report of the torture program, by key.
fn parse(report: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8(report.to_vec()).unwrap();
    text.lines().map(|line| line.split_once('=').unwrap()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_gets_exactly_what_its_launch_says() {
    let (world, bench) = bench("exact", Cgroups::Auto);
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Run);
    launch.command = torture(&["report"]);
    launch.env =
        BTreeMap::from([("A".into(), "1".into()), ("EMPTY".into(), String::new()), ("Ü".into(), "x=y".into())]);
    launch.umask = 0o137;
    launch.limits = BTreeMap::from([(Limit::Nofile, 123), (Limit::Core, 0)]);
    let key = launch.key.clone();
    // What the server leaks must not arrive: an open descriptor, a variable, an ignored signal are all there here.
    let leak = fs::File::open("/dev/zero").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    server.provider.start(launch).await.unwrap();
    let seen = server.gone(&key).await;
    assert_eq!(exit_message(&seen), (Exit::Code(0), String::new()));
    let report = parse(&joined(&lines(&*server.provider, &key, Some(LogStream::Stdout)).await));
    let marker = world::marker(&world, &key);
    assert_eq!(report["env"], format!("A=1|EMPTY=|{marker}|Ü=x=y"));
    assert_eq!(report["stdin"], "0", "standard input is at its end");
    assert_eq!(report["directory"], world.dir.path().to_str().unwrap());
    assert_eq!(report["Umask"], "0137");
    assert_eq!((report["nofile"].as_str(), report["core"].as_str()), ("123 123", "0 0"));
    assert_eq!(report["fds"], "0 1 2", "nothing else is open");
    assert_eq!(report["pgrp"], "true", "it leads its own process group");
    // The runtime of the reporting program itself ignores SIGPIPE before it sets it back.
    for mask in ["SigBlk", "SigIgn"] {
        assert_eq!(u64::from_str_radix(&report[mask], 16).unwrap(), 0, "{mask}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_runs_as_its_user() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can start programs of other users");
        return;
    }
    let (world, bench) = bench("user", Cgroups::Auto);
    let mut server = bench.serve();
    // Others must be able to enter the folder of the test and the one of the program.
    fs::set_permissions(world.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for (ordinal, (user, uid, gid)) in
        [("nobody", "65534", "65534"), ("12345:23456", "12345", "23456")].into_iter().enumerate()
    {
        let mut launch = bench.launch(u32::try_from(ordinal).unwrap(), Program::Run);
        launch.command = ["sh", "-c", "id -u; id -g; id -G; echo by name > /dev/stderr"].map(str::to_owned).to_vec();
        launch.user = Some(user.to_owned());
        launch.directory = "/".into();
        let key = launch.key.clone();
        server.provider.start(launch).await.unwrap();
        let seen = server.gone(&key).await;
        assert_eq!(exit_message(&seen).0, Exit::Code(0), "{seen:?}");
        let text = String::from_utf8(joined(&lines(&*server.provider, &key, None).await)).unwrap();
        assert_eq!(text, format!("{uid}\n{gid}\n{gid}\nby name\n"));
    }
    let mut launch = bench.launch(9, Program::Run);
    launch.user = Some("no-such-user".into());
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    let (exit, message) = exit_message(&server.gone(&key).await);
    assert_eq!(exit, Exit::NotStarted);
    assert!(message.contains("user `no-such-user` does not exist"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_says_which_file_and_why() {
    let (world, bench) = bench("failed-start", Cgroups::Auto);
    let mut server = bench.serve();
    let dir = world.dir.path();
    let file = |name: &str, text: &str, mode: u32| {
        fs::write(dir.join(name), text).unwrap();
        fs::set_permissions(dir.join(name), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        dir.join(name).display().to_string()
    };
    let plain = file("plain", "x", 0o644);
    let orphan = file("orphan", "#!/no/such/interpreter\n", 0o755);
    let text = file("text", "no first line", 0o755);
    let here = dir.display().to_string();
    let cases: [(&str, &str, Vec<&str>); 7] = [
        (
            "no-such-program",
            &here,
            vec!["`no-such-program` was not found", "PATH that was searched: /usr/local/bin:/usr/bin:/bin"],
        ),
        ("./missing", &here, vec!["/missing` does not exist"]),
        ("./plain", &here, vec![&plain, "may not be executed", "chmod +x"]),
        ("./orphan", &here, vec![&orphan, "interpreter or loader that it names does not exist"]),
        ("./text", &here, vec![&text, "#!/bin/sh"]),
        (&here, &here, vec!["it is a directory"]),
        ("true", "/no/such/folder", vec!["working directory `/no/such/folder` cannot be entered: No such file"]),
    ];
    for (ordinal, (program, directory, wanted)) in cases.into_iter().enumerate() {
        let mut launch = bench.launch(u32::try_from(ordinal).unwrap(), Program::Run);
        launch.command = vec![program.to_owned()];
        launch.directory = directory.to_owned();
        let key = launch.key.clone();
        server.provider.start(launch).await.unwrap();
        let (exit, message) = exit_message(&server.gone(&key).await);
        assert_eq!(exit, Exit::NotStarted, "{program}");
        for part in wanted {
            assert!(message.contains(part), "{program}: `{part}` is not in `{message}`");
        }
    }
    let mut launch = bench.launch(99, Program::Exit(0));
    launch.ready_line = Some("(".into());
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    let (exit, message) = exit_message(&server.gone(&key).await);
    assert_eq!(exit, Exit::NotStarted);
    assert!(message.contains("regular expression"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deep_state_directory_works() {
    let mut world = world::Processes::new(Cgroups::Auto);
    let deep: std::path::PathBuf = std::iter::repeat_n("a-rather-long-name-of-a-folder", 8).collect();
    world.state = world.dir.path().join(deep);
    assert!(world.state.as_os_str().len() > 200);
    let bench = orchestra_provider::conformance::Bench::new("deep", Box::new(world));
    let mut first = bench.serve();
    let launch = bench.launch(1, Program::Notify("deep".into()));
    let key = launch.key.clone();
    first.provider.start(launch).await.unwrap();
    first.until(&key, "READY=1", |seen| seen.contains(&ProviderEvent::NotifiedReady)).await;
    drop(first);
    // Another server has to connect by path.
    let mut second = bench.serve();
    assert!(second.provider.find_by_intent(key.clone()).await.unwrap().unwrap().notified_ready);
    second.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    second.gone(&key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_tree_is_believed() {
    for cgroups in BOTH {
        let (world, bench) = bench("believed", cgroups);
        let mut server = bench.serve();
        let mut launch = bench.launch(1, Program::Notify("mine".into()));
        launch.ready_line = None;
        let key = launch.key.clone();
        server.provider.start(launch).await.unwrap();
        server.until(&key, "READY=1", |seen| seen.contains(&ProviderEvent::NotifiedReady)).await;
        let marker = world::marker(&world, &key);
        let name = format!("orchestra/{}", marker.rsplit('@').next().unwrap());
        let address =
            <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name).unwrap();
        UnixDatagram::unbound().unwrap().send_to_addr(b"STATUS=forged\nSTOPPING=1", &address).unwrap();
        // A child of the tree may speak, also one that is gone when it is heard (where the kernel remembers it).
        let exec = Exec { key: key.clone(), command: torture(&["print", "x", "", "0"]), timeout: PATIENCE };
        server.provider.exec(exec).await.unwrap();
        server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
        let seen = server.gone(&key).await;
        assert!(!seen.contains(&ProviderEvent::NotifiedStopping), "{seen:?}");
        assert!(!seen.contains(&ProviderEvent::NotifiedStatus("forged".into())), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_come_in_order_and_the_watchdog_bites_once() {
    let (_world, bench) = bench("notices", Cgroups::Auto);
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Run);
    launch.command =
        torture(&["notify-each", "RELOADING=1", "READY=1", "STATUS=a", "STATUS=b\nMAINPID=1", "STOPPING=1"]);
    launch.watchdog = Some(Timespan::millis(50));
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    let seen = server.until(&key, "a missed watchdog", |seen| seen.contains(&ProviderEvent::WatchdogMissed)).await;
    let status = |text: &str| ProviderEvent::NotifiedStatus(text.into());
    assert_eq!(
        seen[1..],
        [
            ProviderEvent::NotifiedReloading,
            ProviderEvent::NotifiedReady,
            status("a"),
            status("b"),
            ProviderEvent::NotifiedStopping,
            ProviderEvent::WatchdogMissed
        ]
    );
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    let missed = server.gone(&key).await.iter().filter(|event| **event == ProviderEvent::WatchdogMissed).count();
    assert_eq!(missed, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_ends_with_its_whole_tree() {
    for cgroups in BOTH {
        let (world, bench) = bench("exec-tree", cgroups);
        let mut server = bench.serve();
        let launch = bench.launch(1, Program::Run);
        let key = launch.key.clone();
        server.provider.start(launch).await.unwrap();
        let pid = server.started(&key).await;
        let marker = world::marker(&world, &key);
        for (command, exit) in
            [(["daemons", "3", "and", "exit"], Some(Exit::Code(0))), (["daemons", "3", "and", "stay"], None)]
        {
            let exec = Exec { key: key.clone(), command: torture(&command), timeout: Duration::from_millis(300) };
            let outcome = server.provider.exec(exec).await.unwrap();
            assert_eq!((outcome.exit, outcome.output.as_str()), (exit, "armed\n"));
            world::eventually("only the program is left", || world::survivors(&marker) == [pid]).await;
        }
        server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
        server.gone(&key).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_counts_the_whole_tree() {
    for cgroups in BOTH {
        let (world, bench) = bench("usage", cgroups);
        let mut server = bench.serve();
        // A child that was reaped and an orphan that nobody waited for have used 150 ms each, and are gone.
        let mut burnt = bench.launch(1, Program::Run);
        burnt.command = torture(&["burn", "150"]);
        burnt.ready_line = Some("armed".into());
        let mut many = bench.launch(2, Program::Run);
        many.command = torture(&["daemons", "5", "and", "stay"]);
        many.ready_line = Some("armed".into());
        for launch in [&burnt, &many] {
            server.provider.start(launch.clone()).await.unwrap();
            server.until(&launch.key, "`armed`", |seen| seen.contains(&ProviderEvent::LineMatched)).await;
        }
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let usage = server.provider.usage(vec![burnt.key.clone(), many.key.clone()]).await;
            let [(_, burnt), (_, many)] = &usage[..] else { panic!("{usage:?}") };
            if burnt.processes == 1 && many.processes == 6 {
                // The kernel counts in hundredths of a second, and rounds down more than once.
                assert!(burnt.cpu >= Duration::from_millis(260) && burnt.cpu < Duration::from_secs(5), "{usage:?}");
                // Forked processes share nearly all they have.
                let (one, six) = (burnt.memory.as_bytes(), many.memory.as_bytes());
                assert!(one > 100_000 && six > 100_000 && six < one * 3, "{usage:?}");
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{usage:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // Also where nobody is their parent any more.
        let shim = world::shim_of(&world, &many.key);
        world::kill_nine(shim);
        world::eventually("another shim takes over", || world::shim_of(&world, &many.key) != shim).await;
        let place = || server.provider.usage(vec![many.key.clone()]);
        let deadline = std::time::Instant::now() + PATIENCE;
        // Daemons in sessions of their own are found by their group alone.
        let expected = if cgroups == Cgroups::Auto && world::in_cgroup(&world, &many.key) { 6 } else { 1 };
        while place().await.first().is_none_or(|(_, usage)| usage.processes < expected) {
            assert!(std::time::Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for launch in [burnt, many] {
            server.provider.terminate(launch.key.clone(), term(Timespan::millis(10))).await.unwrap();
            server.gone(&launch.key).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_providers_that_race_start_one_program() {
    for round in 0..10 {
        let (world, bench) = bench("race", Cgroups::Auto);
        let launch = bench.launch(1, Program::Print(format!("{round}\n"), String::new(), 0));
        let key = launch.key.clone();
        let providers: Vec<_> = (0..4)
            .map(|_| {
                orchestra_provider_process::ProcessProvider::open(world.options(), orchestra_task::TaskTree::new())
                    .unwrap()
            })
            .collect();
        let mut waits = Vec::new();
        for provider in &providers {
            waits.push(provider.start(launch.clone()));
        }
        let mut events = providers[0].take_events().unwrap();
        let mut started = 0;
        for wait in waits {
            started += u32::from(wait.await.is_ok());
        }
        assert_eq!(started, 4, "all succeed");
        while let Some((_, event)) = tokio::time::timeout(PATIENCE, events.recv()).await.unwrap() {
            if event == ProviderEvent::Gone {
                break;
            }
        }
        let lines = lines(&providers[1], &key, None).await;
        assert_eq!(joined(&lines), format!("{round}\n").into_bytes());
    }
}

/// Who is stopped at once may not have run at all yet: the word must reach it nevertheless.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_right_after_the_start_is_not_lost() {
    let (_world, bench) = bench("stop-at-once", Cgroups::Auto);
    let mut server = bench.serve();
    for round in 0..40 {
        let mut launch = bench.launch(round, Program::Run);
        launch.command = vec!["sleep".into(), "1000".into()];
        let key = launch.key.clone();
        server.provider.start(launch).await.unwrap();
        server.provider.terminate(key.clone(), term(Timespan::millis(30_000))).await.unwrap();
        let seen = server.gone(&key).await;
        let ends: Vec<_> = seen
            .iter()
            .filter_map(|event| match event {
                ProviderEvent::Exited { exit, .. } => Some(exit),
                _ => None,
            })
            .collect();
        assert_eq!(ends, [&Exit::Signal(15)], "round {round}: {seen:?}");
    }
}
