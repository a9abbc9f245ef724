//! What to do when traffic is too low for the step to be decided in time.
//!
//! At 5 % of one request per second the canary answers three a minute, and no test can know in two minutes what takes
//! two hundred responses to know. Three things help, in this order: waiting, if the time is there; a higher weight, up to
//! one half, where a response says most about the difference; and the same synthetic request sent to both releases.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The highest weight that is suggested: evidence per response is greatest where both arms get as much.
pub const MAX_WEIGHT: f64 = 0.5;

/// A suggestion; the caller decides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Advice {
    /// Enough evidence is there, or will be within the time, after about so long.
    Wait(Duration),
    /// At this weight (0 to 1, in steps of 0.001) it will be there within the time.
    RaiseWeight(f64),
    /// Even at the highest sensible weight it will not: so many pairs of synthetic probes, one every so often, would do.
    SyntheticProbes {
        /// The weight to use beside them (0 to 1).
        weight: f64,
        /// Pairs within the time.
        pairs: u32,
        /// Time between pairs.
        every: Duration,
    },
}

/// Advises from `needed` responses of the canary, `per_second` requests on both arms together, the present `weight`
/// and the time that `remains`.
pub fn advise(needed: u64, per_second: f64, weight: f64, remains: Duration) -> Advice {
    if needed == 0 {
        return Advice::Wait(Duration::ZERO);
    }
    let finite = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
    let (rate, weight) = (finite(per_second), finite(weight).min(1.0));
    #[expect(clippy::cast_precision_loss, reason = "a number of responses that somebody waits for")]
    let needed = needed as f64;
    let seconds = remains.as_secs_f64().max(1e-3);
    let wait = needed / (rate * weight);
    if wait <= seconds {
        return Advice::Wait(Duration::from_secs_f64(wait));
    }
    let wanted = (needed / (rate * seconds) * 1000.0).ceil() / 1000.0;
    if wanted <= MAX_WEIGHT && wanted > weight {
        return Advice::RaiseWeight(wanted);
    }
    // Without any request a higher weight helps nothing.
    let weight = if rate > 0.0 { weight.max(MAX_WEIGHT) } else { weight };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at least 1, and saturating at a number that nobody can send"
    )]
    let pairs = (needed - rate * weight * seconds).ceil().max(1.0) as u32;
    Advice::SyntheticProbes { weight, pairs, every: Duration::from_secs_f64(seconds / f64::from(pairs)) }
}
