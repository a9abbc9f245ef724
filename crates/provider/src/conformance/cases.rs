//! The cases. Each says in its name what must hold.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::future::join_all;
use orchestra_model::{
    launch::{Exec, Exit, LaunchKey, ProviderEvent},
    quantity::Timespan,
};
use tokio::{sync::mpsc, time::timeout};

use super::{Bench, Case, PATIENCE, Program, exit, term};
use crate::{LogLine, LogQuery, LogStream};

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub(super) const ALL: &[Case] = &[$((stringify!($name), |bench| Box::pin($name(bench)))),*];
    };
}

cases!(
    an_exit_is_reported_in_order,
    a_key_never_runs_twice,
    a_key_that_is_gone_does_not_run_again,
    a_missing_program_is_not_started,
    a_signal_ends_a_program,
    the_grace_ends_a_stubborn_program,
    asking_again_only_shortens_the_grace,
    terminating_nothing_reports_gone,
    an_intent_is_found,
    a_restarted_server_adopts,
    an_exit_nobody_watched_is_known,
    observing_lists_an_environment,
    only_what_is_gone_is_forgotten,
    notifications_are_reported,
    a_ready_line_is_reported,
    commands_run_beside_an_instance,
    usage_is_sampled,
    logs_are_exact,
    logs_are_followed,
    volumes_are_kept,
    events_are_taken_once,
    a_dropped_call_is_seen_through,
    many_start_at_once,
);

async fn an_exit_is_reported_in_order(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Exit(3));
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    let seen = server.gone(&key).await;
    assert!(
        matches!(
            seen[..],
            [ProviderEvent::Started { .. }, ProviderEvent::Exited { exit: Exit::Code(3), .. }, ProviderEvent::Gone]
        ),
        "{seen:?}"
    );
}

async fn a_key_never_runs_twice(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    let starts = (0..5).map(|_| server.provider.start(launch.clone()));
    for started in join_all(starts).await {
        started.unwrap();
    }
    server.provider.start(launch.clone()).await.unwrap();
    let pid = server.started(&key).await;
    let observed = server.provider.observe(key.environment.clone()).await.unwrap();
    assert_eq!(observed.iter().map(|o| o.pid).collect::<Vec<_>>(), [Some(pid)]);
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    let pids: BTreeSet<u32> = server
        .gone(&key)
        .await
        .iter()
        .filter_map(|event| if let ProviderEvent::Started { pid } = event { Some(*pid) } else { None })
        .collect();
    assert_eq!(pids, BTreeSet::from([pid]), "one process only");
}

async fn a_key_that_is_gone_does_not_run_again(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Print("once\n".into(), String::new(), 0));
    let key = launch.key.clone();
    server.provider.start(launch.clone()).await.unwrap();
    server.gone(&key).await;
    server.provider.start(launch).await.unwrap();
    let query = query(&bench);
    let lines = all(server.provider.logs(query).await.unwrap()).await;
    assert_eq!(texts(&lines), ["once\n"]);
}

async fn a_missing_program_is_not_started(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Missing);
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    let seen = server.gone(&key).await;
    assert!(!seen.iter().any(|event| matches!(event, ProviderEvent::Started { .. })), "{seen:?}");
    let (exit, message) = exit(&seen).unwrap();
    assert_eq!(exit, Exit::NotStarted);
    assert!(message.is_some_and(|message| !message.is_empty()), "it says why");
    let found = server.provider.find_by_intent(key).await.unwrap().unwrap();
    assert_eq!((found.exit, found.gone, found.pid), (Some(Exit::NotStarted), true, None));
    assert!(found.message.is_some());
}

async fn a_signal_ends_a_program(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    server.started(&key).await;
    server.provider.terminate(key.clone(), term(Timespan::seconds(3600))).await.unwrap();
    assert_eq!(exit(&server.gone(&key).await).unwrap().0, Exit::Signal(15));
}

