//! Feature flags: what everybody gets, and how a person lays something over it.

use orchestra_model::{
    Diagnostic,
    flag::{Flag, FlagName, Override, VariantName},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The flags of an environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Flags {
    /// Where programs ask for them: what they find in `OFREP_ENDPOINT`. Missing without flags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Whether the proxy answers with these.
    pub in_force: bool,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Diagnostic>,
    /// Each flag, in order of their names.
    pub flags: Vec<FlagStatus>,
}

/// A flag at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlagStatus {
    /// Its name.
    pub name: FlagName,
    /// What decides.
    pub state: FlagState,
    /// Variant that everybody gets; where rules decide, everybody to whom none applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<VariantName>,
    /// Its value; `null` leaves it to the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<serde_json::Value>,
    /// What was laid over its own rules, also if that has no effect.
    #[serde(default, rename = "override", skip_serializing_if = "Option::is_none")]
    pub overridden: Option<Override>,
    /// Whether the proxy answers with this.
    pub in_force: bool,
    /// What the stack file says; missing if it does not define the flag (any more).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<Flag>,
}

/// What decides about the value of a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FlagState {
    /// The same for everybody.
    Fixed,
    /// The first rule that applies.
    Rules,
    /// It is off, in the stack file.
    Off,
    /// A person or a verdict.
    Overridden,
    /// Its definition cannot be served.
    Broken,
    /// There is only an override, and no flag.
    Undefined,
}

/// Lays something over a flag, or takes it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SwitchFlag {
    /// What is wanted.
    pub to: SwitchTo,
    /// Why, for the people who will see it; at most 500 characters. Every answer to a program carries it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who wants it, for the events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// What a flag is switched to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwitchTo {
    /// Everybody gets this variant.
    Variant(VariantName),
    /// Everybody gets the variant for a flag that is off.
    Off,
    /// Its own rules apply again.
    Clear,
}
