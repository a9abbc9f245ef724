//! The stable release as a witness: a bad response of the canary counts as far as the stable release answered well at
//! the same time.
//!
//! When something breaks that both releases need, the first few bad responses fall on the canary alone in one case out
//! of many hundred, and then speak against it as loudly as its own fault would: with 20 % of the traffic, four in a row
//! with probability `0.2⁴ = 0.0016`. That is within `alpha`, and it is what was left of rollbacks in an outage. But the
//! stable release knows better: what it answers next is bad as well. So a look at bad responses waits until the stable
//! release has answered [`ANSWERS`] times in *later* looks, and the canary's bad responses then count as the fraction of
//! those answers that were good. The stable release's own bad responses always count in full.
//!
//! ```text
//!   look 1           look 2           look 3
//!   canary 1 bad     canary 1 bad     canary 0 bad
//!   stable 3 good    stable 1 good    stable 1 good, 1 bad
//!      └── waits for 2 answers: 1 of look 2, 2 of look 3 ──> counts as 2 / 3
//! ```
//!
//! # Why the test stays valid
//!
//! Let `W(n)` be the wealth after look `n` as [`crate::wealth`] has it, in which every hit counts at once. It is a
//! nonnegative supermartingale, so that it ever reaches `1/α` with probability at most `α`, however often and whenever
//! one looks (Ville's inequality; the mixture over effects is that of Robbins 1970, and of the mixture sequential
//! probability ratio test of Johari, Pekelis and Walsh, "Always Valid Inference: Continuous Monitoring of A/B Tests",
//! Operations Research 70(3), 2022, section 3). What is kept here, `V`, takes the looks in the same order, but later, and
//! takes each hit to a power `f` between 0 and 1. Every bet is on a higher rate of hits, so the factor of a hit is at
//! least 1 and its power `f` at most the factor itself; factors of misses, and the trials that decide when late bettors
//! begin, are the same. So at any moment `V ≤ W(m)` for the look `m` that was let through last, and wherever `V` reaches
//! `1/α`, `W` has reached it before: `P(sup V ≥ 1/α) ≤ P(sup W ≥ 1/α) ≤ α`. Nothing is asked of `f`: it may know the
//! future, as here, and may depend on the outcomes.
//!
//! # Silence
//!
//! A stable release that does not answer at all is no witness of an outage: its responses may take a minute each, where
//! the canary fails at once. If the canary goes on answering, and luck sends it so many requests in a row at most once
//! in a thousand cases, the look counts in full without a witness.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::crowd::Part;
use crate::observation::{Arm, Cell};

/// Answers of the stable release that a look waits for.
const ANSWERS: u64 = 2;

/// Silence of the stable release that luck explains less often than this is not waited out.
const SILENCE: f64 = 1e-3;

/// Looks that wait; a further one joins the last, and waits for what that one would have had to wait for.
const MOST: usize = 16;

/// Bad responses of one look.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Look {
    parts: Vec<Part>,
    /// Good and bad answers of the stable release since.
    good: u64,
    bad: u64,
    /// Logarithm of the probability that all requests since its last answer went to the canary.
    silence: f64,
}

impl Look {
    /// How much of a bad response of the canary counts; `None` while that is not known.
    #[expect(clippy::cast_precision_loss, reason = "a share of counts does not need their last digits")]
    fn credit(&self) -> Option<f64> {
        let answers = self.good.saturating_add(self.bad);
        if answers >= ANSWERS || (answers > 0 && self.is_silent()) {
            return Some(self.good as f64 / answers as f64);
        }
        (self.is_silent() || self.parts.iter().all(|part| part.hits <= 0.0)).then_some(1.0)
    }

    fn is_silent(&self) -> bool {
        self.silence <= SILENCE.ln()
    }
}

/// Bad responses that wait for what the stable release answers next.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Witness {
    waiting: VecDeque<Look>,
    /// Bad responses of the canary that did not count, because the stable release answered badly too.
    doubted: f64,
}

/// What the two releases answered in one look.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answers {
    /// Good answers of the stable release.
    pub(super) good: u64,
    /// Its bad ones.
    pub(super) bad: u64,
    /// Logarithm of the probability that luck sent to the canary all those that it answered.
    pub(super) canary_only: f64,
}

impl Answers {
    /// Adds the responses of a cell, of which so many are bad.
    pub(super) fn add(&mut self, cell: &Cell, bad: u64) {
        let requests = cell.requests.max(cell.bad.total());
        match cell.arm {
            Arm::Stable => {
                self.good = self.good.saturating_add(requests.saturating_sub(bad));
                self.bad = self.bad.saturating_add(bad);
            }
            Arm::Canary if cell.weight > 0.0 && cell.weight < 1.0 => {
                self.canary_only += super::float(requests) * cell.weight.ln();
            }
            Arm::Canary => {}
        }
    }
}

impl Witness {
    /// Takes in the bad responses of one look and what was answered in it; gives the looks that count now, in order.
    pub(super) fn observe(&mut self, parts: Vec<Part>, answers: Answers) -> Vec<Vec<Part>> {
        for look in &mut self.waiting {
            if answers.good > 0 || answers.bad > 0 {
                look.good = look.good.saturating_add(answers.good);
                look.bad = look.bad.saturating_add(answers.bad);
                look.silence = 0.0;
            } else {
                look.silence = (look.silence + answers.canary_only).max(-1e6);
            }
        }
        let mut known = Vec::new();
        while let Some(credit) = self.waiting.front().and_then(Look::credit) {
            known.extend(self.waiting.pop_front().map(|look| (look, credit)));
        }
        if !parts.is_empty() {
            let look = Look { parts, good: 0, bad: 0, silence: 0.0 };
            let at_once = look.credit().filter(|_| self.waiting.is_empty());
            let full = self.waiting.len() >= MOST;
            match (at_once, self.waiting.back_mut()) {
                (Some(credit), _) => known.push((look, credit)),
                (None, Some(last)) if full => last.join(look),
                (None, _) => self.waiting.push_back(look),
            }
        }
        known.into_iter().map(|(look, credit)| self.count(look.parts, credit)).collect()
    }

    fn count(&mut self, mut parts: Vec<Part>, credit: f64) -> Vec<Part> {
        for part in &mut parts {
            part.idle += part.hits * (1.0 - credit);
            part.hits *= credit;
            self.doubted = (self.doubted + part.idle).min(1e12);
        }
        parts
    }

    /// Bad responses of the canary that wait.
    pub(super) fn waits(&self) -> f64 {
        self.waiting.iter().flat_map(|look| &look.parts).map(|part| part.hits).sum()
    }

    /// Bad responses of the canary that did not count, because the stable release answered badly at the same time.
    pub(super) const fn doubted(&self) -> f64 {
        self.doubted
    }
}

impl Look {
    fn join(&mut self, other: Self) {
        for part in other.parts {
            let same = |it: &&mut Part| it.group == part.group && it.p.to_bits() == part.p.to_bits();
            match self.parts.iter_mut().find(same) {
                Some(it) => {
                    it.hits += part.hits;
                    it.misses += part.misses;
                }
                None => self.parts.push(part),
            }
        }
        (self.good, self.bad, self.silence) = (0, 0, 0.0);
    }
}
