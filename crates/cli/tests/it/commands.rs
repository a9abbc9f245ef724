//! Commands that look: screens and JSON, and how the environment that is meant is found.

use orchestra_api::{Frame, scripted::Exchange};
use orchestra_cli::Exit;
use orchestra_model::{Code, Diagnostic, Event};
use serde_json::{Value, json};

use crate::environment::{NOW, TestEnvironment, plan, refusal, run, status, valid};

const STATUS: &str = "GET /v1/environments/shop/dev";
const LIST: &str = "GET /v1/environments?limit=1000";

fn summaries(source: &std::path::Path) -> Value {
    let one = |id: &str, source: &std::path::Path| json!({"id": id, "source": source, "health": "ready", "release": 3, "ready": 1, "services": 1});
    json!({"items": [one("other/dev", std::path::Path::new("/x/orchestra.yaml")), one("shop/dev", source)]})
}

fn event(sequence: u64, kind: &str, extra: &Value) -> Event {
    let mut value =
        json!({"sequence": sequence, "at": NOW, "environment": "shop/dev", "kind": kind, "cause": "because"});
    value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    serde_json::from_value(value).unwrap()
}

fn log_line(instance: &str, stream: &str, line: &Value) -> Value {
    json!({"instance": instance, "attempt": 1, "stream": stream, "at": NOW, "line": line})
}

#[tokio::test]
async fn validate_and_plan_need_no_server_and_start_none() {
    let mut test = TestEnvironment::new();
    // Every environment, unless one is named.
    let mut all = Exchange::json(
        "POST /v1/validate?all=true",
        &json!({"environment": "shop/dev", "resources": [{"kind": "service", "names": ["api"]}], "environments": ["prod"],
            "others": [{"environment": "shop/prod", "resources": [{"kind": "service", "names": ["api", "web"]}]}], "warnings": []}),
    );
    all = all.expect_body(&test.source());
    test.in_process(vec![all]);
    let outcome = test.run("validate").await;
    assert_eq!(
        outcome.page(),
        "exit: 0\n--- stdout\norchestra.yaml is valid: shop/dev with 1 service; shop/prod with 2 services\n--- stderr\n"
    );
    assert!(!test.home().exists(), "looking creates nothing");
    test.finish();

    let mut test = TestEnvironment::new();
    test.in_process(vec![valid()]);
    let outcome = test.run("validate -e dev").await;
    assert_eq!(
        outcome.page(),
        "exit: 0\n--- stdout\norchestra.yaml is valid: shop/dev with 2 services, 1 job\n--- stderr\n"
    );
    test.finish();

    let mut test = TestEnvironment::new();
    test.in_process(vec![
        Exchange::json(
            "POST /v1/plan",
            &json!({"plan": plan(), "warnings": [Diagnostic::warning(Code::UNKNOWN_KEY, "odd")]}),
        )
        .expect_body(&json!({"up": test.source()})),
    ]);
    let outcome = test.run("plan").await;
    assert_eq!(outcome.exit, Exit::Success);
    assert!(outcome.stdout.contains("service.api"), "{}", outcome.stdout);
    assert!(outcome.stderr.contains("odd"), "{}", outcome.stderr);
    assert!(!test.home().exists());
    test.finish();
}

/// `--env other/dev` in the folder of `shop` is a slip: the `dev` of `shop` is not what is meant.
#[tokio::test]
async fn the_file_of_another_stack_is_refused() {
    for line in ["validate -e other/dev", "plan -e other/dev", "up -e other/dev", "up -e other/pr-7 --from dev"] {
        let mut test = TestEnvironment::new();
        if line.starts_with("plan") {
            test.in_process(vec![]);
        } else if line.starts_with("up") {
            test.server(vec![]);
        }
        let outcome = test.run(line).await;
        assert_eq!(outcome.exit, Exit::Invalid, "{line}: {}", outcome.stderr);
        assert!(
            outcome.stderr.starts_with("error[ORC0211]: orchestra.yaml is the stack `shop`, and `other/")
                && outcome.stderr.contains("`--file`"),
            "{line}: {}",
            outcome.stderr
        );
        test.finish();
    }
}

