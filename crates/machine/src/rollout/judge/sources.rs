//! What a judge asks of others while a rollout is on trial: counters that the instances export, and Prometheus servers.
//!
//! Both are asked again and again from the moment at which the new set may get requests. An answer that is lost, with the
//! server or on the way, is asked for again: what is known of a counter begins anew with the next look, what a Prometheus
//! server said before is written down with the judge.
//!
//! # Counters
//!
//! The growth of a counter between two looks is compared with the requests that the set answered meanwhile. Each start of
//! an instance is followed by itself; a number that fell has begun anew. What is taken into the statistics is
//!
//! * only what was read of every instance that serves: with a part of the old set missing, the new one would look worse,
//! * only once `clients` clients have been answered by the new set, and somebody by the old one,
//! * of each instance at most its even share of the requests of its set, and of a set at most as much as it answered
//!   requests: one instance that counts wildly, or a request that counts for many, is no more than a request,
//! * nothing while requests go to a set that were not sent there by chance (matches, copies).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orchestra_model::{
    InstanceId, Now,
    consult::{Answer, Scraped, Selector},
    rollout::{Guard, PrometheusMetric},
    traffic::{self, TrafficCell},
};
use orchestra_stats::{
    Arm, Counter, Limits, Measured, Measurements, Policy, Verdict,
    measurement::{Phase, Rule},
};
use serde::{Deserialize, Serialize};

/// Time beyond the longest wait after which an answer is taken for lost.
const LOST: Duration = Duration::from_secs(5);
/// Clients that are told apart between two readings.
const MAX_CLIENTS: usize = 64;

/// Something to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Due {
    /// What the instances export.
    Counters,
    /// The server of the metric with this position in the guard.
    Metric(usize),
}

/// What outlives a crash.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Memory {
    /// Of each metric, since the analysis began.
    measured: Vec<Measurements>,
    /// Analysis step that they belong to; `None` before the first.
    step: Option<u32>,
}

impl Memory {
    /// Room for so many metrics.
    pub(super) fn fit(&mut self, metrics: usize) {
        self.measured.resize_with(metrics, Measurements::default);
    }
}

/// When a source is asked.
#[derive(Clone, Debug, Default)]
struct Turn {
    /// `None`: not begun.
    next: Option<Now>,
    /// Number of the question that is open, and until when.
    asked: Option<(u64, Now)>,
}

impl Turn {
    fn is_due(&self, now: Now) -> bool {
        self.asked.is_none() && self.next.is_some_and(|next| next <= now)
    }

    fn ask(&mut self, now: Now, number: u64, every: Duration, timeout: Duration) {
        self.asked = Some((number, now + timeout + LOST));
        self.next = Some(now + every);
    }

    fn deadline(&self) -> Option<Now> {
        self.asked.map(|(_, until)| until).or(self.next)
    }

    /// Whether this is the answer that is waited for.
    fn answers(&mut self, number: u64) -> bool {
        self.asked.take_if(|(open, _)| *open == number).is_some()
    }

    /// Whether the answer is lost.
    fn is_lost(&mut self, now: Now) -> bool {
        self.asked.take_if(|(_, until)| *until <= now).is_some()
    }
}

/// The sources of one judge.
#[derive(Clone, Debug)]
pub(super) struct Sources {
    metrics: Vec<Metric>,
    counters: Counters,
    /// The new set may get requests.
    begun: bool,
}

#[derive(Clone, Debug)]
struct Metric {
    spec: PrometheusMetric,
    rule: Rule,
    turn: Turn,
}

/// What is known of exported counters.
#[derive(Clone, Debug, Default)]
struct Counters {
    series: Vec<Selector>,
    turn: Turn,
    /// By start of an instance.
    read: BTreeMap<(InstanceId, u32), Read>,
    /// Instances of the last look that serve the new set.
    canary: BTreeSet<(InstanceId, u32)>,
    /// Requests that each set answered since the last reading that counted: new, old.
    requests: (u64, u64),
    clients: BTreeSet<u64>,
    /// Distinct clients that a reading needs.
    wanted: usize,
    /// Requests go to a set that were not sent there by chance.
    foreign: bool,
    /// Why the last look did not count.
    problem: Option<String>,
    /// The instances of the new set were read.
    seen: bool,
}