async fn the_grace_ends_a_stubborn_program(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Stubborn);
    launch.ready_line = Some("^armed$".into());
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    server.until(&key, "LineMatched", |seen| seen.contains(&ProviderEvent::LineMatched)).await;
    server.provider.terminate(key.clone(), term(Timespan::millis(100))).await.unwrap();
    assert_eq!(exit(&server.gone(&key).await).unwrap().0, Exit::Signal(9));
}

async fn asking_again_only_shortens_the_grace(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::Stubborn);
    launch.ready_line = Some("armed".into());
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    server.until(&key, "LineMatched", |seen| seen.contains(&ProviderEvent::LineMatched)).await;
    server.provider.terminate(key.clone(), term(Timespan::seconds(3600))).await.unwrap();
    server.provider.terminate(key.clone(), term(Timespan::millis(50))).await.unwrap();
    server.provider.terminate(key.clone(), term(Timespan::seconds(3600))).await.unwrap();
    assert_eq!(exit(&server.gone(&key).await).unwrap().0, Exit::Signal(9));
}

async fn terminating_nothing_reports_gone(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let key = bench.key(7);
    server.provider.terminate(key.clone(), term(Timespan::seconds(1))).await.unwrap();
    server.until(&key, "Gone", |seen| seen.contains(&ProviderEvent::Gone)).await;
}

async fn an_intent_is_found(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    assert_eq!(server.provider.find_by_intent(key.clone()).await.unwrap(), None);
    server.provider.start(launch).await.unwrap();
    let pid = server.started(&key).await;
    let found = server.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    assert_eq!((found.pid, found.exit, found.gone), (Some(pid), None, false));
    assert!(found.started_at.is_some());
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(&key).await;
    let found = server.provider.find_by_intent(key).await.unwrap().unwrap();
    assert_eq!((found.pid, found.exit, found.gone), (None, Some(Exit::Signal(15)), true));
}

async fn a_restarted_server_adopts(bench: Arc<Bench>) {
    let mut first = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    first.provider.start(launch.clone()).await.unwrap();
    let pid = first.started(&key).await;
    drop(first);
    let mut second = bench.serve();
    let found = second.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    assert_eq!(found.pid, Some(pid));
    assert_eq!(second.started(&key).await, pid, "the current state is reported");
    second.provider.start(launch).await.unwrap();
    second.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    assert_eq!(exit(&second.gone(&key).await).unwrap().0, Exit::Signal(15));
}

async fn an_exit_nobody_watched_is_known(bench: Arc<Bench>) {
    let mut first = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    first.provider.start(launch).await.unwrap();
    first.started(&key).await;
    first.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    // Begun, and seen through by whoever is there, but not by this server.
    drop(first);
    let mut second = bench.serve();
    let found = second.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    if !found.gone {
        second.gone(&key).await;
    }
    let found = second.provider.find_by_intent(key).await.unwrap().unwrap();
    assert_eq!((found.exit, found.gone), (Some(Exit::Signal(15)), true));
}

async fn observing_lists_an_environment(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let environment = bench.key(1).environment;
    assert_eq!(server.provider.observe(environment.clone()).await.unwrap(), []);
    let runs = bench.launch(1, Program::Run);
    let exits = bench.launch(2, Program::Exit(0));
    let mut elsewhere = bench.launch(3, Program::Exit(0));
    elsewhere.key.environment.environment = "elsewhere".parse().unwrap();
    for launch in [&runs, &exits, &elsewhere] {
        server.provider.start(launch.clone()).await.unwrap();
    }
    server.gone(&exits.key).await;
    server.gone(&elsewhere.key).await;
    let observed = server.provider.observe(environment).await.unwrap();
    let found: Vec<_> = observed.iter().map(|o| (&o.key, o.gone)).collect();
    assert_eq!(found, [(&runs.key, false), (&exits.key, true)]);
    server.provider.terminate(runs.key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(&runs.key).await;
}

async fn only_what_is_gone_is_forgotten(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    server.provider.forget(key.clone()).await.unwrap();
    server.provider.start(launch.clone()).await.unwrap();
    server.started(&key).await;
    server.provider.forget(key.clone()).await.unwrap_err();
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(&key).await;
    server.provider.forget(key.clone()).await.unwrap();
    server.provider.forget(key.clone()).await.unwrap();
    assert_eq!(server.provider.find_by_intent(key.clone()).await.unwrap(), None);
    assert_eq!(server.provider.observe(key.environment.clone()).await.unwrap(), []);
}

async fn notifications_are_reported(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Notify("warm = 80 %".into()));
    let key = launch.key.clone();
    server.provider.start(launch).await.unwrap();
    let text = ProviderEvent::NotifiedStatus("warm = 80 %".into());
    let wanted = |seen: &[ProviderEvent]| seen.contains(&ProviderEvent::NotifiedReady) && seen.contains(&text);
    let seen = server.until(&key, "READY=1 and STATUS=", wanted).await;
    assert!(matches!(seen.first(), Some(ProviderEvent::Started { .. })), "{seen:?}");
    let found = server.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    assert!(found.notified_ready);
    assert_eq!(found.status_text.as_deref(), Some("warm = 80 %"));
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(&key).await;
}

