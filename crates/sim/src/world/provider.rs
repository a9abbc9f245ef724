//! The fake provider: processes that do what their command says.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orchestra_machine::Event;
use orchestra_model::{
    Code, Diagnostic, Name, Now,
    launch::{Exit, Launch, LaunchKey, Observed, ProviderEvent, Termination},
};

use super::{Item, KILLED, World};
use crate::behaviour::Behaviour;

/// Every launch that the world knows.
#[derive(Debug, Default)]
pub struct Provider {
    /// By key, until it is forgotten.
    pub launches: BTreeMap<LaunchKey, Process>,
    /// Every key that was ever started.
    pub ever: BTreeSet<LaunchKey>,
    /// Jobs that completed at some time.
    pub completed: BTreeSet<Name>,
    next_pid: u32,
    /// When the last event of a launch is delivered: they come in order.
    delivered: BTreeMap<LaunchKey, Now>,
}

/// One launch.
#[derive(Clone, Debug)]
pub struct Process {
    /// What was asked.
    pub launch: Launch,
    /// What it does.
    pub behaviour: Behaviour,
    /// When its process started.
    pub started: Option<Now>,
    /// Its process.
    pub pid: u32,
    /// When and how it ended.
    pub exit: Option<(Now, Exit)>,
    /// Nothing is left of it.
    pub gone: bool,
    /// It was told to stop.
    pub told: bool,
    /// It was ready at some time.
    pub ready_seen: bool,
}

impl Process {
    /// Whether its process exists or is about to.
    pub fn is_alive(&self) -> bool {
        self.exit.is_none()
    }

    /// Whether it would answer a ready check.
    pub fn is_ready(&self, now: Now) -> bool {
        self.is_alive() && self.started.is_some_and(|at| self.behaviour.is_ready(now.since(at)))
    }

    /// Whether it would answer a live check.
    pub fn is_live(&self, now: Now) -> bool {
        self.is_alive() && self.started.is_some_and(|at| self.behaviour.is_live(now.since(at)))
    }
}

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Start,
    Ready,
    Exit(Exit),
    Gone,
}

impl Provider {
    /// Truth for a recovery.
    pub fn find(&self, key: &LaunchKey) -> Option<Observed> {
        let process = self.launches.get(key)?;
        let notified = process.ready_seen;
        Some(Observed {
            pid: process.started.filter(|_| process.is_alive()).map(|_| process.pid),
            notified_ready: notified,
            line_matched: notified,
            exit: process.exit.map(|(_, exit)| exit),
            gone: process.gone,
            ..Observed::new(key.clone())
        })
    }

    /// Drops records of launches that are gone and that nobody knows.
    pub(crate) fn forget_unknown(&mut self, known: &BTreeSet<LaunchKey>) {
        self.launches.retain(|key, process| !process.gone || known.contains(key));
    }

    /// Launches that run.
    pub fn alive(&self) -> impl Iterator<Item = (&LaunchKey, &Process)> {
        self.launches.iter().filter(|(_, process)| process.is_alive())
    }
}

impl World {
    pub(crate) fn launch(&mut self, epoch: u64, launch: Launch) {
        let key = launch.key.clone();
        let after = self.latency(0, 5);
        let (taken, fails) = (self.faults.port_taken, self.faults.launch_fails);
        if !launch.ports.is_empty() && self.chance(taken) {
            self.answer(epoch, after, Event::PortsTaken(key));
            return;
        }
        if self.chance(fails) {
            let problem = Diagnostic::error(Code::START_FAILED, format!("cannot start {}", key.instance));
            let retry = Some(Duration::from_millis(50 + self.rng.below(1000)));
            self.answer(epoch, after, Event::LaunchFailed { key, problem, retry });
            return;
        }
        if !self.provider.ever.insert(key.clone()) {
            self.violate(format!("{key} was started twice"));
        }
        let other = self.provider.alive().map(|(other, _)| other).find(|other| other.instance == key.instance).cloned();
        if let Some(other) = other {
            self.violate(format!("{key} was started while {other} runs"));
        }
        self.provider.next_pid += 1;
        let pid = 1000 + self.provider.next_pid;
        let behaviour = Behaviour::parse(&launch.command, key.attempt);
        let missing = behaviour.missing;
        let process =
            Process { launch, behaviour, started: None, pid, exit: None, gone: false, told: false, ready_seen: false };
        self.provider.launches.insert(key.clone(), process);
        self.answer(epoch, after, Event::Launched(key.clone()));
        let spawn = self.latency(1, 10);
        let what = if missing { What::Exit(Exit::NotStarted) } else { What::Start };
        self.push(self.now + spawn, Item::Process { key, what });
    }

