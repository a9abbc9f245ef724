//! Laws of a world at rest: nothing will ever happen again, so what has not ended never will.

use orchestra_model::{
    Name,
    desired::Service,
    record::{RunKind, RunState},
};

use super::service_in;
use crate::rollouts::world::{Process, World, version_of};

impl World {
    /// Laws once nothing happens any more.
    pub(in crate::rollouts) fn check_rest(&mut self) {
        if self.failure.is_some() {
            return;
        }
        let mut broken = Vec::new();
        if self.server.is_none() {
            broken.push("the server is not there".to_owned());
        }
        if let Some(run) = self.active_run() {
            broken.push(format!("{} goes on, and nothing will ever happen again", run.id));
        }
        let unrepaired =
            self.disk.run.as_ref().and_then(|run| run.reverted.as_ref()).is_some_and(|text| text.contains("except"));
        let down = self
            .disk
            .run
            .as_ref()
            .is_some_and(|run| matches!(run.kind, RunKind::Down { .. }) && run.state == RunState::Succeeded);
        let stable = self.stable_desired();
        // What was kept of an earlier release goes on serving where the release in force cannot.
        let whole = |name: &Name, service: &Service| {
            let current = |process: &&Process| {
                process.key.instance.workload == *name && process.version == version_of(service) && process.ready
            };
            self.processes.iter().filter(current).count() >= service.replicas as usize
        };
        for process in &self.processes {
            let name = &process.key.instance.workload;
            if !process.gone {
                let service = service_in(stable, name);
                let known = self
                    .disk
                    .instances
                    .get(&process.key.instance)
                    .is_some_and(|record| record.attempt == process.key.attempt);
                if !known {
                    broken.push(format!("{} runs, and nobody knows it", process.key));
                } else if service.is_none_or(|service| version_of(service) != process.version && whole(name, service))
                    && !unrepaired
                {
                    broken.push(format!("{} runs, and the release in force does not want it", process.key));
                }
            }
        }
        if down && self.processes.iter().any(|process| !process.gone) {
            broken.push("something runs after `down`".to_owned());
        }
        for (id, resource) in stable.into_iter().flat_map(|desired| &desired.resources) {
            let Some(service) = resource.as_service() else { continue };
            let version = version_of(service);
            let current = |process: &&Process| {
                process.key.instance.workload == id.name && process.version == version && process.is_alive()
            };
            let alive: Vec<&Process> = self.processes.iter().filter(current).collect();
            let lasting = self.versions[version_of(service)].is_solid() && self.laws.kills == 0;
            if unrepaired || down {
                continue;
            }
            if alive.len() > service.replicas as usize || (lasting && alive.len() != service.replicas as usize) {
                broken.push(format!("{id} runs {} times, but {} are wanted", alive.len(), service.replicas));
            }
            if let Some(process) =
                alive.iter().find(|process| process.active != (process.ready && !service.ports.is_empty()))
                && !service.ports.is_empty()
                && service.health.ready.is_some()
                && lasting
            {
                broken.push(format!(
                    "{} is ready: {}, and gets requests: {}",
                    process.key, process.ready, process.active
                ));
            }
        }
        for law in broken {
            self.violate(law);
        }
    }
}