async fn a_ready_line_is_reported(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let mut launch = bench.launch(1, Program::PrintAndRun("starting\nlistening on port 17\nmore\n".into()));
    launch.ready_line = Some(r"^listening on port \d+$".into());
    let mut silent = bench.launch(2, Program::PrintAndRun("starting\nlistening on port x\n".into()));
    silent.ready_line.clone_from(&launch.ready_line);
    for launch in [&launch, &silent] {
        server.provider.start(launch.clone()).await.unwrap();
    }
    let key = launch.key.clone();
    server.until(&key, "LineMatched", |seen| seen.contains(&ProviderEvent::LineMatched)).await;
    assert!(server.provider.find_by_intent(key.clone()).await.unwrap().unwrap().line_matched);
    for key in [&key, &silent.key] {
        server.started(key).await;
        server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    }
    let matched = |seen: &[ProviderEvent]| seen.iter().filter(|e| **e == ProviderEvent::LineMatched).count();
    assert_eq!(matched(&server.gone(&silent.key).await), 0);
    server.gone(&key).await;
}

async fn commands_run_beside_an_instance(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    let exec =
        |program: Program, timeout: Duration| Exec { key: key.clone(), command: bench.world.command(program), timeout };
    server.provider.exec(exec(Program::Exit(0), PATIENCE)).await.unwrap_err();
    server.provider.start(launch).await.unwrap();
    server.started(&key).await;
    let outcome = server.provider.exec(exec(Program::Exit(4), PATIENCE)).await.unwrap();
    assert_eq!(outcome.exit, Some(Exit::Code(4)));
    let print = Program::Print("out".into(), "err".into(), 0);
    let outcome = server.provider.exec(exec(print, PATIENCE)).await.unwrap();
    assert_eq!((outcome.exit, outcome.output.as_str()), (Some(Exit::Code(0)), "outerr"));
    let long = Program::Print("x".repeat(10_000), String::new(), 0);
    let outcome = server.provider.exec(exec(long, PATIENCE)).await.unwrap();
    assert_eq!(outcome.output.len(), 4096, "the first 4 KiB");
    let outcome = server.provider.exec(exec(Program::Missing, PATIENCE)).await.unwrap();
    assert_eq!(outcome.exit, Some(Exit::NotStarted));
    let outcome = server.provider.exec(exec(Program::Run, Duration::from_millis(50))).await.unwrap();
    assert_eq!(outcome.exit, None, "it ran into its timeout");
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(&key).await;
    server.provider.exec(exec(Program::Exit(0), PATIENCE)).await.unwrap_err();
}

