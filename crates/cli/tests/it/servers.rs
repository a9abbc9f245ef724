//! Finding, starting and stopping servers.

use orchestra_api::{CheckOutcome, DoctorReport, scripted::Exchange};
use orchestra_cli::Exit;
use orchestra_model::{Code, Diagnostic};
use serde_json::json;

use crate::environment::TestEnvironment;

#[tokio::test]
async fn start_status_and_stop() {
    let mut test = TestEnvironment::new();
    test.spawns(vec![Exchange::json("POST /v1/shutdown", &json!({})).status(202)]);
    let outcome = test.run("server start").await;
    assert_eq!(outcome.stdout, "the server was started (pid 4321, state in /state)\n");
    let outcome = test.run("server start").await;
    assert_eq!(outcome.stdout, "the server runs already (pid 4321, state in /state)\n");
    let outcome = test.run("server status --json").await;
    assert_eq!((outcome.exit, outcome.json()["pid"].clone()), (Exit::Success, json!(4321)));
    assert_eq!(test.run("server status --pid").await.stdout, "4321\n");
    let command = test.start("server stop");
    // The scripted server answers the shutdown and, like a real one, ends a little later.
    let end = async {
        while !test.is_exhausted() {
            tokio::task::yield_now().await;
        }
        test.kill_server();
    };
    let (exit, ()) = tokio::join!(command, end);
    assert_eq!(exit, Exit::Success);
    assert!(test.outcome(exit).stderr.contains("was stopped"));
    assert_eq!(test.run("server status").await.exit, Exit::NoServer);
    // `kill $(orchestra server status --pid)` must not get words.
    let outcome = test.run("server status --pid").await;
    assert_eq!((outcome.exit, outcome.stdout.as_str()), (Exit::NoServer, ""));
    test.finish();
}

