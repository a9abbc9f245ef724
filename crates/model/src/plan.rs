//! The plan: an immutable, ordered list of steps, with a report of why each is there.
//!
//! `plan` (the crate) makes it, `machine` walks it, the API shows it. Apply walks exactly this graph: there is no
//! second graph builder.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    desired::{Condition, Desired},
    flag::FlagName,
    id::{Digest, EnvironmentId, ReleaseNumber, ResourceId},
    text::Reference,
};

/// Version of the saved form of a plan.
pub const PLAN_FORMAT: u32 = 1;

/// What would be done, or is being done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// Version of this form: [`PLAN_FORMAT`].
    pub format: u32,
    /// Where.
    pub environment: EnvironmentId,
    /// Release that was in force when it was made.
    pub base: Option<ReleaseNumber>,
    /// The goal. `None` takes everything down.
    pub desired: Option<Desired>,
    /// Steps in an order that respects every edge; ties are broken by resource id, so equal inputs give equal plans.
    pub steps: Vec<Step>,
    /// Resources that stay as they are.
    pub unchanged: u32,
    /// Volumes that nothing desires any more, but that stay with their data until they are deleted by wish.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<ResourceId>,
    /// Flags that differ, in order of their names. Their values are there when the first step begins; nothing restarts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<FlagStep>,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.flags.is_empty()
    }

    /// The step for a resource.
    pub fn step(&self, resource: &ResourceId) -> Option<&Step> {
        self.steps.iter().find(|step| &step.resource == resource)
    }

    /// Identity of the plan: equal plans have equal digests.
    pub fn digest(&self) -> Digest {
        Digest::of(self)
    }
}

/// One thing to do with one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Step {
    /// To what.
    pub resource: ResourceId,
    /// What.
    pub action: Action,
    /// Why, each reason one line.
    pub reasons: Vec<String>,
    /// Properties that differ, in order of their paths.
    pub changes: Vec<PropertyChange>,
    /// What must be true before this step begins. Edges may lead to resources without a step of their own.
    pub after: BTreeMap<ResourceId, Wait>,
    /// Digest of what was last applied to the resource when the plan was made; a saved plan is refused for this
    /// resource if it is another one by now.
    pub base: Option<Digest>,
    /// Digest of what will have been applied; `None` for a deletion.
    pub target: Option<Digest>,
}

/// What is done with one flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlagStep {
    /// Which.
    pub flag: FlagName,
    /// What: create, update or delete.
    pub action: Action,
    /// Properties that differ, in order of their paths; none of a flag that is new or deleted.
    pub changes: Vec<PropertyChange>,
    /// Digest of the flag that was in force when the plan was made; a saved plan is refused if it is another one by now.
    pub base: Option<Digest>,
    /// Digest of what will be in force; `None` for a deletion.
    pub target: Option<Digest>,
}

/// What a step waits for on another resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// The other resource's step, if it has one, is done (for `started`: has begun), and the condition holds.
    Until(Condition),
    /// The other resource is gone.
    Gone,
}

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Make it: it is not there.
    Create,
    /// Change it in place; running instances stay.
    Update,
    /// Replace its instances by new ones, as its rollout strategy says; old and new overlap.
    Roll,
    /// Delete it and make it anew; there is no overlap.
    Replace,
    /// Run it (a job).
    Run,
    /// Repair it: what is there is not what was last applied.
    Repair,
    /// Delete it.
    Delete,
}

/// One property of a resource that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PropertyChange {
    /// Path within the resource, such as `program.env.LOG_LEVEL`.
    pub path: String,
    /// Value that was last applied; `None` if it was not there.
    pub before: Option<serde_json::Value>,
    /// Value that is desired; `None` if it will not be there.
    pub after: Option<serde_json::Value>,
    /// Parts of `after` that are known only after apply.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<Reference>,
    /// Whether it needs new instances.
    pub replaces: bool,
}
