//! Flags: what the data plane answers with, and what people and verdicts lay over it.
//!
//! ```text
//!   no run      the flags of the release in force
//!   run         the flags of its release from the beginning, so that its first instance finds them;
//!   |           beside them those that only the release in force has, because its instances still ask for them
//!   reverting   the flags of the release in force at once; beside them those that only the other one has
//!   down        none once everything is gone: it is over when nobody answers any more
//! ```
//!
//! Overrides lie over all of this, whatever release is in force. The flags are one more route of the environment, with
//! an address that is chosen once: they are sent, refused and acknowledged together with those of services.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use orchestra_model::{
    Code, Diagnostic, EventKind, Now,
    desired::{Drain, Protocol},
    flag::{Flag, FlagName, FlagSet, Override, OverrideBy, OverrideServe, ServedFlags},
    quantity::Timespan,
    record::{RunRecord, RunState, StepState},
    route::{Route, RouteId},
    time::UnixMillis,
    traffic::{PortPolicy, Split},
};

use super::Environment;
use crate::rollout::millis;

#[cfg(test)]
mod tests;

/// Time for the data plane to take the flags of a run without steps.
const FLAGS_DEADLINE: Duration = Duration::from_secs(30);

/// The flags of an environment at one moment.
#[derive(Clone, Debug)]
pub struct FlagsStatus {
    /// Definitions and overrides, also overrides without a flag.
    pub set: FlagSet,
    /// Where programs ask, once the address is known: what they find in `OFREP_ENDPOINT`.
    pub endpoint: Option<String>,
    /// Whether the data plane has acknowledged this set.
    pub in_force: bool,
    /// Why it cannot be served.
    pub problem: Option<Diagnostic>,
}

/// A wish to switch a flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlagSwitch {
    /// Which.
    pub flag: FlagName,
    /// What everybody gets; `None` takes the override back.
    pub serve: Option<OverrideServe>,
    /// Who wants it.
    pub by: String,
    /// Why.
    pub reason: String,
}

/// Whether a run has taken everything down.
fn is_down(run: &RunRecord) -> bool {
    let succeeded = run.steps.values().filter(|state| **state == StepState::Succeeded).count();
    run.state == RunState::Running && run.plan.desired.is_none() && succeeded == run.plan.steps.len()
}

impl Environment {
    /// Looks at what is to be served now, and sends it if it is something else than before.
    pub(super) fn refresh_flags(&mut self, at: UnixMillis) {
        self.serve(self.wanted_flags(self.run()), at);
    }

    fn serve(&mut self, set: FlagSet, at: UnixMillis) {
        if self.flags.as_ref().map_or(set.flags.is_empty(), |served| served.set == set) {
            return;
        }
        self.flags = (!set.flags.is_empty()).then(|| Arc::new(ServedFlags { set, changed_at: at }));
        self.routes.touch();
    }

    /// After a recovery nothing has changed: what counts is when it was written down.
    pub(super) fn recover_flags(&mut self, run: Option<&RunRecord>) {
        let release = run.and_then(|run| run.release).or(self.record.stable);
        let created = release.and_then(|number| self.releases.get(&number)).map_or(0, |release| release.created_at);
        let overridden = self.record.flag_overrides.values().map(|over| over.since).max().unwrap_or(0);
        self.serve(self.wanted_flags(run), created.max(overridden));
    }

    fn wanted_flags(&self, run: Option<&RunRecord>) -> FlagSet {
        let of = |number| self.releases.get(&number).map(|release| &release.desired.flags.flags);
        let stable = self.record.stable.and_then(of);
        let (first, second) = match run {
            Some(run) if is_down(run) => (None, None),
            Some(run) if run.state == RunState::Reverting => (stable, run.release.and_then(of)),
            Some(run) => (run.release.and_then(of), stable),
            None => (stable, None),
        };
        let mut flags = second.cloned().unwrap_or_default();
        flags.extend(first.into_iter().flatten().map(|(name, flag)| (name.clone(), flag.clone())));
        FlagSet { flags, overrides: self.record.flag_overrides.clone() }
    }

