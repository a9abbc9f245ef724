//! Holding the traffic of a service up, and letting it go on.

use orchestra_model::{Name, quantity::Timespan, traffic::PausedTraffic};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is wanted of a service's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrafficAction {
    /// New requests wait.
    Pause,
    /// They go on.
    Resume,
}

/// Holds traffic up, or lets it go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveTraffic {
    /// What is wanted.
    pub action: TrafficAction,
    /// How long a pause lasts if nobody ends it: five minutes unless said otherwise, one hour at most.
    #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
    pub duration: Option<Timespan>,
    /// Who wants it, for the events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// The traffic of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TrafficStatus {
    /// Whose.
    pub service: Name,
    /// Until when new requests wait, and who said so, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<PausedTraffic>,
    /// Whether the proxy does so already.
    pub in_force: bool,
}
