//! Feature flags as programs and people use them: the address in a program's environment, changes without a restart,
//! overrides, and answers while parts are dead.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::mpsc,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    environment::{PATIENCE, TestEnvironment},
    processes::{self, Role},
};

#[path = "../../../flags/tests/it/client/official.rs"]
pub(crate) mod official;

/// A service and flags.
fn stack(version: &str, flags: &str) -> String {
    format!(
        r#"
version: 1
name: flags
services:
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{VERSION: "{version}"}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
    restart: {{backoff: 20ms, max_backoff: 100ms, budget: 1}}
    rollout: {{drain: {{requests: 2s, streams: 2s}}}}
{flags}
"#
    )
}

const FLAGS: &str = r#"
flags:
  editor: false
  banner:
    variants: {plain: Hello, festive: Happy holidays}
    default: plain
    rules: [{name: staff, when: {email: {ends_with: "@acme.example"}}, serve: festive}]
"#;

/// Where the flags are served.
fn endpoint(env: &TestEnvironment) -> SocketAddr {
    let flags = env.ok(&["flags", "--json"]).json();
    let endpoint = flags["endpoint"].as_str().unwrap_or_else(|| panic!("no endpoint: {flags:#}"));
    endpoint.strip_prefix("http://").expect("an HTTP address").parse().unwrap()
}

