//! The analysis of one release: evidence in, verdict out.
//!
//! # The test
//!
//! The data plane sends each request to the canary with a known probability `w`. If the canary is no worse, then a
//! *bad* response belongs to the canary with probability `w` at most, however many there are and whatever they have in
//! common: a database outage makes more of them, but splits them `w : 1 − w`, and rolls back nothing. So the test looks
//! at bad responses alone and bets that the canary has more than its share ([`Wealth`]). `w` may change with every
//! response; each carries the one in force when it was assigned.
//!
//! | wealth | a trial | hits when | under the null hypothesis |
//! |---|---|---|---|
//! | relative | a bad response at weight below 1 | it is the canary's | `w` |
//! | absolute | a response of the canary at weight 1 | it is bad | `errors`, or what is [`usual`] |
//! | probes | a pair of which one answer is bad | it is the canary's (sign test) | one half |
//! | each counter | one increment | it is the canary's | the canary's share of requests |
//!
//! A counter is a Poisson stream on each arm; given their sum, the canary's part is binomial by exposure. Counters count
//! the same requests that are bad, so the wealths are not independent and are not multiplied. They are averaged: relative
//! 0.7, and 0.3 in equal parts for the others that are asked for. The average fails the release when it reaches `1/alpha`.
//!
//! # Guards
//!
//! * A client counts for `client_cap` bad responses per `client_window`; a session, where routing is sticky, once
//!   ([`clients`](crate::clients)).
//! * A fail needs `min_clients` clients with bad responses on the canary, and evidence that stands without any one of
//!   them: without it there must still be a third of what is needed ([`crowd`]). So a client whose requests fail on the
//!   canary alone, and who repeats them for ever, fails a good release with probability `3·alpha` at most.
//! * A bad response of the canary counts as far as the stable release answered well at the same time ([`witness`]): an
//!   outage of something that both need rolls back nothing, also where its first victims are the canary's by chance.
//! * A moment counts for a few failed responses and one late one beyond the usual ([`Burst`]): a stall of one instance
//!   makes everything late that is in flight, but the draw that put those requests there was not made anew for each.
//! * Late responses of cold instances, or all their bad ones, do not count.
//!
//! # Pass
//!
//! Pairs of probes may fail a release by themselves: both answers were asked for at the same time, by us, so nobody can
//! forge them, and a fail needs no second client. They may let it pass only together with `min_requests` answers to real
//! requests in the step: that one path answers says little of all the others.
//!
//! To pass, a step must show that the stated degradation (at least `rate` of the canary's responses bad, and at least
//! `ratio` times the stable release's odds) is not there. Two wealths bet against it: that the rate is lower (with no bad
//! response at all, about `ln(1/beta)/rate` responses do, the "rule of three"), and that the ratio is lower (which needs
//! bad responses on both arms). Their average must reach `1/beta`. They begin anew with every step.
//!
//! # States
//!
//! ```text
//!            observe, lost                       evidence reaches 1/alpha
//!   watching ─────────────> watching ──────────────────────────────────────> failed (for good)
//!      │ the step is over: verdict(true)
//!      ├─> pass           evidence against the degradation reached 1/beta
//!      ├─> error          more time lost than measured
//!      └─> inconclusive   otherwise; the policy says what then
//!   the next `step` goes on watching with all evidence so far
//! ```

mod counters;
mod crowd;
mod report;
mod step;
mod witness;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::{
    counters::Tally,
    crowd::{Crowd, Part},
    step::{Step, Warmth},
    witness::{Answers, Witness},
};
use crate::{
    advice::{Advice, advise},
    clients::{Burst, Caps, Distinct, Sessions},
    latency::Bounds,
    observation::{Arm, Bad, Cell, Pair, Tick},
    settings::{Settings, Unit},
    usual,
    verdict::{ArmEvidence, Evidence, Outcome, ProbeEvidence, Verdict, WeightChange, with_policy},
    wealth::{BETTER, Bets, Wealth, sum_of_logs},
};

/// Share of the average that the relative test has when there are others.
const RELATIVE_SHARE: f64 = 0.7;

/// A fail needs that, without any one client, the evidence is at most so many times lower.
const CROWD_SHARE: f64 = 3.0;

/// Share of each wealth that begins to bet late.
const KEPT: f64 = 0.25;