#[tokio::test]
async fn plan_of_down_and_without_changes() {
    let mut test = TestEnvironment::new();
    let mut empty = plan();
    empty["steps"] = json!([]);
    test.server(vec![
        Exchange::json("POST /v1/plan", &json!({"plan": empty, "warnings": []}))
            .expect_body(&json!({"down": {"environment": "shop/dev", "volumes": true}})),
    ]);
    let outcome = test.run("plan --down --volumes --exit-code --json -e shop/dev").await;
    assert_eq!(outcome.exit, Exit::Success);
    assert_eq!(outcome.json()["plan"]["steps"], json!([]));
    test.finish();
}

#[tokio::test]
async fn an_invalid_stack_file_is_drawn_or_printed_as_json() {
    let error = Diagnostic::error(Code::UNKNOWN_KEY, "`comand` is not known here").help("did you mean `command`?");
    for line in ["validate", "validate --json"] {
        let mut test = TestEnvironment::new();
        test.in_process(vec![refusal("POST /v1/validate?all=true", 422, &error)]);
        let outcome = test.run(line).await;
        assert_eq!(outcome.exit, Exit::Invalid);
        if line.contains("json") {
            assert_eq!(outcome.json()["errors"][0]["code"], "ORC0201");
            assert_eq!(outcome.stderr, "");
        } else {
            assert!(
                outcome.stderr.contains("ORC0201") && outcome.stderr.contains("did you mean"),
                "{}",
                outcome.stderr
            );
            assert_eq!(outcome.stdout, "");
        }
        test.finish();
    }
}

#[tokio::test]
async fn status_of_the_stack_of_this_folder() {
    let mut test = TestEnvironment::new();
    test.server(vec![valid().expect_body(&test.source()), Exchange::json(STATUS, &status())]);
    let outcome = test.run("status").await;
    insta::assert_snapshot!(outcome.page());
    test.finish();
}

#[tokio::test]
async fn a_broken_stack_file_does_not_hide_what_runs() {
    let mut test = TestEnvironment::new();
    let broken = Diagnostic::error(Code::YAML_SYNTAX, "a bracket is not closed");
    let known = summaries(&test.cwd().join("orchestra.yaml"));
    test.server(vec![
        refusal("POST /v1/validate", 422, &broken),
        Exchange::json(LIST, &known),
        Exchange::json(STATUS, &status()),
    ]);
    assert_eq!(test.run("status").await.exit, Exit::Success);
    test.finish();

    let mut test = TestEnvironment::new();
    let known = summaries(std::path::Path::new("/elsewhere/orchestra.yaml"));
    test.server(vec![refusal("POST /v1/validate", 422, &broken), Exchange::json(LIST, &known)]);
    let outcome = test.run("status").await;
    assert_eq!(outcome.exit, Exit::Invalid);
    assert!(outcome.stderr.contains("a bracket is not closed"), "{}", outcome.stderr);
    test.finish();
}

#[tokio::test]
async fn without_a_stack_file_status_lists_environments_and_others_ask_for_one() {
    let mut test = TestEnvironment::new();
    std::fs::remove_file(test.cwd().join("orchestra.yaml")).unwrap();
    test.server(vec![Exchange::json(LIST, &summaries(std::path::Path::new("/srv/orchestra.yaml")))]);
    let outcome = test.run("status").await;
    assert!(outcome.stdout.contains("shop/dev     ready  1/1    3        /srv/orchestra.yaml"), "{}", outcome.stdout);
    test.finish();

    let mut test = TestEnvironment::new();
    std::fs::remove_file(test.cwd().join("orchestra.yaml")).unwrap();
    test.server(Vec::new());
    let outcome = test.run("logs").await;
    assert_eq!(outcome.exit, Exit::Invalid);
    assert!(outcome.stderr.contains("orchestra init"), "{}", outcome.stderr);
    test.finish();
}

#[tokio::test]
async fn looking_where_nothing_is_creates_nothing() {
    for line in ["status", "logs", "events", "history", "status --all", "doctor", "server status", "server stop"] {
        let mut test = TestEnvironment::new();
        let outcome = test.run(line).await;
        let expected = if line == "server status" { Exit::NoServer } else { Exit::Success };
        assert_eq!(outcome.exit, expected, "{line}: {}", outcome.page());
        assert!(!test.home().exists(), "{line}");
        test.finish();
    }
    for line in ["down", "restart", "scale api=2", "rollback"] {
        let mut test = TestEnvironment::new();
        let outcome = test.run(line).await;
        assert_eq!(outcome.exit, Exit::Failed, "{line}: {}", outcome.page());
        assert!(outcome.stderr.contains("nothing is up"), "{line}: {}", outcome.stderr);
        assert!(!test.home().exists(), "{line}");
        test.finish();
    }
    let mut test = TestEnvironment::new();
    assert_eq!(test.run("show 3").await.exit, Exit::Failed);
    assert_eq!(test.run("status --json").await.stdout, "[]\n");
    test.finish();
}

