//! The sentences: what people read in `orchestra show`.

use super::{Analysis, float};
use crate::{
    observation::{Arm, Kind},
    settings::Unit,
    verdict::{ArmEvidence, counted, percent},
    wealth::Wealth,
};

/// A pass that needs so many times the responses that there were is not told in numbers.
const OUT_OF_REACH: u64 = 20;

impl Analysis {
    /// The present state.
    pub(super) fn explain(&self) -> String {
        if let Some(reason) = &self.failure {
            reason.clone()
        } else if self.enough() {
            self.explain_pass()
        } else if self.step.lost > self.step.measured {
            self.explain_lost()
        } else {
            self.explain_inconclusive()
        }
    }

    /// Why it fails: the part of the evidence that weighs most.
    pub(super) fn explain_failure(&self) -> String {
        let luck = format!("luck explains this at most once in {:.0} releases", self.highest.min(27.0).exp());
        let mut most = ("relative", self.relative.all().ln());
        let mut heavier = |name, wealth: &Wealth| {
            if wealth.ln() > most.1 {
                most = (name, wealth.ln());
            }
        };
        if let Some(crowd) = &self.absolute {
            heavier("absolute", crowd.all());
        }
        if let Some(wealth) = &self.probes {
            heavier("probes", wealth);
        }
        let counter = self.counters.iter().max_by(|a, b| a.wealth().ln().total_cmp(&b.wealth().ln()));
        if let Some(counter) = counter {
            heavier("counter", counter.wealth());
        }
        match (most.0, counter) {
            ("absolute", _) => {
                let bound = percent(self.bound());
                format!("on the canary {}, above the bound of {bound}; {luck}", arm(&self.canary))
            }
            ("probes", _) => format!(
                "of {} only the canary's answer was bad, of {} only the stable release's; {luck}",
                counted(self.pairs.canary_bad, "pair of probes", "pairs of probes"),
                self.pairs.stable_bad,
            ),
            ("counter", Some(counter)) => {
                let it = counter.evidence();
                format!(
                    "counter {} grew by {} in {} requests on the canary, by {} in {} on the stable release; {luck}",
                    counter.name(),
                    it.canary.0,
                    it.canary.1,
                    it.stable.0,
                    it.stable.1,
                )
            }
            _ => format!(
                "on the canary {}, on the stable release {}, at a weight of {}; {luck}",
                arm(&self.canary),
                arm(&self.stable),
                percent(self.step.weight),
            ),
        }
    }

    pub(super) fn explain_pass(&self) -> String {
        format!(
            "in this step {}; {} bad, with {} times the odds of the stable release, would have been seen",
            self.this_step(),
            percent(self.settings.degradation.rate),
            self.settings.degradation.ratio,
        )
    }

    pub(super) fn explain_lost(&self) -> String {
        let (lost, measured) = (self.step.lost.as_secs_f64(), self.step.measured.as_secs_f64());
        if lost < 0.5 {
            return "nothing was measured".to_owned();
        }
        format!("nothing was measured for {lost:.0} s of {:.0} s", lost + measured)
    }

    pub(super) fn explain_inconclusive(&self) -> String {
        let seen = self.this_step();
        if self.ln_worse(false) >= self.ln_threshold() {
            let clients = counted(self.bad_clients.count().into(), "client has", "clients have");
            let asked = self.settings.min_clients;
            return format!(
                "in this step {seen}; but {clients} seen it: a fail needs {asked}, and must not rest on one"
            );
        }
        if self.step.outage() {
            return format!("in this step {seen}: an outage of both, in which nothing is promoted");
        }
        let (requests, least) = (self.step.requests(Arm::Canary), self.settings.min_requests);
        if requests < least && self.step.pairs() > 0 {
            return format!("in this step {seen}; probes alone let nothing pass: it needs {least} real responses");
        }
        if requests == 0 {
            return "the canary has answered nothing in this step".to_owned();
        }
        let waits = self.witness.waits();
        if waits >= 1.0 {
            return format!(
                "in this step {seen}; what the stable release answers next decides how much {waits:.0} bad count"
            );
        }
        let bad = self.step.bad(Arm::Canary);
        let (clients, asked) = (self.bad_clients.count(), self.settings.min_clients);
        if bad > 0 && clients < asked {
            let clients = counted(clients.into(), "client has", "clients have");
            return format!("in this step {seen}; {clients} seen it, and a fail needs {asked}");
        }
        let unit = match self.settings.unit {
            Unit::Request => "good responses",
            Unit::Session => "good sessions",
        };
        let needed = self.needed();
        if needed > OUT_OF_REACH.saturating_mul(requests.max(self.settings.min_requests)) {
            return format!("in this step {seen}; that is far from a pass{}", self.capped());
        }
        format!("in this step {seen}; a pass needs about {needed} more {unit}{}", self.capped())
    }

    /// That most of the bad responses count for little, because few clients or few moments had them.
    fn capped(&self) -> String {
        let (bad, counts) = (self.canary.bad.total().saturating_sub(self.canary.warm_up), self.counted.0);
        if bad < 4 || counts + self.witness.doubted() + self.witness.waits() > float(bad) / 2.0 {
            return String::new();
        }
        format!("; of {bad} bad ones {counts:.0} count, because a client and a moment count for a few at most")
    }

    fn this_step(&self) -> String {
        let (requests, bad) = (self.step.requests(Arm::Canary), self.step.bad(Arm::Canary));
        let (stable, stable_bad) = (self.step.requests(Arm::Stable), self.step.bad(Arm::Stable));
        let canary = format!("{bad} of {} of the canary were bad", counted(requests, "response", "responses"));
        let probes = match self.step.pairs() {
            0 => String::new(),
            pairs => format!(", beside {}", counted(pairs, "pair of probes", "pairs of probes")),
        };
        if stable == 0 {
            return canary + &probes;
        }
        format!("{canary}, and {stable_bad} of {stable} of the stable release{probes}")
    }
}

/// "5 of 23 responses (21.7 %) were bad (4 server errors, 1 too slow)".
fn arm(arm: &ArmEvidence) -> String {
    let bad = arm.bad.total();
    let share = if arm.requests == 0 { 0.0 } else { float(bad) / float(arm.requests) };
    let kinds: Vec<String> = Kind::ALL
        .iter()
        .filter(|kind| arm.bad.of(**kind) > 0)
        .map(|kind| format!("{} {}", arm.bad.of(*kind), kind.phrase()))
        .collect();
    let kinds = if kinds.is_empty() { String::new() } else { format!(": {}", kinds.join(", ")) };
    format!("{bad} of {} ({}{kinds})", counted(arm.requests, "response was bad", "responses were bad"), percent(share))
}