#[derive(Clone, Debug)]
struct Read {
    last: Vec<f64>,
    /// Growth since the last reading that counted.
    grown: Vec<f64>,
}

impl Sources {
    pub(super) fn new(guard: &Guard) -> Self {
        let metric = |spec: &PrometheusMetric| {
            let condition = |text: &Option<String>| text.as_ref().and_then(|text| text.parse().ok());
            let limits = Limits {
                count: spec.count,
                failure: spec.failure_limit,
                inconclusive: spec.inconclusive_limit,
                consecutive_error: spec.error_limit,
                consecutive_success: spec.success_limit,
            };
            let rule = Rule {
                success: condition(&spec.success),
                failure: condition(&spec.failure),
                limits,
                dry_run: spec.dry_run,
            };
            Metric { spec: spec.clone(), rule, turn: Turn::default() }
        };
        let counters = Counters {
            series: guard.counters.clone(),
            wanted: usize::try_from(guard.clients).unwrap_or(MAX_CLIENTS).clamp(1, MAX_CLIENTS),
            ..Counters::default()
        };
        Self { metrics: guard.prometheus.iter().map(metric).collect(), counters, begun: false }
    }

    /// Where the rollout is: its step, whether that is an analysis, whether the new set may get requests, and whether some
    /// of them were not sent there by chance.
    pub(super) fn follow(
        &mut self,
        now: Now,
        memory: &mut Memory,
        (step, analysis): (u32, bool),
        exposed: bool,
        foreign: bool,
    ) {
        self.counters.foreign = foreign;
        if analysis && memory.step != Some(step) {
            // Each analysis measures for itself, as each analysis step of Argo Rollouts does.
            memory.step = Some(step);
            memory.measured.fill(Measurements::default());
            self.counters.seen = false;
            for metric in &mut self.metrics {
                metric.turn = Turn { next: Some(now + metric.spec.initial_delay.duration()), asked: None };
            }
            self.begun = false;
        }
        if !self.begun && (exposed || analysis) {
            self.begun = true;
            for (metric, measured) in self.metrics.iter_mut().zip(&memory.measured) {
                // One that goes on after a crash has waited already.
                let began = *measured != Measurements::default();
                let delay = if began { Duration::ZERO } else { metric.spec.initial_delay.duration() };
                metric.turn.next.get_or_insert(now + delay);
            }
            if !self.counters.series.is_empty() {
                self.counters.turn.next.get_or_insert(now);
            }
        }
        for (metric, measured) in self.metrics.iter_mut().zip(&mut memory.measured) {
            if metric.turn.is_lost(now) {
                measured.record(&metric.rule, &Measured::Error("no answer".to_owned()));
            }
            if is_settled(&metric.rule, measured) {
                metric.turn = Turn::default();
            }
        }
        if self.counters.turn.is_lost(now) {
            self.counters.problem = Some("no answer".to_owned());
        }
    }

    /// What is to be asked now.
    pub(super) fn due(&self, now: Now) -> Vec<Due> {
        let counters = self.counters.turn.is_due(now).then_some(Due::Counters);
        let metrics = self.metrics.iter().enumerate().filter(|(_, metric)| metric.turn.is_due(now));
        counters.into_iter().chain(metrics.map(|(index, _)| Due::Metric(index))).collect()
    }

    /// It was asked.
    pub(super) fn asked(&mut self, now: Now, due: Due, number: u64, every: Duration, timeout: Duration) {
        match due {
            Due::Counters => self.counters.turn.ask(now, number, every, timeout),
            Due::Metric(index) => {
                if let Some(metric) = self.metrics.get_mut(index) {
                    metric.turn.ask(now, number, every, timeout);
                }
            }
        }
    }

    /// It could not be asked: again later.
    pub(super) fn skipped(&mut self, now: Now, due: Due, every: Duration) {
        let turn = match due {
            Due::Counters => &mut self.counters.turn,
            Due::Metric(index) => match self.metrics.get_mut(index) {
                Some(metric) => &mut metric.turn,
                None => return,
            },
        };
        turn.next = Some(now + every);
    }

    /// When something is due, or an answer is lost.
    pub(super) fn deadline(&self) -> Option<Now> {
        self.metrics.iter().map(|metric| &metric.turn).chain([&self.counters.turn]).filter_map(Turn::deadline).min()
    }

