//! The tables of version 1: every key of the stack file, with its default and where that comes from.

use crate::table::{Key, Shape, Table};

mod flags;
mod port;
mod preview;
mod rollout;
mod scale;

pub(crate) use flags::{FLAG, RULE, TEST};
pub(crate) use port::{
    BREAKER, CLIENT, DEVELOPMENT, FALLBACK, NONE, OUTLIER, PORT, REQUEST_LIMITS, RETRY, STICKY, TIMEOUTS, TLS,
};
use preview::SHARED;
pub(crate) use preview::{PREVIEWS, PRICES};
pub(crate) use rollout::{
    ANALYSIS, BLUE_GREEN, CANARY, GUARD, HOLD, HOOK, LATENCY, MATCH, MIRROR, PAIR_PROBE, PAUSE, PROMETHEUS, ROLLING,
    ROLLOUT, STEP, TOKEN,
};
pub(crate) use scale::{
    METRICS, SCALE, SCALE_DOWN, SCALE_EXPORTED, SCALE_LEVEL, SCALE_METRIC, SCALE_POLICY, SCALE_QUEUE, SCALE_UP, TO_ZERO,
};

/// Requirement document 004, probes.
const PROBES: &str = "004 probes";
/// Kubernetes.
const KUBERNETES: &str = "as Kubernetes";
/// The author of a default that nothing else dictates.
const OURS: &str = "our choice";

