//! Between the machines' probe keys and the prober's numbers.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use orchestra_machine::{Leaf, ProbeKey, ProbeTarget};
use orchestra_model::{EnvironmentId, launch::Exec};
use orchestra_probe::{HttpCheck, ProbeId, Prober, Target};

/// Knows which number stands for which leaf of which instance.
pub(crate) struct ProbeHub {
    prober: Prober,
    names: Mutex<Names>,
}

#[derive(Default)]
struct Names {
    last: u64,
    ids: HashMap<(EnvironmentId, ProbeKey), ProbeId>,
    keys: HashMap<ProbeId, (EnvironmentId, ProbeKey)>,
}

impl ProbeHub {
    pub(crate) fn new(prober: Prober) -> Self {
        Self { prober, names: Mutex::default() }
    }

    /// Begins to ask, or asks at another rate.
    pub(crate) fn start(
        &self,
        environment: &EnvironmentId,
        key: ProbeKey,
        target: ProbeTarget,
        every: Duration,
        timeout: Duration,
    ) {
        let id = {
            let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
            let name = (environment.clone(), key);
            if let Some(id) = names.ids.get(&name) {
                *id
            } else {
                names.last += 1;
                let id = ProbeId(names.last);
                names.ids.insert(name.clone(), id);
                names.keys.insert(id, name);
                id
            }
        };
        let leaf = match target.leaf {
            Leaf::Http { address, method, path, headers, body, status, contains } => {
                orchestra_probe::Leaf::Http(HttpCheck {
                    address,
                    method,
                    path,
                    headers,
                    body,
                    status: status.into_iter().collect(),
                    contains,
                })
            }
            Leaf::Tcp { address } => orchestra_probe::Leaf::Tcp { address },
            Leaf::Grpc { address, service } => orchestra_probe::Leaf::Grpc { address, service },
            Leaf::Exec { command } => orchestra_probe::Leaf::Exec(Exec { key: target.launch, command, timeout }),
        };
        self.prober.set(Target { id, leaf, every, timeout });
    }

    /// Stops asking.
    pub(crate) fn stop(&self, environment: &EnvironmentId, key: &ProbeKey) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = names.ids.remove(&(environment.clone(), key.clone())) {
            names.keys.remove(&id);
            self.prober.remove(id);
        }
    }

    /// Who asked.
    pub(crate) fn who(&self, id: ProbeId) -> Option<(EnvironmentId, ProbeKey)> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).keys.get(&id).cloned()
    }
}
