//! What a client asks for: validations, plans and runs.

use std::collections::BTreeMap;

use orchestra_model::{Diagnostic, EnvironmentId, Name, Plan, ReleaseNumber, ResourceKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::preview::PreviewRequest;

/// A stack file, with the environment that is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Absolute path of the stack file: relative paths in it start at its folder.
    pub source_path: String,
    /// Its text.
    pub source_text: String,
    /// The path as the user gave it, for messages; `source_path` if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_path: Option<String>,
    /// Environment; the stack's default if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Name>,
    /// What is asked of a preview; missing for one that is there and changes neither its time nor its owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<PreviewRequest>,
}

impl Source {
    /// The path to show in messages.
    pub fn shown_path(&self) -> &str {
        self.display_path.as_deref().unwrap_or(&self.source_path)
    }
}

/// A stack file that is in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ValidateResponse {
    /// Stack and environment that were validated.
    pub environment: EnvironmentId,
    /// Resources by kind; kinds without any are missing.
    pub resources: Vec<ResourceCount>,
    /// Environments that the stack file defines.
    pub environments: Vec<Name>,
    /// The other environments of the stack file, if all were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<ValidEnvironment>,
    /// What is probably not meant.
    pub warnings: Vec<Diagnostic>,
}

/// Another environment of a stack file that was validated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ValidEnvironment {
    /// Stack and environment.
    pub environment: EnvironmentId,
    /// Resources by kind; kinds without any are missing.
    pub resources: Vec<ResourceCount>,
}

/// How many resources of one kind there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ResourceCount {
    /// Kind.
    pub kind: ResourceKind,
    /// Their names, sorted.
    pub names: Vec<Name>,
}

/// What to plan. Planning changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PlanRequest {
    /// What `up` would do.
    Up(Source),
    /// What `down` would do.
    Down(Down),
}

/// A plan with what is worth knowing about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlanResponse {
    /// The plan.
    pub plan: Plan,
    /// What is probably not meant.
    pub warnings: Vec<Diagnostic>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StartRun {
    /// Make an environment what a stack file says.
    Up(Up),
    /// Apply a saved plan, unless what it changes has moved on.
    Apply(Box<Apply>),
    /// Take an environment down.
    Down(Down),
    /// Replace the instances of services by new ones.
    Restart(Restart),
    /// Change replica counts.
    Scale(Scale),
    /// Go back to an earlier release.
    Rollback(Rollback),
}

/// See [`StartRun::Up`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Up {
    /// The stack file.
    pub source: Source,
}

/// See [`StartRun::Apply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// The saved plan.
    pub plan: Plan,
    /// Absolute path of the stack file that it was made from; missing for a plan of `down`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_path: Option<String>,
}

/// See [`StartRun::Down`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Down {
    /// Which.
    pub environment: EnvironmentId,
    /// Also delete managed volumes, with what is in them.
    #[serde(default)]
    pub volumes: bool,
}

/// See [`StartRun::Restart`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Restart {
    /// Where.
    pub environment: EnvironmentId,
    /// Which services; empty means all.
    #[serde(default)]
    pub services: Vec<Name>,
}

/// See [`StartRun::Scale`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// Where.
    pub environment: EnvironmentId,
    /// New replica counts by service; at least one.
    pub replicas: BTreeMap<Name, u32>,
}

/// See [`StartRun::Rollback`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// Where.
    pub environment: EnvironmentId,
    /// To which release; the last one that was in force before the present one if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<ReleaseNumber>,
}
