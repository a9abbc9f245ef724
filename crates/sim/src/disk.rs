//! The fake disk: applies committed changes as the store does, and refuses what must never be committed.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    EnvironmentId, Event, InstanceId, Name, Now, ReleaseNumber, ResourceId, RunId,
    record::{
        Change, EnvironmentRecord, EnvironmentState, InstanceRecord, JournalKind, ReleaseRecord, ReleaseState,
        ResourceRecord, RunRecord, RunState,
    },
    time::UnixMillis,
};

/// Everything that is written down of one environment.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The environment.
    pub environment: EnvironmentRecord,
    /// Its resources.
    pub resources: BTreeMap<ResourceId, ResourceRecord>,
    /// Its instances.
    pub instances: BTreeMap<InstanceId, InstanceRecord>,
    /// All runs.
    pub runs: BTreeMap<RunId, RunRecord>,
    /// All releases.
    pub releases: BTreeMap<ReleaseNumber, ReleaseRecord>,
    /// Intents of the journal without an outcome.
    pub intents: BTreeSet<String>,
    /// Events.
    pub events: Vec<Event>,
    /// When each of them was committed.
    pub times: Vec<Now>,
    /// Number of commits.
    pub commits: usize,
}

impl Disk {
    /// An empty disk for an environment.
    pub fn new(id: EnvironmentId) -> Self {
        Self {
            environment: EnvironmentRecord { source: "/stack/orchestra.yaml".to_owned(), ..EnvironmentRecord::new(id) },
            resources: BTreeMap::new(),
            instances: BTreeMap::new(),
            runs: BTreeMap::new(),
            releases: BTreeMap::new(),
            intents: BTreeSet::new(),
            events: Vec::new(),
            times: Vec::new(),
            commits: 0,
        }
    }

    /// Commits changes as a whole, under the same laws as the store.
    ///
    /// # Errors
    /// The law that they would break.
    pub fn commit(&mut self, now: Now, wall: UnixMillis, changes: &[Change]) -> Result<(), String> {
        self.commits += 1;
        let known = self.events.len();
        for change in changes {
            self.change(change)?;
        }
        for (index, event) in self.events.iter_mut().enumerate().skip(known) {
            // The order of events is that of their commits, whatever the clock does.
            (event.sequence, event.at) = (index as u64 + 1, wall);
        }
        self.times.resize(self.events.len(), now);
        let stable: Vec<_> =
            self.releases.values().filter(|r| r.state == ReleaseState::Stable).map(|r| r.number).collect();
        if stable.len() > 1 {
            return Err(format!("releases {stable:?} would both be stable"));
        }
        if self.environment.stable != stable.first().copied() {
            return Err(format!("{:?} is named as stable, but {stable:?} is", self.environment.stable));
        }
        let going: Vec<RunId> = self.runs.values().filter(|run| !run.state.is_final()).map(|run| run.id).collect();
        if going.len() > 1 || self.environment.run != going.first().copied() {
            return Err(format!("{going:?} go on, and the environment names {:?}", self.environment.run));
        }
        if self.releases.keys().next_back().is_some_and(|newest| *newest > self.environment.last_release) {
            return Err("a release is beyond the last one".to_owned());
        }
        Ok(())
    }

