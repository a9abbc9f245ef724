//! Numbers from elsewhere, such as a Prometheus server, judged by conditions and limits.
//!
//! The rules are those of Argo Rollouts' `AnalysisRun` (its `docs/features/analysis.md` and `analysis/analysis.go`): a
//! measurement is successful, failed, inconclusive or an error; it takes more than `failure` failed ones to fail, more than
//! `inconclusive` inconclusive ones to be inconclusive, more than `consecutive_error` errors in a row to give up; `count`
//! measurements without any of that pass, and so do `consecutive_success` successful ones in a row.
//!
//! Where we differ: no data, or NaN, is inconclusive whatever the conditions say, never a failure; a source that has
//! neither condition decides nothing; a source that ends without one successful measurement does not pass; and one that
//! was asked for successes in a row and never had them is inconclusive.

use serde::{Deserialize, Serialize};

use crate::{
    condition::Condition,
    settings::Policy,
    verdict::{Outcome, Verdict, counted, with_policy},
};

/// When a source has said enough. `None` for a limit: no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Measurements, errors not counted, after which it passes.
    pub count: Option<u32>,
    /// Failed measurements that are tolerated.
    pub failure: Option<u32>,
    /// Inconclusive measurements that are tolerated.
    pub inconclusive: Option<u32>,
    /// Errors in a row that are tolerated.
    pub consecutive_error: Option<u32>,
    /// Successful measurements in a row after which it passes.
    pub consecutive_success: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            count: None,
            failure: Some(0),
            inconclusive: Some(0),
            consecutive_error: Some(4),
            consecutive_success: None,
        }
    }
}

/// How a source is judged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// Holds for a good value.
    pub success: Option<Condition>,
    /// Holds for a bad value.
    pub failure: Option<Condition>,
    /// When it has said enough.
    pub limits: Limits,
    /// It is measured and shown, but decides nothing.
    pub dry_run: bool,
}

/// What came back from a source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// Numbers; an empty list is no data.
    Values(Vec<f64>),
    /// It answered, but had nothing.
    NoData,
    /// It could not be asked: why.
    Error(String),
}

/// What one measurement was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Good.
    Successful,
    /// Bad.
    Failed,
    /// Neither, or no data.
    Inconclusive,
    /// Not measured.
    Error,
}

impl Rule {
    /// Judges one measurement.
    pub fn judge(&self, measured: &Measured) -> Phase {
        let values = match measured {
            Measured::Values(values) => values.as_slice(),
            Measured::NoData => return Phase::Inconclusive,
            Measured::Error(_) => return Phase::Error,
        };
        let holds = |condition: &Option<Condition>| condition.as_ref().map(|it| it.holds(values));
        match (holds(&self.success), holds(&self.failure)) {
            (Some(None), _) | (_, Some(None)) | (None, None) | (Some(Some(false)), Some(Some(false))) => {
                Phase::Inconclusive
            }
            (_, Some(Some(true))) | (Some(Some(false)), None) => Phase::Failed,
            (Some(Some(true)), _) | (None, Some(Some(false))) => Phase::Successful,
        }
    }
}

/// The measurements of one source so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measurements {
    /// Good ones.
    pub successful: u32,
    /// Bad ones.
    pub failed: u32,
    /// Neither.
    pub inconclusive: u32,
    /// Not measured.
    pub error: u32,
    /// Good ones since the last other.
    pub consecutive_success: u32,
    /// Errors since the last other.
    pub consecutive_error: u32,
    /// The first number of the last measurement that had one.
    pub last: Option<f64>,
    /// Why the last error was one.
    pub last_error: Option<String>,
    /// The verdict, once there is one; measurements after it change nothing.
    settled: Option<Verdict>,
}

/// The longest text of an error that is kept, in bytes.
const MAX_ERROR: usize = 256;

