//! Values that the tests of several screens start from.

use orchestra_model::{
    Plan,
    record::{RunKind, RunRecord, RunState},
};
use serde_json::json;

/// A plan of three steps: a volume, a job that waits for it, a service that waits for the job.
pub(crate) fn plan() -> Plan {
    let step = |resource: &str, action: &str, after: serde_json::Value| json!({"resource": resource, "action": action, "reasons": ["it is new"], "changes": [], "after": after, "base": null, "target": null});
    let plan = json!({
        "format": 1,
        "environment": "shop/dev",
        "base": null,
        "desired": null,
        "steps": [
            step("volume.data", "create", json!({})),
            step("job.migrate", "run", json!({"volume.data": {"until": "started"}})),
            step("service.api", "create", json!({"job.migrate": {"until": "completed"}})),
        ],
        "unchanged": 0,
    });
    serde_json::from_value(plan).unwrap()
}

/// A run of it.
pub(crate) fn run() -> RunRecord {
    RunRecord {
        id: "run_7".parse().unwrap(),
        environment: "shop/dev".parse().unwrap(),
        kind: RunKind::Up,
        generation: orchestra_model::Generation(1),
        release: Some(orchestra_model::ReleaseNumber(3)),
        plan: plan(),
        state: RunState::Running,
        steps: [].into(),
        started_at: 1_795_232_980_123,
        ended_at: None,
        problems: Vec::new(),
        reverted: None,
        culprits: Vec::new(),
        request_key: None,
    }
}
