//! Rollouts: how one stands, and how a person moves it.

use orchestra_model::{
    Name, ReleaseNumber,
    quantity::Percent,
    rollout::{Paused, RolloutCommand, RolloutPhase},
    time::UnixMillis,
    traffic::Permille,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Moves the rollout of one service, or every rollout of the run that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRollout {
    /// Which service; all that are being rolled out if missing. An abort always turns the whole run back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// What is wanted.
    pub command: RolloutCommand,
    /// Who wants it, for the events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// A rollout at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RolloutStatus {
    /// `canary`, `blue_green`, `rolling`, …
    pub strategy: String,
    /// Release that was in force when it began.
    pub from: ReleaseNumber,
    /// Release that it leads to.
    pub to: ReleaseNumber,
    /// Where it stands.
    pub phase: RolloutPhase,
    /// The same in words: `step 2 of 5: weight 25 %`.
    pub words: String,
    /// Step that it is at, from 1; 0 after the last.
    pub step: u32,
    /// Steps in all.
    pub steps: u32,
    /// Share of the traffic that the new set gets.
    #[serde(with = "orchestra_model::share")]
    #[schemars(with = "Percent")]
    pub weight: Permille,
    /// Instances of the new set that are available.
    pub available: u32,
    /// Instances of the new set that are wanted now.
    pub wanted: u32,
    /// Instances of the old set that are ready.
    pub baseline: u32,
    /// When it began.
    pub started_at: UnixMillis,
    /// When its step or phase began.
    pub since: UnixMillis,
    /// When it is turned back if it has not ended; time that a person takes does not count.
    pub deadline: UnixMillis,
    /// A pause that is not a step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<Paused>,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    /// What came of copied requests, once there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirrored: Option<Mirrored>,
    /// When the old set is let go, once the release is in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_until: Option<UnixMillis>,
}

/// What came of requests that were copied to the new set: its responses were compared with those that the clients got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Mirrored {
    /// Responses that agreed.
    pub agreed: u64,
    /// Responses that differed in status or (for small bodies) in content.
    pub differed: u64,
}
