//! The judge of a rollout: from what the data plane reports to a verdict, with the statistics of `orchestra-stats`.
//!
//! It keeps the time between reports, freezes the bound of lateness once the old set has answered often enough, and
//! translates. What it must remember after a crash is one value, written down with the rollout.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orchestra_model::{
    InstanceId, Now,
    consult::{Answer, Selector},
    quantity::Timespan,
    rollout::{Guard, LatencyBound, OnInconclusive, PrometheusMetric, VerdictOutcome},
    route::RouteId,
    traffic::{self, LatencyHistogram, Permille, TrafficReport, Watch},
};
use orchestra_stats::{
    Advice, Analysis, Arm, Bad, Bounds, Cell, Outcome, Pair, Policy, Settings, Tick, Unit, Verdict, WarmUp,
};
use serde::{Deserialize, Serialize};

mod sources;

pub use self::sources::Due;
use self::sources::Sources;

/// Pause between two reports of the data plane.
const EVERY: Timespan = Timespan::millis(250);
/// Silence that is longer than this was not measured.
const SILENCE: Duration = Duration::from_secs(3);
/// Responses of the old set that a bound of lateness needs: ten of them lie above the quantile.
const MIN_SAMPLES: u64 = 200;

/// The judge of one rollout.
#[derive(Clone, Debug)]
pub struct Judge {
    memory: Memory,
    guard: Guard,
    last: Option<Now>,
    /// Step and number of available instances that it was told last.
    place: Option<(u32, u32)>,
    sequences: BTreeMap<RouteId, u64>,
    sources: Sources,
    /// No request of the service is seen: only the sources judge.
    blind: bool,
    /// What is heard earlier says nothing of what is judged.
    from: Option<Now>,
}

/// What outlives a crash.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Memory {
    analysis: Analysis,
    /// Responses of the old set, until the bound is frozen.
    stable: Vec<u32>,
    /// Frozen bound in microseconds.
    bound: Option<u64>,
    weight: Permille,
    /// Mirrored requests: agreed, and not.
    mirrored: (u64, u64),
    /// The last bad answer of the new set to a synthetic request.
    #[serde(default)]
    probed: Option<String>,
    /// What others were asked.
    #[serde(default)]
    sources: sources::Memory,
}

impl Judge {
    /// Begins. `sticky`: clients, not requests, are assigned at random.
    pub fn new(guard: &Guard, sticky: bool) -> Self {
        let usual = Settings::default();
        let settings = Settings {
            alpha: f64::from(guard.alpha.get()) / 1000.0,
            errors: guard.max_errors.map(share).or(usual.errors.filter(|_| guard.errors)),
            errors_give_way: guard.max_errors.is_none(),
            unit: if sticky { Unit::Session } else { Unit::Request },
            client_cap: guard.per_client,
            min_clients: guard.clients,
            warm_up: WarmUp { time: guard.warm_up.duration(), requests: 0, errors_too: false },
            counters: guard.counters.iter().map(ToString::to_string).collect(),
            probes: guard.probe.is_some(),
            inconclusive: match guard.inconclusive {
                OnInconclusive::Hold => Policy::Hold,
                OnInconclusive::PromoteAndWatch => Policy::PromoteAndWatch,
                OnInconclusive::RollBack => Policy::RollBack,
            },
            ..usual
        };
        let mut memory = Memory {
            analysis: Analysis::new(settings),
            stable: Vec::new(),
            bound: None,
            weight: Permille::ZERO,
            mirrored: (0, 0),
            probed: None,
            sources: sources::Memory::default(),
        };
        memory.analysis.latency(bounds(guard, None));
        memory.sources.fit(guard.prometheus.len());
        Self {
            memory,
            guard: guard.clone(),
            last: None,
            place: None,
            sequences: BTreeMap::new(),
            sources: Sources::new(guard),
            blind: false,
            from: None,
        }
    }

    /// The same judge with nothing heard: something changed that was bad. Only the bound of lateness stays as it was
    /// frozen, or what was gathered for it.
    #[must_use]
    pub fn anew(&self) -> Self {
        let sticky = self.memory.analysis.settings().unit == Unit::Session;
        let mut this = Self::new(&self.guard, sticky).blind(self.blind);
        this.memory.stable.clone_from(&self.memory.stable);
        this.memory.bound = self.memory.bound;
        this.memory.analysis.latency(bounds(&self.guard, self.memory.bound.map(micros)));
        this
    }

