//! Automatic scaling beside the number of instances.

use orchestra_model::{
    Code,
    autoscale::{Change, Level, MetricSource, Select},
    desired::Service,
    quantity::Measure,
};

use crate::{errors, loaded};

fn service(keys: &str) -> Service {
    let loaded = loaded(&format!("version: 1\nname: demo\nservices:\n  a:\n    command: [./a]\n    {keys}\n"));
    loaded.desired.service(&"a".parse().unwrap()).unwrap().clone()
}

#[test]
fn the_number_to_begin_with_lies_within_the_bounds() {
    for (keys, replicas) in [
        ("scale: {min: 3, max: 5, on: [{memory: 1Gi}]}", 3),
        ("scale: {max: 5, on: [{memory: 1Gi}]}", 1),
        ("replicas: 4\n    scale: {min: 3, max: 5, on: [{memory: 1Gi}]}", 4),
        ("ports: {http: auto}\n    scale: {min: 0, max: 5, on: [{memory: 1Gi}]}", 1),
        ("ports: {http: auto}\n    replicas: 0\n    scale: {min: 0, max: 5, on: [{memory: 1Gi}]}", 0),
    ] {
        assert_eq!(service(keys).replicas, replicas, "{keys}");
    }
    for replicas in [0, 2, 6] {
        let text = format!(
            "version: 1\nname: demo\nservices:\n  a: {{command: [a], scale: {{min: 3, max: 5, on: [{{memory: 1Gi}}]}}}}\n\
             environments:\n  dev: {{services: {{a: {{replicas: {replicas}}}}}}}\n"
        );
        let errors = errors(text.as_bytes());
        assert_eq!((errors.len(), errors[0].code), (1, Code::CONFLICTING_KEYS));
        assert_eq!(errors[0].labels[0].location.line, 6, "the overlay is to blame");
    }
}

#[test]
fn scaling_replaces_no_instance() {
    let plain = service("replicas: 3");
    let scaled = service("scale: {min: 3, max: 5, on: [{memory: 1Gi}]}");
    assert_eq!(plain.launch_digest(), scaled.launch_digest());
    // A stack that was recorded before there was scaling reads as one that does not scale.
    let recorded = serde_json::to_value(&plain).unwrap();
    assert!(recorded.get("scale").is_none());
    assert_eq!(serde_json::from_value::<Service>(recorded).unwrap(), plain);
}

#[test]
fn targets_have_the_notations_of_what_they_measure() {
    let scale = service(
        "resources: {cpu: 1, memory: 1Gi}\n    ports: {http: auto}\n    scale: {max: 5, on: [{cpu: 150%}, {cpu: 0.5}, {memory: 80 %}, \
         {memory: 1Gi}, {requests_per_second: 0.5}, {requests_in_flight: {value: 20}}, {exported: {name: a_b, average: 3}}]}",
    )
    .scale
    .unwrap();
    let targets: Vec<(&MetricSource, Level)> = scale.on.iter().map(|metric| (&metric.source, metric.target)).collect();
    let exported = MetricSource::Exported { name: "a_b".to_owned(), labels: std::collections::BTreeMap::new() };
    assert_eq!(
        targets,
        [
            (&MetricSource::Cpu, Level::Utilization(150)),
            (&MetricSource::Cpu, Level::Average(Measure::thousandths(500))),
            (&MetricSource::Memory, Level::Utilization(80)),
            (&MetricSource::Memory, Level::Average(Measure::whole(1 << 30))),
            (&MetricSource::RequestsPerSecond, Level::Average(Measure::thousandths(500))),
            (&MetricSource::RequestsInFlight, Level::Value(Measure::whole(20))),
            (&exported, Level::Average(Measure::whole(3))),
        ]
    );
}

/// The defaults of Kubernetes: <https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/#default-behavior>
#[test]
fn defaults_are_those_of_kubernetes() {
    let scale = service("resources: {cpu: 1}\n    scale: {max: 5}").scale.unwrap();
    assert_eq!((scale.min, scale.to_zero, scale.every.to_string().as_str()), (1, None, "15s"));
    assert_eq!((&scale.on[0].source, scale.on[0].target), (&MetricSource::Cpu, Level::Utilization(80)));
    let behavior = |behavior: &orchestra_model::autoscale::Behavior| {
        let policies: Vec<(Change, String)> =
            behavior.policies.iter().map(|policy| (policy.change, policy.per.to_string())).collect();
        (behavior.window.to_string(), behavior.tolerance.to_string(), behavior.select, policies)
    };
    let per = || "15s".to_owned();
    let doubling = || (Change::Percent(100), per());
    assert_eq!(
        behavior(&scale.up),
        ("0s".to_owned(), "10%".to_owned(), Select::Max, vec![doubling(), (Change::Instances(4), per())])
    );
    assert_eq!(behavior(&scale.down), ("5m".to_owned(), "10%".to_owned(), Select::Max, vec![doubling()]));
}

#[test]
fn a_share_with_too_few_instances_behind_it_is_warned_of() {
    let warnings = |steps: &str| {
        let service =
            format!("command: [a], replicas: 4, ports: {{http: auto}}, rollout: {{canary: {{steps: [{steps}]}}}}");
        loaded(&format!("version: 1\nname: demo\nservices:\n  a: {{{service}}}\n")).warnings
    };
    for enough in
        ["{weight: 100}", "{scale: 50%}, {weight: 50}", "{scale: 1}, {weight: 25}", "{weight: 60}, {scale: 3}"]
    {
        assert_eq!(warnings(enough), [], "{enough}");
    }
    let found = warnings("{scale: 1}, {weight: 20}, {weight: 100}");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].message, "100 % of the traffic of 4 instances would go to 1 instance");
    assert_eq!(
        found[0].help.as_deref(),
        Some("write `{scale: 100%}` before it, or leave `scale` out: a share brings its instances")
    );
    let found = warnings("{weight: 60}, {scale: 2}");
    assert_eq!(found[0].message, "60 % of the traffic of 4 instances would go to 2 instances");
}