/// Below this weight nothing is concluded: the lowest that can be asked for is ten times as high.
const LEAST_WEIGHT: f64 = 1e-4;

/// From this weight on there is no stable release to compare with.
const FULL_WEIGHT: f64 = 1.0 - 1e-6;

/// Weight changes that are remembered.
const MAX_WEIGHTS: usize = 64;

/// The analysis of one release, from its first request to its promotion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Analysis {
    settings: Settings,
    relative: Crowd,
    witness: Witness,
    absolute: Option<Crowd>,
    probes: Option<Wealth>,
    counters: Vec<Tally>,
    pass_rate: Wealth,
    pass_ratio: Wealth,
    caps: Caps,
    /// For failed responses, and for late ones.
    bursts: (Burst, Burst),
    bad_clients: Distinct,
    sessions: Sessions,
    canary: ArmEvidence,
    stable: ArmEvidence,
    counted: (f64, f64),
    pairs: ProbeEvidence,
    step: Step,
    warmth: Warmth,
    latency: Bounds,
    weights: Vec<WeightChange>,
    measured: Duration,
    lost: Duration,
    /// Highest logarithm of the average so far.
    highest: f64,
    /// Why it failed, once it has.
    failure: Option<String>,
}

impl Analysis {
    /// Begins with no evidence, at weight 0. Settings out of range are brought into it.
    pub fn new(settings: Settings) -> Self {
        let settings = settings.in_range();
        let worse = || Wealth::new(Bets::Worse, KEPT);
        let counters = settings.counters.iter().map(|name| Tally::new(name, worse(), settings.failed_burst)).collect();
        Self {
            relative: Crowd::new(worse()),
            witness: Witness::default(),
            absolute: settings.errors.map(|_| Crowd::new(worse())),
            probes: settings.probes.then(worse),
            counters,
            pass_rate: Wealth::new(Bets::Better, 0.0),
            pass_ratio: Wealth::new(Bets::Better, 0.0),
            caps: Caps::default(),
            bursts: (Burst::new(settings.failed_burst), Burst::new(settings.late_burst)),
            bad_clients: Distinct::default(),
            sessions: Sessions::default(),
            canary: ArmEvidence::default(),
            stable: ArmEvidence::default(),
            counted: (0.0, 0.0),
            pairs: ProbeEvidence::default(),
            step: Step::default(),
            warmth: Warmth::default(),
            latency: Bounds::default(),
            weights: Vec::new(),
            measured: Duration::ZERO,
            lost: Duration::ZERO,
            highest: 0.0,
            failure: None,
            settings,
        }
    }

    /// A step begins: new requests go to the canary with probability `weight` (0 to 1). All evidence that the canary is
    /// worse stays; what a pass needs is gathered anew.
    pub fn step(&mut self, weight: f64) {
        let weight = if weight.is_nan() { 0.0 } else { weight.clamp(0.0, 1.0) };
        self.step = Step::new(weight);
        self.pass_rate = Wealth::new(Bets::Better, 0.0);
        self.pass_ratio = Wealth::new(Bets::Better, 0.0);
        self.sessions = Sessions::default();
        self.note_weight(weight);
    }

    /// New requests go to the canary with probability `weight` (0 to 1) in the midst of a step. What was gathered for a
    /// pass stays: that a response is bad does not depend on how many there are.
    pub fn reweigh(&mut self, weight: f64) {
        let weight = if weight.is_nan() { 0.0 } else { weight.clamp(0.0, 1.0) };
        self.step.weight = weight;
        self.note_weight(weight);
    }

    fn note_weight(&mut self, weight: f64) {
        if self.weights.len() >= MAX_WEIGHTS {
            self.weights.remove(1);
        }
        self.weights.push(WeightChange { after: self.measured, weight });
    }

    /// An instance of the canary was admitted: its warm-up begins. Instances that keep coming back cannot put off the
    /// judgement for ever: after six warm-ups' time of it, further ones do not count.
    pub fn admitted(&mut self) {
        self.warmth.admitted(&self.settings.warm_up);
    }

    /// The data plane judges lateness by these bounds from now on, on both arms.
    pub const fn latency(&mut self, bounds: Bounds) {
        self.latency = bounds;
    }

