//! What the autoscaler is told: one value per evaluation, with nothing in it that it could not have been told by any
//! target.

use std::{collections::BTreeMap, time::Duration};

use orchestra_model::{
    InstanceId, Now,
    autoscale::MetricSource,
    quantity::{ByteSize, Cpu, Measure},
};

/// A service at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Instances that are wanted now, all releases together: the number that the last decision, a person or a release
    /// set. The second set of a rollout does not add to it.
    pub replicas: u32,
    /// Every instance that exists, of whatever release.
    pub instances: Vec<InstanceSample>,
    /// What was measured. A source that is missing here is not available.
    pub readings: BTreeMap<MetricSource, Reading>,
    /// Requests, if somebody counts them; needed only by a service that may sleep.
    pub activity: Option<Activity>,
    /// A rollout of the service goes on.
    pub rollout: bool,
}

impl Sample {
    /// Instances that neither leave nor were given up.
    pub(super) fn staying(&self) -> impl Iterator<Item = &InstanceSample> {
        self.instances.iter().filter(|instance| !matches!(instance.phase, InstancePhase::Leaving))
    }

    /// Instances that stay and are ready.
    pub(super) fn ready(&self) -> usize {
        self.staying().filter(|instance| matches!(instance.phase, InstancePhase::Running { ready: true, .. })).count()
    }
}

/// An instance at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceSample {
    /// Which.
    pub id: InstanceId,
    /// Where it stands.
    pub phase: InstancePhase,
    /// CPU that its release asks for.
    pub cpu: Option<Cpu>,
    /// Memory that its release asks for.
    pub memory: Option<ByteSize>,
}

/// Where an instance stands, as far as scaling is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstancePhase {
    /// It is wanted and its process does not run yet.
    Pending,
    /// Its process runs.
    Running {
        /// Since then.
        started: Now,
        /// Whether it is ready.
        ready: bool,
        /// When `ready` last changed; the start, if it never did.
        since: Now,
    },
    /// It leaves, or was given up: it counts for nothing.
    Leaving,
}

/// What was measured of one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// By instance; those that are missing were not measured.
    PerInstance(BTreeMap<InstanceId, Point>),
    /// Of the service as a whole, requests that wait for an instance included.
    Total(Measure),
    /// Nothing, and why: one clause.
    Unavailable(String),
}

/// One measurement of one instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// CPU in cores, memory in bytes, or what the metric counts.
    pub value: Measure,
    /// When it was taken.
    pub at: Now,
    /// Time over which it is an average; zero for a momentary value.
    pub over: Duration,
}

/// Requests of a service, over all its routes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Requests that have begun, by any count that only grows. A count that is not the one of the last sample says that
    /// there were requests in between, also if it began anew.
    pub begun: u64,
    /// Requests and streams under way.
    pub in_flight: u64,
    /// Requests that wait for an instance.
    pub held: u64,
}

impl Activity {
    pub(super) fn is_busy(self) -> bool {
        self.in_flight > 0 || self.held > 0
    }
}
