//! The one primitive of every test here: the wealth of a bettor who bets against the null hypothesis.
//!
//! A trial hits with a known probability `p` under the null hypothesis. Under the alternative that its odds are `m` times
//! as high it hits with `p·m / (1 − p + p·m)`. The likelihood ratio of the two is, with `d = 1 − p + p·m`,
//!
//! ```text
//!   m / d   for a hit          1 / d   for a miss
//! ```
//!
//! (Wald, "Sequential Tests of Statistical Hypotheses", 1945). Multiplied over trials it is what a bettor owns who began
//! with 1 and whose bets are fair if the null hypothesis holds: a nonnegative martingale, also when `p` differs from trial
//! to trial, and a supermartingale for every null probability on the far side of `p` from the alternative. An average of
//! such processes over several `m`, and over several moments at which a bettor begins, is one again. Ville's inequality
//! ("Étude critique de la notion de collectif", 1939) says that it ever reaches `1/α` with probability at most `α`. So the
//! wealth may be looked at after every response, and the first time it reaches `1/α` decides. The average over effects is
//! the mixture of Robbins ("Statistical methods related to the law of the iterated logarithm", 1970) and of Johari,
//! Pekelis and Walsh ("Always valid inference", 2015); for a survey see Ramdas, Grünwald, Vovk and Shafer ("Game-theoretic
//! statistics and safe anytime-valid inference", 2023).
//!
//! Late beginnings matter: a bettor who bet on a broken canary from the start has lost nearly everything after an hour of
//! common errors, and would notice a regression that begins then only after as many errors again. So a share of the
//! initial wealth is kept back and begins to bet bit by bit, after the `n`-th hit or miss with a density in
//! proportion to `1 / (1 + n/20)²`. A change after `n` trials is then noticed at the price of about `2·ln n` in
//! log-wealth, instead of everything that was lost before.
//!
//! A trial may count as a fraction `f` of one: its ratio is taken to the power `f`. By Jensen's inequality the product is
//! still a supermartingale, as long as `f` was chosen without regard to whether the trial hit. That is how the caps on one
//! client and on one moment are kept without drawing samples.
//!
//! Everything is in natural logarithms and clamped to finite values.

use serde::{Deserialize, Serialize};

/// Bounds of a logarithm: far beyond any threshold, and finite, so that nothing becomes infinite or NaN.
const LIMIT: f64 = 1e12;

/// How many trials pass until half of what was kept back has begun to bet.
const PATIENCE: f64 = 20.0;

/// What is bet on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bets {
    /// [`WORSE`].
    Worse,
    /// [`BETTER`].
    Better,
}

impl Bets {
    /// The bets.
    pub const fn all(self) -> &'static [Bet] {
        match self {
            Self::Worse => &WORSE,
            Self::Better => &BETTER,
        }
    }
}

/// A bet: the multiple of the odds under the alternative, and the share of the wealth that bets on it.
pub type Bet = (f64, f64);

/// Bets that trials hit more often than under the null hypothesis, from one and a half times the odds to always. Most is
/// on gross effects, because there speed matters; a small effect needs many trials whatever is bet on it. Shares sum to 1.
pub const WORSE: [Bet; 6] = [(1.5, 0.04), (2.5, 0.06), (5.0, 0.10), (10.0, 0.15), (30.0, 0.30), (1000.0, 0.35)];

/// Bets that trials hit less often than under the null hypothesis. Shares sum to 1.
pub const BETTER: [Bet; 3] = [(0.001, 0.6), (0.1, 0.25), (0.35, 0.15)];

/// What happened at one moment, as logarithms of factors on each bet.
#[derive(Clone, Debug, PartialEq)]
pub struct Look {
    gains: Vec<f64>,
    trials: f64,
}

impl Look {
    /// The same with so many trials more that were not bet on: time passes for those who begin late.
    #[must_use]
    pub fn with_idle(mut self, trials: f64) -> Self {
        if trials.is_finite() {
            self.trials += trials.max(0.0);
        }
        self
    }

    /// The same without what happened in `part`.
    #[must_use]
    pub fn without(&self, part: &Self) -> Self {
        let gains = self.gains.iter().zip(&part.gains).map(|(all, part)| clamp(all - part)).collect();
        Self { gains, trials: (self.trials - part.trials).max(0.0) }
    }
}

/// A bettor's wealth over some bets, in logarithms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wealth {
    /// The bets.
    bets: Bets,
    /// Logarithm of what bets on each, in the order of `bets`.
    betting: Vec<f64>,
    /// Share of the initial wealth that was kept back at the start.
    kept: f64,
    /// Trials so far, fractions included.
    trials: f64,
}