#[tokio::test]
async fn logs_have_prefixes_and_drive_nothing() {
    let mut test = TestEnvironment::new();
    let lines = [
        log_line("api-r3-1", "stdout", &json!({"text": "plain\n"})),
        log_line("worker-r3-12", "stderr", &json!({"text": "\u{1b}]0;title\u{7}\u{1b}[31mred\u{1b}[0m\r\n"})),
        log_line("api-r3-1", "stdout", &json!({"base64": "/wAK"})),
        log_line("api-r3-1", "stdout", &json!({"text": "no end"})),
    ];
    let path = "GET /v1/environments/shop/dev/logs?workload=api,worker&tail=5&since=1795232680123";
    test.server(vec![Exchange::lines(path, &lines)]);
    let outcome = test.run("logs api worker --tail 5 --since 5m -e shop/dev").await;
    assert_eq!(
        outcome.stdout,
        "api-r3-1 | plain\nworker-r3-12 ! \\e]0;title\\x07red\napi-r3-1     | \u{fffd}\\x00\napi-r3-1     | no end\n"
    );
    test.finish();

    let mut test = TestEnvironment::new();
    test.terminal(80, 24);
    test.server(vec![Exchange::lines("GET /v1/environments/shop/dev/logs", &lines[1..2])]);
    let outcome = test.run("logs -t -e shop/dev").await;
    assert!(outcome.stdout.contains("\\e]0;title\\x07\x1b[31mred\x1b[0m\x1b[0m\n"), "{:?}", outcome.stdout);
    assert!(outcome.stdout.contains("2026-11-21T03:49:40.123Z"), "{:?}", outcome.stdout);
    test.finish();
}

#[tokio::test]
async fn raw_logs_are_the_bytes_that_were_written() {
    let mut test = TestEnvironment::new();
    let lines = [
        log_line("api-r3-1", "stdout", &json!({"text": "\u{1b}[31mred\r\n"})),
        log_line("api-r3-1", "stdout", &json!({"text": "no end"})),
    ];
    test.server(vec![Exchange::lines("GET /v1/environments/shop/dev/logs?instance=api-r3-1", &lines)]);
    let outcome = test.run("logs --raw --instance api-r3-1 -e shop/dev").await;
    assert_eq!(outcome.stdout, "\x1b[31mred\r\nno end");
    test.finish();
}

#[tokio::test]
async fn logs_that_are_cut_off_are_an_error() {
    let mut test = TestEnvironment::new();
    let lines = [log_line("api-r3-1", "stdout", &json!({"text": "x\n"}))];
    test.server(vec![Exchange::lines("GET /v1/environments/shop/dev/logs", &lines).cut()]);
    let outcome = test.run("logs -e shop/dev").await;
    assert_eq!((outcome.exit, &outcome.stdout[..]), (Exit::NoServer, "api-r3-1 | x\n"));
    test.finish();
}

#[tokio::test]
async fn logs_are_followed_over_servers_without_gap_or_repetition_until_ctrl_c() {
    let mut test = TestEnvironment::new();
    let path = "GET /v1/environments/shop/dev/logs";
    let line = |text: &str| log_line("api-r3-1", "stdout", &json!({"text": text}));
    test.server(vec![
        Exchange::lines(&format!("{path}?tail=2&follow=true"), &[line("one\n"), line("two\n")]).cut(),
        Exchange::lines(
            &format!("{path}?since={}&follow=true", NOW - 5_000),
            &[line("one\n"), line("two\n"), line("three\n")],
        )
        .open(),
    ]);
    let command = test.start("logs -f -n 2 -e shop/dev");
    let (stdout, stderr, interrupts) = (test.stdout.clone(), test.stderr.clone(), test.interrupts.clone());
    let act = async {
        while !stdout.text().contains("three") {
            tokio::task::yield_now().await;
        }
        test.kill_server();
        while !stderr.text().contains("waiting for the next one") {
            tokio::task::yield_now().await;
        }
        let again = ["one\n", "two\n", "three\n", "four\n"].map(line);
        test.server(vec![Exchange::lines(&format!("{path}?since={}&follow=true", NOW - 5_000), &again).open()]);
        while !stdout.text().contains("four") {
            tokio::task::yield_now().await;
        }
        interrupts.send(()).await.unwrap();
    };
    let (exit, ()) = tokio::join!(command, act);
    let outcome = test.outcome(exit);
    assert_eq!(outcome.exit, Exit::Interrupted, "{}", outcome.page());
    let lines = ["one", "two", "three", "four"].map(|text| format!("api-r3-1 | {text}\n"));
    assert_eq!(outcome.stdout, lines.concat());
    assert_eq!(test.spawned(), []);
    test.finish();
}

