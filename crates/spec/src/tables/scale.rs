//! Keys of automatic scaling.

use super::{KUBERNETES, OURS};
use crate::table::{Key, Shape, Table};

/// Words of `select`.
pub(crate) const SELECTS: &[&str] = &["max", "min", "disabled"];

pub(crate) static SCALE: Table = Table {
    id: "scale",
    noun: "`scale`",
    doc: "The number of instances follows the load, as the HorizontalPodAutoscaler of Kubernetes (`autoscaling/v2`) decides it. `replicas` is then only the number to begin with, by default `min`, or 1 if that is 0.",
    keys: &[&[
        Key::new("min", Shape::Integer(0, 10_000), "Fewest instances. With 0 the service sleeps while nobody uses it.")
            .default("1")
            .from(KUBERNETES),
        Key::new("max", Shape::Integer(1, 10_000), "Most instances.").required(),
        Key::new(
            "on",
            Shape::List(&Shape::Table(&SCALE_METRIC)),
            "What it scales on; the metric that asks for most instances wins.",
        )
        .default("`cpu: 80%`; nothing if `max` is 1")
        .from(KUBERNETES),
        Key::new("every", Shape::Duration, "How often it is decided: `1s` to `1h`.").default("15s").from(KUBERNETES),
        Key::new("up", Shape::Table(&SCALE_UP), "How it grows."),
        Key::new("down", Shape::Table(&SCALE_DOWN), "How it shrinks."),
        Key::new(
            "cpu_initialization",
            Shape::Duration,
            "CPU of an instance that is younger counts only while it is ready, and only what was measured since then.",
        )
        .default("5m")
        .from(KUBERNETES),
        Key::new(
            "initial_readiness",
            Shape::Duration,
            "CPU of an older instance that is not ready does not count if it became so within this time of its start.",
        )
        .default("30s")
        .from(KUBERNETES),
        Key::new("to_zero", Shape::Table(&TO_ZERO), "How it sleeps; only with `min: 0`."),
    ]],
    habits: &[
        ("minReplicas", "write `min`"),
        ("maxReplicas", "write `max`"),
        ("min_replicas", "write `min`"),
        ("max_replicas", "write `max`"),
        ("metrics", "write `on`"),
        ("behavior", "write `up` and `down` directly"),
        ("scaleUp", "write `up`"),
        ("scaleDown", "write `down`"),
        ("cooldown", "write `down: {window: …}`"),
        ("cooldownPeriod", "write `to_zero: {idle_for: …}` or `down: {window: …}`"),
        ("pollingInterval", "write `every`"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static SCALE_METRIC: Table = Table {
    id: "scale-metric",
    noun: "a metric",
    doc: "One thing to scale on, with what it should be. A number alone is an average per instance.",
    keys: &[&[
        Key::new(
            "cpu",
            Shape::Any(&[Shape::Utilization, Shape::Cpu]),
            "CPU of an instance on average: a share of `resources.cpu`, or an amount.",
        ),
        Key::new(
            "memory",
            Shape::Any(&[Shape::Utilization, Shape::Size]),
            "Memory of an instance on average: a share of `resources.memory`, or an amount.",
        ),
        Key::new(
            "requests_per_second",
            Shape::Any(&[Shape::Measure, Shape::Table(&SCALE_LEVEL)]),
            "Requests that begin at the published ports.",
        ),
        Key::new(
            "requests_in_flight",
            Shape::Any(&[Shape::Measure, Shape::Table(&SCALE_LEVEL)]),
            "Requests and streams that are under way, and requests that wait for an instance.",
        ),
        Key::new(
            "tokens_in_flight",
            Shape::Any(&[Shape::Measure, Shape::Table(&SCALE_LEVEL)]),
            "Tokens (events of streams, messages of gRPC) that the responses under way have sent so far.",
        ),
        Key::new(
            "queue_depth",
            Shape::Any(&[Shape::Measure, Shape::Table(&SCALE_QUEUE)]),
            "Requests that wait for an instance; with `metric`, work that waits as the instances export it.",
        ),
        Key::new("exported", Shape::Table(&SCALE_EXPORTED), "A metric that the service exports."),
    ]],
    habits: &[
        ("rps", "write `requests_per_second`"),
        ("concurrency", "write `requests_in_flight`"),
        ("resource", "write `cpu: 70%` or `memory: 1Gi`"),
        ("type", "write the metric itself: `cpu: 70%`, `requests_per_second: 100`"),
        ("external", "write `exported: {name: …, value: …}`"),
        ("pods", "write `exported: {name: …, average: …}`"),
    ],
    later: &[],
    one_of: &[
        "cpu",
        "memory",
        "requests_per_second",
        "requests_in_flight",
        "tokens_in_flight",
        "queue_depth",
        "exported",
    ],
};

const AVERAGE: Key = Key::new("average", Shape::Measure, "Per instance, on average.");
const VALUE: Key = Key::new("value", Shape::Measure, "Of the service as a whole.");

pub(crate) static SCALE_LEVEL: Table = Table {
    id: "scale-level",
    noun: "a level",
    doc: "What a metric should be.",
    keys: &[&[AVERAGE, VALUE]],
    habits: &[("averageValue", "write `average`"), ("target", "write `average` or `value`")],
    later: &[],
    one_of: &["average", "value"],
};

const LABELS: Key =
    Key::new("labels", Shape::Map(&Shape::Text), "Labels that its series must have; those that fit are added up.")
        .default("any");

pub(crate) static SCALE_QUEUE: Table = Table {
    id: "scale-queue",
    noun: "`queue_depth`",
    doc: "How long a queue should be.",
    keys: &[&[
        Key::new("metric", Shape::Text, "Metric that the instances export, such as `vllm:num_requests_waiting`.")
            .default("none: requests that wait for an instance"),
        LABELS,
        AVERAGE,
        VALUE,
    ]],
    habits: &[
        ("averageValue", "write `average`"),
        ("target", "write `average` or `value`"),
        ("name", "write `metric`"),
    ],
    later: &[],
    one_of: &["average", "value"],
};

pub(crate) static METRICS: Table = Table {
    id: "metrics",
    noun: "`metrics`",
    doc: "Where the instances of a service export metrics, in the text format of Prometheus or OpenMetrics. Each instance is asked at its own port.",
    keys: &[&[
        Key::new("port", Shape::Reference, "Published port; plain HTTP is spoken with it.")
            .default("`metrics`, else `http`, else the only one"),
        Key::new("path", Shape::Text, "Path.").default("/metrics"),
        Key::new("every", Shape::Duration, "Pause between two looks: `1s` to `5m`.").default("5s").from(OURS),
        Key::new("timeout", Shape::Duration, "Longest wait for an instance: up to `30s`.").default("2s").from(OURS),
    ]],
    habits: &[("interval", "write `every`"), ("scrape_interval", "write `every`"), ("metrics_path", "write `path`")],
    later: &[],
    one_of: &[],
};

pub(crate) static SCALE_EXPORTED: Table = Table {
    id: "scale-exported",
    noun: "`exported`",
    doc: "A metric that the service exports, and what it should be.",
    keys: &[&[Key::new("name", Shape::Text, "Its name.").required(), LABELS, AVERAGE, VALUE]],
    habits: &[("averageValue", "write `average`"), ("target", "write `average` or `value`")],
    later: &[],
    one_of: &["average", "value"],
};

const POLICIES: Shape = Shape::List(&Shape::Table(&SCALE_POLICY));

const BEHAVIOR_HABITS: &[(&str, &str)] = &[
    ("stabilizationWindowSeconds", "write `window`"),
    ("selectPolicy", "write `select`"),
    ("policy", "write `policies`"),
];

pub(crate) static SCALE_UP: Table = Table {
    id: "scale-up",
    noun: "`up`",
    doc: "How a service grows.",
    keys: &[&[
        Key::new("window", Shape::Duration, "The lowest recommendation of this time counts; at most `1h`.")
            .default("0s")
            .from(KUBERNETES),
        Key::new("tolerance", Shape::Percentage, "How far a metric may be above its target.")
            .default("10%")
            .from(KUBERNETES),
        Key::new("policies", POLICIES, "Bounds of the growth per time.")
            .default("100 percent or 4 instances per 15 s")
            .from(KUBERNETES),
        Key::new("select", Shape::Choice(SELECTS), "The policy that allows most, or least; or no growth at all.")
            .default("max")
            .from(KUBERNETES),
    ]],
    habits: BEHAVIOR_HABITS,
    later: &[],
    one_of: &[],
};

pub(crate) static SCALE_DOWN: Table = Table {
    id: "scale-down",
    noun: "`down`",
    doc: "How a service shrinks.",
    keys: &[&[
        Key::new("window", Shape::Duration, "The highest recommendation of this time counts; at most `1h`.")
            .default("5m")
            .from(KUBERNETES),
        Key::new("tolerance", Shape::Percentage, "How far a metric may be below its target.")
            .default("10%")
            .from(KUBERNETES),
        Key::new("policies", POLICIES, "Bounds of the shrinking per time.")
            .default("100 percent per 15 s")
            .from(KUBERNETES),
        Key::new("select", Shape::Choice(SELECTS), "The policy that allows most, or least; or no shrinking at all.")
            .default("max")
            .from(KUBERNETES),
    ]],
    habits: BEHAVIOR_HABITS,
    later: &[],
    one_of: &[],
};

pub(crate) static SCALE_POLICY: Table = Table {
    id: "scale-policy",
    noun: "a policy",
    doc: "A bound of the change per time.",
    keys: &[&[
        Key::new("percent", Shape::Integer(1, 1_000), "Percent of the instances at the beginning of the time."),
        Key::new("instances", Shape::Integer(1, 10_000), "That many instances."),
        Key::new("per", Shape::Duration, "The time: `1s` to `30m`.").required(),
    ]],
    habits: &[
        ("type", "write `percent: N` or `instances: N`"),
        ("value", "write `percent: N` or `instances: N`"),
        ("periodSeconds", "write `per`"),
        ("pods", "write `instances`"),
    ],
    later: &[],
    one_of: &["percent", "instances"],
};

pub(crate) static TO_ZERO: Table = Table {
    id: "to-zero",
    noun: "`to_zero`",
    doc: "How a service sleeps. The next request wakes it and waits for its first instance.",
    keys: &[&[
        Key::new("idle_for", Shape::Duration, "Time without any request, under way or waiting, after which it sleeps.")
            .default("5m")
            .from(OURS),
        Key::new("cold_start", Shape::Duration, "Longest that a request waits for the first instance; then 503.")
            .default("60s")
            .from(OURS),
    ]],
    habits: &[("idle", "write `idle_for`"), ("after", "write `idle_for`"), ("timeout", "write `cold_start`")],
    later: &[],
    one_of: &[],
};