    pub(crate) fn terminate(&mut self, key: &LaunchKey, how: Termination) {
        let now = self.now;
        let Some(process) = self.provider.launches.get_mut(key) else {
            self.report(key, ProviderEvent::Gone);
            return;
        };
        if process.exit.is_some() {
            // Asked again: it is said again.
            self.replay(&key.clone());
            return;
        }
        if process.told {
            return;
        }
        process.told = true;
        let grace = how.grace.duration();
        let (after, exit) = match process.behaviour.term {
            Some(term) if term <= grace => {
                (term, if term.as_millis() % 2 == 0 { Exit::Code(0) } else { Exit::Signal(15) })
            }
            _ => (grace, KILLED),
        };
        self.push(now + after, Item::Process { key: key.clone(), what: What::Exit(exit) });
    }

    pub(crate) fn forget(&mut self, key: &LaunchKey) {
        if self.provider.launches.get(key).is_some_and(|process| !process.gone) {
            self.violate(format!("{key} was forgotten before it was gone"));
        }
        self.provider.launches.remove(key);
    }

    pub(crate) fn process(&mut self, key: &LaunchKey, what: What) {
        let now = self.now;
        let Some(process) = self.provider.launches.get_mut(key) else { return };
        match what {
            What::Start => {
                if process.exit.is_some() {
                    return;
                }
                process.started = Some(now);
                let (pid, behaviour) = (process.pid, process.behaviour.clone());
                self.log(|| format!("{}#{} runs", key.instance, key.attempt));
                self.report(key, ProviderEvent::Started { pid });
                if let Some(ready) = behaviour.ready {
                    self.push(now + ready, Item::Process { key: key.clone(), what: What::Ready });
                }
                if let Some((after, exit)) = behaviour.exit {
                    self.push(now + after, Item::Process { key: key.clone(), what: What::Exit(exit) });
                }
            }
            What::Ready => {
                if process.exit.is_some() {
                    return;
                }
                process.ready_seen = true;
                let (notify, line) = (process.launch.notify, process.launch.ready_line.is_some());
                if notify {
                    self.report(key, ProviderEvent::NotifiedReady);
                }
                if line {
                    self.report(key, ProviderEvent::LineMatched);
                }
            }
            What::Exit(exit) => {
                if process.exit.is_some() {
                    return;
                }
                process.exit = Some((now, exit));
                let linger = process.behaviour.linger;
                if exit.is_success() && !process.told {
                    self.provider.completed.insert(key.instance.workload.clone());
                }
                self.log(|| format!("{}#{} ended: {exit}", key.instance, key.attempt));
                let message = (exit == Exit::NotStarted).then(|| "no such file or directory".to_owned());
                self.report(key, ProviderEvent::Exited { exit, message });
                self.endpoint_died(key);
                let after = self.latency(0, 3) + linger;
                self.push(self.now + after, Item::Process { key: key.clone(), what: What::Gone });
            }
            What::Gone => {
                process.gone = true;
                self.report(key, ProviderEvent::Gone);
            }
        }
    }

    /// An event of a launch, in order with its others, and sometimes with the whole story told again.
    fn report(&mut self, key: &LaunchKey, event: ProviderEvent) {
        let after = self.latency(0, 5);
        let at = (self.now + after).max(self.provider.delivered.get(key).copied().unwrap_or_default());
        self.provider.delivered.insert(key.clone(), at);
        let epoch = self.epoch;
        self.push(at, Item::Deliver { epoch, event: Event::Provider { key: key.clone(), event } });
        let double = self.faults.double;
        if self.chance(double) {
            self.replay(key);
        }
    }

    /// A reconnect: what is known of a launch is reported again, from the beginning.
    pub(crate) fn replay(&mut self, key: &LaunchKey) {
        let Some(process) = self.provider.launches.get(key) else { return };
        let mut events = Vec::new();
        if process.started.is_some() {
            events.push(ProviderEvent::Started { pid: process.pid });
        }
        if process.ready_seen && process.launch.notify {
            events.push(ProviderEvent::NotifiedReady);
        }
        if process.ready_seen && process.launch.ready_line.is_some() {
            events.push(ProviderEvent::LineMatched);
        }
        if let Some((_, exit)) = process.exit {
            events.push(ProviderEvent::Exited { exit, message: None });
            if process.gone {
                events.push(ProviderEvent::Gone);
            }
        }
        let epoch = self.epoch;
        for event in events {
            let after = self.latency(0, 5);
            let at = (self.now + after).max(self.provider.delivered.get(key).copied().unwrap_or_default());
            self.provider.delivered.insert(key.clone(), at);
            self.push(at, Item::Deliver { epoch, event: Event::Provider { key: key.clone(), event } });
        }
    }

    /// Kills one running process.
    pub(crate) fn kill_random(&mut self) {
        let alive: Vec<LaunchKey> =
            self.provider.alive().filter(|(_, p)| p.started.is_some()).map(|(key, _)| key.clone()).collect();
        if alive.is_empty() {
            return;
        }
        let index = usize::try_from(self.rng.below(alive.len() as u64)).unwrap_or(0);
        let key = alive[index].clone();
        self.kill(&key);
    }

    /// Kills one process.
    pub fn kill(&mut self, key: &LaunchKey) {
        self.log(|| format!("{}#{} killed", key.instance, key.attempt));
        self.killed = true;
        self.killed_once = true;
        self.process(key, What::Exit(KILLED));
    }
}