#[tokio::test]
async fn events_are_read_page_after_page() {
    let mut test = TestEnvironment::new();
    let path = "GET /v1/environments/shop/dev/events";
    let first = [
        event(4, "run_started", &json!({"run": "run_7"})),
        event(5, "instance_ready", &json!({"resource": "service.api", "instance": "api-r3-1"})),
    ];
    let second = [event(6, "step_failed", &json!({"resource": "service.api", "cause": "exit \u{1b}[2J code 1"}))];
    test.server(vec![
        Exchange::json(path, &json!({"items": first, "next": "5"})),
        Exchange::json(&format!("{path}?after=5"), &json!({"items": second})),
    ]);
    let outcome = test.run("events -e shop/dev").await;
    insta::assert_snapshot!(outcome.page());
    test.finish();
}

#[tokio::test]
async fn events_are_followed_over_servers_until_ctrl_c() {
    let mut test = TestEnvironment::new();
    let path = "GET /v1/environments/shop/dev/events";
    let frame = |n| Frame::event(&event(n, "instance_ready", &json!({"instance": "api-r3-1"})));
    test.server(vec![Exchange::events(&format!("{path}?tail=1&follow=true"), &[frame(4)]).open()]);
    let command = test.start("events -f -n 1 --json -e shop/dev");
    let (stdout, stderr, interrupts) = (test.stdout.clone(), test.stderr.clone(), test.interrupts.clone());
    let act = async {
        while !stdout.text().contains("\"sequence\":4") {
            tokio::task::yield_now().await;
        }
        test.kill_server();
        // It may have been stopped on purpose: who only looks does not start it.
        while !stderr.text().contains("waiting for the next one") {
            tokio::task::yield_now().await;
        }
        test.server(vec![
            Exchange::events(&format!("{path}?after=4&follow=true"), &[frame(5)]).expect_last_event_id("4").open(),
        ]);
        while !stdout.text().contains("\"sequence\":5") {
            tokio::task::yield_now().await;
        }
        interrupts.send(()).await.unwrap();
    };
    let (exit, ()) = tokio::join!(command, act);
    let outcome = test.outcome(exit);
    assert_eq!(outcome.exit, Exit::Interrupted);
    assert_eq!(outcome.ndjson().len(), 2);
    assert_eq!(test.spawned(), []);
    test.finish();
}

