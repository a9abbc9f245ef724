//! What is shown of an environment: enough for every screen, and no more.
//!
//! A look must stay cheap however large the environment is, because screens look often. So a [`View`] carries neither
//! plans nor whole specifications: its record is shared, and of a specification it has what a status shows.

use std::{collections::BTreeMap, sync::Arc};

use orchestra_machine::{
    Environment,
    status::{InstanceStatus, Status},
};
use orchestra_model::{
    Event, InstanceId, Name, Now, Resource, ResourceId, desired::Protocol, record::EnvironmentRecord, time::UnixMillis,
};

use crate::clock::Clock;

/// An environment at one moment, with what its record adds.
#[derive(Clone, Debug)]
pub struct View {
    /// Its record.
    pub record: Arc<EnvironmentRecord>,
    /// Of what a run puts into force, or was last applied: what the status does not say. Resources of which there is
    /// nothing to show are missing.
    pub shown: BTreeMap<ResourceId, Shown>,
    /// What its machine shows.
    pub status: Status,
    /// When that was so, by the wall clock.
    pub at: UnixMillis,
    /// Why nothing can be written at the moment.
    pub trouble: Option<String>,
    /// When the control plane was opened, by the wall clock.
    pub(crate) opened_at: UnixMillis,
    /// The events by which instances entered the phases in which that found them.
    pub(crate) entered: Arc<BTreeMap<InstanceId, Event>>,
}

/// What a status shows of a specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A service: what is spoken on its published ports.
    Ports(BTreeMap<Name, Protocol>),
    /// A volume.
    Volume {
        /// Absolute path.
        path: String,
        /// Whether it may be deleted.
        managed: bool,
    },
}

impl View {
    /// Since when an instance is in its phase, by the wall clock. A machine counts from its recovery; what happened before
    /// that is in the history.
    pub fn since(&self, instance: &InstanceStatus) -> UnixMillis {
        let counted =
            self.at.saturating_sub(UnixMillis::try_from(instance.since.as_millis()).unwrap_or(UnixMillis::MAX));
        if counted > self.opened_at {
            return counted;
        }
        let entered = self.entered.get(&instance.id);
        let fits = |event: &&Event| event.kind.as_str().strip_prefix("instance_") == Some(instance.phase);
        entered.filter(fits).map_or(counted, |event| event.at.min(counted))
    }

    /// Whether the history has to say since when something is as it is.
    pub(crate) fn needs_history(&self) -> bool {
        let mut instances = self.status.resources.iter().flat_map(|resource| &resource.instances);
        instances.any(|instance| self.since(instance) <= self.opened_at)
    }
}

/// What an environment's driver knows of it.
pub(crate) struct Look {
    pub(crate) record: Arc<EnvironmentRecord>,
    pub(crate) shown: BTreeMap<ResourceId, Shown>,
    pub(crate) status: Status,
    pub(crate) at: UnixMillis,
}

impl Look {
    pub(crate) fn at(machine: &Environment, record: &Arc<EnvironmentRecord>, now: Now) -> Self {
        let (at, status) = (Clock::wall(), machine.status(now));
        let desired = machine.run().and_then(|run| run.plan.desired.as_ref());
        let shown = status.resources.iter().filter_map(|resource| {
            let planned = desired.and_then(|desired| desired.resources.get(&resource.id));
            let spec = planned.or_else(|| Some(&machine.resources().get(&resource.id)?.applied))?;
            Some((resource.id.clone(), show(spec)?))
        });
        let shown = shown.collect();
        Self { record: Arc::clone(record), shown, status, at }
    }
}

fn show(spec: &Resource) -> Option<Shown> {
    match spec {
        Resource::Service(service) if service.ports.is_empty() => None,
        Resource::Service(service) => {
            Some(Shown::Ports(service.ports.iter().map(|(name, port)| (name.clone(), port.protocol)).collect()))
        }
        Resource::Volume(volume) => Some(Shown::Volume { path: volume.path.clone(), managed: volume.managed }),
        Resource::Job(_) => None,
    }
}
