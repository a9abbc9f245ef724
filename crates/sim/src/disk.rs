//! The fake disk: applies committed changes as the store does, and refuses what must never be committed.

use std::collections::BTreeMap;

use orchestra_model::{
    EnvironmentId, Event, Generation, InstanceId, Name, ReleaseNumber, ResourceId, RunId,
    record::{
        Change, EnvironmentRecord, EnvironmentState, InstanceRecord, JournalEntry, ReleaseRecord, ResourceRecord, RunRecord,
    },
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
    /// The journal.
    pub journal: Vec<JournalEntry>,
    /// Events.
    pub events: Vec<Event>,
    /// Number of commits.
    pub commits: usize,
}

impl Disk {
    /// An empty disk for an environment.
    pub fn new(id: EnvironmentId) -> Self {
        Self {
            environment: EnvironmentRecord {
                id,
                source: "/stack/orchestra.yaml".to_owned(),
                generation: Generation(0),
                stable: None,
                last_release: ReleaseNumber(0),
                run: None,
                chosen_ports: BTreeMap::new(),
                ordinals: BTreeMap::new(),
            },
            resources: BTreeMap::new(),
            instances: BTreeMap::new(),
            runs: BTreeMap::new(),
            releases: BTreeMap::new(),
            journal: Vec::new(),
            events: Vec::new(),
            commits: 0,
        }
    }

    /// Commits changes as a whole.
    ///
    /// # Errors
    /// The law that they would break.
    pub fn commit(&mut self, changes: &[Change]) -> Result<(), String> {
        self.commits += 1;
        for change in changes {
            match change {
                Change::Environment(record) => {
                    if record.generation < self.environment.generation {
                        return Err("the generation went backwards".to_owned());
                    }
                    if record.last_release < self.environment.last_release {
                        return Err("the last release number went backwards".to_owned());
                    }
                    self.check_ports(record)?;
                    self.environment = record.clone();
                }
                Change::Release(record) => {
                    if self.releases.insert(record.number, (**record).clone()).is_some() {
                        return Err(format!("release {} was written twice", record.number));
                    }
                }
                Change::ReleaseState(_, number, state) => {
                    let Some(release) = self.releases.get_mut(number) else {
                        return Err(format!("release {number} is not known"));
                    };
                    release.state = *state;
                }
                Change::Run(record) => {
                    if let Some(old) = self.runs.get(&record.id)
                        && old.state.is_final()
                    {
                        return Err(format!("{} has ended and was written again", record.id));
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
                Change::Instance(record) => {
                    if let Some(old) = self.instances.get(&record.id)
                        && old.attempt > record.attempt
                    {
                        return Err(format!("the attempt of {} went backwards", record.id));
                    }
                    self.instances.insert(record.id.clone(), (**record).clone());
                }
                Change::ForgetInstance(_, id) => {
                    self.instances.remove(id);
                }
                Change::Resource(record) => {
                    self.resources.insert(record.id.clone(), (**record).clone());
                }
                Change::ForgetResource(_, id) => {
                    self.resources.remove(id);
                }
                Change::Journal(entry) => self.journal.push(entry.clone()),
                Change::Event(event) => self.events.push((**event).clone()),
            }
        }
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