    fn change(&mut self, change: &Change) -> Result<(), String> {
        match change {
            Change::Environment(record) => {
                if record.generation < self.environment.generation
                    || record.last_release < self.environment.last_release
                {
                    return Err("a number of the environment went backwards".to_owned());
                }
                self.check_ports(record)?;
                self.environment = record.clone();
            }
            Change::Release(record) => {
                if self.releases.keys().next_back().is_some_and(|newest| record.number <= *newest) {
                    return Err(format!("release {} is not a new one", record.number));
                }
                self.releases.insert(record.number, (**record).clone());
            }
            Change::ReleaseState(_, number, to) => {
                use ReleaseState::{Deploying, Retired, Stable};
                let Some(release) = self.releases.get_mut(number) else {
                    return Err(format!("release {number} is not known"));
                };
                let from = release.state;
                if from != *to
                    && from != Deploying
                    && (from, *to) != (Stable, Retired)
                    && (from, *to) != (Retired, Stable)
                {
                    return Err(format!("release {number} cannot go from {from:?} to {to:?}"));
                }
                release.state = *to;
            }
            Change::Verdict(_, number, verdict) => {
                let Some(release) = self.releases.get_mut(number) else {
                    return Err(format!("release {number} is not known"));
                };
                release.verdicts.push((**verdict).clone());
            }
            Change::Run(record) => {
                if let Some(old) = self.runs.get(&record.id) {
                    use RunState::{Cancelled, Failed, Reverting, Running};
                    let (from, to) = (old.state, record.state);
                    let fine = from == to || from == Running || (from == Reverting && matches!(to, Failed | Cancelled));
                    if old.state.is_final() || !fine {
                        return Err(format!("{} cannot go from {from:?} to {to:?}", record.id));
                    }
                    if old.generation != record.generation || old.kind != record.kind {
                        return Err(format!("what identifies {} changed", record.id));
                    }
                } else if self.runs.values().any(|run| run.generation >= record.generation) {
                    return Err(format!("{} has no new generation", record.id));
                }
                if record.generation != self.environment.generation {
                    return Err(format!("{} is fenced", record.id));
                }
                self.runs.insert(record.id, (**record).clone());
            }
            Change::Step(run, resource, state) => {
                let Some(record) = self.runs.get_mut(run) else { return Err(format!("{run} is not known")) };
                if record.state.is_final() {
                    return Err(format!("{run} has ended, and its step {resource} moved"));
                }
                record.steps.insert(resource.clone(), *state);
            }
            Change::Instance(record) => self.instance(record)?,
            Change::ForgetInstance(_, id) => {
                self.instances.remove(id);
            }
            Change::Resource(record) => {
                if record.digest != record.applied.digest() || record.id.kind != record.applied.kind() {
                    return Err(format!("the record of {} contradicts itself", record.id));
                }
                self.resources.insert(record.id.clone(), (**record).clone());
            }
            Change::ForgetResource(_, id) => {
                self.resources.remove(id);
            }
            Change::Journal(entry) => {
                if let Some(run) = entry.run
                    && !self.runs.contains_key(&run)
                {
                    return Err(format!("{run} is in the journal, but is not known"));
                }
                if entry.entry == JournalKind::Intent {
                    self.intents.insert(entry.key.clone());
                } else if !self.intents.remove(&entry.key) {
                    return Err(format!("there is no open intent {} to which an outcome could belong", entry.key));
                }
            }
            Change::Event(event) => self.events.push((**event).clone()),
        }
        Ok(())
    }

    fn instance(&mut self, record: &InstanceRecord) -> Result<(), String> {
        match self.instances.get(&record.id) {
            None if record.attempt > 1 || record.last_exit.is_some() => {
                return Err(format!("{} was forgotten, and is written with a past", record.id));
            }
            Some(old) if old.attempt > record.attempt => {
                return Err(format!("the attempt of {} went backwards", record.id));
            }
            Some(old) if old.launch_digest != record.launch_digest || old.kind != record.kind => {
                return Err(format!("what {} was born with changed", record.id));
            }
            _ => {}
        }
        self.instances.insert(record.id.clone(), record.clone());
        Ok(())
    }

    /// A chosen port stays as long as its service is there.
    fn check_ports(&self, new: &EnvironmentRecord) -> Result<(), String> {
        for (service, ports) in &self.environment.chosen_ports {
            let chosen = |port: &Name| {
                let id = ResourceId::new(orchestra_model::ResourceKind::Service, service.clone());
                let applied = self.resources.get(&id)?.applied.as_service()?.ports.get(port)?;
                Some(applied.port.is_none())
            };
            for (port, number) in ports {
                let now = new.chosen_ports.get(service).and_then(|ports| ports.get(port));
                if chosen(port) == Some(true) && now.is_some_and(|now| now != number) {
                    return Err(format!("the chosen port {port} of {service} moved from {number} to {now:?}"));
                }
            }
        }
        Ok(())
    }

    /// What a recovery reads.
    pub fn state(&self) -> EnvironmentState {
        let run = self.environment.run.and_then(|run| self.runs.get(&run)).filter(|run| !run.state.is_final()).cloned();
        let matters = |number: &ReleaseNumber| {
            Some(*number) == self.environment.stable || run.as_ref().is_some_and(|run| run.release == Some(*number))
        };
        EnvironmentState {
            environment: self.environment.clone(),
            resources: self.resources.clone(),
            instances: self.instances.clone(),
            releases: self.releases.iter().filter(|(n, _)| matters(n)).map(|(n, r)| (*n, r.clone())).collect(),
            run,
        }
    }

    /// The run that has not ended.
    pub fn active_run(&self) -> Option<&RunRecord> {
        self.environment.run.and_then(|run| self.runs.get(&run)).filter(|run| !run.state.is_final())
    }

    /// The release in force.
    pub fn stable(&self) -> Option<&ReleaseRecord> {
        self.environment.stable.and_then(|number| self.releases.get(&number))
    }
}
