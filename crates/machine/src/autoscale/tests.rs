//! The autoscaler against a second implementation of the published algorithm, against the published examples, and
//! against laws.

mod laws;
mod load;
mod published;
mod reference;
mod sleep;

use std::{collections::BTreeMap, time::Duration};

use orchestra_model::{
    InstanceId, Now,
    autoscale::{Autoscale, Behavior, Change, Level, Metric, MetricSource, ScalePolicy, Select, ToZero},
    quantity::{ByteSize, Cpu, Measure, Percent, Timespan},
};

use super::{Activity, Autoscaler, InstancePhase, InstanceSample, Point, Reading, Sample};

/// Long after the origin, so that instances can be old.
const START: u64 = 100_000;

fn at(second: u64) -> Now {
    Now::at(Duration::from_secs(START + second))
}

fn policy_of(changes: &[(Change, u64)], select: Select, window: u64) -> Behavior {
    Behavior {
        window: Timespan::seconds(window),
        tolerance: Percent::whole(10),
        policies: changes
            .iter()
            .map(|(change, per)| ScalePolicy { change: *change, per: Timespan::seconds(*per) })
            .collect(),
        select,
    }
}

/// The defaults of Kubernetes.
fn policy(min: u32, max: u32, on: Vec<Metric>) -> Autoscale {
    Autoscale {
        min,
        max,
        on,
        every: Timespan::seconds(15),
        up: policy_of(&[(Change::Percent(100), 15), (Change::Instances(4), 15)], Select::Max, 0),
        down: policy_of(&[(Change::Percent(100), 15)], Select::Max, 300),
        cpu_initialization: Timespan::seconds(300),
        initial_readiness: Timespan::seconds(30),
        to_zero: (min == 0).then_some(ToZero { idle_for: Timespan::seconds(300), cold_start: Timespan::seconds(60) }),
    }
}

fn metric(source: MetricSource, target: Level) -> Metric {
    Metric { source, target }
}

fn average(number: u64) -> Level {
    Level::Average(Measure::whole(number))
}

fn instance_id(ordinal: usize) -> InstanceId {
    format!("api-r1-{ordinal}").parse().unwrap()
}

/// An instance that has been ready for ages.
fn instance(ordinal: usize) -> InstanceSample {
    let long_ago = Now::at(Duration::from_secs(1));
    InstanceSample {
        id: instance_id(ordinal),
        phase: InstancePhase::Running { started: long_ago, ready: true, since: long_ago },
        cpu: Some(Cpu::millis(1000)),
        memory: Some(ByteSize::bytes(1 << 30)),
    }
}

/// That many instances, all ready, and nothing measured.
fn sample(replicas: u32) -> Sample {
    Sample { replicas, instances: (1..=replicas as usize).map(instance).collect(), ..Sample::default() }
}

/// One measurement, in thousandths, for each of the first instances.
fn points(now: Now, values: &[u64]) -> Reading {
    let point = |value: &u64| Point { value: Measure::thousandths(*value), at: now, over: Duration::ZERO };
    Reading::PerInstance(values.iter().enumerate().map(|(i, value)| (instance_id(i + 1), point(value))).collect())
}

impl Sample {
    fn with(mut self, source: MetricSource, reading: Reading) -> Self {
        self.readings.insert(source, reading);
        self
    }

    fn total(self, source: MetricSource, number: u64) -> Self {
        self.with(source, Reading::Total(Measure::whole(number)))
    }
}

/// A number of instances that follows its autoscaler at once.
struct Scaled {
    autoscaler: Autoscaler,
    replicas: u32,
}

impl Scaled {
    fn new(policy: Autoscale, replicas: u32) -> Self {
        Self { autoscaler: Autoscaler::new(policy), replicas }
    }

    fn step(&mut self, now: Now, readings: &BTreeMap<MetricSource, Reading>) -> u32 {
        let sample = Sample { readings: readings.clone(), ..sample(self.replicas) };
        self.give(now, &sample)
    }

    fn give(&mut self, now: Now, sample: &Sample) -> u32 {
        assert_eq!(sample.replicas, self.replicas);
        if let Some(decision) = self.autoscaler.handle(now, sample) {
            assert_eq!(decision.from, self.replicas);
            assert_ne!(decision.to, self.replicas);
            self.replicas = decision.to;
        }
        self.replicas
    }
}

fn only(source: MetricSource, reading: Reading) -> BTreeMap<MetricSource, Reading> {
    BTreeMap::from([(source, reading)])
}