const KINDS_OF_SIGNAL: &[&str] = &["TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "KILL"];

pub(crate) static ROOT: Table = Table {
    id: "stack",
    noun: "a stack file",
    doc: "The whole file.",
    keys: &[&[
        Key::new("version", Shape::VersionOne, "Version of the format: always 1.").required(),
        Key::new("name", Shape::Name, "Name of the stack.").required(),
        Key::new(
            "services",
            Shape::Maybe(&Shape::Names(&Shape::Table(&SERVICE))),
            "Programs that are kept running, by name.",
        ),
        Key::new("jobs", Shape::Maybe(&Shape::Names(&Shape::Table(&JOB))), "Programs that run to completion, by name."),
        Key::new(
            "volumes",
            Shape::Maybe(&Shape::Names(&Shape::Maybe(&Shape::Table(&VOLUME)))),
            "Directories that outlive instances, by name.",
        ),
        Key::new(
            "flags",
            Shape::Maybe(&Shape::Keys(&Shape::Any(&[Shape::Constant, Shape::Table(&FLAG)]))),
            "Feature flags, by name.",
        ),
        Key::new(
            "secrets",
            Shape::Maybe(&Shape::Names(&Shape::Table(&SECRET))),
            "Values that are kept out of this file, by name.",
        ),
        Key::new(
            "environments",
            Shape::Maybe(&Shape::Names(&Shape::Maybe(&Shape::Table(&ENVIRONMENT)))),
            "Overlays of this file, by name.",
        )
        .default("an implicit `dev`"),
        Key::new(
            "previews",
            Shape::Maybe(&Shape::Table(&PREVIEWS)),
            "What holds for environments that are made from another one, for a while.",
        ),
    ]],
    habits: &[("networks", "services of a stack reach each other at their published ports; delete this key")],
    later: &["models", "stores", "routes", "frontends", "memory", "monitoring", "alerts", "config"],
    one_of: &[],
};

/// Keys of everything that lies over a stack.
static OVERLAYS: &[Key] = &[
    Key::new(
        "services",
        Shape::Maybe(&Shape::Overlay(&Shape::Names(&Shape::Table(&SERVICE)))),
        "Overlay of `services`.",
    ),
    Key::new("jobs", Shape::Maybe(&Shape::Overlay(&Shape::Names(&Shape::Table(&JOB)))), "Overlay of `jobs`."),
    Key::new("volumes", Shape::Maybe(&Shape::Overlay(&Shape::Names(&Shape::Table(&VOLUME)))), "Overlay of `volumes`."),
    Key::new(
        "flags",
        Shape::Maybe(&Shape::Overlay(&Shape::Keys(&Shape::Any(&[Shape::Constant, Shape::Table(&FLAG)])))),
        "Overlay of `flags`.",
    ),
    Key::new("secrets", Shape::Maybe(&Shape::Overlay(&Shape::Names(&Shape::Table(&SECRET)))), "Overlay of `secrets`."),
];

pub(crate) static ENVIRONMENT: Table = Table {
    id: "environment",
    noun: "an environment",
    doc: "A named overlay. Mappings merge key by key, other values replace, and an explicit `null` deletes.",
    keys: &[
        &[Key::new("target", Shape::Choice(&["process"]), "The world that runs the workloads.")
            .default("process")
            .from(OURS)],
        OVERLAYS,
    ],
    habits: &[],
    later: &["namespace", "models", "stores", "routes", "frontends", "memory", "monitoring", "alerts", "config"],
    one_of: &[],
};

/// Targets of the design that this version does not have.
pub(crate) const LATER_TARGETS: &[&str] = &["docker", "kubernetes", "systemd"];

pub(crate) static SECRET: Table = Table {
    id: "secret",
    noun: "a secret",
    doc: "Where the value is read when a release is made. The release keeps it, sealed; it is shown nowhere.",
    keys: &[&[
        Key::new(
            "file",
            Shape::Text,
            "File whose content it is, without one line end at its end; relative to the folder of the stack file.",
        ),
        Key::new("env", Shape::Text, "Variable of the server's environment."),
    ]],
    habits: &[
        ("value", "a secret does not belong into the stack file: write `file` or `env`"),
        ("environment", "write `env`"),
        ("path", "write `file`"),
        ("external", "write `file` or `env`"),
    ],
    later: &[],
    one_of: &["file", "env"],
};

pub(crate) static ENV_SECRET: Table = Table {
    id: "env-secret",
    noun: "a variable",
    doc: "A variable whose value is a secret.",
    keys: &[&[Key::new("secret", Shape::Reference, "Name of the secret.").required()]],
    habits: &[],
    later: &["from"],
    one_of: &[],
};

static PROGRAM: &[Key] = &[
    Key::new(
        "command",
        Shape::Any(&[Shape::List(&Shape::Template), Shape::Template]),
        "Program and arguments as a list, or a text for `/bin/sh -c`.",
    )
    .required(),
    Key::new("directory", Shape::Template, "Working directory, relative to the folder of the stack file.")
        .default("the folder of the stack file"),
    Key::new(
        "env",
        Shape::Map(&Shape::Any(&[Shape::Template, Shape::Table(&ENV_SECRET)])),
        "Variables. Numbers and booleans become the text that stands there.",
    )
    .default("none beside the documented minimum"),
    Key::new("user", Shape::Template, "User to run as, by name or number; needs a server that runs as root.")
        .default("the user of the server"),
    Key::new("umask", Shape::Umask, "File mode creation mask in octal, such as \"0022\".").default("0022").from(OURS),
    Key::new(
        "limits",
        Shape::Table(&LIMITS),
        "Limits of the process, as `setrlimit(2)` has them; soft and hard alike.",
    )
    .default("those of the server"),
    Key::new("resources", Shape::Table(&RESOURCES), "CPU and memory.").default("no bounds"),
    Key::new(
        "depends_on",
        Shape::Any(&[
            Shape::List(&Shape::Reference),
            Shape::Names(&Shape::Any(&[Shape::Choice(CONDITIONS), Shape::Table(&DEPENDENCY)])),
        ]),
        "What must be there first: a list of names, or a mapping of names to conditions.",
    )
    .default("nothing"),
    Key::new("stop", Shape::Table(&STOP), "How it is stopped."),
];

/// Conditions of a dependency.
pub(crate) const CONDITIONS: &[&str] = &["started", "ready", "completed"];

const PROGRAM_HABITS: &[(&str, &str)] = &[
    ("environment", "write `env`"),
    ("args", "put the arguments into `command`"),
    ("arguments", "put the arguments into `command`"),
    ("entrypoint", "put program and arguments into `command`"),
    ("cmd", "write `command`"),
    ("run", "write `command`"),
    ("working_dir", "write `directory`"),
    ("workdir", "write `directory`"),
    ("cwd", "write `directory`"),
    ("ulimits", "write `limits`"),
    ("env_file", "write the variables under `env`"),
    (
        "volumes",
        "define the volume at the top level and pass its folder on: `env: {DATA_DIR: \"{{ volumes.NAME.path }}\"}`",
    ),
    ("stop_signal", "write `stop: {signal: …}`"),
    ("stop_grace_period", "write `stop: {grace: …}`"),
    ("networks", "services of a stack reach each other at their published ports; delete this key"),
    ("container_name", "an instance is named after its service, its release and a number; delete this key"),
    ("profiles", "use `environments` at the top level"),
];

const LATER_WORKLOAD: &[&str] = &["image", "build", "secrets", "config"];

pub(crate) static SERVICE: Table = Table {
    id: "service",
    noun: "a service",
    doc: "A program that is kept running.",
    keys: &[PROGRAM, SHARED, &[
        Key::new("replicas", Shape::Integer(0, 10_000), "How many instances; with `scale` only to begin with.").default("1").from(OURS),
        Key::new(
            "ports",
            Shape::Names(&Shape::Any(&[
                Shape::Integer(1, 65_535),
                Shape::Choice(&["auto"]),
                Shape::Address,
                Shape::Table(&PORT),
            ])),
            "Published ports by name. The address is stable; each instance listens on a port of its own, given in its environment.",
        )
        .default("none"),
        Key::new("health", Shape::Table(&HEALTH), "How it is known to work.").default(READY_BY_DEFAULT),
        Key::new(
            "restart",
            Shape::Any(&[Shape::Choice(RESTARTS), Shape::Table(&RESTART)]),
            "What happens when an instance exits by itself.",
        ),
        Key::new("rollout", Shape::Table(&ROLLOUT), "How instances are replaced."),
        Key::new("scale", Shape::Table(&SCALE), "How the number of instances follows the load.").default("it does not"),
        Key::new(
            "metrics",
            Shape::Any(&[Shape::Text, Shape::Table(&METRICS)]),
            "Where its instances export metrics, for `guard: {counters: …}` and `scale`: the path, or a mapping.",
        )
        .default("`/metrics` of the port `metrics`, else `http`, else the only one, if something looks at them"),
        Key::new("watchdog", Shape::Duration, "Longest time between two `WATCHDOG=1` messages of the program.").default("none"),
    ]],
    habits: &[
        ("healthcheck", "write `health: {ready: …, live: …}`"),
        ("readiness", "write `health: {ready: …}`"),
        ("liveness", "write `health: {live: …}`"),
        ("deploy", "write `replicas`, `resources`, `restart` and `rollout` directly"),
        ("expose", "write `ports`"),
        ("autoscale", "write `scale`"),
        ("autoscaling", "write `scale`"),
        ("instances", "write `replicas`"),
        ("scrape", "write `metrics: {port: …, path: …}`"),
        ("retries", "a service is restarted, not retried: write `restart: {budget: …}`"),
        ("timeout", "only jobs have a timeout; a service has `health: {start_deadline: …}`"),
        ("backoff", "write `restart: {backoff: …}`"),
    ],
    later: LATER_WORKLOAD,
    one_of: &[],
};

pub(crate) static JOB: Table = Table {
    id: "job",
    noun: "a job",
    doc: "A program that runs to completion.",
    keys: &[
        PROGRAM,
        SHARED,
        &[
            Key::new("retries", Shape::Integer(0, 1_000), "How often it is tried again after a failure.")
                .default("0")
                .from(OURS),
            Key::new("timeout", Shape::Duration, "Longest run of one try.")
                .default("300s")
                .from("003 `orchestration_performance.service_deployment_time`"),
            Key::new("backoff", Shape::Duration, "Pause before the first retry; doubles each time.")
                .default("1s")
                .from(OURS),
        ],
    ],
    habits: &[
        ("retry", "write `retries`"),
        ("replicas", "a job runs once; delete this key or make it a service"),
        ("ports", "only services have published ports"),
        ("health", "a job is judged by its exit code; delete this key or make it a service"),
        ("restart", "write `retries: N`"),
        ("rollout", "a job is not rolled; delete this key"),
        ("schedule", "a job runs when its stack is brought up; schedules come with a later version"),
    ],
    later: LATER_WORKLOAD,
    one_of: &[],
};

/// Habits of both workloads.
pub(crate) fn workload_habit(table: &Table, key: &str) -> Option<&'static str> {
    let workload = matches!(table.id, "service" | "job");
    let shared = PROGRAM_HABITS.iter().filter(|_| workload);
    table.habits.iter().chain(shared).find(|(habit, _)| *habit == key).map(|(_, remedy)| *remedy)
}

