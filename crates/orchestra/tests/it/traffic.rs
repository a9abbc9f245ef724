//! What a stack says of its traffic, through the whole: limits, retries, ejection, a fallback, and pauses by hand.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    environment::{TestEnvironment, find},
    load,
    processes::Role,
};

const STACK: &str = r#"
version: 1
name: traffic
services:
  api:
    command: [APP]
    replicas: 2
    ports:
      http:
        port: auto
        limits: {body: 1Ki}
        outlier: {failures: 3, eject_for: 60s}
        fallback: sorry
    env:
      VERSION: one
      FAIL_FILE: "HERE/fail-{{ instance.ordinal }}"
      UNREADY_FILE: HERE/unready
    health:
      ready: {http: /ready, every: 50ms, every_starting: 20ms, fail_after: 1}
    rollout: {drain: {requests: 5s, streams: 5s}}
    stop: {grace: 5s}
  sorry:
    command: [APP]
    ports: {http: {port: auto, limits: {requests_per_second: 5}}}
    env: {VERSION: sorry}
    health:
      ready: {http: /ready, every: 500ms, every_starting: 20ms}
    stop: {grace: 5s}
"#;

/// The head and the body of an answer.
fn ask(address: SocketAddr, request: &str) -> (String, String) {
    let mut tcp = TcpStream::connect(address).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    tcp.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in `{answer}`"));
    (head.to_ascii_lowercase(), body.to_owned())
}

fn get(address: SocketAddr, path: &str) -> (String, String) {
    ask(address, &format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"))
}

/// What `why` says of the service, line by line.
fn why(env: &TestEnvironment) -> String {
    env.ok(&["why", "api"]).text()
}

#[test]
fn limits_ejection_and_fallback_hold_as_the_stack_says() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    let address = env.address("api");

    // Limits.
    let long = "x".repeat(2000);
    let post = |body: &str| {
        let length = body.len();
        ask(
            address,
            &format!("POST /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"),
        )
    };
    assert!(post("short").0.starts_with("http/1.1 200"));
    let (head, body) = post(&long);
    assert!(head.starts_with("http/1.1 413") && body.contains("longer than 1024 bytes"), "{head}\n{body}");
    // As fast as one client can is more than five a second on any machine that runs the tests.
    let sorry = env.address("sorry");
    let heads: Vec<String> = (0..40).map(|_| get(sorry, "/version").0).collect();
    let limited = heads.iter().find(|head| head.starts_with("http/1.1 429")).expect("nobody was limited");
    assert!(limited.contains("retry-after: 1") && heads[0].starts_with("http/1.1 200"), "{heads:?}");

    // One of two instances goes bad: it is left out, and the other one answers.
    fs::write(env.path("fail-1"), "").unwrap();
    let mut failed = 0;
    for _ in 0..60 {
        failed += u32::from(get(address, "/version").0.starts_with("http/1.1 500"));
    }
    assert!((3..=6).contains(&failed), "{failed} of 60");
    // Whoever looks at the status sees it, and for how long.
    let status = env.ok(&["status"]).text();
    assert!(status.contains("ejected from http for 5"), "{status}");
    let status: Value = env.ok(&["status", "--json"]).json();
    let instances = find(&status, "api")["instances"].as_array().unwrap().clone();
    let ejected: Vec<&Value> = instances.iter().filter(|instance| !instance["ejected"].is_null()).collect();
    assert!(ejected.len() == 1 && ejected[0]["ejected"][0]["port"] == "http", "{ejected:?}");
    assert!(ejected[0]["ejected"][0]["until"].as_u64() > status["at"].as_u64(), "{ejected:?}");
    // A change of the other kind moves nothing: the table is new, and it is still left out.
    fs::write(env.path("fail-2"), "").unwrap();
    assert!(get(address, "/version").0.starts_with("http/1.1 500"), "somebody must answer");
    for file in ["fail-1", "fail-2"] {
        fs::remove_file(env.path(file)).unwrap();
    }

    // No instance at all: the other service answers at once, says so, and stops when there is one.
    fs::write(env.path("unready"), "").unwrap();
    env.wait_for("nobody ready", |status| find(status, "api")["ready"] == 0);
    let began = Instant::now();
    let (head, body) = get(address, "/version");
    assert!(head.contains("orchestra-fallback: sorry") && body == "sorry", "{head}\n{body}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    fs::remove_file(env.path("unready")).unwrap();
    env.wait_for("both ready", |status| find(status, "api")["ready"] == 2);
    let (head, body) = get(address, "/version");
    assert!(!head.contains("orchestra-fallback") && body == "one", "{head}\n{body}");
    env.finish();
}

#[test]
fn a_pause_holds_requests_up_survives_the_server_and_ends() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    let address = env.address("api");
    for refused in [
        &["traffic", "resume", "api"][..],
        &["traffic", "pause", "nobody"],
        &["traffic", "pause", "api", "--for", "2h"],
    ] {
        let refused = env.run(refused);
        assert!(refused.code() != Some(0) && refused.stderr.starts_with("error[ORC"), "{refused}");
    }

    let paused = env.ok(&["traffic", "pause", "api", "--for", "10m"]);
    assert!(paused.text().contains("orchestra traffic resume api"), "{paused}");
    let asked = std::thread::spawn(move || load::get(address, "/version").unwrap());
    assert!(why(&env).contains("new requests wait"), "{}", why(&env));
    assert!(env.ok(&["status"]).text().contains("new requests wait"));
    let queued = env.wait_for("a request that waits", |status| find(status, "api")["queues"][0]["length"] == 1);
    assert_eq!(find(&queued, "sorry")["queues"], Value::Null);
    assert!(why(&env).contains("1 request to http waits, of 1024 that may"), "{}", why(&env));
    assert!(!asked.is_finished());
    // Another service is not concerned.
    assert_eq!(load::get(env.address("sorry"), "/version").unwrap(), "sorry");

    // Killed at this moment: the proxy goes on holding, and so does the next server.
    env.one(Role::Server).kill();
    let status = env.status();
    let service = find(&status, "api");
    assert!(service["traffic_paused"]["until"].is_u64(), "{service:#}");
    assert!(!asked.is_finished(), "the pause ended with the server");
    // A rollout goes on meanwhile, and the requests go to what is there afterwards.
    let stack = STACK.replace("VERSION: one", "VERSION: two");
    env.write(&stack);
    env.ok(&["up"]);
    assert!(!asked.is_finished());
    let resumed = env.ok(&["traffic", "resume", "api"]);
    assert_eq!(resumed.text().trim_end(), "requests to api of traffic/dev go on");
    assert_eq!(asked.join().unwrap(), "two");
    assert!(!why(&env).contains("new requests wait") && !why(&env).contains("that may"), "{}", why(&env));

    // By itself, and as JSON.
    let paused = env.ok(&["traffic", "pause", "api", "--for", "700ms", "--json"]).json();
    assert_eq!((&paused["service"], &paused["in_force"]), (&Value::from("api"), &Value::from(true)));
    let began = Instant::now();
    assert_eq!(load::get(address, "/version").unwrap(), "two");
    let waited = began.elapsed();
    assert!(waited > Duration::from_millis(100) && waited < Duration::from_secs(5), "{waited:?}");
    let events: Vec<Value> = env.ok(&["events", "--json"]).json_lines();
    let count = |kind: &str| events.iter().filter(|event| event["kind"] == kind).count();
    assert_eq!((count("traffic_paused"), count("traffic_resumed")), (2, 2));
    env.finish();
}