    /// Takes in what the data plane saw.
    pub fn observe(&mut self, tick: &Tick) {
        self.measured = self.measured.saturating_add(tick.covers);
        self.step.measured = self.step.measured.saturating_add(tick.covers);
        let window = (self.settings.unit == Unit::Request).then_some(self.settings.client_window);
        self.caps.pass(tick.covers, window);

        let cold = self.warmth.is_cold();
        self.responses(&tick.cells, tick.covers, cold);
        for pair in &tick.pairs {
            self.pair(*pair);
        }
        if !cold {
            // What cold instances count into their counters cannot be told apart by kind; it is let go for both arms.
            for tally in &mut self.counters {
                tally.observe(&tick.counters, tick.covers, self.step.weight);
            }
        }
        let canary = tick.cells.iter().filter(|it| it.arm == Arm::Canary);
        self.warmth.pass(tick.covers, canary.fold(0, |sum: u64, it| sum.saturating_add(it.requests)));
        self.judge();
    }

    /// Nothing was measured for so long: the data plane did not report.
    pub fn lost(&mut self, time: Duration) {
        self.lost = self.lost.saturating_add(time);
        self.step.lost = self.step.lost.saturating_add(time);
    }

    /// The verdict. Before the step is over it is `None`, or a fail; a fail stands for good.
    pub fn verdict(&self, step_over: bool) -> Option<Verdict> {
        let verdict = |outcome, reason| Some(Verdict { outcome, reason, then: None });
        let verdict = if let Some(reason) = &self.failure {
            verdict(Outcome::Fail, reason.clone())
        } else if !step_over {
            None
        } else if self.step.lost >= self.step.measured {
            verdict(Outcome::Error, self.explain_lost())
        } else if self.enough() {
            verdict(Outcome::Pass, self.explain_pass())
        } else {
            verdict(Outcome::Inconclusive, self.explain_inconclusive())
        };
        verdict.map(|it| with_policy(it, self.settings.inconclusive))
    }

    /// Whether the step has the evidence for a pass already.
    pub fn enough(&self) -> bool {
        self.failure.is_none()
            && self.step.requests(Arm::Canary) >= self.settings.min_requests
            && !self.step.outage()
            && self.ln_pass() >= self.ln_pass_threshold()
    }

    /// What to do so that the step is decided within the time that `remains`. `None` once it has failed.
    pub fn advice(&self, remains: Duration) -> Option<Advice> {
        if self.failure.is_some() {
            return None;
        }
        let seconds = self.step.measured.as_secs_f64();
        let requests = float(self.step.requests(Arm::Canary)) + float(self.step.requests(Arm::Stable));
        let per_second = if seconds > 0.0 { requests / seconds } else { 0.0 };
        Some(advise(self.needed(), per_second, self.step.weight, remains))
    }