    pub(super) fn metric(&self, index: usize) -> Option<&PrometheusMetric> {
        self.metrics.get(index).map(|metric| &metric.spec)
    }

    pub(super) fn series(&self) -> &[Selector] {
        &self.counters.series
    }

    /// An answer of a Prometheus server; what it was, unless it is a late one.
    pub(super) fn measured(&mut self, memory: &mut Memory, index: usize, number: u64, answer: Answer) -> Option<Phase> {
        let metric = self.metrics.get_mut(index)?;
        let measured = memory.measured.get_mut(index)?;
        if !metric.turn.answers(number) {
            return None;
        }
        let answer = match answer {
            Answer::Values(values) if values.is_empty() => Measured::NoData,
            Answer::Values(values) => Measured::Values(values),
            Answer::Error(why) => Measured::Error(why),
            Answer::Scraped(_) => return None,
        };
        let phase = measured.record(&metric.rule, &answer);
        if is_settled(&metric.rule, measured) {
            metric.turn = Turn::default();
        }
        Some(phase)
    }

    /// An answer of the instances; what counts of it.
    pub(super) fn scraped(&mut self, number: u64, answer: Answer) -> Vec<Counter> {
        if !self.counters.turn.answers(number) {
            return Vec::new();
        }
        match answer {
            Answer::Scraped(scraped) => self.counters.read(scraped),
            Answer::Error(why) => {
                self.counters.problem = Some(why);
                Vec::new()
            }
            Answer::Values(_) => Vec::new(),
        }
    }

    /// These instances of the new set will be looked at.
    pub(super) fn looks_at(&mut self, canary: BTreeSet<(InstanceId, u32)>) {
        self.counters.canary = canary;
    }

    /// Requests that ended.
    pub(super) fn served(&mut self, cells: &[TrafficCell]) {
        let counters = &mut self.counters;
        if counters.series.is_empty() {
            return;
        }
        for cell in cells {
            // What a client did wrong may be counted by the service as well.
            let requests = u64::from(cell.requests) + u64::from(cell.client_failed);
            let sum = match cell.arm {
                traffic::Arm::Canary => &mut counters.requests.0,
                traffic::Arm::Stable => &mut counters.requests.1,
            };
            *sum = sum.saturating_add(requests);
            if cell.arm == traffic::Arm::Canary && requests > 0 && counters.clients.len() < MAX_CLIENTS {
                counters.clients.insert(cell.client);
            }
        }
    }

    /// What those that decide say; a fail comes as soon as it is certain, everything else when the step is over, or as soon
    /// as nothing can change it any more.
    pub(super) fn verdicts(&self, memory: &Memory, step_over: bool, policy: Policy) -> Vec<Option<Verdict>> {
        let deciding = self.metrics.iter().zip(&memory.measured).filter(|(metric, _)| !metric.rule.dry_run);
        let mut verdicts: Vec<Option<Verdict>> = deciding
            .map(|(metric, measured)| {
                let verdict = measured.verdict(&metric.rule, step_over, policy)?;
                let reason = format!("{}: {}", metric.spec.name, verdict.reason);
                Some(Verdict { reason, ..verdict })
            })
            .collect();
        if let (true, Some(problem)) = (step_over, self.counters.unread()) {
            let reason = format!("the counters of the service could not be read: {problem}");
            verdicts.push(Some(Verdict { outcome: orchestra_stats::Outcome::Error, reason, then: Some(Policy::Hold) }));
        }
        verdicts
    }

    /// How they stand, in words.
    pub(super) fn words(&self, memory: &Memory) -> Vec<String> {
        let metrics = self.metrics.iter().zip(&memory.measured).map(|(metric, measured)| {
            let value = measured.last.map(|last| format!(", last value {last}")).unwrap_or_default();
            let error = measured.last_error.as_ref().filter(|_| measured.consecutive_error > 0);
            let error = error.map(|why| format!(", {why}")).unwrap_or_default();
            let dry = if metric.rule.dry_run { " (dry run)" } else { "" };
            let Measurements { successful, failed, inconclusive, error: errors, .. } = measured;
            let name = &metric.spec.name;
            format!(
                "{name}{dry}: {successful} good, {failed} bad, {inconclusive} inconclusive, {errors} errors{value}{error}"
            )
        });
        let counters = self.counters.problem.as_ref().map(|why| format!("counters: {why}"));
        metrics.chain(counters).collect()
    }