impl Wealth {
    /// A wealth of 1 over `bets`, of which the share `kept` (0 to below 1) begins late.
    pub fn new(bets: Bets, kept: f64) -> Self {
        let kept = if kept.is_finite() { kept.clamp(0.0, 0.99) } else { 0.0 };
        let betting = bets.all().iter().map(|(_, share)| log((1.0 - kept) * share)).collect();
        Self { bets, betting, kept, trials: 0.0 }
    }

    /// Takes in `hits` and `misses` (fractions allowed) of trials that hit with probability `p` under the null
    /// hypothesis. A `p` that is not strictly between 0 and 1 says nothing and is ignored.
    pub fn observe(&mut self, p: f64, hits: f64, misses: f64) {
        self.observe_all(&[(p, hits, misses)]);
    }

    /// Takes in several groups of `(p, hits, misses)` as one look: they happened together, in no order.
    pub fn observe_all(&mut self, groups: &[(f64, f64, f64)]) {
        let look = self.look(groups);
        self.take(&look);
    }

    /// What several groups of `(p, hits, misses)` do to wealths over these bets.
    pub fn look(&self, groups: &[(f64, f64, f64)]) -> Look {
        let mut look = Look { gains: vec![0.0; self.bets.all().len()], trials: 0.0 };
        for &(p, hits, misses) in groups {
            if !(p > 0.0 && p < 1.0 && hits.is_finite() && misses.is_finite()) {
                continue;
            }
            look.trials += hits + misses;
            for (sum, &(odds, _)) in look.gains.iter_mut().zip(self.bets.all()) {
                *sum = clamp(*sum + gain(p, odds, hits, misses));
            }
        }
        look
    }

    /// Takes in one look, made by a wealth over the same bets.
    pub fn take(&mut self, look: &Look) {
        for (wealth, gain) in self.betting.iter_mut().zip(&look.gains) {
            *wealth = clamp(*wealth + gain);
        }
        if look.trials > 0.0 && self.kept > 0.0 {
            // What begins now bets from the next look on, so that its beginning knows nothing of what it bets on.
            let before = self.kept_back();
            self.trials = (self.trials + look.trials).min(LIMIT);
            let begins = log(before - self.kept_back());
            for (wealth, (_, share)) in self.betting.iter_mut().zip(self.bets.all()) {
                *wealth = join(*wealth, begins, *share);
            }
        }
    }

    /// The natural logarithm of the wealth.
    pub fn ln(&self) -> f64 {
        let mut parts = self.betting.clone();
        parts.push(log(self.kept_back()));
        sum_of_logs(&parts)
    }

    /// The natural logarithm of what is bet on the first bet.
    pub(crate) fn first_ln(&self) -> f64 {
        self.betting.first().copied().unwrap_or(-LIMIT)
    }

    fn kept_back(&self) -> f64 {
        self.kept / (1.0 + self.trials / PATIENCE)
    }
}

/// The logarithm of the likelihood ratio of `hits` and `misses`, for odds that are `odds` times as high.
pub fn gain(p: f64, odds: f64, hits: f64, misses: f64) -> f64 {
    let d = (1.0 - p + p * odds).ln();
    clamp(hits * (odds.ln() - d) - misses * d)
}

/// The logarithm of a sum, from logarithms.
pub fn sum_of_logs(logs: &[f64]) -> f64 {
    let most = logs.iter().copied().fold(-LIMIT, f64::max);
    let sum: f64 = logs.iter().map(|it| (it - most).exp()).sum();
    clamp(most + sum.max(f64::MIN_POSITIVE).ln())
}

/// The logarithm of `e^wealth + share · e^begins`.
fn join(wealth: f64, begins: f64, share: f64) -> f64 {
    match begins - wealth {
        // Below e^-40 a part does not show in 53 bits.
        less if less < -40.0 => wealth,
        more if more > 40.0 => clamp(begins + share.ln()),
        ratio => clamp(wealth + (ratio.exp() * share).ln_1p()),
    }
}

fn log(value: f64) -> f64 {
    if value > 0.0 { clamp(value.ln()) } else { -LIMIT }
}

fn clamp(value: f64) -> f64 {
    // `clamp` passes NaN on; none can come from finite arguments, and a gain of nothing is the safe answer.
    if value.is_nan() { 0.0 } else { value.clamp(-LIMIT, LIMIT) }
}
