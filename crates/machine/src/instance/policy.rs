//! What the spec of a service or job says about the life of its instances.

use orchestra_model::{
    desired::{Drain, Job, Restart, RestartPolicy, Service, Signal, Stop},
    quantity::Timespan,
};

/// What the spec says about the life of an instance. It can change while the instance runs.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Whether a successful exit is the goal (a job).
    pub completes: bool,
    /// Restarts.
    pub restart: Restart,
    /// How it is stopped.
    pub stop: Stop,
    /// What it may finish when it leaves.
    pub drain: Drain,
    /// Whether requests reach it through a route.
    pub routed: bool,
    /// Longest time to first readiness; for a job, longest run.
    pub start_deadline: Timespan,
}

impl Policy {
    /// Of a service.
    pub fn of_service(service: &Service) -> Self {
        Self {
            completes: false,
            restart: service.restart.clone(),
            stop: service.stop,
            drain: service.rollout.drain,
            routed: !service.ports.is_empty(),
            start_deadline: service.health.start_deadline,
        }
    }

    /// Of an instance of which nobody knows any more what it was made from: it can only be stopped.
    pub fn unknown() -> Self {
        let second = Timespan::seconds(1);
        Self {
            completes: false,
            restart: Restart {
                policy: RestartPolicy::Never,
                backoff: second,
                max_backoff: second,
                reset_after: second,
                budget: Some(0),
            },
            stop: Stop { signal: Signal::Term, grace: Timespan::seconds(10) },
            // It may have been routed, and have requests in flight still.
            drain: Drain { requests: Timespan::seconds(30), streams: Timespan::seconds(30) },
            routed: false,
            start_deadline: Timespan::seconds(60),
        }
    }

    /// Of a job: retries are restarts after a failure.
    pub fn of_job(job: &Job) -> Self {
        Self {
            completes: true,
            restart: Restart {
                policy: RestartPolicy::OnFailure,
                backoff: job.backoff,
                max_backoff: Timespan::seconds(3600),
                reset_after: Timespan::seconds(u64::from(u32::MAX)),
                budget: Some(job.retries),
            },
            stop: job.stop,
            drain: Drain { requests: Timespan::default(), streams: Timespan::default() },
            routed: false,
            start_deadline: job.timeout,
        }
    }
}
