//! The time of a preview, and what it has used.
//!
//! ```text
//!   up ---> live --- soon over: said once ---> over ---> the driver takes it down ---> removed
//!            ^  |                               |  ^              |
//!            +--+ up again: its time anew       +--+ failed: tried again after a pause
//! ```
//!
//! The end is written down as wall-clock time, so that it holds while no server runs; a living server counts from its
//! own start, so that a changed clock ends nothing early. A clock that was set back between two servers prolongs a
//! preview by no more than its whole time. A run that goes on is never cut short: its end is waited for.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orchestra_model::{
    EventKind, InstanceId, Now, ResourceId,
    launch::{LaunchKey, Usage},
    preview::{Preview, PreviewRecord, Used},
    quantity::ByteSize,
    time::UnixMillis,
};

use super::Environment;
use crate::Effect;

#[cfg(test)]
mod tests;

/// Longest time before its end at which that is said.
const WARN_BEFORE: Duration = Duration::from_secs(3600);
/// Pause before a preview that could not be taken down is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// Pause between two looks at what it uses, as the metrics server of Kubernetes has it.
const MEASURE_EVERY: Duration = Duration::from_secs(15);
/// What it has used is written down at least so often: a crash costs no more of the account.
const KEEP_EVERY: Duration = Duration::from_secs(300);

/// What a machine knows of its preview beside the record.
#[derive(Clone, Debug, Default)]
pub(super) struct Watch {
    /// When its end is tried again.
    again_at: Option<Now>,
    measure_at: Now,
    keep_at: Now,
    /// What was seen of each start of an instance at the last look.
    seen: BTreeMap<InstanceId, Seen>,
    /// Starts that were there when this machine was recovered: what they used before, nobody knows.
    recovered: BTreeSet<(InstanceId, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    attempt: u32,
    at: Now,
    cpu: Duration,
    memory: ByteSize,
}

impl Environment {
    /// What is written down of it, if it is a preview that is there.
    pub fn preview(&self) -> Option<&PreviewRecord> {
        self.record.preview.as_deref().filter(|record| record.is_live())
    }

    /// How much of its time it has left, if that ends. A changed clock changes nothing about it while a server lives.
    pub(crate) fn preview_left(&self, now: Now) -> Option<Duration> {
        self.preview()?.expires_at.map(|at| self.moment(at).since(now))
    }

    /// Whether its time is over and nothing stands in the way of taking it down.
    pub fn preview_is_over(&self, now: Now) -> bool {
        let over = self.preview().and_then(|record| record.expires_at).is_some_and(|at| at <= self.wall(now));
        over && self.run.is_none() && self.watch.again_at.is_none_or(|at| at <= now)
    }

    /// An `up` makes it a preview, or begins its time anew.
    pub(super) fn enter_preview(&mut self, now: Now, preview: &Preview) {
        let at = self.wall(now);
        let ttl = preview.ttl.duration();
        let known = self.preview();
        let renewed = known.is_some();
        let expires_at = (!ttl.is_zero()).then(|| at.saturating_add(millis(ttl)));
        let record = PreviewRecord {
            preview: preview.clone(),
            created_at: known.map_or(at, |known| known.created_at),
            expires_at,
            warned: false,
            removed_at: None,
            used: known.map(|known| known.used).unwrap_or_default(),
        };
        self.record.preview = Some(Box::new(record));
        self.record_changed = true;
        self.watch.again_at = None;
        if renewed {
            let cause = match expires_at {
                Some(_) => format!("its time begins anew: {}", preview.ttl),
                None => "it stays until it is taken down".to_owned(),
            };
            self.note(EventKind::PreviewRenewed, None, None, None, cause);
        }
    }

    /// Its time is over: says so, and leaves the rest to the driver, who takes it down.
    pub(super) fn preview_over(&mut self, now: Now) {
        let Some(record) = self.preview() else { return };
        let cause = format!("its ttl of {} is over", record.preview.ttl);
        self.watch.again_at = Some(now + AGAIN);
        self.note(EventKind::PreviewExpired, None, None, None, cause);
    }

    /// Nothing of it is left.
    pub(super) fn preview_removed(&mut self, now: Now) {
        let at = self.wall(now);
        if let Some(record) = self.record.preview.as_deref_mut().filter(|record| record.is_live()) {
            record.removed_at = Some(at);
            self.record_changed = true;
            self.watch = Watch::default();
        }
    }

    /// After a recovery: a clock that was set back gives it no more than its time.
    pub(super) fn recover_preview(&mut self, now: Now) {
        let latest = |record: &PreviewRecord, at: UnixMillis| at.saturating_add(millis(record.preview.ttl.duration()));
        let at = self.wall(now);
        self.watch.recovered = self.instances.values().map(|i| (i.record().id.clone(), i.record().attempt)).collect();
        if let Some(record) = self.record.preview.as_deref_mut().filter(|record| record.is_live())
            && record.expires_at.is_some_and(|end| end > latest(record, at))
        {
            record.expires_at = Some(latest(record, at));
            self.record_changed = true;
        }
    }

