//! Previews: environments that are made from another one, for a while.
//!
//! A preview is not named in the stack file. It has names, addresses and volumes of its own, except for what the stack
//! says that it shares with the environment that it was made from, and it is taken down when its time is over.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    desired::Resource,
    id::{Name, ResourceId},
    quantity::Timespan,
    time::UnixMillis,
};

/// What makes an environment a preview, as its run puts it into force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Preview {
    /// The environment that it was made from.
    pub from: Name,
    /// How long it stays after the last `up`; 0 is until somebody takes it down.
    pub ttl: Timespan,
    /// Whose it is, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Resources of the other environment that it uses instead of having its own.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub shared: BTreeSet<ResourceId>,
    /// What its use is worth.
    #[serde(default)]
    pub prices: Prices,
}

/// What an hour costs, in millionths of the currency.
///
/// The default is what AWS asks on demand for Fargate on Linux and x86 in us-east-1 (0.04048 USD per vCPU and hour,
/// 0.004445 USD per GB and hour): on a machine of one's own the figure is an equivalent and not a bill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Prices {
    /// Of a core.
    pub cpu_hour: u64,
    /// Of a GiB of memory.
    pub memory_hour: u64,
    /// Three letters, as ISO 4217 has them.
    pub currency: String,
}

impl Default for Prices {
    fn default() -> Self {
        Self { cpu_hour: 40_480, memory_hour: 4_445, currency: "USD".to_owned() }
    }
}

/// What an environment has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Used {
    /// CPU time, in milliseconds of one core.
    pub cpu_ms: u64,
    /// Memory held, in MiB times seconds.
    pub memory_mib_s: u64,
}

impl Used {
    /// What it costs, in millionths of the currency.
    pub fn cost(&self, prices: &Prices) -> u64 {
        const MS_PER_HOUR: u128 = 3_600_000;
        const MIB_S_PER_GIB_HOUR: u128 = 3_600 * 1_024;
        let cpu = u128::from(self.cpu_ms) * u128::from(prices.cpu_hour) / MS_PER_HOUR;
        let memory = u128::from(self.memory_mib_s) * u128::from(prices.memory_hour) / MIB_S_PER_GIB_HOUR;
        u64::try_from(cpu + memory).unwrap_or(u64::MAX)
    }
}

/// What is written down of a preview.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PreviewRecord {
    /// As it was asked for last.
    pub preview: Preview,
    /// When it was made.
    pub created_at: UnixMillis,
    /// When its time is over; `None` is never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
    /// Whether it was said that its time will soon be over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub warned: bool,
    /// When it was taken down; nothing of it is left then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed_at: Option<UnixMillis>,
    /// What it has used since it was made.
    #[serde(default)]
    pub used: Used,
}

impl PreviewRecord {
    /// Whether it is there.
    pub const fn is_live(&self) -> bool {
        self.removed_at.is_none()
    }
}

/// A resource of the environment that a preview is made from, as it is in force there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseResource {
    /// What was applied.
    pub applied: Resource,
    /// Ports that the machine chose for published ports without a number.
    pub chosen_ports: BTreeMap<Name, u16>,
}