    /// The route on which the flags are served, if there are any.
    pub(super) fn flags_route(&self) -> Option<Route> {
        let flags = self.flags.clone()?;
        Some(Route {
            id: RouteId::flags(self.record.id.clone()),
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), self.flags_port().unwrap_or(0)),
            protocol: Protocol::Http,
            hold: Timespan::default(),
            hold_limit: 0,
            drain: Drain { requests: Timespan::default(), streams: Timespan::default() },
            policy: PortPolicy::default(),
            split: Split::default(),
            metered: false,
            backends: Vec::new(),
            flags: Some(flags),
        })
    }

    /// The port that was chosen for them.
    fn flags_port(&self) -> Option<u16> {
        let RouteId { service, port, .. } = RouteId::flags(self.record.id.clone());
        self.record.chosen_ports.get(&service)?.get(&port).copied()
    }

    /// Remembers the port on which the data plane serves them.
    pub(super) fn keep_flags_port(&mut self, route: &RouteId, port: u16) {
        let ports = self.record.chosen_ports.entry(route.service.clone()).or_default();
        self.record_changed |= ports.insert(route.port.clone(), port) != Some(port);
    }

    /// After everything was taken down nobody knows the address any more.
    pub(super) fn forget_flags_port(&mut self) {
        if self.record.stable.is_none() && self.flags.is_none() {
            let service = RouteId::flags(self.record.id.clone()).service;
            self.record_changed |= self.record.chosen_ports.remove(&service).is_some();
        }
    }

    /// What programs find in `OFREP_ENDPOINT`: the base to which clients append `/ofrep/v1/…`.
    pub(super) fn flags_endpoint(&self) -> Option<String> {
        let port = self.flags.as_ref().and_then(|_| self.flags_port())?;
        Some(format!("http://{}", SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)))
    }

    /// What keeps an instance from being launched: it must find the flags of its release.
    pub(super) fn flags_obstacle(&self) -> Option<String> {
        let waits = self.flags.is_some()
            && (self.flags_endpoint().is_none() || (!self.flags_in_force() && self.flags_problem().is_none()));
        waits.then(|| "the proxy to serve the flags".to_owned())
    }

    /// Whether the data plane answers with what is to be served.
    pub fn flags_in_force(&self) -> bool {
        let in_force = self.routes.flags_in_force().and_then(|route| route.flags.as_ref());
        in_force == self.flags.as_ref() && !self.routes.is_unanswered()
    }

    /// Whether the run may succeed: what it changes in the flags is in force. Sets a deadline for that.
    pub(super) fn flags_taken(&mut self, now: Now) -> bool {
        let Some(run) = self.run() else { return true };
        let down = is_down(run);
        let concerned = if down {
            self.refresh_flags(self.wall(now));
            self.routes.flags_in_force().is_some()
        } else {
            run.release.is_some() && !run.plan.flags.is_empty()
        };
        if !concerned || self.flags_in_force() {
            return true;
        }
        let wall = self.wall(now);
        let at = wall.saturating_add(millis(FLAGS_DEADLINE));
        let deadlines = self.record.deadlines.get_or_insert_default();
        if down && deadlines.flags.is_some_and(|known| known <= wall) {
            // A proxy that does not answer keeps nothing from being down.
            return true;
        }
        if deadlines.flags.is_none_or(|known| known > at) {
            deadlines.flags = Some(at);
            self.record_changed = true;
        }
        false
    }

    /// The data plane has answered, or time has passed: the run may be over, or has no chance.
    pub(super) fn look_at_flags(&mut self, now: Now) {
        let wall = self.wall(now);
        let Some(run) = &self.run else { return };
        if run.record.state == RunState::Running && !run.record.plan.flags.is_empty() && run.record.release.is_some() {
            let late =
                self.record.deadlines.as_ref().and_then(|deadlines| deadlines.flags).is_some_and(|at| at <= wall).then(
                    || {
                        Diagnostic::error(Code::RUN_TIMED_OUT, "the flags were not served in time")
                            .note("every step had succeeded; the proxy did not take the flags")
                    },
                );
            if let Some(problem) = self.flags_problem().cloned().or(late) {
                let cause = format!("the flags cannot be served: {}", problem.message);
                let run = self.run.as_mut().expect("seen above");
                run.record.problems.push(problem);
                self.begin_revert(now, cause);
                return;
            }
        }
        self.conclude(now);
    }

    /// Why the flags cannot be served.
    pub(super) fn flags_problem(&self) -> Option<&Diagnostic> {
        self.routes.problems.iter().find(|(route, _)| route.is_flags()).map(|(_, problem)| problem)
    }

    /// What is served.
    pub fn flags(&self) -> FlagsStatus {
        let set = self.flags.as_ref().map_or_else(|| self.wanted_flags(self.run()), |served| served.set.clone());
        FlagsStatus {
            set,
            endpoint: self.flags_endpoint(),
            in_force: self.flags_in_force(),
            problem: self.flags_problem().cloned(),
        }
    }

    /// Whether turning a flag off would change anything: it is served, nobody has decided about it, and it gives more than
    /// it gives while it is off.
    pub(super) fn flag_is_on(&self, flag: &FlagName) -> bool {
        !self.record.flag_overrides.contains_key(flag)
            && self.flags.as_ref().and_then(|served| served.set.flags.get(flag)).is_some_and(Flag::differs_when_off)
    }

    /// Whether [`Event::Flag`](super::Event::Flag) would mean something; otherwise why not.
    ///
    /// # Errors
    ///
    /// There is no such flag or variant, or nothing to take back.
    pub fn can_switch(&self, switch: &FlagSwitch) -> Result<(), Diagnostic> {
        let FlagSwitch { flag, serve, .. } = switch;
        if serve.is_none() && self.record.flag_overrides.contains_key(flag) {
            // Also of a flag that is gone.
            return Ok(());
        }
        let set = self.flags.as_ref().map(|served| &served.set);
        let Some(found) = set.and_then(|set| set.flags.get(flag)) else {
            let known: Vec<&str> = set.into_iter().flat_map(|set| set.flags.keys()).map(FlagName::as_str).collect();
            let message = format!("there is no flag `{flag}` in {}", self.record.id);
            let help = if known.is_empty() {
                "flags are defined in the stack file, under `flags`; then `orchestra up`".to_owned()
            } else {
                format!("flags are: {}", few(&known))
            };
            return Err(Diagnostic::error(Code::NOT_FOUND, message).help(help));
        };
        match serve {
            Some(OverrideServe::Variant(variant)) if !found.variants.contains_key(variant) => {
                let known: Vec<&str> = found.variants.keys().map(orchestra_model::flag::VariantName::as_str).collect();
                let message = format!("flag {flag} has no variant `{variant}`");
                Err(Diagnostic::error(Code::NOT_FOUND, message).help(format!("variants are: {}", few(&known))))
            }
            None => {
                let message = format!("nothing is laid over flag {flag}: its own rules apply");
                Err(Diagnostic::error(Code::NOT_FOUND, message).help("`orchestra flags` shows what everybody gets"))
            }
            Some(_) => Ok(()),
        }
    }

    /// A person lays something over a flag, or takes it back.
    pub(super) fn switch_flag(&mut self, now: Now, switch: FlagSwitch) {
        if self.can_switch(&switch).is_err() {
            return;
        }
        let at = self.wall(now);
        let FlagSwitch { flag, serve, by, reason } = switch;
        let what = match &serve {
            Some(OverrideServe::Off) => "is off".to_owned(),
            Some(OverrideServe::Variant(variant)) => format!("is {variant} for everybody"),
            None => "follows its own rules again".to_owned(),
        };
        let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        let cause = format!("flag {flag} {what}, by {by}{why}");
        match serve {
            Some(serve) => {
                let decision = Override { serve, by: OverrideBy::Person, reason, since: at };
                self.record.flag_overrides.insert(flag, decision);
            }
            None => {
                self.record.flag_overrides.remove(&flag);
            }
        }
        self.record_changed = true;
        self.note(EventKind::FlagSwitched, None, None, None, cause);
        self.refresh_flags(at);
    }
}

/// Names in one line, however many there are.
fn few(names: &[&str]) -> String {
    const SHOWN: usize = 12;
    match names.split_at_checked(SHOWN) {
        Some((first, rest)) if !rest.is_empty() => {
            format!("{} and {} more, see `orchestra flags`", first.join(", "), rest.len())
        }
        _ => names.join(", "),
    }
}