    /// Judges only what it hears from then on: what is heard before answers requests that began before a change.
    #[must_use]
    pub fn from(self, from: Option<Now>) -> Self {
        Self { from, ..self }
    }

    fn is_early(&self, now: Now) -> bool {
        self.from.is_some_and(|from| now < from)
    }

    /// Goes on from what was written down; begins anew if that cannot be read.
    pub fn resume(guard: &Guard, sticky: bool, memory: Option<&serde_json::Value>) -> Self {
        let mut this = Self::new(guard, sticky);
        if let Some(memory) = memory.and_then(|memory| serde_json::from_value(memory.clone()).ok()) {
            this.memory = memory;
            this.memory.sources.fit(guard.prometheus.len());
        }
        this
    }

    /// What must be written down.
    pub fn memory(&self) -> Option<serde_json::Value> {
        serde_json::to_value(&self.memory).ok()
    }

    /// What the data plane is to report.
    pub fn watch(&self, id: u64) -> Watch {
        let frozen = self.memory.bound.map(micros);
        let bounds = bounds(&self.guard, frozen);
        let span = |bound: Option<Duration>| {
            bound.map(|b| Timespan::millis(u64::try_from(b.as_millis()).unwrap_or(u64::MAX).max(1)))
        };
        Watch {
            id,
            every: EVERY,
            slow: span(bounds.whole),
            first_byte: span(bounds.first_byte),
            first_token: span(bounds.first_token),
        }
    }

    /// Where the rollout is: its share of the traffic, its step, and how many of its instances are available.
    pub fn follow(&mut self, weight: Permille, step: u32, available: u32) {
        self.weighed(weight);
        let before = self.place.replace((step, available));
        if before.is_some_and(|(earlier, _)| earlier != step) {
            self.step();
        }
        if before.is_some_and(|(_, earlier)| available > earlier) {
            self.admitted();
        }
    }

    /// The share of the canary changed: evidence for a pass is gathered anew.
    pub fn weighed(&mut self, weight: Permille) {
        if weight != self.memory.weight {
            self.memory.weight = weight;
            self.memory.analysis.step(share(weight));
        }
    }

    /// The share grows in the midst of a step: what was gathered in it stays.
    pub fn raised(&mut self, weight: Permille) {
        if weight != self.memory.weight {
            self.memory.weight = weight;
            self.memory.analysis.reweigh(share(weight));
        }
    }