    // === clocks ===

    pub(super) fn preview_deadline(&self) -> Option<Now> {
        let record = self.preview()?;
        let end = record.expires_at.map(|at| self.moment(at));
        let warn = end.filter(|_| !record.warned).map(|end| warn_at(record, end));
        // Once it is over, only the next try is due; the end of a run wakes the driver by itself.
        let over =
            if self.run.is_some() { None } else { end.map(|end| self.watch.again_at.map_or(end, |at| at.max(end))) };
        let measure = (!self.instances.is_empty()).then_some(self.watch.measure_at);
        [warn, over, measure].into_iter().flatten().min()
    }

    pub(super) fn preview_tick(&mut self, now: Now) {
        let Some(record) = self.preview() else { return };
        if let Some(end) = record.expires_at.map(|at| self.moment(at))
            && !record.warned
            && warn_at(record, end) <= now
        {
            let name = &self.record.id.environment;
            let left = end.since(now);
            let when = if left.is_zero() { "now".to_owned() } else { format!("in {}", rounded(left)) };
            let cause = format!("it is taken down {when}; `orchestra up --env {name}` begins its time anew");
            self.record.preview.as_mut().expect("seen above").warned = true;
            self.record_changed = true;
            self.note(EventKind::PreviewExpiring, None, None, None, cause);
        }
        if self.watch.measure_at <= now {
            self.watch.measure_at = now + MEASURE_EVERY;
            self.measure_preview();
        }
    }

    // === use ===

    fn measure_preview(&mut self) {
        let mut keys: BTreeMap<ResourceId, Vec<LaunchKey>> = BTreeMap::new();
        for instance in self.instances.values().filter(|instance| instance.is_started()) {
            let record = instance.record();
            let resource = ResourceId::new(record.kind, record.id.workload.clone());
            // What its autoscaler measures comes by itself.
            let scaling = self.workloads.get(&resource).and_then(|workload| workload.scaling.as_ref());
            if scaling.is_none_or(|scaling| !scaling.measures()) {
                keys.entry(resource).or_default().push(self.launch_key(&record.id, record.attempt));
            }
        }
        let looks = keys.into_iter().map(|(resource, keys)| Effect::MeasureUsage { service: resource.name, keys });
        self.out.effects.extend(looks);
    }

    /// Adds to the account what was used since the last look.
    pub(super) fn account(&mut self, now: Now, usage: &[(LaunchKey, Usage)]) {
        let Some(record) = self.record.preview.as_deref_mut().filter(|record| record.is_live()) else { return };
        for (key, usage) in usage {
            let (instance, attempt) = (&key.instance, key.attempt);
            if !self.instances.contains_key(instance) {
                self.watch.seen.remove(instance);
                continue;
            }
            let now_seen = Seen { attempt, at: now, cpu: usage.cpu, memory: usage.memory };
            let before = self.watch.seen.insert(instance.clone(), now_seen).filter(|seen| seen.attempt == attempt);
            match before {
                Some(before) => add(&mut record.used, &before, &now_seen),
                // Its first look: all that it used is new, unless it is older than this machine.
                None if !self.watch.recovered.contains(&(instance.clone(), attempt)) => {
                    add(&mut record.used, &Seen { cpu: Duration::ZERO, ..now_seen }, &now_seen);
                }
                None => {}
            }
        }
        if self.watch.keep_at <= now {
            self.watch.keep_at = now + KEEP_EVERY;
            self.record_changed = true;
        }
    }
}

fn add(used: &mut Used, before: &Seen, after: &Seen) {
    let over = after.at.since(before.at);
    // Counters that ran backwards begin anew.
    used.cpu_ms = used.cpu_ms.saturating_add(millis(after.cpu.saturating_sub(before.cpu)));
    let held = u128::from(before.memory.as_bytes()) * over.as_millis() / (1_024 * 1_024 * 1_000);
    used.memory_mib_s = used.memory_mib_s.saturating_add(u64::try_from(held).unwrap_or(u64::MAX));
}

fn warn_at(record: &PreviewRecord, end: Now) -> Now {
    let before = (record.preview.ttl.duration() / 10).min(WARN_BEFORE);
    Now::at(end.since_origin().saturating_sub(before))
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// For people: whole seconds.
fn rounded(span: Duration) -> orchestra_model::quantity::Timespan {
    orchestra_model::quantity::Timespan::seconds(span.as_millis().div_ceil(1_000).try_into().unwrap_or(u64::MAX))
}
