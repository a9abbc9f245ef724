//! Traffic that a person holds up: new requests to a service wait at the proxy, and go on when they say so or when the
//! time is over.
//!
//! The pause is in the environment's record, so it outlives the server and any run; its end is wall-clock time there, and
//! counted from the server's own start while it lives, as with previews. It lies over whatever a rollout says of the same
//! routes. Requests wait for as long as the pause lasts and then for an instance as ever, in the route's bounded queue.

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind, Name, Now,
    quantity::Timespan,
    traffic::{LONGEST_PAUSE, PausedTraffic, TrafficCommand},
};

use super::{Environment, service_id};

#[cfg(test)]
mod tests;

/// A wish to hold traffic up, or to let it go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficMove {
    /// Whose.
    pub service: Name,
    /// What is wanted.
    pub command: TrafficCommand,
    /// Who wants it.
    pub by: String,
}

impl Environment {
    /// Whether [`Event::MoveTraffic`](super::Event::MoveTraffic) would mean something; otherwise why not.
    ///
    /// # Errors
    ///
    /// There is no such service with a port, the time is too short or too long, or nothing is paused.
    pub fn can_move_traffic(&self, wish: &TrafficMove) -> Result<(), Diagnostic> {
        let TrafficMove { service, command, .. } = wish;
        match command {
            TrafficCommand::Resume if self.record.paused.contains_key(service) => return Ok(()),
            TrafficCommand::Pause(span) if span.duration() > LONGEST_PAUSE.duration() || span.duration().is_zero() => {
                let message = format!("traffic can be paused for at most {LONGEST_PAUSE}, and not for {span}");
                return Err(Diagnostic::error(Code::BAD_REQUEST, message)
                    .help("pause it again before the time is over to go on with the pause"));
            }
            _ => {}
        }
        let published = |name: &Name| {
            let workload = self.workloads.get(&service_id(name))?;
            let spec = workload.want.as_ref().map(|want| &want.resource).or(workload.last.as_ref())?;
            spec.as_service().filter(|service| !service.ports.is_empty())
        };
        if published(service).is_none() {
            let known: Vec<&str> =
                self.workloads.keys().map(|id| &id.name).filter(|n| published(n).is_some()).map(Name::as_str).collect();
            let message = format!("there is no service `{service}` with a published port in {}", self.record.id);
            let help = if known.is_empty() {
                "ports are published in the stack file, under `ports`".to_owned()
            } else {
                format!("services with one are: {}", known.join(", "))
            };
            return Err(Diagnostic::error(Code::NOT_FOUND, message).help(help));
        }
        if *command == TrafficCommand::Resume {
            let message = format!("the traffic of service {service} is not paused");
            return Err(Diagnostic::error(Code::NOT_FOUND, message).help("`orchestra status` shows what waits"));
        }
        Ok(())
    }

    /// A person holds traffic up, or lets it go on. A second pause takes the place of the first.
    pub(super) fn move_traffic(&mut self, now: Now, wish: TrafficMove) {
        if self.can_move_traffic(&wish).is_err() {
            return;
        }
        let TrafficMove { service, command, by } = wish;
        match command {
            TrafficCommand::Pause(span) => {
                let since = self.wall(now);
                let length = u64::try_from(span.duration().as_millis()).unwrap_or(u64::MAX);
                let cause = format!("new requests wait for {span}, by {by}");
                self.record
                    .paused
                    .insert(service.clone(), PausedTraffic { since, until: since.saturating_add(length), by });
                self.record_changed = true;
                self.note(EventKind::TrafficPaused, Some(service_id(&service)), None, None, cause);
                self.routes.touch();
            }
            TrafficCommand::Resume => self.resume_traffic(&service, &format!("by {by}")),
        }
    }

    fn resume_traffic(&mut self, service: &Name, why: &str) {
        if self.record.paused.remove(service).is_some() {
            self.record_changed = true;
            let cause = format!("requests go on: {why}");
            self.note(EventKind::TrafficResumed, Some(service_id(service)), None, None, cause);
            self.routes.touch();
        }
    }

    /// When the next pause is over.
    pub(super) fn traffic_deadline(&self) -> Option<Now> {
        self.record.paused.values().map(|paused| self.moment(paused.until)).min()
    }

    /// A clock that was set back between two servers prolongs a pause by no more than its whole time.
    pub(super) fn recover_traffic(&mut self, now: Now) {
        let at = self.wall(now);
        for paused in self.record.paused.values_mut().filter(|paused| paused.since > at) {
            (paused.since, paused.until) = (at, at.saturating_add(paused.until.saturating_sub(paused.since)));
            self.record_changed = true;
        }
    }

    /// Nothing is left of a service.
    pub(super) fn forget_traffic(&mut self, service: &Name) {
        self.record_changed |= self.record.paused.remove(service).is_some();
    }

    pub(super) fn traffic_tick(&mut self, now: Now) {
        let over = |paused: &PausedTraffic| self.moment(paused.until) <= now;
        let over: Vec<Name> =
            self.record.paused.iter().filter(|(_, paused)| over(paused)).map(|(service, _)| service.clone()).collect();
        for service in over {
            self.resume_traffic(&service, "the time of the pause is over");
        }
    }

    /// How long new requests to a paused service wait beside what its route gives them anyway.
    pub(super) fn traffic_pause(&self, service: &Name) -> Option<Timespan> {
        let paused = self.record.paused.get(service)?;
        Some(Timespan::millis(paused.until.saturating_sub(paused.since)))
    }

    /// Whether the data plane does what was last said of a service's traffic.
    pub fn traffic_in_force(&self, service: &Name) -> bool {
        self.routes_in_force(&service_id(service))
    }
}

/// Longer by a pause.
pub(super) fn prolonged(hold: Timespan, pause: Option<Timespan>) -> Timespan {
    let pause = pause.map_or(Duration::ZERO, Timespan::duration);
    Timespan::millis(u64::try_from((hold.duration() + pause).as_millis()).unwrap_or(u64::MAX))
}
