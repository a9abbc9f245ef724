//! The fake prober: asks every leaf at its rate and answers with the truth about the process.

use std::{collections::BTreeMap, time::Duration};

use orchestra_machine::{Event, Leaf, ProbeKey, ProbeTarget, Which};
use orchestra_model::{Now, launch::LaunchKey, quantity::Timespan};

use super::{Item, World};

/// Questions that are being asked.
#[derive(Debug, Default)]
pub struct Prober {
    /// By key.
    pub open: BTreeMap<ProbeKey, Question>,
    /// When the last answer to a question arrives: they arrive in the order in which they were asked for, because one
    /// check of a target goes on at a time.
    answered: BTreeMap<ProbeKey, Now>,
    next: u64,
}

/// A question.
#[derive(Clone, Debug)]
pub struct Question {
    /// Whom and what.
    pub target: ProbeTarget,
    every: Duration,
    generation: u64,
}

impl Prober {
    pub(crate) fn stop(&mut self, key: &ProbeKey) {
        self.open.remove(key);
    }

    pub(crate) fn clear(&mut self) {
        self.open.clear();
        self.answered.clear();
    }
}

impl World {
    pub(crate) fn start_probe(&mut self, key: ProbeKey, target: ProbeTarget, every: Timespan, _timeout: Timespan) {
        self.prober.next += 1;
        let generation = self.prober.next;
        let question = Question { target, every: every.duration(), generation };
        self.prober.open.insert(key.clone(), question);
        let (epoch, after) = (self.epoch, self.latency(0, 1));
        self.push(self.now + after, Item::Ask { epoch, key, generation });
    }

    pub(crate) fn ask(&mut self, epoch: u64, key: &ProbeKey, generation: u64) {
        if epoch != self.epoch {
            return;
        }
        let Some(question) = self.prober.open.get(key).filter(|q| q.generation == generation) else { return };
        let (every, target) = (question.every, question.target.clone());
        let passed = self.truth(key.which, &target.launch, &target.leaf);
        let after = self.latency(0, 4);
        let detail = if passed { String::new() } else { "no".to_owned() };
        let last = self.prober.answered.entry(key.clone()).or_default();
        *last = (self.now + after).max(*last);
        let after = last.since(self.now);
        self.tell(after, Event::Probed { key: key.clone(), passed, detail });
        self.push(self.now + every, Item::Ask { epoch, key: key.clone(), generation });
    }

    fn truth(&mut self, which: Which, key: &LaunchKey, leaf: &Leaf) -> bool {
        let Some(process) = self.provider.launches.get(key) else { return false };
        let port = match leaf {
            Leaf::Http { address, .. } | Leaf::Tcp { address } | Leaf::Grpc { address, .. } => Some(address.port()),
            Leaf::Exec { .. } => None,
        };
        if let Some(port) = port
            && !process.launch.ports.values().any(|own| *own == port)
        {
            let law = format!("{key} is asked at port {port}, which it does not have");
            self.violate(law);
            return false;
        }
        match which {
            Which::Ready => process.is_ready(self.now),
            Which::Live => process.is_live(self.now),
        }
    }
}