    /// The numbers, for the record of a verdict: what Prometheus said, and why counters were not read.
    pub(super) fn evidence(&self, memory: &Memory) -> (Option<serde_json::Value>, Option<String>) {
        let metric = |(metric, measured): (&Metric, &Measurements)| {
            let spec = &metric.spec;
            serde_json::json!({
                "name": spec.name,
                "address": spec.address,
                "query": spec.query,
                "success": spec.success,
                "failure": spec.failure,
                "dry_run": spec.dry_run,
                "value": measured.last,
                "successful": measured.successful,
                "failed": measured.failed,
                "inconclusive": measured.inconclusive,
                "errors": measured.error,
                "last_error": measured.last_error,
                "settled": measured
                    .verdict(&metric.rule, false, Policy::Hold)
                    .and_then(|verdict| serde_json::to_value(verdict.outcome).ok()),
            })
        };
        let metrics: Vec<serde_json::Value> = self.metrics.iter().zip(&memory.measured).map(metric).collect();
        ((!metrics.is_empty()).then(|| metrics.into()), self.counters.unread())
    }
}

fn is_settled(rule: &Rule, measured: &Measurements) -> bool {
    measured.verdict(rule, false, Policy::Hold).is_some()
}

impl Counters {
    fn unread(&self) -> Option<String> {
        self.problem.clone().filter(|_| !self.series.is_empty() && !self.seen)
    }

    fn read(&mut self, scraped: Vec<Scraped>) -> Vec<Counter> {
        self.problem = None;
        let present: BTreeSet<(InstanceId, u32)> = scraped.iter().map(|it| (it.instance.clone(), it.attempt)).collect();
        self.read.retain(|start, _| present.contains(start));
        let mut whole = true;
        for Scraped { instance, attempt, values } in scraped {
            match values {
                Ok(values) => {
                    // Many programs export a counter first when it has counted something.
                    let values: Vec<f64> = values.into_iter().map(Option::unwrap_or_default).collect();
                    self.grow((instance, attempt), values);
                }
                Err(why) => {
                    whole = false;
                    self.problem = Some(format!("{instance}: {why}"));
                }
            }
        }
        let serves = self.canary.iter().any(|start| self.read.contains_key(start));
        self.seen |= whole && serves;
        let enough = self.requests.0 > 0 && self.requests.1 > 0 && self.clients.len() >= self.wanted;
        if !whole || !enough { Vec::new() } else { self.take() }
    }

    fn grow(&mut self, start: (InstanceId, u32), values: Vec<f64>) {
        let Some(read) = self.read.get_mut(&start) else {
            let grown = vec![0.0; values.len()];
            self.read.insert(start, Read { last: values, grown });
            return;
        };
        for ((last, grown), value) in read.last.iter_mut().zip(&mut read.grown).zip(values) {
            *grown += if value >= *last { value - *last } else { value.max(0.0) };
            *last = value;
        }
    }

    /// What has grown since the last time.
    fn take(&mut self) -> Vec<Counter> {
        let requests = std::mem::take(&mut self.requests);
        self.clients.clear();
        let mut sets: [Vec<&mut Read>; 2] = [Vec::new(), Vec::new()];
        for (start, read) in &mut self.read {
            sets[usize::from(!self.canary.contains(start))].push(read);
        }
        let mut counters = Vec::new();
        for ((arm, requests), set) in [(Arm::Canary, requests.0), (Arm::Stable, requests.1)].into_iter().zip(sets) {
            let share = requests.div_ceil(u64::try_from(set.len()).unwrap_or(1).max(1));
            let mut sums = vec![0_u64; self.series.len()];
            for read in set {
                for (sum, grown) in sums.iter_mut().zip(&mut read.grown) {
                    *sum = sum.saturating_add(whole_number(std::mem::take(grown)).min(share));
                }
            }
            let named = self.series.iter().zip(sums).map(|(series, sum)| Counter {
                name: series.to_string(),
                arm,
                increase: sum.min(requests),
                requests,
            });
            counters.extend(named);
        }
        if self.foreign { Vec::new() } else { counters }
    }
}

/// The nearest number that can be counted.
fn whole_number(value: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the cast saturates, and growth is not negative"
    )]
    let whole = value.round() as u64;
    whole
}

#[cfg(test)]
mod tests;