    /// Responses of the canary, all good, that are still missing for a pass.
    pub fn needed(&self) -> u64 {
        if self.enough() {
            return 0;
        }
        let rate = self.settings.degradation.rate;
        let per_response = crate::wealth::gain(rate, BETTER[0].0, 0.0, 1.0);
        let missing = (self.ln_pass_threshold() - PASS_RATE_SHARE.ln() - self.pass_rate.first_ln()) / per_response;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, and a saturating number of responses"
        )]
        let missing = missing.ceil().max(0.0) as u64;
        missing.max(self.settings.min_requests.saturating_sub(self.step.requests(Arm::Canary))).max(1)
    }

    /// What the verdict rests on.
    pub fn evidence(&self) -> Evidence {
        Evidence {
            canary: self.canary,
            stable: self.stable,
            counted: self.counted,
            canary_bad_clients: self.bad_clients.count(),
            doubted: self.witness.doubted(),
            counters: self.counters.iter().map(Tally::evidence).collect(),
            probes: self.pairs,
            ln_evidence: self.ln_worse(false),
            ln_threshold: self.ln_threshold(),
            chance: (-self.highest).exp().min(1.0),
            alpha: self.settings.alpha,
            ln_pass_evidence: self.ln_pass(),
            ln_pass_threshold: self.ln_pass_threshold(),
            latency: self.latency,
            weights: self.weights.clone(),
            measured: self.measured,
            lost: self.lost,
            reason: self.explain(),
        }
    }

    /// The settings in force.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    // === impl evidence ===

    fn responses(&mut self, cells: &[Cell], covers: Duration, cold: bool) {
        let mut order: Vec<&Cell> = cells.iter().collect();
        order.sort_by_key(|cell| cell.client);
        // What the caps on clients let through, of failed and of late responses.
        let mut parts: Vec<(&Cell, f64, f64)> = Vec::new();
        let mut answers = Answers::default();
        let (mut pass, mut full_good) = ((0.0, 0.0), 0.0);
        for cells in order.chunk_by(|a, b| a.client == b.client) {
            let bad = cells.iter().fold(0_u64, |sum, cell| sum.saturating_add(self.counts(cell, cold).total()));
            let cap = if self.settings.unit == Unit::Session { 1 } else { self.settings.client_cap };
            let share = if bad > 0 { f64::from(self.caps.take(cells[0].client, bad, cap)) / float(bad) } else { 0.0 };
            for cell in cells {
                let counts = self.counts(cell, cold);
                self.total(cell, counts.total());
                answers.add(cell, counts.total());
                let mut share = share;
                if cell.arm == Arm::Canary {
                    let (bad, good) = self.exposure(cell, counts.total(), cold);
                    if !cold {
                        pass = (pass.0 + bad, pass.1 + good);
                    }
                    if cell.weight >= FULL_WEIGHT {
                        full_good += good;
                        if self.settings.unit == Unit::Session {
                            // Bad and good sessions against the bound, as they were seen.
                            share = if bad > 0.0 { bad / float(counts.total()) } else { 0.0 };
                        }
                    }
                }
                if counts.total() > 0 && cell.weight >= LEAST_WEIGHT && cell.weight <= 1.0 {
                    if cell.arm == Arm::Canary {
                        self.bad_clients.insert(cell.client);
                    }
                    if share > 0.0 {
                        parts.push((cell, float(counts.failed()) * share, float(counts.late()) * share));
                    }
                }
            }
        }
        let (failed, late) = parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.1, sum.1 + part.2));
        let shares = (self.bursts.0.take(covers, failed), self.bursts.1.take(covers, late));
        let bound = self.bound();
        let mut relative: Vec<Part> = Vec::new();
        let mut absolute: Vec<Part> = Vec::new();
        for (cell, failed, late) in parts {
            let bad = failed * shares.0 + late * shares.1;
            let group = crowd::group(cell.client);
            let (hits, misses) = if cell.arm == Arm::Canary { (bad, 0.0) } else { (0.0, bad) };
            self.counted = (self.counted.0 + hits, self.counted.1 + misses);
            if cell.weight < FULL_WEIGHT {
                relative.push(Part { group, p: cell.weight, hits, misses, idle: 0.0 });
            } else if cell.arm == Arm::Canary {
                absolute.push(Part { group, p: bound, hits, misses, idle: 0.0 });
            }
        }
        if full_good != 0.0 {
            absolute.push(Part { group: None, p: bound, hits: 0.0, misses: full_good, idle: 0.0 });
        }
        if let Some(wealth) = &mut self.absolute {
            wealth.observe(&absolute);
        }
        if !cold {
            let ratio = self.settings.degradation.ratio;
            self.pass_rate.observe(self.settings.degradation.rate, pass.0, pass.1);
            let degraded = |it: &Part| (it.p * ratio / (1.0 - it.p + it.p * ratio), it.hits, it.misses);
            self.pass_ratio.observe_all(&relative.iter().map(degraded).collect::<Vec<_>>());
        }
        for look in self.witness.observe(relative, answers) {
            self.relative.observe(&look);
        }
    }

    /// Bad responses of a cell that count at present.
    fn counts(&self, cell: &Cell, cold: bool) -> Bad {
        match (cold, self.settings.warm_up.errors_too) {
            (true, true) => Bad::default(),
            (true, false) => Bad { broken: cell.bad.broken, server_error: cell.bad.server_error, ..Bad::default() },
            (false, _) => cell.bad,
        }
    }

    /// Bad and good units among a cell's responses. What a session did while it was cold says nothing of its later life, so
    /// it is seen first when it is warm.
    fn exposure(&mut self, cell: &Cell, counts: u64, cold: bool) -> (f64, f64) {
        match self.settings.unit {
            _ if cold && self.settings.warm_up.errors_too => (0.0, 0.0),
            Unit::Request => (float(counts), float(cell.requests.saturating_sub(cell.bad.total()))),
            Unit::Session if !cold && (cell.requests > 0 || counts > 0) => self.sessions.note(cell.client, counts > 0),
            Unit::Session => (0.0, 0.0),
        }
    }

    /// The share of bad responses that is asked for at weight 1.
    fn bound(&self) -> f64 {
        let bound = self.settings.errors.unwrap_or_default();
        let usual = || usual::limit(float(self.stable.bad.total()), float(self.stable.requests));
        if self.settings.errors_give_way { bound.max(usual()) } else { bound }
    }

    fn total(&mut self, cell: &Cell, counts: u64) {
        let arm = match cell.arm {
            Arm::Canary => &mut self.canary,
            Arm::Stable => &mut self.stable,
        };
        let requests = cell.requests.max(cell.bad.total());
        arm.requests = arm.requests.saturating_add(requests);
        arm.bad.add(&cell.bad);
        arm.client_failed = arm.client_failed.saturating_add(cell.client_failed);
        arm.warm_up = arm.warm_up.saturating_add(cell.bad.total().saturating_sub(counts));
        self.step.add(cell.arm, requests, cell.bad.total());
    }

    fn pair(&mut self, pair: Pair) {
        let Some(wealth) = &mut self.probes else { return };
        let number = match (pair.canary_bad, pair.stable_bad) {
            (false, false) => &mut self.pairs.both_good,
            (true, true) => &mut self.pairs.both_bad,
            (true, false) => {
                wealth.observe(0.5, 1.0, 0.0);
                &mut self.pairs.canary_bad
            }
            (false, true) => {
                wealth.observe(0.5, 0.0, 1.0);
                &mut self.pairs.stable_bad
            }
        };
        *number = number.saturating_add(1);
        self.step.add_pair();
        let bad = f64::from(u8::from(pair.canary_bad));
        self.pass_rate.observe(self.settings.degradation.rate, bad, 1.0 - bad);
    }

    fn judge(&mut self) {
        let (all, threshold) = (self.ln_worse(false), self.ln_threshold());
        self.highest = self.highest.max(all);
        // What is guarded is never more than all, and dearer to know.
        if self.failure.is_none() && all >= threshold && self.ln_worse(true) >= threshold {
            self.failure = Some(self.explain_failure());
        }
    }

    /// Logarithm of the average of the wealths; what responses show counts, if `guarded`, as far as it does not rest on
    /// one client, and as far as enough clients have seen it.
    fn ln_worse(&self, guarded: bool) -> f64 {
        let others = self.counters.len() + usize::from(self.absolute.is_some()) + usize::from(self.probes.is_some());
        #[expect(clippy::cast_precision_loss, reason = "at most eighteen")]
        let (relative, other) = match others {
            0 => (0.0, 0.0),
            others => (RELATIVE_SHARE.ln(), ((1.0 - RELATIVE_SHARE) / others as f64).ln()),
        };
        let enough_clients = self.bad_clients.count() >= self.settings.min_clients;
        let ln = |crowd: &Crowd| match (guarded, self.settings.min_clients) {
            (true, 2..) => crowd.guarded_ln(CROWD_SHARE.ln()),
            _ => crowd.all().ln(),
        };
        let mut logs = Vec::new();
        if enough_clients || !guarded {
            logs.push(relative + ln(&self.relative));
            logs.extend(self.absolute.iter().map(|it| other + ln(it)));
        }
        let others = self.probes.iter().chain(self.counters.iter().map(Tally::wealth));
        logs.extend(others.map(|it| other + it.ln()));
        sum_of_logs(&logs)
    }

    fn ln_threshold(&self) -> f64 {
        -self.settings.alpha.ln()
    }

    fn ln_pass(&self) -> f64 {
        sum_of_logs(&[PASS_RATE_SHARE.ln() + self.pass_rate.ln(), (1.0 - PASS_RATE_SHARE).ln() + self.pass_ratio.ln()])
    }

    fn ln_pass_threshold(&self) -> f64 {
        -self.settings.beta.ln()
    }
}

/// Share of the average for a pass that bets on the rate.
const PASS_RATE_SHARE: f64 = 0.75;

/// A count as a number to calculate with.
#[expect(clippy::cast_precision_loss, reason = "a count beyond 2^52 does not need its last digits")]
const fn float(count: u64) -> f64 {
    count as f64
}