async fn usage_is_sampled(bench: Arc<Bench>) {
    let mut first = bench.serve();
    let (spins, runs) = (bench.launch(1, Program::Spin), bench.launch(2, Program::Run));
    let keys = vec![spins.key.clone(), bench.key(3), runs.key.clone()];
    assert_eq!(first.provider.usage(keys.clone()).await, [], "nothing runs");
    for launch in [&spins, &runs] {
        first.provider.start(launch.clone()).await.unwrap();
    }
    for key in [&spins.key, &runs.key] {
        first.started(key).await;
    }
    let used = used_more(&first, &keys, Duration::from_millis(50)).await;
    drop(first);
    // What an earlier server has seen is not counted again, and not lost.
    let mut second = bench.serve();
    for key in [&spins.key, &runs.key] {
        second.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    }
    let used = used_more(&second, &keys, used).await;
    used_more(&second, &keys, used).await;
    for key in [&spins.key, &runs.key] {
        second.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
        second.gone(key).await;
    }
    assert_eq!(second.provider.usage(keys).await, [], "nothing runs any more");
}

/// Waits until the first of some launches, of which the second does not exist, has used more than this.
async fn used_more(server: &super::Server, keys: &[LaunchKey], before: Duration) -> Duration {
    let sampled = timeout(PATIENCE, async {
        loop {
            let sampled = server.provider.usage(keys.to_vec()).await;
            let found: Vec<_> = sampled.iter().map(|(key, _)| key).collect();
            assert_eq!(found, [&keys[0], &keys[2]], "those that run, in the order of the question");
            let (spins, runs) = (sampled[0].1, sampled[1].1);
            assert_eq!((spins.processes, runs.processes), (1, 1));
            // A process that is being replaced by its program has no memory for a moment.
            let in_memory = spins.memory.as_bytes() > 0 && runs.memory.as_bytes() > 0;
            if spins.cpu > before && in_memory {
                assert!(runs.cpu < spins.cpu, "{sampled:?}");
                return spins.cpu;
            }
            // Time is what it waits for.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    sampled.await.expect("a program that spins uses CPU time")
}

async fn logs_are_exact(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let long = "l".repeat((64 << 10) + 10);
    let first = bench.launch(1, Program::Print(format!("one\n\ntwo\n{long}\nno line feed"), "problem\n".into(), 0));
    let mut second = bench.launch(1, Program::Print("three\n".into(), String::new(), 0));
    second.key.attempt = 2;
    let mut other = bench.launch(1, Program::Print("other\n".into(), String::new(), 0));
    other.key.instance.workload = "worker".parse().unwrap();
    for launch in [&first, &second, &other] {
        server.provider.start(launch.clone()).await.unwrap();
        server.gone(&launch.key).await;
    }
    let stdout =
        LogQuery { stream: Some(LogStream::Stdout), instance: Some(first.key.instance.clone()), ..query(&bench) };
    let lines = all(server.provider.logs(stdout.clone()).await.unwrap()).await;
    let (head, rest) = long.split_at(64 << 10);
    assert_eq!(texts(&lines), ["one\n", "\n", "two\n", head, &format!("{rest}\n"), "no line feed", "three\n"]);
    assert_eq!(lines.iter().map(|line| line.attempt).collect::<Vec<_>>(), [1, 1, 1, 1, 1, 1, 2]);
    let stderr = LogQuery { stream: Some(LogStream::Stderr), ..query(&bench) };
    assert_eq!(texts(&all(server.provider.logs(stderr).await.unwrap()).await), ["problem\n"]);
    let tail = LogQuery { tail: Some(2), ..stdout.clone() };
    assert_eq!(texts(&all(server.provider.logs(tail).await.unwrap()).await), ["no line feed", "three\n"]);
    let none = LogQuery { tail: Some(0), ..stdout.clone() };
    assert!(all(server.provider.logs(none).await.unwrap()).await.is_empty());
    let since = LogQuery { since: Some(lines[6].at + 1_000_000), ..stdout };
    assert!(all(server.provider.logs(since).await.unwrap()).await.is_empty());
    let worker = LogQuery { workloads: vec!["worker".parse().unwrap()], ..query(&bench) };
    assert_eq!(texts(&all(server.provider.logs(worker).await.unwrap()).await), ["other\n"]);
    let everything = all(server.provider.logs(query(&bench)).await.unwrap()).await;
    assert_eq!(everything.len(), 9);
    assert!(everything.is_sorted_by_key(|line| line.at), "in order of arrival");
}

async fn logs_are_followed(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let before = bench.launch(1, Program::Print("before\n".into(), String::new(), 0));
    server.provider.start(before.clone()).await.unwrap();
    server.gone(&before.key).await;
    let mut lines = server.provider.logs(LogQuery { follow: true, tail: Some(1), ..query(&bench) }).await.unwrap();
    assert_eq!(next(&mut lines).await, "before\n");
    let after = bench.launch(2, Program::Print("after\nunfinished".into(), String::new(), 0));
    server.provider.start(after.clone()).await.unwrap();
    assert_eq!(next(&mut lines).await, "after\n");
    assert_eq!(next(&mut lines).await, "unfinished");
    server.gone(&after.key).await;
    let runs = bench.launch(3, Program::PrintAndRun("while it runs\n".into()));
    server.provider.start(runs.clone()).await.unwrap();
    assert_eq!(next(&mut lines).await, "while it runs\n");
    server.provider.terminate(runs.key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(&runs.key).await;
}

async fn volumes_are_kept(bench: Arc<Bench>) {
    let server = bench.serve();
    let path = bench.world.volume("data");
    let exists = || server.provider.volume_exists(path.clone());
    assert!(!exists().await.unwrap());
    server.provider.create_volume(path.clone()).await.unwrap();
    server.provider.create_volume(path.clone()).await.unwrap();
    assert!(exists().await.unwrap());
    server.provider.delete_volume(path.clone()).await.unwrap();
    server.provider.delete_volume(path.clone()).await.unwrap();
    assert!(!exists().await.unwrap());
    for outside in ["/", "/etc", &format!("{path}/../../.."), "relative"] {
        server.provider.delete_volume(outside.to_owned()).await.unwrap_err();
    }
}

async fn events_are_taken_once(bench: Arc<Bench>) {
    let server = bench.serve();
    assert!(server.provider.take_events().is_none());
}

async fn a_dropped_call_is_seen_through(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    drop(server.provider.start(launch));
    server.started(&key).await;
    drop(server.provider.terminate(key.clone(), term(Timespan::seconds(10))));
    server.gone(&key).await;
}

async fn many_start_at_once(bench: Arc<Bench>) {
    let mut server = bench.serve();
    let launches: Vec<_> = (1..=20).map(|ordinal| bench.launch(ordinal, Program::Run)).collect();
    for started in join_all(launches.iter().map(|launch| server.provider.start(launch.clone()))).await {
        started.unwrap();
    }
    let mut pids = BTreeSet::new();
    for launch in &launches {
        pids.insert(server.started(&launch.key).await);
    }
    assert_eq!(pids.len(), launches.len());
    let stops = launches.iter().map(|l| server.provider.terminate(l.key.clone(), term(Timespan::seconds(10))));
    for stopped in join_all(stops).await {
        stopped.unwrap();
    }
    for launch in &launches {
        server.gone(&launch.key).await;
    }
}

fn query(bench: &Bench) -> LogQuery {
    LogQuery {
        environment: bench.environment.clone(),
        workloads: Vec::new(),
        instance: None,
        stream: None,
        tail: None,
        since: None,
        follow: false,
    }
}

async fn all(mut lines: mpsc::Receiver<LogLine>) -> Vec<LogLine> {
    let mut all = Vec::new();
    while let Some(line) = timeout(PATIENCE, lines.recv()).await.expect("the end of the logs comes") {
        all.push(line);
    }
    all
}

async fn next(lines: &mut mpsc::Receiver<LogLine>) -> String {
    let line = timeout(PATIENCE, lines.recv()).await.expect("a line comes").expect("following does not end");
    String::from_utf8(line.bytes).expect("the programs print text")
}

fn texts(lines: &[LogLine]) -> Vec<String> {
    lines.iter().map(|line| String::from_utf8_lossy(&line.bytes).into_owned()).collect()
}
