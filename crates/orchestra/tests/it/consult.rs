//! Numbers that come from outside the data plane: a counter that the service exports, a real Prometheus server, and what
//! instances export to be scaled by.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use orchestra_testbed::load::{Load, Plan, Report};
use serde_json::Value;

use crate::{
    environment::{TestEnvironment, find},
    load::get,
};

/// Clients that go on until they are stopped.
struct Clients {
    runtime: tokio::runtime::Runtime,
    load: Load,
}

impl Clients {
    fn of(address: SocketAddr, plan: impl FnOnce(Plan) -> Plan) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let plan = plan(Plan::to(address));
        let load = runtime.block_on(async { Load::start(plan) });
        Self { runtime, load }
    }

    fn stop(self) -> Report {
        self.runtime.block_on(self.load.stop())
    }
}

fn verdict(env: &TestEnvironment, release: &str) -> Value {
    let shown = env.ok(&["show", release, "--json"]).json();
    shown["verdicts"].as_array().and_then(|all| all.last()).cloned().unwrap_or_else(|| panic!("{shown:#}"))
}

#[test]
fn a_canary_that_answers_well_and_counts_errors_is_turned_back() {
    let env = TestEnvironment::new();
    let stack = |version: u32, permille: u32| {
        format!(
            r#"
version: 1
name: consult
services:
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    metrics: {{every: 1s}}
    env: {{VERSION: "{version}", COUNT_PERMILLE: "{permille}"}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
    rollout:
      canary: {{steps: [{{weight: 20}}, {{analysis: 60s}}], keep_warm: 0s}}
      guard: {{counters: [app_errors_total], warm_up: 1s}}
"#
        )
    };
    env.write(&stack(1, 20));
    env.ok(&["up"]);
    let clients = Clients::of(env.address("api"), |plan| Plan { get: 60, post: 40, fresh: 60, ..plan });

    // As many as before: it passes, and the counter is in the record.
    env.write(&stack(2, 20));
    env.ok(&["up"]);
    let passed = verdict(&env, "2");
    assert_eq!(passed["outcome"], "pass", "{passed:#}");
    let counter = &passed["evidence"]["counters"][0];
    assert_eq!(counter["name"], "app_errors_total", "{passed:#}");
    assert!(counter["stable"][1].as_u64().unwrap() > 0, "{counter:#}");

    // Half of its requests count an error, and every one is answered 200.
    env.write(&stack(3, 500));
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("ORC0704"), "{failed}");
    let failed = verdict(&env, "3");
    assert_eq!(failed["outcome"], "fail", "{failed:#}");
    let reason = failed["reason"].as_str().unwrap();
    assert!(reason.starts_with("counter app_errors_total grew by"), "{reason}");
    eprintln!("{reason}");
    let shown = env.ok(&["show", "3"]).text();
    assert!(shown.contains("verdict fail") && shown.contains("app_errors_total"), "{shown}");
    assert_eq!(get(env.address("api"), "/version").unwrap(), "2");

    // One that cannot be read is an error, and no failure.
    env.write(&stack(4, 20).replace("{every: 1s}", "{every: 1s, path: /nothing}").replace("60s", "4s"));
    let up = env.spawn(&["up"]);
    env.wait_for("the pause", |status| find(status, "api")["rollout"]["paused"].is_object());
    let unread = verdict(&env, "4");
    assert_eq!(unread["outcome"], "error", "{unread:#}");
    assert!(unread["reason"].as_str().unwrap().contains("/nothing: HTTP 404"), "{unread:#}");
    env.ok(&["promote"]);
    up.wait().expect(0);

    let report = clients.stop();
    assert!(report.ok() > 0 && report.failures.is_empty(), "{report}");
    env.finish();
}

/// A port that was free a moment ago.
fn free() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// The value of a metric, as Prometheus sees it.
fn seen(prometheus: SocketAddr, metric: &str) -> Option<String> {
    let answer: Value = serde_json::from_str(&get(prometheus, &format!("/api/v1/query?query={metric}")).ok()?).ok()?;
    answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
}

