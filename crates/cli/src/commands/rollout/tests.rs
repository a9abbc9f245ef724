use serde_json::{Value, json};

use super::*;

const NOW: UnixMillis = 1_795_232_980_123;

fn service(extra: &Value) -> ServiceStatus {
    let mut value = json!({"name": "api", "state": "rolling", "release": 2, "desired": 2, "ready": 2, "addresses": [], "instances": []});
    value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    serde_json::from_value(value).unwrap()
}

fn instance(extra: &Value) -> Value {
    let mut value =
        json!({"id": "api-r2-1", "phase": "pending", "since": NOW, "attempt": 1, "ports": {}, "restarts": 0});
    value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    value
}

#[test]
fn a_canary_in_sentences() {
    let rollout = json!({
        "strategy": "canary", "from": 1, "to": 2, "phase": "stepping", "words": "step 2 of 3: analysis for at most 5m",
        "step": 2, "steps": 3, "weight": "12.5%", "available": 1, "wanted": 1, "baseline": 2,
        "started_at": NOW - 61_000, "since": NOW - 42_000, "deadline": NOW + 3_600_000,
        "waits_for": "step 2 of 3: analysis for at most 5m: a verdict: 0 of 9 were bad",
        "mirrored": {"agreed": 120, "differed": 3},
    });
    let lines = reasons(&service(&json!({"rollout": rollout})), NOW);
    assert_eq!(
        lines,
        [
            "canary from release 1 to 2: step 2 of 3: analysis for at most 5m (42s so far); 12.5 % of traffic, 1 of 1 new instances available, 2 old ones ready",
            "waits for a verdict: 0 of 9 were bad",
            "mirror: 120 responses agreed, 3 differed",
        ]
    );
    assert_eq!(mirrored(1, 0), "mirror: 1 response agreed, 0 differed");
}

#[test]
fn a_pause_before_a_restart_counts_down() {
    let waiting = |due: UnixMillis| json!({"reason": "its restart after exit code 1", "due": due});
    let line = |due| {
        let instances = json!({"instances": [instance(&json!({"waits_for": waiting(due)}))]});
        reasons(&service(&instances), NOW).remove(0)
    };
    assert_eq!(line(NOW + 3_200), "api-r2-1 waits 3.2s for its restart after exit code 1");
    assert_eq!(line(NOW + 900), "api-r2-1 waits 900ms for its restart after exit code 1");
    assert_eq!(line(NOW - 1), "api-r2-1 waits for its restart after exit code 1", "its time has come");
}

#[test]
fn what_was_set_to_zero_says_so_and_what_sleeps_does_not() {
    let off = json!({"state": "stopped", "desired": 0, "ready": 0});
    let hint = "set to 0: `orchestra scale api=1` starts one";
    assert_eq!(reasons(&service(&off), NOW), [hint]);
    // One that scales has more to say.
    let mut resting = off;
    resting["scaling"] = json!(["stays at 0: it was set to 0, and autoscaling rests until it is raised", "21s ago: …"]);
    let lines = reasons(&service(&resting), NOW);
    assert_eq!(lines.len(), 2);
    assert_eq!(switched_off(&service(&resting)).unwrap(), lines[0]);
    let mut asleep = resting;
    asleep["state"] = json!("asleep");
    assert_eq!(switched_off(&service(&asleep)), None);
}
