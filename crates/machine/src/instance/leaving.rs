//! How an instance leaves: it finishes what is in flight as far as its budget allows, and is told to stop.
//!
//! The budget begins when the data plane has acknowledged that no new request reaches it, because until then there may be
//! more to finish.

use std::time::Duration;

use orchestra_model::{EventKind, Now, launch::Termination, record::InstanceIntent};

use super::{CUT_PATIENCE, Command, Instance, Phase};

impl Instance {
    pub(super) fn drain(&mut self, now: Now, cause: String, brief: bool) -> Vec<Command> {
        if let Phase::Draining { requests_by, streams_by, .. } = &mut self.phase {
            // Taken down while it drains: streams get no more than requests from here on.
            if brief && !self.brief_drain {
                self.brief_drain = true;
                *streams_by = (*streams_by).min((now + self.policy.drain.requests.duration()).max(*requests_by));
            }
            return Vec::new();
        }
        if !matches!(self.phase, Phase::Ready | Phase::Unready | Phase::Starting) || !self.policy.routed || !self.proven
        {
            return self.stop(now, cause);
        }
        self.record.intent = InstanceIntent::Drain;
        self.brief_drain = brief;
        self.in_flight = (0, 0);
        self.withdrawn = false;
        // A data plane that does not take the new routes cannot keep it for ever.
        let (requests, streams) = self.drain_budget();
        let (requests_by, streams_by) = (now + CUT_PATIENCE + requests, now + CUT_PATIENCE + streams);
        self.enter(Phase::Draining { requests_by, streams_by, cut: None }, now);
        vec![self.stop_probes(), Command::Persist, Command::Note(EventKind::InstanceDraining, cause)]
    }

    fn drain_budget(&self) -> (Duration, Duration) {
        let requests = self.policy.drain.requests.duration();
        let streams = if self.brief_drain { requests } else { self.policy.drain.streams.duration() };
        (requests, streams)
    }

    pub(super) fn withdraw(&mut self, now: Now) {
        let (requests, streams) = self.drain_budget();
        if let Phase::Draining { requests_by, streams_by, cut: None } = &mut self.phase
            && !self.withdrawn
        {
            self.withdrawn = true;
            (*requests_by, *streams_by) = (now + requests, now + streams);
        }
    }

    pub(super) fn stop(&mut self, now: Now, cause: String) -> Vec<Command> {
        let persist = self.record.intent != InstanceIntent::Stop;
        match self.phase {
            Phase::Gone => Vec::new(),
            // Nothing runs: there is nothing to stop.
            Phase::Pending { .. } => {
                self.record.intent = InstanceIntent::Stop;
                self.enter(Phase::Gone, now);
                vec![Command::Note(EventKind::InstanceGone, cause)]
            }
            Phase::Ended { .. } => {
                self.record.intent = InstanceIntent::Stop;
                self.enter(Phase::Gone, now);
                // That nothing is left of a completed one was said when it completed.
                let note = (!self.completed).then_some(Command::Note(EventKind::InstanceGone, cause));
                note.into_iter().chain([Command::Forget(self.record.attempt)]).collect()
            }
            Phase::Exited { .. } => {
                self.record.intent = InstanceIntent::Stop;
                if persist { vec![Command::Persist] } else { Vec::new() }
            }
            Phase::Stopping { .. } if !persist => Vec::new(),
            _ => self.begin_stop(now, cause),
        }
    }

    pub(super) fn begin_stop(&mut self, now: Now, cause: String) -> Vec<Command> {
        self.record.intent = InstanceIntent::Stop;
        self.terminate(now, cause)
    }

    /// Tells the program to stop.
    pub(super) fn terminate(&mut self, now: Now, why: String) -> Vec<Command> {
        self.enter(Phase::Stopping { why: why.clone() }, now);
        vec![
            self.stop_probes(),
            Command::Persist,
            Command::Note(EventKind::InstanceStopping, why),
            Command::Terminate(self.termination()),
        ]
    }

    pub(super) fn termination(&self) -> Termination {
        Termination { signal: self.policy.stop.signal, grace: self.policy.stop.grace }
    }
}

/// Requests and streams, such as `2 requests and 1 stream`.
pub(super) fn in_words((requests, streams): (u32, u32)) -> String {
    let plural = |count: u32| if count == 1 { "" } else { "s" };
    format!("{requests} request{} and {streams} stream{}", plural(requests), plural(streams))
}

#[cfg(test)]
mod tests {
    use orchestra_model::{
        ResourceKind,
        desired::{Drain, Strategy},
        quantity::Timespan,
        record::InstanceRecord,
    };

    use super::*;
    use crate::{environment::fixture, instance::Policy};

    /// Leaves at 0, with no new requests from then on.
    fn leaving(drain: Drain) -> Instance {
        let service = fixture::service(1, Strategy::Recreate);
        let record = InstanceRecord {
            environment: "demo/dev".parse().unwrap(),
            id: "api-r1-1".parse().unwrap(),
            kind: ResourceKind::Service,
            launch_digest: service.launch_digest(),
            attempt: 1,
            ports: [].into(),
            intent: InstanceIntent::Run,
            was_ready: true,
            last_exit: None,
            forced: None,
            recent_restarts: 0,
            restarts: 0,
            created_at: 0,
        };
        let policy = Policy { drain, ..Policy::of_service(&service) };
        let mut instance = Instance::new(record, policy, None, None, Now::at(Duration::ZERO));
        (instance.phase, instance.proven) = (Phase::Ready, true);
        instance.drain(Now::at(Duration::ZERO), "replaced".to_owned(), false);
        instance.withdraw(Now::at(Duration::ZERO));
        instance
    }

    #[test]
    fn each_kind_has_its_own_budget_and_both_the_longer_one() {
        for (requests, streams) in [(30, 900), (30, 8), (30, 0)] {
            let seconds = |seconds: u32| Timespan::seconds(seconds.into());
            let mut instance = leaving(Drain { requests: seconds(requests), streams: seconds(streams) });
            let longer = requests.max(streams);
            for (in_flight, ends) in [((1, 0), requests), ((0, 1), streams), ((1, 1), longer), ((0, 0), requests)] {
                instance.in_flight = in_flight;
                let ends = Now::at(Duration::from_secs(ends.into()));
                assert_eq!(instance.deadline(), Some(ends), "{in_flight:?} of {requests} s and {streams} s");
            }
            // Taken down in the middle: nothing gets longer, and streams as long as requests at most.
            instance.drain(Now::at(Duration::from_secs(1)), "down".to_owned(), true);
            instance.in_flight = (0, 1);
            let ends = Now::at(Duration::from_secs(streams.min(requests + 1).into()));
            assert_eq!(instance.deadline(), Some(ends), "{requests} s and {streams} s");
        }
    }
}
