//! Previews, and what environments use.

use std::collections::BTreeSet;

use orchestra_model::{
    Name, ResourceId,
    preview::Used,
    quantity::{ByteSize, Timespan},
    time::UnixMillis,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is asked of a preview.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PreviewRequest {
    /// The environment that it is made from; of a preview that is there it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Name>,
    /// How long it stays; 0 is until it is taken down. What it had before or the stack file says if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Timespan>,
    /// Whose it is, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// A preview: an environment that is made from another one, for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PreviewStatus {
    /// The environment that it was made from.
    pub from: Name,
    /// How long it stays after its last `up`; 0 is until it is taken down.
    pub ttl: Timespan,
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// What it uses of that environment instead of having its own.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub shared: BTreeSet<ResourceId>,
    /// When it was made.
    pub created_at: UnixMillis,
    /// When it is taken down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
    /// How long until then as the server counts, whatever the clock of whoever asks says; `0s` once its time is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<Timespan>,
    /// When it was taken down; nothing of it is left then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed_at: Option<UnixMillis>,
    /// What it has used since it was made.
    pub used: Used,
    /// What that is worth, by the prices of the stack file.
    pub cost: Cost,
}

/// An amount of money.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cost {
    /// In millionths of the currency.
    pub millionths: u64,
    /// Three letters, as ISO 4217 has them.
    pub currency: String,
}

/// What the instances of an environment use at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UsageNow {
    /// CPU, in thousandths of a core.
    pub cpu_thousandths: u64,
    /// Memory.
    pub memory: ByteSize,
    /// Instances that were looked at.
    pub instances: u32,
}
