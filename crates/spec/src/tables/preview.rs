//! Keys of previews.

use super::{OURS, OVERLAYS};
use crate::table::{Key, Shape, Table};

/// Whether a preview has a resource of its own.
pub(crate) const SHARING: &[&str] = &["own", "shared"];

/// The key of everything that a preview may share.
pub(super) static SHARED: &[Key] = &[Key::new(
    "preview",
    Shape::Choice(SHARING),
    "What a preview has: `own`, one of its own; `shared`, that of the environment that it is made from.",
)
.default("own")
.from(OURS)];

pub(crate) static PREVIEWS: Table = Table {
    id: "previews",
    noun: "`previews`",
    doc: "What holds for environments that `orchestra up --env NAME --from ENVIRONMENT` makes. The overlays lie over those of that environment.",
    keys: &[
        &[
            Key::new(
                "ttl",
                Shape::Duration,
                "How long a preview stays after its last `up`, without `--ttl`; 0: until it is taken down.",
            )
            .default("24h")
            .from(OURS),
            Key::new("limit", Shape::Integer(1, 1_000), "Most previews of the stack at one time.")
                .default("10")
                .from(OURS),
            Key::new("target", Shape::Choice(&["process"]), "The world that runs their workloads.")
                .default("that of the environment"),
            Key::new("prices", Shape::Table(&PRICES), "What their use is worth.")
                .default("AWS Fargate on demand, Linux on x86, us-east-1"),
        ],
        OVERLAYS,
    ],
    habits: &[
        ("expires", "write `ttl`"),
        ("expire_after", "write `ttl`"),
        ("max", "write `limit`"),
        ("from", "say it on the command line: `orchestra up --env NAME --from ENVIRONMENT`"),
    ],
    later: &["models", "stores", "routes", "frontends", "config"],
    one_of: &[],
};

pub(crate) static PRICES: Table = Table {
    id: "prices",
    noun: "`prices`",
    doc: "What an hour of use costs. The list of environments multiplies what a preview used by it.",
    keys: &[&[
        Key::new("cpu_hour", Shape::Measure, "Of one core, up to six decimals.").default("0.04048"),
        Key::new("memory_hour", Shape::Measure, "Of one GiB of memory, up to six decimals.").default("0.004445"),
        Key::new("currency", Shape::Text, "Three capital letters, as ISO 4217 has them.").default("USD"),
    ]],
    habits: &[("cpu", "write `cpu_hour`"), ("memory", "write `memory_hour`"), ("gib_hour", "write `memory_hour`")],
    later: &[],
    one_of: &[],
};