/// Asks for a flag as a person; the answer, if there is one.
fn asked(address: SocketAddr, flag: &str, email: &str) -> std::io::Result<Value> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = json!({"context": {"targetingKey": "u", "email": email}}).to_string();
    let head = format!("POST /ofrep/v1/evaluate/flags/{flag} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
    write!(stream, "{head}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    serde_json::from_str(body).map_err(std::io::Error::other)
}

/// The value of a flag for nobody in particular.
#[track_caller]
fn value(address: SocketAddr, flag: &str) -> Value {
    asked(address, flag, "u@x.example").unwrap()["value"].clone()
}

/// Asks until somebody answers: a proxy that was killed is started again.
#[track_caller]
fn value_again(address: SocketAddr, flag: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match asked(address, flag, "u@x.example") {
            Ok(answer) => return answer["value"].clone(),
            Err(error) => assert!(Instant::now() < deadline, "nobody answers: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Hears of changes. Ends with its stream.
fn subscribe(address: SocketAddr) -> mpsc::Receiver<Value> {
    let stream = TcpStream::connect(address).unwrap();
    (&stream).write_all(b"GET /ofrep/v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let (sender, heard) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if let Some(data) = line.strip_prefix("data: ")
                && sender.send(serde_json::from_str(data).unwrap()).is_err()
            {
                return;
            }
        }
    });
    heard
}

/// What an instance finds in its environment.
fn variable(pid: u64, name: &str) -> Option<String> {
    let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let prefix = format!("{name}=");
    let text = String::from_utf8(environ).unwrap();
    text.split('\0').find_map(|line| line.strip_prefix(&prefix)).map(str::to_owned)
}

#[test]
fn a_change_of_flags_alone_reaches_programs_without_a_restart() {
    let env = TestEnvironment::new();
    env.write(&stack("1", FLAGS));
    env.ok(&["up"]);
    let (address, pids) = (endpoint(&env), env.pids());
    for pid in pids.values() {
        assert_eq!(variable(*pid, "OFREP_ENDPOINT"), Some(format!("http://{address}")));
    }
    assert_eq!(value(address, "editor"), false);
    assert_eq!(asked(address, "banner", "a@acme.example").unwrap()["variant"], "festive");
    assert_eq!(asked(address, "unknown", "u").unwrap()["errorCode"], "FLAG_NOT_FOUND");
    let heard = subscribe(address);
    let first = heard.recv_timeout(PATIENCE).unwrap();

    env.write(&stack(
        "1",
        &FLAGS.replace("editor: false", "editor: true").replace("default: plain", "default: festive"),
    ));
    let plan = env.ok(&["plan", "--json"]).json()["plan"].clone();
    assert_eq!(plan["steps"], json!([]), "{plan:#}");
    let changed: Vec<&str> = plan["flags"].as_array().unwrap().iter().map(|f| f["flag"].as_str().unwrap()).collect();
    assert_eq!(changed, ["banner", "editor"]);
    assert_eq!(plan["flags"][0]["changes"][0]["path"], "default", "{plan:#}");
    let text = env.run(&["plan", "--exit-code"]).expect(10).text();
    assert!(text.contains("flag banner") && text.contains("nothing restarts"), "{text}");
    env.ok(&["up"]);
    // What `up` waits for is that it is served.
    assert_eq!((value(address, "editor"), value(address, "banner")), (json!(true), json!("Happy holidays")));
    let notice = heard.recv_timeout(PATIENCE).unwrap();
    assert_eq!(notice["type"], "refetchEvaluation");
    assert_ne!(notice["etag"], first["etag"]);
    assert_eq!(env.pids(), pids, "an instance was replaced");
    assert_eq!(env.status()["release"], 2);
    env.ok(&["up"]);
    assert_eq!(env.status()["release"], 2, "the same once more is no release");

    // A release that fails brings its flags with it, and takes them along.
    env.write(&stack("2", "flags: {editor: broken}").replace("command: [APP]", "command: [/bin/false]"));
    env.run(&["up"]).expect(1);
    assert_eq!((value(address, "editor"), value(address, "banner")), (json!(true), json!("Happy holidays")));
    assert_eq!(env.pids(), pids, "an instance was replaced");

    env.ok(&["rollback"]);
    assert_eq!((value(address, "editor"), value(address, "banner")), (json!(false), json!("Hello")));
    assert_eq!(env.pids(), pids, "an instance was replaced");
    assert_eq!(endpoint(&env), address);

    env.ok(&["down"]);
    assert!(TcpStream::connect(address).is_err(), "flags are served though everything is down");
    env.finish();
}

#[test]
fn the_official_client_follows_releases_and_overrides() {
    let Some(python) = official::python() else { return };
    let env = TestEnvironment::new();
    env.write(&stack("1", FLAGS));
    env.ok(&["up"]);
    let pid = *env.pids().values().next().unwrap();
    let found = variable(pid, "OFREP_ENDPOINT").unwrap();
    let mut client = official::Client::start(&python, &found);
    let mut editor = || client.ask(&json!({"kind": "boolean", "flag": "editor", "default": true, "key": "u"}));
    let answer = editor();
    assert_eq!(json!([answer["value"], answer["reason"], answer["error"]]), json!([false, "STATIC", null]));

    env.write(&stack("1", &FLAGS.replace("editor: false", "editor: true")));
    env.ok(&["up"]);
    assert_eq!(editor()["value"], true);

    env.ok(&["flags", "off", "editor", "--reason", "it loses drafts"]);
    let answer = editor();
    assert_eq!(json!([answer["value"], answer["reason"]]), json!([false, "DISABLED"]));
    assert_eq!(answer["metadata"]["orchestra.override.reason"], "it loses drafts");
    env.ok(&["flags", "clear", "editor"]);
    assert_eq!(editor()["value"], true);

    let server = env.one(Role::Server);
    processes::kill(server.pid, Signal::KILL);
    assert_eq!(editor()["value"], true, "nobody answers without a control plane");
    drop(client);
    env.finish();
}

#[test]
fn overrides_hold_until_they_are_taken_back() {
    let env = TestEnvironment::new();
    env.write(&stack("1", FLAGS));
    env.ok(&["up"]);
    let (address, pids) = (endpoint(&env), env.pids());
    let mut events = env.follow();

    let set = env.ok(&["flags", "set", "banner", "festive", "--reason", "the demo", "--json"]).json();
    assert_eq!(json!([set["state"], set["value"], set["in_force"]]), json!(["overridden", "Happy holidays", true]));
    assert_eq!(value(address, "banner"), "Happy holidays");
    let noted = events.event("flag_switched", "flags/dev");
    assert!(noted["cause"].as_str().unwrap().ends_with(": the demo"), "{noted:#}");

    let text = env.ok(&["flags"]).text();
    assert!(text.contains("overridden") && text.contains("the demo"), "{text}");
    for (arguments, word) in [
        (&["flags", "set", "banner", "loud"][..], "no variant `loud`"),
        (&["flags", "off", "bannr"], "no flag `bannr`"),
        (&["flags", "clear", "editor"], "nothing is laid over"),
    ] {
        let refused = env.run(arguments);
        assert!(refused.code() != Some(0) && refused.stderr.contains(word), "{refused}");
    }

    // Across a release of the service, and across a crash of the server.
    env.write(&stack("2", FLAGS));
    env.ok(&["up"]);
    assert_ne!(env.pids(), pids);
    assert_eq!(value(address, "banner"), "Happy holidays");
    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    assert_eq!(value(address, "banner"), "Happy holidays");
    let flags = env.ok(&["flags", "--json"]).json();
    assert_eq!(flags["flags"][0]["override"]["reason"], "the demo", "{flags:#}");
    assert_eq!(endpoint(&env), address);

    let cleared = env.ok(&["flags", "clear", "banner", "--json"]).json();
    assert_eq!(json!([cleared["state"], cleared["variant"]]), json!(["rules", "plain"]));
    assert_eq!(value(address, "banner"), "Hello");
    env.finish();
}

#[test]
fn flags_are_answered_while_parts_are_dead() {
    let env = TestEnvironment::new();
    env.write(&stack("1", FLAGS));
    env.ok(&["up"]);
    env.ok(&["flags", "set", "banner", "festive"]);
    let address = endpoint(&env);

    // The server: whoever asks does not notice.
    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    for _ in 0..20 {
        assert_eq!((value(address, "editor"), value(address, "banner")), (json!(false), json!("Happy holidays")));
    }
    // The proxy, with a server: connections wait for the next one.
    env.ok(&["flags"]);
    let heard = subscribe(address);
    let etag = heard.recv_timeout(PATIENCE).unwrap()["etag"].clone();
    processes::kill(env.one(Role::Proxy).pid, Signal::KILL);
    assert_eq!(value_again(address, "banner"), "Happy holidays");
    let heard = subscribe(address);
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap()["etag"], etag, "another set is served");
    // Told to end, it ends though somebody listens; its successor serves.
    let old = env.one(Role::Proxy).pid;
    processes::kill(old, Signal::TERM);
    let ended = heard.recv_timeout(PATIENCE);
    assert_eq!(ended, Err(mpsc::RecvTimeoutError::Disconnected), "the stream of a proxy that leaves goes on");
    assert_eq!(value_again(address, "banner"), "Happy holidays");

    // Both: the next command brings the same flags back at the same address.
    let proxy = env.one(Role::Proxy).pid;
    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    processes::kill(proxy, Signal::KILL);
    env.ok(&["flags"]);
    assert_eq!(value_again(address, "banner"), "Happy holidays");
    assert_eq!(endpoint(&env), address);
    env.finish();
}

#[test]
fn flags_that_come_later_restart_nothing() {
    let env = TestEnvironment::new();
    env.write(&stack("1", ""));
    env.ok(&["up"]);
    let pids = env.pids();
    assert!(env.ok(&["flags", "--json"]).json()["endpoint"].is_null());
    env.write(&stack("1", FLAGS));
    let plan = env.ok(&["plan"]).text();
    assert!(plan.contains("OFREP_ENDPOINT"), "{plan}");
    env.ok(&["up"]);
    assert_eq!(env.pids(), pids, "an instance was replaced");
    assert_eq!(value(endpoint(&env), "editor"), false);
    env.ok(&["restart"]);
    for pid in env.pids().values() {
        assert_eq!(variable(*pid, "OFREP_ENDPOINT"), Some(format!("http://{}", endpoint(&env))));
    }
    env.finish();
}
