use serde_json::json;

use super::*;

const NOW: UnixMillis = 1_795_232_980_123;

fn status() -> EnvironmentStatus {
    let instance = |id: &str, phase: &str, extra: serde_json::Value| {
        let mut value = json!({"id": id, "phase": phase, "since": NOW - 61_000, "attempt": 1, "ports": {"http": 40001}, "restarts": 0});
        value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        value
    };
    let status = json!({
        "id": "shop/dev",
        "source": "/srv/shop/orchestra.yaml",
        "target": "process",
        "health": "changing",
        "release": 3,
        "at": NOW,
        "run": {"id": "run_8", "environment": "shop/dev", "kind": {"scale": {"replicas": {"api": 3}}}, "release": 4,
            "state": "running", "started_at": NOW - 2_300, "ended_at": null},
        "services": [
            {"name": "api", "state": "rolling", "release": 4, "desired": 3, "ready": 1,
                "addresses": [{"port": "http", "protocol": "http", "url": "http://127.0.0.1:8080"}],
                "instances": [
                    instance("api-r3-1", "draining", json!({"pid": 100, "in_flight": {"requests": 1, "streams": 3}})),
                    instance("api-r4-1", "ready", json!({"pid": 101, "restarts": 2, "last_exit": {"signal": 9},
                        "ejected": [{"port": "http", "until": NOW + 9_400}]})),
                    instance("api-r4-2", "starting", json!({"pid": 102, "waits_for": {"reason": "its ready check"},
                        "ready": {"state": "failing", "streak": 3, "detail": "HTTP 503\u{1b}[2J"}, "status_text": "loading \u{202e}model"})),
                ]},
            {"name": "batch", "state": "stopped", "release": 3, "desired": 0, "ready": 0, "addresses": [], "instances": []},
            {"name": "mail", "state": "degraded", "release": 3, "desired": 1, "ready": 0, "addresses": [],
                "instances": [instance("mail-r3-1", "pending", json!({"restarts": 1, "last_exit": {"code": 1},
                    "waits_for": {"reason": "its restart after exit code 1", "due": NOW + 3_200}}))]},
            {"name": "web", "state": "waiting", "release": null, "desired": 1, "ready": 0, "addresses": [],
                "waits_for": [{"on": "service.api", "until": "ready", "reason": "service.api to be ready"}],
                "problem": {"code": "ORC0506", "severity": "error",
                    "message": "service.api failed\nbadly, after which everything that depends on it was left as it is"},
                "instances": []},
        ],
        "jobs": [{"name": "migrate", "state": "failed", "release": 3, "last_exit": {"code": 1},
            "instances": [instance("migrate-r3-1", "ended", json!({}))]}],
        "volumes": [{"name": "data", "state": "present", "path": "/state/volumes/shop/dev/data", "managed": true}],
    });
    serde_json::from_value(status).unwrap()
}

#[test]
fn a_screen_in_full() {
    insta::assert_snapshot!(render(&status(), NOW, Palette::PLAIN, None));
}

#[test]
fn a_screen_of_eighty_columns() {
    let text = render(&status(), NOW, Palette::PLAIN, Some(80));
    for line in text.lines().skip(2) {
        assert!(crate::text::width(line) <= 80, "{line}");
    }
    insta::assert_snapshot!(text);
}

#[test]
fn nothing_in_a_status_drives_the_terminal() {
    let text = render(&status(), NOW, Palette::PLAIN, None);
    assert!(!text.chars().any(|c| c != '\n' && (c.is_control() || c == '\u{202e}')));
    let colored = render(&status(), NOW, Palette { color: true }, None);
    assert!(!colored.contains("\x1b[2J") && colored.contains("\x1b[33m"));
}

#[test]
fn environments_in_a_list() {
    let environments = json!([
        {"id": "shop/dev", "source": "/srv/shop/orchestra.yaml", "health": "ready", "release": 3, "ready": 2, "services": 2},
        {"id": "shop/production", "source": "/srv/shop/orchestra.yaml", "health": "degraded", "release": 12, "ready": 1, "services": 2},
        {"id": "old/dev", "source": "/srv/old/orchestra.yaml", "health": "down", "release": null, "ready": 0, "services": 0},
    ]);
    let environments: Vec<EnvironmentSummary> = serde_json::from_value(environments).unwrap();
    insta::assert_snapshot!(list(&environments).render(Palette::PLAIN, None));
}

#[test]
fn a_state_that_cannot_be_written_is_said_first() {
    let status = EnvironmentStatus { trouble: Some("the state cannot be written\u{1b}[2J".to_owned()), ..status() };
    let text = render(&status, NOW, Palette::PLAIN, None);
    let line = text.lines().nth(2).unwrap();
    assert_eq!(
        line,
        "nothing goes on: the state cannot be written\\e[2J; make room on the disk, and it does by itself"
    );
}

#[test]
fn what_was_lost_after_a_run_is_said() {
    let mut status = status();
    status.services.retain(|service| service.name.as_str() != "mail");
    assert_eq!(lost(&status), None, "what waits, rolls or is wanted no more is not lost");
    status.services[2].state = ServiceState::Degraded;
    assert_eq!(
        lost(&status).unwrap(),
        "no longer ready: web (0 of 1: service.api failed\\nbadly, after which everything that depends on it was left as it is)"
    );
}

#[test]
fn while_a_new_release_comes_the_instances_of_both_are_ready_and_the_new_ones_are_counted_apart() {
    let instance = |id: &str, phase: &str| json!({"id": id, "phase": phase, "since": NOW, "attempt": 1, "ports": {}, "restarts": 0});
    let mut instances: Vec<_> = (1..=4).map(|ordinal| instance(&format!("api-r3-{ordinal}"), "ready")).collect();
    instances.extend([instance("api-r4-1", "ready"), instance("api-r4-2", "starting")]);
    let mut api = json!({"name": "api", "state": "rolling", "release": 4, "desired": 4, "ready": 1, "addresses": [],
        "instances": instances});
    let row = |service: &serde_json::Value| {
        let services = vec![serde_json::from_value(service.clone()).unwrap()];
        let table = services_table(&EnvironmentStatus { services, ..status() });
        table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(row(&api), ["SERVICE STATE READY NEW RELEASE", "api rolling 5/4 1/4 4"]);
    let rollout = json!({"strategy": "canary", "from": 3, "to": 4, "phase": "stepping", "words": "step 1 of 3",
        "step": 1, "steps": 3, "weight": "25%", "available": 1, "wanted": 2, "baseline": 4, "started_at": NOW, "since": NOW,
        "deadline": NOW});
    api["rollout"] = rollout;
    assert_eq!(row(&api)[1], "api rolling 5/4 1/2 4");
    api["rollout"]["phase"] = json!("warm");
    (api["ready"], api["state"]) = (json!(4), json!("ready"));
    assert_eq!(row(&api), ["SERVICE STATE READY RELEASE", "api ready 4/4 4"], "what is kept warm is in reserve");
}

fn services_table(status: &EnvironmentStatus) -> String {
    services(status).render(Palette::PLAIN, None)
}