#[tokio::test]
async fn a_server_that_ends_at_once_says_why() {
    let mut test = TestEnvironment::new();
    let damaged = Diagnostic::error(Code::STATE_DAMAGED, "the state in /state is damaged").help("restore it");
    test.spawn_fails(&format!("{}\n", json!({"errors": [damaged]})));
    let outcome = test.run("up").await;
    assert_eq!(outcome.exit, Exit::of(&[damaged]), "{}", outcome.page());
    assert!(outcome.stderr.starts_with("error[ORC0403]: the state in /state is damaged"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("help: restore it") && outcome.stderr.contains("server.log"), "{}", outcome.stderr);
    let outcome = test.run("up --json").await;
    assert_eq!(outcome.json()["errors"][0]["code"], "ORC0403");
    // One that was killed can say nothing: then its log may help.
    test.spawn_fails("");
    let outcome = test.run("up").await;
    assert_eq!(outcome.exit, Exit::NoServer);
    assert!(outcome.stderr.contains("the server ended at once (exit code 1)"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("a line of the log"), "{}", outcome.stderr);
}

#[tokio::test]
async fn a_server_that_is_killed_while_it_starts_is_started_again() {
    let mut test = TestEnvironment::new();
    test.spawns_are_killed(2);
    test.spawns(Vec::new());
    let outcome = test.run("server start").await;
    assert_eq!((outcome.exit, test.spawned().len()), (Exit::Success, 3), "{}", outcome.page());
    test.finish();
    // Somebody means it.
    let mut test = TestEnvironment::new();
    test.spawns_are_killed(3);
    let outcome = test.run("server start").await;
    assert_eq!((outcome.exit, test.spawned().len()), (Exit::NoServer, 3), "{}", outcome.page());
    assert!(outcome.stderr.contains("(signal: 9 (SIGKILL))"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("help: somebody killed it"), "{}", outcome.stderr);
}

#[tokio::test]
async fn of_two_commands_that_start_a_server_both_get_the_one_that_won() {
    let mut test = TestEnvironment::new();
    let locked = Diagnostic::error(Code::STATE_LOCKED, "another server owns the state directory");
    test.spawn_fails(&json!({"errors": [locked]}).to_string());
    let command = test.start("server start");
    let win = async {
        while test.spawned().is_empty() {
            tokio::task::yield_now().await;
        }
        test.server(Vec::new());
    };
    let (exit, ()) = tokio::join!(command, win);
    assert_eq!(exit, Exit::Success, "{}", test.outcome(exit).page());
    test.finish();
}

#[tokio::test]
async fn a_server_that_ends_in_this_moment_is_replaced() {
    let mut test = TestEnvironment::new();
    std::fs::create_dir_all(test.home()).unwrap();
    let dying = std::os::unix::net::UnixListener::bind(orchestra_api::socket_path(&test.home())).unwrap();
    let end = std::thread::spawn(move || {
        for _ in 0..2 {
            drop(dying.accept().unwrap());
        }
    });
    test.spawns(Vec::new());
    let outcome = test.run("server start").await;
    assert_eq!(outcome.exit, Exit::Success, "{}", outcome.page());
    assert_eq!(test.spawned().len(), 1);
    end.join().unwrap();
    test.finish();
}

#[tokio::test]
async fn listening_on_tcp_needs_a_token_that_is_no_argument() {
    let mut test = TestEnvironment::new();
    let outcome = test.run("server start --listen 127.0.0.1:7070").await;
    assert_eq!(outcome.exit, Exit::Invalid);
    assert!(outcome.stderr.contains("--token-file"), "{}", outcome.stderr);
    std::fs::write(test.cwd().join("token"), "0123456789abcdef\n").unwrap();
    test.spawns(Vec::new());
    assert_eq!(test.run("server start --listen 127.0.0.1:7070 --token-file token").await.exit, Exit::Success);
    assert_eq!(test.spawned(), [(Some("127.0.0.1:7070".to_owned()), Some("0123456789abcdef".to_owned()))]);
    // Where it listens cannot be changed while it runs.
    let outcome = test.run("server start --listen 127.0.0.1:7071 --token-file token").await;
    assert_eq!(outcome.exit, Exit::Refused);
    test.finish();
}

#[tokio::test]
async fn a_network_address_is_pointed_out() {
    for (address, warned) in
        [("0.0.0.0:7070", true), ("[::]:7070", true), ("127.0.0.1:7070", false), ("[::1]:7070", false)]
    {
        let mut test = TestEnvironment::new();
        std::fs::write(test.cwd().join("token"), "0123456789abcdef\n").unwrap();
        test.spawns(Vec::new());
        let outcome = test.run(&format!("server start --listen {address} --token-file token")).await;
        assert_eq!(outcome.exit, Exit::Success, "{}", outcome.page());
        assert_eq!(outcome.stderr.contains("the API is not encrypted"), warned, "{address}: {}", outcome.stderr);
        test.finish();
    }
}

#[tokio::test]
async fn a_unit_is_printed_or_written_and_only_ours_is_replaced() {
    let mut test = TestEnvironment::new();
    test.variable("HOME", "/home/you");
    test.variable("ORCHESTRA_HOME", "/home/you/my state");
    insta::assert_snapshot!("unit_system", test.run("server install --print --system").await.page());
    std::fs::write(test.cwd().join("token"), "0123456789abcdef\n").unwrap();
    let line = "server install --print --user --listen 127.0.0.1:7070";
    assert_eq!(test.run(line).await.exit, Exit::Invalid, "a token must be there after a restart");
    insta::assert_snapshot!("unit_user", test.run(&format!("{line} --token-file token")).await.page());

    let config = test.cwd().join("config");
    test.variable("XDG_CONFIG_HOME", config.to_str().unwrap());
    insta::assert_snapshot!("unit_written", test.run("server install --user").await.page());
    let path = config.join("systemd/user/orchestra.service");
    let written = std::fs::read_to_string(&path).unwrap();
    let start = "ExecStart=/usr/local/bin/orchestra --home \"/home/you/my state\" server run\n";
    assert!(written.contains(start), "{written}");
    assert_eq!(test.run("server install --user").await.exit, Exit::Success, "ours is replaced");
    std::fs::write(&path, "[Unit]\n").unwrap();
    assert_eq!(test.run("server install --user").await.exit, Exit::Invalid);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "[Unit]\n", "somebody else's is kept");
    assert_eq!(test.run("server install --user --unit other").await.exit, Exit::Success);
    assert!(test.spawned().is_empty());
    test.finish();
}

#[tokio::test]
async fn a_locked_state_directory_is_refused() {
    let mut test = TestEnvironment::new();
    let outcome = test.run("server run").await;
    assert_eq!(outcome.exit, Exit::Refused);
    assert!(outcome.stderr.starts_with("error[ORC0401]"), "nothing is announced before it serves: {}", outcome.stderr);
    test.finish();
}

#[tokio::test]
async fn a_named_server_is_never_started() {
    for line in ["up", "status", "plan"] {
        let mut test = TestEnvironment::new();
        test.variable("ORCHESTRA_SERVER", "http://127.0.0.1:1");
        let outcome = test.run(line).await;
        assert_eq!(outcome.exit, Exit::NoServer, "{line}: {}", outcome.page());
        assert!(outcome.stderr.contains("127.0.0.1:1"), "{}", outcome.stderr);
        test.finish();
    }
    let mut test = TestEnvironment::new();
    assert_eq!(test.run("status --server ftp://x").await.exit, Exit::Invalid);
    assert_eq!(test.run("server start --server http://127.0.0.1:1").await.exit, Exit::Invalid);
    test.finish();
}

#[tokio::test]
async fn a_server_of_another_version_is_pointed_out() {
    let mut test = TestEnvironment::new();
    test.server(vec![Exchange::json(
        "POST /v1/runs",
        &json!({"run": crate::environment::run("running"), "warnings": []}),
    )]);
    test.server_version("9.9.9");
    let outcome = test.run("up --detach").await;
    assert!(outcome.stderr.contains("the server is version 9.9.9, this is 0.0.0-test"), "{}", outcome.stderr);
    test.finish();
}

#[tokio::test]
async fn doctor_joins_what_both_sides_see() {
    let mut test = TestEnvironment::new();
    let checks = json!({"checks": [
        {"name": "proxy", "outcome": "ok", "detail": "serves, pid 77"},
        {"name": "disk space", "outcome": "failed", "detail": "0 MiB free", "help": "make room"},
    ]});
    test.server(vec![Exchange::json("GET /v1/doctor", &checks)]);
    let outcome = test.run("doctor --json").await;
    assert_eq!(outcome.exit, Exit::Failed);
    let report: DoctorReport = serde_json::from_value(outcome.json()).unwrap();
    let disk: Vec<_> = report.checks.iter().filter(|check| check.name == "disk space").collect();
    assert_eq!(disk.len(), 1, "the server knows it better");
    assert_eq!(disk[0].outcome, CheckOutcome::Failed);
    assert!(report.checks.iter().any(|check| check.name == "proxy"));
    assert!(report.checks.iter().any(|check| check.name == "server" && check.outcome == CheckOutcome::Ok));
    test.finish();

    let mut test = TestEnvironment::new();
    let outcome = test.run("doctor").await;
    assert_eq!(outcome.exit, Exit::Success, "{}", outcome.page());
    for name in
        ["state directory", "socket", "disk space", "control groups", "open files", "clock", "server", "processes"]
    {
        assert!(outcome.stdout.contains(name), "{name}: {}", outcome.stdout);
    }
    test.finish();
}
