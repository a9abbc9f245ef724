//! The tables of rollouts.

use super::{DRAIN, KUBERNETES, OURS};
use crate::table::{Key, Shape, Table};

/// Argo Rollouts.
const ARGO: &str = "as Argo Rollouts";

const PAUSE_WORDS: &[&str] = &["manual"];
const EXPIRY_WORDS: &[&str] = &["roll_back", "promote"];
const INCONCLUSIVE_WORDS: &[&str] = &["hold", "promote_and_watch", "roll_back"];
const ERROR_WORDS: &[&str] = &["auto", "off"];
const LATENCY_WORDS: &[&str] = &["auto"];

pub(crate) static ROLLOUT: Table = Table {
    id: "rollout",
    noun: "`rollout`",
    doc: "How instances are replaced. At most one strategy; without one it is `rolling`.",
    keys: &[&[
        Key::new("rolling", Shape::Table(&ROLLING), "A few at a time, each new one ready before an old one leaves."),
        Key::new("recreate", Shape::True, "All old ones are gone before the first new one starts."),
        Key::new("hold", Shape::Any(&[Shape::True, Shape::Table(&HOLD)]), "As `recreate`, while requests wait for the new ones."),
        Key::new("canary", Shape::Any(&[Shape::True, Shape::Table(&CANARY)]), "Beside the old ones, with a growing share of the traffic."),
        Key::new("blue_green", Shape::Any(&[Shape::True, Shape::Table(&BLUE_GREEN)]), "A full second set, switched at once."),
        Key::new("guard", Shape::Table(&GUARD), "What turns a canary or blue-green rollout back by itself.")
            .default("with `errors: auto`"),
        Key::new("drain", Shape::Table(&DRAIN), "How long an instance that leaves may go on with what it has begun."),
        Key::new(
            "deadline",
            Shape::Duration,
            "Deadline of the whole rollout, apart from drain and from what its steps wait for by themselves.",
        )
        .default("300s")
        .from("003 `orchestration_performance.service_deployment_time`"),
        Key::new("min_ready", Shape::Duration, "A new instance counts once it has been ready for so long without a break.")
            .default("0s")
            .from(KUBERNETES),
        Key::new(
            "progress_deadline",
            Shape::Duration,
            "Longest time in which no further instance becomes available though one is wanted, of a canary or blue-green rollout.",
        )
        .default("10m")
        .from(KUBERNETES),
    ]],
    habits: &[
        ("max_surge", "write `rolling: {max_surge: …}`"),
        ("max_unavailable", "write `rolling: {max_unavailable: …}`"),
        ("steps", "write `canary: {steps: […]}`"),
        ("strategy", "write the strategy itself: `canary: {…}`, `blue_green: {…}`, `rolling: {…}`"),
        ("analysis", "write `guard: {…}` for the whole rollout, or a step `analysis: 5m`"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static ROLLING: Table = Table {
    id: "rolling",
    noun: "`rolling`",
    doc: "Bounds of a rolling update. They must not both come out as 0.",
    keys: &[&[
        Key::new("max_surge", Shape::Amount, "Instances above `replicas` at one time; a share is rounded up.")
            .default("25%")
            .from(KUBERNETES),
        Key::new(
            "max_unavailable",
            Shape::Amount,
            "Ready instances below `replicas` at one time; a share is rounded down.",
        )
        .default("0")
        .from(OURS),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

pub(crate) static HOLD: Table = Table {
    id: "hold",
    noun: "`hold`",
    doc: "Stop first, while requests wait: for what cannot hold two versions at a time.",
    keys: &[&[
        Key::new("queue", Shape::Integer(1, 1_000_000), "Requests that may wait; more are answered 503.")
            .default("1000")
            .from(OURS),
        Key::new("timeout", Shape::Duration, "Longest wait of a request; then 503.").default("2m").from(OURS),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

pub(crate) static CANARY: Table = Table {
    id: "canary",
    noun: "`canary`",
    doc: "Beside the old ones, with a growing share of the traffic. After the last step the new set gets all of it.",
    keys: &[&[
        Key::new("steps", Shape::List(&Shape::Table(&STEP)), "Taken in order.")
            .default("weights 5, 25 and 50, each with an analysis of at most 2m")
            .from(OURS),
        Key::new("keep_warm", Shape::Duration, "How long the old set stays ready after the release is in force.")
            .default("1m")
            .from(OURS),
    ]],
    habits: &[("analysis", "write `guard` beside `canary`, or a step `analysis: 5m`")],
    later: &[],
    one_of: &[],
};

pub(crate) static BLUE_GREEN: Table = Table {
    id: "blue_green",
    noun: "`blue_green`",
    doc: "A full second set beside the first, switched at once.",
    keys: &[&[
        Key::new(
            "before",
            Shape::List(&Shape::Table(&STEP)),
            "Steps between the moment at which the new set is complete and the switch.",
        )
        .default("none"),
        Key::new(
            "after",
            Shape::List(&Shape::Table(&STEP)),
            "Steps between the switch and the end, with the old set ready.",
        )
        .default("none"),
        Key::new("keep_warm", Shape::Duration, "How long the old set stays ready after the release is in force.")
            .default("5m")
            .from(OURS),
    ]],
    habits: &[("steps", "write `before: […]` and `after: […]`")],
    later: &[],
    one_of: &[],
};

pub(crate) static STEP: Table = Table {
    id: "rollout-step",
    noun: "a step",
    doc: "One step of a rollout: exactly one of these.",
    keys: &[&[
        Key::new("weight", Shape::Weight, "Share of the traffic of the new set in percent, exact to 0.1."),
        Key::new("scale", Shape::Amount, "Instances of the new set, whatever its share of the traffic is."),
        Key::new(
            "pause",
            Shape::Any(&[Shape::Duration, Shape::Choice(PAUSE_WORDS), Shape::Table(&PAUSE)]),
            "Waits for so long, or (`manual`) until a person promotes.",
        ),
        Key::new(
            "analysis",
            Shape::Any(&[Shape::Duration, Shape::Table(&ANALYSIS)]),
            "Waits for a verdict, at most for so long.",
        ),
        Key::new("hook", Shape::Table(&HOOK), "Asks a webhook or a command whether to go on."),
        Key::new(
            "match",
            Shape::Items(&Shape::Table(&MATCH)),
            "Requests that go to the new set whatever its share is; an empty list ends that.",
        ),
        Key::new(
            "mirror",
            Shape::Any(&[Shape::Weight, Shape::Table(&MIRROR)]),
            "Copies this share of the requests to the new set and compares the responses; 0 ends that.",
        ),
    ]],
    habits: &[
        ("setWeight", "write `weight`"),
        ("set_weight", "write `weight`"),
        ("setCanaryScale", "write `scale`"),
        ("webhook", "write `hook: {url: …}`"),
        ("wait", "write `pause`"),
    ],
    later: &[],
    one_of: &["weight", "scale", "pause", "analysis", "hook", "match", "mirror"],
};

pub(crate) static PAUSE: Table = Table {
    id: "pause",
    noun: "`pause`",
    doc: "Waits until a person promotes.",
    keys: &[&[
        Key::new("owner", Shape::Text, "Who is to decide, in words.").default("a person"),
        Key::new("expires", Shape::Duration, "Longest wait.").default("24h").from(OURS),
        Key::new("on_expiry", Shape::Choice(EXPIRY_WORDS), "What happens then.").default("roll_back").from(OURS),
    ]],
    habits: &[("duration", "write `pause: 2m`"), ("for", "write `pause: 2m`")],
    later: &[],
    one_of: &[],
};

pub(crate) static ANALYSIS: Table = Table {
    id: "analysis",
    noun: "`analysis`",
    doc: "Waits for a verdict.",
    keys: &[&[
        Key::new("for", Shape::Duration, "Longest time for evidence; a pass may come earlier.")
            .default("5m")
            .from(OURS),
        Key::new("inconclusive", Shape::Choice(INCONCLUSIVE_WORDS), "What too little evidence means here.")
            .default("what `guard` says"),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

pub(crate) static HOOK: Table = Table {
    id: "hook",
    noun: "`hook`",
    doc: "Asks somebody else whether to go on: 2xx or exit code 0 says yes.",
    keys: &[&[
        Key::new("name", Shape::Text, "How it is called in events.").default("`hook`"),
        Key::new("url", Shape::Text, "`http://…` or `https://…` that gets a POST with a JSON document."),
        Key::new("command", Shape::List(&Shape::Text), "Program and arguments; the document is on its standard input."),
        Key::new("timeout", Shape::Duration, "Longest wait for the answer.").default("30s").from(OURS),
        Key::new("retries", Shape::Integer(0, 100), "Further tries after a no, ten seconds apart.")
            .default("0")
            .from(OURS),
    ]],
    habits: &[("webhook", "write `url`"), ("exec", "write `command`")],
    later: &[],
    one_of: &["url", "command"],
};

pub(crate) static MATCH: Table = Table {
    id: "match",
    noun: "a match",
    doc: "A condition on a request: all parts hold.",
    keys: &[&[
        Key::new("headers", Shape::Map(&Shape::Text), "Header fields with the value that they must have.")
            .default("none"),
        Key::new("cookies", Shape::Map(&Shape::Text), "Cookies with the value that they must have.").default("none"),
    ]],
    habits: &[("header", "write `headers: {NAME: VALUE}`"), ("cookie", "write `cookies: {NAME: VALUE}`")],
    later: &[],
    one_of: &[],
};

pub(crate) static MIRROR: Table = Table {
    id: "mirror",
    noun: "`mirror`",
    doc: "Copies requests to the new set; its responses are compared and thrown away.",
    keys: &[&[
        Key::new("share", Shape::Weight, "Share of the requests in percent.").required(),
        Key::new("unsafe_methods", Shape::Boolean, "Also methods that may change something.").default("false"),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

pub(crate) static GUARD: Table = Table {
    id: "guard",
    noun: "`guard`",
    doc: "What turns a rollout back by itself, and on which evidence.",
    keys: &[&[
        Key::new(
            "alpha",
            Shape::Weight,
            "Probability, in percent, that a release that is as good as the old one is turned back.",
        )
        .default("1%")
        .from(OURS),
        Key::new(
            "errors",
            Shape::Choice(ERROR_WORDS),
            "Compare server errors and broken responses with the old set's.",
        )
        .default("auto"),
        Key::new(
            "max_errors",
            Shape::Weight,
            "With all traffic, where no old set is left to compare with, more bad responses than this share fail.",
        )
        .default("2%, or what the old set was seen to do if that is more; none with `errors: off` or `sticky`")
        .from(OURS),
        Key::new(
            "latency",
            Shape::Any(&[Shape::Choice(LATENCY_WORDS), Shape::Duration, Shape::Table(&LATENCY)]),
            "Responses that take longer are bad; `auto` is the old set's 95th percentile when the rollout began.",
        )
        .default("none"),
        Key::new("first_byte", Shape::Duration, "Responses whose head comes later are bad.").default("none"),
        Key::new("first_token", Shape::Duration, "Streams whose first event comes later are bad.").default("none"),
        Key::new(
            "counters",
            Shape::List(&Shape::Text),
            "Counters that the instances export (`metrics`), such as `errors_total` or `http_total{code=\"500\"}`: more of them per request is worse.",
        )
        .default("none"),
        Key::new(
            "prometheus",
            Shape::Any(&[Shape::Table(&PROMETHEUS), Shape::List(&Shape::Table(&PROMETHEUS))]),
            "Questions to Prometheus servers as further sources of the verdict.",
        )
        .default("none"),
        Key::new("per_client", Shape::Integer(1, 1000), "One client counts for at most so many bad responses.")
            .default("2")
            .from(OURS),
        Key::new(
            "clients",
            Shape::Integer(1, 1000),
            "Distinct clients that must have seen bad responses before it fails.",
        )
        .default("2")
        .from(OURS),
        Key::new(
            "warm_up",
            Shape::Duration,
            "What the new set answers late in this time after an instance was admitted does not count.",
        )
        .default("10s")
        .from(OURS),
        Key::new("inconclusive", Shape::Choice(INCONCLUSIVE_WORDS), "What too little evidence means.")
            .default("hold")
            .from(OURS),
        Key::new(
            "raise_to",
            Shape::Weight,
            "The share of the traffic may grow up to this, at most 50, where an analysis would end without enough evidence.",
        )
        .default("none"),
        Key::new(
            "probe",
            Shape::Any(&[Shape::Text, Shape::Table(&PAIR_PROBE)]),
            "Path that the server itself asks of both sets in pairs, while real requests are rarer than that.",
        )
        .default("none"),
        Key::new("flag", Shape::Text, "A bad verdict turns this flag off instead of turning the release back.")
            .default("none"),
    ]],
    habits: &[
        ("p95", "write `latency: 800ms`"),
        ("error_rate", "write `max_errors`"),
        ("success_rate", "write `max_errors`, the complement"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static PAIR_PROBE: Table = Table {
    id: "pair-probe",
    noun: "`probe`",
    doc: "The same safe request to one instance of each set at the same time.",
    keys: &[&[
        Key::new("path", Shape::Text, "Path with query, asked with `GET`; begins with `/`.").required(),
        Key::new("port", Shape::Name, "Name of the port that is asked.").default("`http`, or the only port"),
        Key::new("every", Shape::Duration, "Pause between pairs: at least `100ms`.").default("1s").from(OURS),
        Key::new("timeout", Shape::Duration, "Longest wait for an answer; none is a bad one.").default("5s").from(OURS),
    ]],
    habits: &[("http", "write `path`"), ("url", "write `path`"), ("interval", "write `every`")],
    later: &[],
    one_of: &[],
};

pub(crate) static PROMETHEUS: Table = Table {
    id: "prometheus",
    noun: "`prometheus`",
    doc: "A question to a Prometheus server, with the conditions and limits of Argo Rollouts. No data is inconclusive, never a failure.",
    keys: &[&[
        Key::new("name", Shape::Text, "How it is called in events.").default("`prometheus`, `prometheus-2`, …"),
        Key::new(
            "address",
            Shape::Text,
            "`http://prometheus:9090` or `https://…`, perhaps with a path in front of `/api/v1`.",
        )
        .required(),
        Key::new("query", Shape::Text, "A query (PromQL) with one number, or a few, as its result.").required(),
        Key::new(
            "success",
            Shape::Text,
            "Condition on `result` that makes a measurement good, such as `result < 0.01`.",
        )
        .default("none: `failure` does not hold"),
        Key::new("failure", Shape::Text, "Condition on `result` that makes it bad.")
            .default("none: `success` does not hold"),
        Key::new("every", Shape::Duration, "Pause between measurements: `1s` to `1h`.").default("10s").from(OURS),
        Key::new("initial_delay", Shape::Duration, "Pause before the first one.").default("0s").from(ARGO),
        Key::new("timeout", Shape::Duration, "Longest wait for an answer: up to `1m`; then it is an error.")
            .default("10s")
            .from(OURS),
        Key::new("count", Shape::CountLimit(1, 100_000), "Measurements after which it passes.")
            .default("unlimited")
            .from(ARGO),
        Key::new("failure_limit", Shape::CountLimit(0, 100_000), "Bad measurements that are put up with.")
            .default("0")
            .from(ARGO),
        Key::new("inconclusive_limit", Shape::CountLimit(0, 100_000), "Inconclusive ones that are put up with.")
            .default("0")
            .from(ARGO),
        Key::new("consecutive_error_limit", Shape::CountLimit(0, 100_000), "Errors in a row that are put up with.")
            .default("4")
            .from(ARGO),
        Key::new(
            "consecutive_success_limit",
            Shape::CountLimit(1, 100_000),
            "Good measurements in a row after which it passes.",
        )
        .default("unlimited")
        .from(ARGO),
        Key::new("token", Shape::Table(&TOKEN), "Bearer token that opens the server.").default("none"),
        Key::new("ca", Shape::Text, "File (PEM) with the certificates that an `https://` server is trusted by.")
            .default("those of the machine"),
        Key::new("dry_run", Shape::Boolean, "It is measured and shown, and decides nothing.").default("false"),
    ]],
    habits: &[
        ("successCondition", "write `success`"),
        ("success_condition", "write `success`"),
        ("failureCondition", "write `failure`"),
        ("failure_condition", "write `failure`"),
        ("interval", "write `every`"),
        ("initialDelay", "write `initial_delay`"),
        ("failureLimit", "write `failure_limit`"),
        ("inconclusiveLimit", "write `inconclusive_limit`"),
        ("consecutiveErrorLimit", "write `consecutive_error_limit`"),
        ("consecutiveSuccessLimit", "write `consecutive_success_limit`"),
        ("error_limit", "write `consecutive_error_limit`"),
        ("dryRun", "write `dry_run`"),
        ("provider", "write `address` and `query` directly"),
        ("url", "write `address`"),
        ("authentication", "write `token: {file: …}` or `token: {env: …}`"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static TOKEN: Table = Table {
    id: "token",
    noun: "`token`",
    doc: "Where a token is read from whenever it is needed. It is kept and shown nowhere.",
    keys: &[&[
        Key::new("file", Shape::Text, "File whose first line it is, relative to the folder of the stack file."),
        Key::new("env", Shape::Text, "Variable of the server's environment."),
    ]],
    habits: &[
        ("value", "a token does not belong into the stack file: write `file` or `env`"),
        ("secret", "write `file` or `env`"),
    ],
    later: &[],
    one_of: &["file", "env"],
};

pub(crate) static LATENCY: Table = Table {
    id: "latency",
    noun: "`latency`",
    doc: "What makes a response slow.",
    keys: &[&[Key::new("p95", Shape::Duration, "Responses that take longer are bad.").required()]],
    habits: &[("p99", "write `p95`: it is the bound above which a response counts as slow")],
    later: &[],
    one_of: &[],
};