pub(crate) static VOLUME: Table = Table {
    id: "volume",
    noun: "a volume",
    doc: "A directory that outlives instances. Without `path`, Orchestra chooses it and `orchestra down --volumes` deletes it.",
    keys: &[&[Key::new(
        "path",
        Shape::Template,
        "A directory of yours, relative to the folder of the stack file; Orchestra creates it and never deletes it. Only `stack` and `environment` values may be used in it.",
    )
    .default("chosen by Orchestra, per stack and environment")], SHARED],
    habits: &[
        ("driver", "a volume is a directory of this machine; delete this key"),
        ("external", "write `path: /where/it/is`"),
        ("name", "the key is the name; write `path` to choose the directory"),
        ("size", "a directory has no size of its own; delete this key"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static LIMITS: Table = Table {
    id: "limits",
    noun: "`limits`",
    doc: "Limits of the process, or `unlimited`.",
    keys: &[&[
        Key::new("nofile", Shape::CountLimit(0, u32::MAX as u64), "Open files.").default("that of the server"),
        Key::new("nproc", Shape::CountLimit(0, u32::MAX as u64), "Processes of the user.")
            .default("that of the server"),
        Key::new("core", Shape::SizeLimit, "Size of a core file.").default("that of the server"),
        Key::new("as", Shape::SizeLimit, "Address space.").default("that of the server"),
        Key::new("memlock", Shape::SizeLimit, "Locked memory.").default("that of the server"),
        Key::new("stack", Shape::SizeLimit, "Stack.").default("that of the server"),
        Key::new("fsize", Shape::SizeLimit, "Size of a file.").default("that of the server"),
        Key::new("cpu", Shape::CountLimit(0, u32::MAX as u64), "Seconds of CPU time.").default("that of the server"),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

pub(crate) static RESOURCES: Table = Table {
    id: "resources",
    noun: "`resources`",
    doc: "What a workload needs, and what it may use at most.",
    keys: &[&[
        Key::new("cpu", Shape::Cpu, "CPU that it needs.").default("unknown"),
        Key::new("memory", Shape::Size, "Memory that it needs.").default("unknown"),
        Key::new("limits", Shape::Table(&RESOURCE_LIMITS), "What it may use at most.").default("no bounds"),
    ]],
    habits: &[("requests", "write `cpu` and `memory` directly under `resources`")],
    later: &["gpus"],
    one_of: &[],
};

pub(crate) static RESOURCE_LIMITS: Table = Table {
    id: "resource-limits",
    noun: "`resources.limits`",
    doc: "Bounds of the control group of an instance.",
    keys: &[&[
        Key::new("cpu", Shape::Cpu, "CPU that it may use.").default("no bound"),
        Key::new("memory", Shape::Size, "Memory that it may use.").default("no bound"),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

pub(crate) static DEPENDENCY: Table = Table {
    id: "dependency",
    noun: "a dependency",
    doc: "What a workload waits for, and what happens when that is lost later.",
    keys: &[&[
        Key::new("until", Shape::Choice(CONDITIONS), "What must be true before the start.")
            .default("`ready` of a service, `completed` of a job, `started` of a volume"),
        Key::new("on_loss", Shape::Choice(&["ignore", "hold", "stop"]), "What happens when it stops being true.")
            .default("ignore")
            .from(OURS),
    ]],
    habits: &[
        ("condition", "write `until: started`, `until: ready` or `until: completed`"),
        ("restart", "write `on_loss: stop`"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static STOP: Table = Table {
    id: "stop",
    noun: "`stop`",
    doc: "Signal, grace, then SIGKILL for the whole process tree.",
    keys: &[&[
        Key::new("signal", Shape::Choice(KINDS_OF_SIGNAL), "Signal to the main process.")
            .default("TERM")
            .from(KUBERNETES),
        Key::new("grace", Shape::Duration, "Time that it has to exit.").default("30s").from(KUBERNETES),
    ]],
    habits: &[("timeout", "write `grace`")],
    later: &[],
    one_of: &[],
};

/// Protocols of ports.
pub(crate) const PROTOCOLS: &[&str] = &["http", "h2c", "grpc", "tcp"];

pub(crate) static HEALTH: Table = Table {
    id: "health",
    noun: "`health`",
    doc: "How a service is known to work. Readiness routes, liveness restarts.",
    keys: &[&[
        Key::new(
            "ready",
            Shape::Any(&[Shape::Choice(&[NO_CHECK]), Shape::Table(&READY)]),
            "An instance that fails it gets no requests. `none`: ready once its process runs.",
        )
        .default(READY_BY_DEFAULT)
        .from(OURS),
        Key::new(
            "live",
            Shape::Table(&LIVE),
            "An instance that fails it is stopped and started again. Begins once the instance is ready.",
        )
        .default("none"),
        Key::new("start_deadline", Shape::Duration, "Longest time from process start to first readiness.")
            .default("120s")
            .from("003 `orchestration_performance.service_startup_time`"),
    ]],
    habits: &[
        ("readiness", "write `ready`"),
        ("liveness", "write `live`"),
        ("test", "write `ready: {exec: [...]}`"),
        ("startup", "write `start_deadline`; `every_starting` beside a check is the interval until then"),
        ("start_period", "write `start_deadline`"),
        ("http", "write `ready: {http: …}`"),
    ],
    later: &[],
    one_of: &[],
};

/// `health: {ready: none}`.
pub(crate) const NO_CHECK: &str = "none";

const READY_BY_DEFAULT: &str = "each published port accepts connections; without ports, ready once its process runs";

/// The kinds of checks.
pub(crate) const CHECKS: &[&str] =
    &["http", "tcp", "grpc", "exec", "log", "notify", "dependency", "all", "any", "at_least"];

static CHECK: &[Key] = &[
    Key::new(
        "http",
        Shape::Any(&[Shape::Template, Shape::Table(&HTTP_CHECK)]),
        "An HTTP request to the instance succeeds: a path, or a mapping.",
    ),
    Key::new(
        "tcp",
        Shape::Any(&[Shape::True, Shape::Name]),
        "A TCP connection is accepted: the name of a port, or `true`.",
    ),
    Key::new(
        "grpc",
        Shape::Any(&[Shape::True, Shape::Name, Shape::Table(&GRPC_CHECK)]),
        "The gRPC health protocol answers SERVING: the name of a port, `true`, or a mapping.",
    ),
    Key::new(
        "exec",
        Shape::Any(&[Shape::List(&Shape::Template), Shape::Template]),
        "A command exits with 0: like `command`.",
    ),
    Key::new("log", Shape::Text, "A line of output matches this regular expression. At most one pattern per service."),
    Key::new("notify", Shape::True, "The program sends `READY=1` to `$NOTIFY_SOCKET`."),
    Key::new("dependency", Shape::Name, "Another service of the stack is ready."),
    Key::new("all", Shape::List(&Shape::Table(&PART)), "All parts pass."),
    Key::new("any", Shape::List(&Shape::Table(&PART)), "One part passes."),
    Key::new("at_least", Shape::Table(&AT_LEAST), "So many parts pass."),
];

const CHECK_HABITS: &[(&str, &str)] = &[
    ("path", "write `http: /path`, or `http: {path: …, port: …}`"),
    ("httpGet", "write `http: /path`"),
    ("tcpSocket", "write `tcp: PORT_NAME`"),
    ("test", "write `exec: [...]`"),
    ("command", "write `exec: [...]`"),
    ("interval", "write `every`"),
    ("period", "write `every`"),
    ("retries", "write `fail_after`"),
    ("failure_threshold", "write `fail_after`"),
    ("success_threshold", "write `pass_after`"),
    ("start_period", "write `start_deadline` beside `ready`"),
];

macro_rules! timing {
    ($every:literal, $timeout:literal, $fail_after:literal) => {
        &[
            Key::new("every", Shape::Duration, "Interval.").default($every).from(PROBES),
            Key::new("every_starting", Shape::Duration, "Interval until the instance was ready for the first time.")
                .default("250ms")
                .from(OURS),
            Key::new("timeout", Shape::Duration, "Longest wait for one answer.").default($timeout).from(PROBES),
            Key::new(
                "pass_after",
                Shape::Integer(1, 1_000),
                "Successes in a row that turn a failing check into a passing one.",
            )
            .default("1")
            .from(KUBERNETES),
            Key::new(
                "fail_after",
                Shape::Integer(1, 1_000),
                "Failures in a row that turn a passing check into a failing one.",
            )
            .default($fail_after)
            .from(PROBES),
        ]
    };
}

pub(crate) static READY: Table = Table {
    id: "ready-check",
    noun: "a readiness check",
    doc: "One check with its timing.",
    keys: &[CHECK, timing!("5s", "3s", "1")],
    habits: CHECK_HABITS,
    later: &[],
    one_of: CHECKS,
};

pub(crate) static LIVE: Table = Table {
    id: "live-check",
    noun: "a liveness check",
    doc: "One check with its timing.",
    keys: &[CHECK, timing!("10s", "5s", "3")],
    habits: CHECK_HABITS,
    later: &[],
    one_of: CHECKS,
};

pub(crate) static PART: Table = Table {
    id: "check-part",
    noun: "a part of a check",
    doc: "One check inside `all`, `any` or `at_least`; the timing stands beside the outermost one.",
    keys: &[CHECK],
    habits: &[
        ("every", "the timing stands beside the outermost check"),
        ("every_starting", "the timing stands beside the outermost check"),
        ("timeout", "the timing stands beside the outermost check"),
        ("pass_after", "the timing stands beside the outermost check"),
        ("fail_after", "the timing stands beside the outermost check"),
    ],
    later: &[],
    one_of: CHECKS,
};

pub(crate) static AT_LEAST: Table = Table {
    id: "at-least",
    noun: "`at_least`",
    doc: "A number of checks out of several.",
    keys: &[&[
        Key::new("count", Shape::Integer(1, 1_000), "How many must pass.").required(),
        Key::new("of", Shape::List(&Shape::Table(&PART)), "Of these.").required(),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

/// Methods of HTTP checks.
pub(crate) const METHODS: &[&str] = &["GET", "HEAD", "POST"];

pub(crate) static HTTP_CHECK: Table = Table {
    id: "http-check",
    noun: "an HTTP check",
    doc: "An HTTP/1.1 request to the instance.",
    keys: &[&[
        Key::new("path", Shape::Template, "Path with query; begins with `/`.").required(),
        Key::new("port", Shape::Name, "Name of the instance's port.").default("`http`, or the only port"),
        Key::new("method", Shape::Choice(METHODS), "Method.").default("GET").from(KUBERNETES),
        Key::new("headers", Shape::Map(&Shape::Template), "Additional header fields.").default("none"),
        Key::new("body", Shape::Template, "Body to send.").default("none"),
        Key::new(
            "status",
            Shape::Any(&[Shape::Integer(100, 599), Shape::List(&Shape::Integer(100, 599))]),
            "Accepted status codes.",
        )
        .default("200 to 399")
        .from(KUBERNETES),
        Key::new("contains", Shape::Template, "Text that the first 64 KiB of the answer must contain.").default("any"),
    ]],
    habits: &[
        ("url", "write `path` and `port`: checks go to the instance itself"),
        ("host", "checks go to the instance itself; write the `Host` field under `headers`"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static GRPC_CHECK: Table = Table {
    id: "grpc-check",
    noun: "a gRPC check",
    doc: "The gRPC health protocol, `grpc.health.v1.Health/Check`.",
    keys: &[&[
        Key::new("port", Shape::Name, "Name of the instance's port.").default("`grpc`, `http`, or the only port"),
        Key::new("service", Shape::Text, "Service to ask about.").default("the whole server"),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

/// Restart policies.
pub(crate) const RESTARTS: &[&str] = &["always", "on_failure", "never"];

pub(crate) static RESTART: Table = Table {
    id: "restart",
    noun: "`restart`",
    doc: "What happens when an instance exits by itself.",
    keys: &[&[
        Key::new("policy", Shape::Choice(RESTARTS), "When it is started again.").default("always").from(KUBERNETES),
        Key::new(
            "backoff",
            Shape::Duration,
            "Pause before the first restart; doubles each time, with up to 10 % jitter.",
        )
        .default("500ms")
        .from(OURS),
        Key::new("max_backoff", Shape::Duration, "Longest pause.")
            .default("60s")
            .from("003 `orchestration_performance.lifecycle_coordination_time`"),
        Key::new(
            "reset_after",
            Shape::Duration,
            "Time of uninterrupted readiness after which pause and budget start anew.",
        )
        .default("60s")
        .from("003 `orchestration_performance.lifecycle_coordination_time`"),
        Key::new(
            "budget",
            Shape::CountLimit(0, 1_000_000),
            "Restarts without such a time before it is given up as a crash loop; `unlimited` never gives up.",
        )
        .default("5")
        .from(OURS),
    ]],
    habits: &[
        ("condition", "write `policy`"),
        ("delay", "write `backoff`"),
        ("max_attempts", "write `budget`"),
        ("window", "write `reset_after`"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static DRAIN: Table = Table {
    id: "drain",
    noun: "`drain`",
    doc: "How long an instance that leaves may go on with what it has begun.",
    keys: &[&[
        Key::new("requests", Shape::Duration, "For requests.")
            .default("30s")
            .from("003 `orchestration_performance.health_validation_time`"),
        Key::new("streams", Shape::Duration, "For streams: SSE, WebSocket, gRPC streams, TCP connections.")
            .default("15m")
            .from(OURS),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

/// Tables in the order in which the reference shows them.
pub(crate) static ALL: &[&Table] = &[
    &ROOT,
    &ENVIRONMENT,
    &SERVICE,
    &JOB,
    &VOLUME,
    &PORT,
    &TLS,
    &STICKY,
    &REQUEST_LIMITS,
    &TIMEOUTS,
    &RETRY,
    &OUTLIER,
    &BREAKER,
    &FALLBACK,
    &METRICS,
    &DEPENDENCY,
    &HEALTH,
    &READY,
    &LIVE,
    &PART,
    &AT_LEAST,
    &HTTP_CHECK,
    &GRPC_CHECK,
    &RESTART,
    &STOP,
    &ROLLOUT,
    &ROLLING,
    &HOLD,
    &CANARY,
    &BLUE_GREEN,
    &STEP,
    &PAUSE,
    &ANALYSIS,
    &HOOK,
    &MATCH,
    &MIRROR,
    &GUARD,
    &LATENCY,
    &PROMETHEUS,
    &TOKEN,
    &SECRET,
    &ENV_SECRET,
    &PAIR_PROBE,
    &DRAIN,
    &SCALE,
    &SCALE_METRIC,
    &SCALE_LEVEL,
    &SCALE_QUEUE,
    &SCALE_EXPORTED,
    &SCALE_UP,
    &SCALE_DOWN,
    &SCALE_POLICY,
    &TO_ZERO,
    &RESOURCES,
    &RESOURCE_LIMITS,
    &LIMITS,
    &FLAG,
    &RULE,
    &TEST,
    &PREVIEWS,
    &PRICES,
];