#[tokio::test]
async fn history_lists_and_show_compares() {
    let release = |number: u64, state: &str| json!({"number": number, "created_at": NOW, "run": "run_7", "reason": "up", "state": state});
    let mut test = TestEnvironment::new();
    let path = "GET /v1/environments/shop/dev/releases";
    test.server(vec![
        Exchange::json(
            &format!("{path}?limit=1000"),
            &json!({"items": [release(4, "superseded"), release(3, "stable"), release(2, "failed")], "next": "2"}),
        ),
        Exchange::json(&format!("{path}?after=2&limit=1000"), &json!({"items": [release(1, "retired")]})),
    ]);
    let outcome = test.run("history -e shop/dev").await;
    insta::assert_snapshot!("history", outcome.page());
    test.finish();

    let volume = |path: &str| json!({"volume": {"path": path, "managed": true}});
    let record = |number: u64, resources: Value| {
        json!({"environment": "shop/dev", "number": number, "created_at": NOW, "run": "run_7", "reason": "up", "state": "stable",
        "desired": {"environment": "shop/dev", "target": "process", "resources": resources}})
    };
    let mut test = TestEnvironment::new();
    test.server(vec![
        Exchange::json(
            &format!("{path}/3"),
            &record(3, json!({"volume.a": volume("/new\u{1b}[2J"), "volume.b": volume("/b")})),
        ),
        // Release 2 failed: what was in force before is release 1.
        Exchange::json(
            &format!("{path}?after=3&limit=1000"),
            &json!({"items": [release(2, "failed"), release(1, "retired")]}),
        ),
        Exchange::json(&format!("{path}/1"), &record(1, json!({"volume.a": volume("/old"), "volume.c": volume("/c")}))),
    ]);
    let outcome = test.run("show 3 -e shop/dev").await;
    insta::assert_snapshot!("show", outcome.page());
    test.finish();

    // One that failed says why.
    let mut test = TestEnvironment::new();
    let mut failed = record(2, json!({"volume.a": volume("/new")}));
    failed["state"] = json!("failed");
    let mut attempt = run("failed");
    attempt["problems"] = json!([{"code": "ORC0705", "severity": "error", "message": "hook gate did not agree: exit code 3",
        "notes": ["nobody\u{1b}[2J home"]}]);
    test.server(vec![
        Exchange::json(&format!("{path}/2"), &failed),
        Exchange::json(&format!("{path}?after=2&limit=1000"), &json!({"items": []})),
        Exchange::json("GET /v1/runs/run_7", &attempt),
    ]);
    let outcome = test.run("show 2 -e shop/dev").await;
    insta::assert_snapshot!("show_failed", outcome.page());
    test.finish();

    // One whose place was taken did not fail; what its mirror found is said beside its verdict.
    let mut test = TestEnvironment::new();
    let mut superseded = record(2, json!({"volume.a": volume("/new")}));
    superseded["state"] = json!("superseded");
    superseded["verdicts"] = json!([{"service": "api", "baseline": 1, "step": 2, "at": NOW, "outcome": "pass", "reason": "nothing bad",
        "evidence": {"mirrored": {"agreed": 41, "differed": 2}}}]);
    let mut attempt = run("cancelled");
    attempt["problems"] = json!([Diagnostic::error(Code::SUPERSEDED, "release 2 was superseded by a newer release")]);
    test.server(vec![
        Exchange::json(&format!("{path}/2"), &superseded),
        // Release 1 was never in force either.
        Exchange::json(&format!("{path}?after=2&limit=1000"), &json!({"items": [release(1, "superseded")]})),
        Exchange::json("GET /v1/runs/run_7", &attempt),
    ]);
    let outcome = test.run("show 2 -e shop/dev").await;
    insta::assert_snapshot!("show_superseded", outcome.page());
    test.finish();
}

#[tokio::test]
async fn status_is_watched_as_json() {
    let mut test = TestEnvironment::new();
    let mut changed = status();
    changed["health"] = json!("degraded");
    let events = "GET /v1/environments/shop/dev/events?tail=0&follow=true";
    test.server(vec![
        Exchange::json(STATUS, &status()),
        Exchange::events(events, &[Frame::event(&event(9, "instance_unready", &json!({})))]).open(),
        Exchange::json(STATUS, &changed),
    ]);
    let command = test.start("status --watch --json -e shop/dev");
    let (stdout, stderr, interrupts) = (test.stdout.clone(), test.stderr.clone(), test.interrupts.clone());
    let act = async {
        while !stdout.text().contains("degraded") {
            tokio::task::yield_now().await;
        }
        test.kill_server();
        while !stderr.text().contains("waiting for the next one") {
            tokio::task::yield_now().await;
        }
        let mut later = status();
        later["release"] = json!(4);
        test.server(vec![
            Exchange::json(STATUS, &later),
            Exchange::events("GET /v1/environments/shop/dev/events?after=9&follow=true", &[])
                .expect_last_event_id("9")
                .open(),
        ]);
        while !stdout.text().contains("\"release\":4") || !test.is_exhausted() {
            tokio::task::yield_now().await;
        }
        interrupts.send(()).await.unwrap();
    };
    let (exit, ()) = tokio::join!(command, act);
    assert_eq!(exit, Exit::Interrupted);
    assert_eq!(test.outcome(exit).ndjson().len(), 3);
    assert_eq!(test.spawned(), []);
    test.finish();
}