    /// The share at which the step would be decided in the time that `remains`, if that is another one and there is any
    /// traffic.
    pub fn advice(&self, remains: Duration) -> Option<Permille> {
        let share = match self.memory.analysis.advice(remains)? {
            Advice::Wait(_) => return None,
            Advice::RaiseWeight(weight) | Advice::SyntheticProbes { weight, .. } => weight,
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share from 0 to 1")]
        let permille = Permille::new((share * 1000.0).ceil() as u16);
        (permille > self.memory.weight).then_some(permille)
    }

    /// What a pair of synthetic requests was answered.
    pub fn pair(&mut self, now: Now, canary: &Result<(), String>, stable: &Result<(), String>) {
        if self.is_early(now) {
            return;
        }
        if let Err(reason) = canary {
            self.memory.probed = Some(reason.clone());
        }
        let pairs = vec![Pair { canary_bad: canary.is_err(), stable_bad: stable.is_err() }];
        self.memory.analysis.observe(&Tick { pairs, ..Tick::default() });
    }

    /// A step begins at the same share.
    pub fn step(&mut self) {
        self.memory.analysis.step(share(self.memory.weight));
    }

    /// An instance of the canary was admitted: its warm-up begins.
    pub fn admitted(&mut self) {
        self.memory.analysis.admitted();
    }

    /// Takes in a report. Whether the bound of lateness was frozen by it, so that the data plane must be told.
    pub fn observe(&mut self, now: Now, report: &TrafficReport) -> bool {
        let since = self.last.map_or(EVERY.duration(), |last| now.since(last));
        self.last = Some(self.last.map_or(now, |last| last.max(now)));
        if since > SILENCE {
            self.memory.analysis.lost(since);
        }
        let expected = self.sequences.insert(report.route.clone(), report.sequence).map(|last| last + 1);
        if expected.is_some_and(|expected| report.sequence > expected) {
            let reports = u32::try_from(report.sequence - expected.unwrap_or_default()).unwrap_or(u32::MAX);
            self.memory.analysis.lost(EVERY.duration().saturating_mul(reports));
        }
        if self.is_early(now) {
            return false;
        }
        self.sources.served(&report.cells);
        let cells = report.cells.iter().map(|it| cell(it, self.guard.errors)).collect();
        let covers = since.min(SILENCE);
        self.memory.analysis.observe(&Tick { covers, cells, counters: Vec::new(), pairs: Vec::new() });
        self.memory.mirrored.0 += u64::from(report.mirrored.0);
        self.memory.mirrored.1 += u64::from(report.mirrored.1);
        self.freeze(&report.stable_latency)
    }

    // === sources ===

    /// The service has no port whose requests are seen.
    #[must_use]
    pub fn blind(self, blind: bool) -> Self {
        Self { blind, ..self }
    }

    /// Where the rollout is, for what is asked of others: its step, whether that is an analysis, whether the new set may
    /// get requests, and whether some of them are not sent there by chance.
    pub fn look(&mut self, now: Now, step: (u32, bool), exposed: bool, foreign: bool) {
        self.sources.follow(now, &mut self.memory.sources, step, exposed, foreign);
    }

    /// What is to be asked now.
    pub fn due(&self, now: Now) -> Vec<Due> {
        // Counters begin with what they show when they are first looked at.
        if self.is_early(now) { Vec::new() } else { self.sources.due(now) }
    }

    /// It was asked, with this number, and will be again after `every`.
    pub fn asked(&mut self, now: Now, due: Due, number: u64, every: Duration, timeout: Duration) {
        self.sources.asked(now, due, number, every, timeout);
    }

    /// It cannot be asked now, and will be tried again after `every`.
    pub fn skipped(&mut self, now: Now, due: Due, every: Duration) {
        self.sources.skipped(now, due, every);
    }

    /// When it must be looked at again.
    pub fn deadline(&self) -> Option<Now> {
        self.sources.deadline().map(|at| self.from.map_or(at, |from| at.max(from)))
    }

    /// A metric of a Prometheus server.
    pub fn metric(&self, index: usize) -> Option<&PrometheusMetric> {
        self.sources.metric(index)
    }

    /// The counters that instances export.
    pub fn series(&self) -> &[Selector] {
        self.sources.series()
    }

    /// These starts of instances of the new set will be asked for their counters, and those of the old one.
    pub fn looks_at(&mut self, canary: BTreeSet<(InstanceId, u32)>) {
        self.sources.looks_at(canary);
    }

    /// An answer.
    pub fn consulted(&mut self, due: Due, number: u64, answer: Answer) {
        match due {
            Due::Metric(index) => {
                self.sources.measured(&mut self.memory.sources, index, number, answer);
            }
            Due::Counters => {
                let counters = self.sources.scraped(number, answer);
                if !counters.is_empty() {
                    self.memory.analysis.observe(&Tick { counters, ..Tick::default() });
                }
            }
        }
    }

    /// How the sources stand, in words.
    pub fn sources(&self) -> Vec<String> {
        self.sources.words(&self.memory.sources)
    }

    fn freeze(&mut self, latency: &LatencyHistogram) -> bool {
        if self.memory.bound.is_some() || self.guard.latency != Some(LatencyBound::Stable) {
            return false;
        }
        let mut stable = LatencyHistogram { counts: std::mem::take(&mut self.memory.stable) };
        stable.merge(latency);
        let quantile = (stable.total() >= MIN_SAMPLES).then(|| stable.quantile(Permille::new(950))).flatten();
        self.memory.stable = stable.counts;
        let Some(quantile) = quantile else { return false };
        // As `orchestra_stats::Freeze` has it: half as much again, and 10 ms at least.
        let bound = (quantile + quantile / 2).max(quantile + 10_000);
        self.memory.bound = Some(bound);
        self.memory.stable = Vec::new();
        self.memory.analysis.latency(bounds(&self.guard, Some(micros(bound))));
        true
    }

    /// The verdict; before the step is over only a fail or an early pass. Of several sources the worst word stands.
    pub fn verdict(&self, step_over: bool) -> Option<(VerdictOutcome, String)> {
        let policy = self.memory.analysis.settings().inconclusive;
        let mut verdicts = self.sources.verdicts(&self.memory.sources, step_over, policy);
        if !self.blind || verdicts.is_empty() {
            let early = self.memory.analysis.enough();
            verdicts.insert(0, self.memory.analysis.verdict(step_over || early));
        }
        let complete = verdicts.iter().all(Option::is_some);
        let verdict = Verdict::worst(verdicts.into_iter().flatten())?;
        // What is not certain yet may still become worse.
        if verdict.outcome != Outcome::Fail && !step_over && (!complete || verdict.outcome != Outcome::Pass) {
            return None;
        }
        let outcome = match verdict.outcome {
            Outcome::Pass => VerdictOutcome::Pass,
            Outcome::Inconclusive => VerdictOutcome::Inconclusive,
            Outcome::Error => VerdictOutcome::Error,
            Outcome::Fail => VerdictOutcome::Fail,
        };
        Some((outcome, verdict.reason))
    }

    /// Copied requests so far: those of which both responses agreed, and the others.
    pub fn mirrored(&self) -> (u64, u64) {
        self.memory.mirrored
    }

    /// How things stand, in one sentence.
    pub fn words(&self) -> String {
        self.memory.analysis.evidence().reason
    }

    /// The numbers, by name.
    pub fn evidence(&self) -> BTreeMap<String, serde_json::Value> {
        let value = serde_json::to_value(self.memory.analysis.evidence()).unwrap_or_default();
        let mut evidence: BTreeMap<String, serde_json::Value> = match value {
            serde_json::Value::Object(map) => map.into_iter().collect(),
            _ => BTreeMap::new(),
        };
        if self.memory.mirrored != (0, 0) {
            let (agreed, differed) = self.memory.mirrored;
            evidence.insert("mirrored".to_owned(), serde_json::json!({"agreed": agreed, "differed": differed}));
        }
        if let Some(reason) = &self.memory.probed {
            evidence.insert("probed".to_owned(), reason.clone().into());
        }
        let (prometheus, unread) = self.sources.evidence(&self.memory.sources);
        evidence.extend(prometheus.map(|metrics| ("prometheus".to_owned(), metrics)));
        evidence.extend(unread.map(|why| ("counters_unread".to_owned(), why.into())));
        evidence
    }
}

fn share(permille: Permille) -> f64 {
    f64::from(permille.get()) / 1000.0
}

fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

fn bounds(guard: &Guard, frozen: Option<Duration>) -> Bounds {
    Bounds {
        whole: match guard.latency {
            Some(LatencyBound::Fixed(bound)) => Some(bound.duration()),
            Some(LatencyBound::Stable) => frozen,
            None => None,
        },
        first_byte: guard.first_byte.map(Timespan::duration),
        first_token: guard.first_token.map(Timespan::duration),
    }
}

/// A response that is bad in several ways counts under the first in the order of `orchestra_stats::Kind`.
fn cell(from: &traffic::TrafficCell, errors: bool) -> Cell {
    let mut left = u64::from(from.bad);
    let mut take = |number: u32, counts: bool| {
        let taken = u64::from(number).min(left);
        left -= taken;
        if counts { taken } else { 0 }
    };
    let bad = Bad {
        broken: take(from.broken, errors),
        server_error: take(from.server_errors, errors),
        slow_first_byte: take(from.slow_first_byte, true),
        slow_first_token: take(from.slow_first_token, true),
        slow: take(from.slow, true),
    };
    Cell {
        arm: match from.arm {
            traffic::Arm::Canary => Arm::Canary,
            traffic::Arm::Stable => Arm::Stable,
        },
        client: from.client,
        weight: share(from.canary),
        requests: u64::from(from.requests),
        bad,
        client_failed: u64::from(from.client_failed),
    }
}

#[cfg(test)]
mod tests;