fn until_seen(prometheus: SocketAddr, metric: &str, value: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while seen(prometheus, metric).as_deref() != Some(value) {
        assert!(Instant::now() < deadline, "Prometheus does not see {value}, but {:?}", seen(prometheus, metric));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A stack with its own Prometheus server, which looks at a gauge whose value is in a file.
fn watched(prometheus: u16, gauge: u16, version: u32, keys: &str, analysis: &str) -> String {
    format!(
        r#"
version: 1
name: watched
services:
  prometheus:
    command: exec prometheus --config.file=HERE/prometheus.yml --storage.tsdb.path=HERE/tsdb --web.listen-address=127.0.0.1:$PORT
    ports: {{http: {prometheus}}}
    health: {{ready: {{http: /-/ready, every: 1s, every_starting: 50ms}}}}
  gauge:
    command: [APP]
    ports: {{http: {gauge}}}
    env: {{QUEUE_FILE: HERE/queue}}
    health: {{ready: {{http: /ready, every_starting: 20ms}}}}
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{VERSION: "{version}"}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
    rollout:
      canary: {{steps: [{{weight: 20}}, {{analysis: {analysis}}}], keep_warm: 0s}}
      guard:
        prometheus: {{name: depth, address: "http://127.0.0.1:{prometheus}", every: 1s, {keys}}}
"#
    )
}

#[test]
fn a_prometheus_server_has_a_say() {
    if !is_there("prometheus") {
        eprintln!("SKIPPED: the Debian package `prometheus` is not installed; scripts/test installs it");
        return;
    }
    let env = TestEnvironment::new();
    let (prometheus, gauge) = (free(), free());
    let queue = env.path("queue");
    let set = |value: &str| replace(&queue, value);
    set("0");
    let config = format!(
        "global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}\nscrape_configs: [{{job_name: gauge, static_configs: [{{targets: ['127.0.0.1:{gauge}']}}]}}]\n"
    );
    std::fs::write(env.path("prometheus.yml"), config).unwrap();
    let server: SocketAddr = ([127, 0, 0, 1], prometheus).into();
    let stack = |version, keys: &str, analysis: &str| env.write(&watched(prometheus, gauge, version, keys, analysis));
    let good = "query: 'sum(app_queue_depth{job=\"gauge\"})', success: 'result < 5', count: 3";
    stack(1, good, "60s");
    env.ok(&["up"]);
    until_seen(server, "app_queue_depth", "0");
    let clients = Clients::of(env.address("api"), |plan| Plan { get: 60, post: 40, fresh: 60, ..plan });

    // It says good three times, and the requests say the same.
    stack(2, good, "60s");
    env.ok(&["up"]);
    let passed = verdict(&env, "2");
    assert_eq!(passed["outcome"], "pass", "{passed:#}");
    let source = &passed["evidence"]["prometheus"][0];
    assert_eq!((&source["name"], &source["value"], &source["successful"]), (&"depth".into(), &0.0.into(), &3.into()));

    // It says bad: all requests are good, and the release is turned back.
    set("9");
    until_seen(server, "app_queue_depth", "9");
    stack(3, good, "60s");
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("ORC0704") && failed.stderr.contains("last value 9"), "{failed}");
    assert_eq!(verdict(&env, "3")["outcome"], "fail");
    let shown = env.ok(&["show", "3"]).text();
    assert!(shown.contains("depth") && shown.contains("result < 5"), "{shown}");

    // A dry run is told and decides nothing.
    stack(4, &format!("{good}, dry_run: true"), "60s");
    env.ok(&["up"]);
    let dry = verdict(&env, "4");
    let source = &dry["evidence"]["prometheus"][0];
    assert_eq!((&dry["outcome"], &source["failed"], &source["settled"]), (&"pass".into(), &1.into(), &"fail".into()));

    // No data is inconclusive; what that means the policy says.
    let none = "query: nothing_there, success: 'result < 5'";
    stack(5, none, "{for: 8s, inconclusive: roll_back}");
    let turned = env.run(&["up"]).expect(1);
    assert!(turned.stderr.contains("was inconclusive"), "{turned}");
    let inconclusive = verdict(&env, "5");
    assert_eq!(inconclusive["outcome"], "inconclusive", "{inconclusive:#}");
    assert_eq!(inconclusive["evidence"]["prometheus"][0]["failed"], 0);

    // A query that is wrong is an error, with the server's own words; a person decides.
    stack(6, "query: 'sum(', success: 'result < 5'", "8s");
    let up = env.spawn(&["up"]);
    env.wait_for("its words", |_| env.ok(&["why", "api"]).text().contains("bad_data"));
    env.wait_for("the pause", |status| find(status, "api")["rollout"]["paused"].is_object());
    assert_eq!(verdict(&env, "6")["outcome"], "error");
    let why = env.ok(&["why", "api"]).text();
    assert!(why.contains("could not be measured"), "{why}");
    env.ok(&["promote"]);
    up.wait().expect(0);
    assert_eq!(get(env.address("api"), "/version").unwrap(), "6");

    let report = clients.stop();
    assert!(report.ok() > 0 && report.failures.is_empty(), "{report}");
    env.finish();
}

/// Replaces a file at once: nobody reads a half of it.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

/// Waits until it has so many instances, all ready.
fn until(env: &TestEnvironment, count: u64) {
    env.wait_for(&format!("{count} instances"), |status| {
        let api = find(status, "api");
        (api["desired"].as_u64(), api["ready"].as_u64()) == (Some(count), Some(count))
    });
}

#[test]
fn a_service_grows_with_the_queue_that_it_exports() {
    let env = TestEnvironment::new();
    replace(&env.path("queue"), "1");
    env.write(
        r"
version: 1
name: consult
services:
  api:
    command: [APP]
    ports: {http: auto}
    env: {QUEUE_FILE: HERE/queue}
    health: {ready: {http: /ready, every: 200ms, every_starting: 20ms}}
    scale:
      min: 1
      max: 3
      on: [{queue_depth: {metric: app_queue_depth, average: 5}}, {exported: {name: app_requests_total, labels: {version: none}, value: 100}}]
      every: 1s
      down: {window: 1s}
",
    );
    env.ok(&["up"]);
    // One of its metrics is not there: that is said, and nothing is taken away.
    env.wait_for("the reason", |status| {
        let lines = find(status, "api")["scaling"].to_string();
        lines.contains("app_queue_depth is 1 of 5 per instance")
            && lines.contains(
                "app_requests_total{version=\\\"none\\\"}: no instance exports it as a finite number on /metrics",
            )
    });
    replace(&env.path("queue"), "10");
    until(&env, 3);
    let why = env.ok(&["why", "api"]).text();
    assert!(why.contains("app_queue_depth is 10 of 5 per instance"), "{why}");
    replace(&env.path("queue"), "0");
    env.wait_for("what blocks it", |status| {
        find(status, "api")["scaling"].to_string().contains("not all are available, and so nothing is taken away")
    });
    until(&env, 3);

    // Without that metric it shrinks; what cannot be read moves nothing.
    let text = std::fs::read_to_string(env.path("orchestra.yaml")).unwrap();
    let (head, tail) = text.split_once(", {exported").unwrap();
    env.write(&format!("{head}{}", tail.split_once("}}").unwrap().1));
    env.ok(&["up"]);
    until(&env, 1);
    replace(&env.path("queue"), "many");
    env.wait_for("the line", |status| {
        find(status, "api")["scaling"].to_string().contains("/metrics: line 7 cannot be read")
    });
    until(&env, 1);
    env.finish();
}

#[test]
fn a_service_grows_with_the_tokens_that_are_in_flight() {
    let env = TestEnvironment::new();
    env.write(
        r"
version: 1
name: consult
services:
  api:
    command: [APP]
    ports: {http: auto}
    health: {ready: {http: /ready, every: 200ms, every_starting: 20ms}}
    rollout: {drain: {requests: 5s, streams: 20s}}
    scale: {min: 1, max: 2, on: [{tokens_in_flight: 20}], every: 1s, down: {window: 1s}}
",
    );
    env.ok(&["up"]);
    let address = env.address("api");
    env.wait_for("a measurement", |status| {
        find(status, "api")["scaling"].to_string().contains("tokens_in_flight is 0 of 20 per instance")
    });
    // Sixty tokens in three seconds, all of them in flight until the stream ends.
    let stream = TcpStream::connect(address).unwrap();
    let reader = std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let mut stream = stream;
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(stream, "GET /stream?n=120&ms=50 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    until(&env, 2);
    assert!(reader.join().unwrap().contains("event: done"));
    // They are gone with it.
    until(&env, 1);
    env.finish();
}