impl Measurements {
    /// Takes in one measurement; returns what it was.
    pub fn record(&mut self, rule: &Rule, measured: &Measured) -> Phase {
        let phase = rule.judge(measured);
        if self.settled.is_some() {
            return phase;
        }
        let number = match phase {
            Phase::Successful => &mut self.successful,
            Phase::Failed => &mut self.failed,
            Phase::Inconclusive => &mut self.inconclusive,
            Phase::Error => &mut self.error,
        };
        *number = number.saturating_add(1);
        let in_a_row = |is: bool, so_far: u32| if is { so_far.saturating_add(1) } else { 0 };
        self.consecutive_success = in_a_row(phase == Phase::Successful, self.consecutive_success);
        self.consecutive_error = in_a_row(phase == Phase::Error, self.consecutive_error);
        match measured {
            Measured::Values(values) => {
                self.last = values.first().copied().filter(|it| it.is_finite()).or(self.last);
            }
            Measured::Error(why) => {
                let end = why.char_indices().map(|(at, _)| at).take_while(|at| *at <= MAX_ERROR).last();
                let end = if why.len() <= MAX_ERROR { why.len() } else { end.unwrap_or(0) };
                self.last_error = Some(why[..end].to_owned());
            }
            Measured::NoData => {}
        }
        self.settled = self.settle(&rule.limits);
        phase
    }

    /// The verdict of the source. Before the step is over it is `None` as long as more measurements could change it.
    pub fn verdict(&self, rule: &Rule, step_over: bool, policy: Policy) -> Option<Verdict> {
        if let Some(verdict) = &self.settled {
            return Some(with_policy(verdict.clone(), policy));
        }
        if !step_over {
            return None;
        }
        let verdict = if let (0, 0, 0, 1..) = (self.successful, self.failed, self.inconclusive, self.error) {
            verdict(Outcome::Error, format!("every measurement was an error{}", self.why()))
        } else if self.successful == 0 {
            verdict(Outcome::Inconclusive, "no measurement was successful".to_owned())
        } else if let Some(wanted) = rule.limits.consecutive_success {
            let row = self.consecutive_success;
            verdict(Outcome::Inconclusive, format!("{row} of {wanted} successful measurements in a row"))
        } else {
            self.passed()
        };
        Some(with_policy(verdict, policy))
    }

    fn settle(&self, limits: &Limits) -> Option<Verdict> {
        let over = |number: u32, limit: Option<u32>| limit.is_some_and(|limit| number > limit);
        if over(self.failed, limits.failure) {
            let failed = counted(self.failed.into(), "measurement", "measurements");
            return Some(verdict(Outcome::Fail, format!("{failed} failed{}", self.value())));
        }
        if over(self.inconclusive, limits.inconclusive) {
            let number = counted(self.inconclusive.into(), "measurement was", "measurements were");
            return Some(verdict(Outcome::Inconclusive, format!("{number} without data or between the conditions")));
        }
        if over(self.consecutive_error, limits.consecutive_error) {
            let number = self.consecutive_error;
            return Some(verdict(Outcome::Error, format!("{number} errors in a row{}", self.why())));
        }
        if limits.consecutive_success.is_some_and(|wanted| wanted > 0 && self.consecutive_success >= wanted) {
            return Some(self.passed());
        }
        let measured = self.successful.saturating_add(self.failed).saturating_add(self.inconclusive);
        if limits.count.is_some_and(|count| measured >= count.max(1)) {
            return Some(match limits.consecutive_success {
                Some(wanted) if wanted > 0 => {
                    let reason = format!("{measured} measurements, but never {wanted} successful ones in a row");
                    verdict(Outcome::Inconclusive, reason)
                }
                _ if self.successful == 0 => verdict(Outcome::Inconclusive, "no measurement was successful".to_owned()),
                _ => self.passed(),
            });
        }
        None
    }

    fn passed(&self) -> Verdict {
        let successful = counted(self.successful.into(), "successful measurement", "successful measurements");
        verdict(Outcome::Pass, format!("{successful}, {} failed{}", self.failed, self.value()))
    }

    fn value(&self) -> String {
        self.last.map(|last| format!(", last value {last}")).unwrap_or_default()
    }

    fn why(&self) -> String {
        self.last_error.as_ref().map(|why| format!(": {why}")).unwrap_or_default()
    }
}

fn verdict(outcome: Outcome, reason: String) -> Verdict {
    Verdict { outcome, reason, then: None }
}
