//! An instance after a restart of the control plane: from its record and what the provider found to the phase it is in.

use orchestra_model::{
    EventKind, Now,
    desired::Check,
    launch::Observed,
    record::{InstanceIntent, InstanceRecord},
};

use super::{Command, Instance, Phase, policy::Policy};
use crate::{Which, health::Health, restart::History, rng::Rng};

impl Instance {
    /// An instance after a restart of the control plane: its record, and what the provider says of its last attempt.
    /// Requests kept flowing to it in the meantime, so one that runs and was ready counts as ready until its check,
    /// which is asked at once, says otherwise.
    pub fn recover(
        record: InstanceRecord,
        policy: Policy,
        ready: Option<Health>,
        live: Option<Health>,
        observed: Option<&Observed>,
        now: Now,
        rng: &mut Rng,
    ) -> (Self, Vec<Command>) {
        let mut instance = Self::new(record, policy, ready, live, now);
        // Whether a route leads to it is not known before the data plane has answered; its spec may say otherwise by now.
        instance.policy.routed |= !instance.record.ports.is_empty();
        instance.proven = instance.record.was_ready;
        instance.history = History { recent: instance.record.recent_restarts, total: instance.record.restarts };
        let mut commands = Vec::new();
        let Some(observed) = observed else {
            match instance.record.intent {
                // The intent to launch is on disk, the launch is not: it never happened.
                InstanceIntent::Run => {
                    instance.phase = Phase::Pending { until: None, why: "launch after recovery".to_owned() };
                }
                InstanceIntent::Drain | InstanceIntent::Stop => {
                    instance.enter(Phase::Gone, now);
                    commands.push(Command::Note(EventKind::InstanceGone, "nothing was left after recovery".to_owned()));
                }
            }
            return (instance, commands);
        };
        instance.pid = observed.pid;
        instance.status_text.clone_from(&observed.status_text);
        if let Some(exit) = observed.exit {
            instance.enter(Phase::Starting, now);
            commands.extend(instance.exited(now, exit, observed.message.as_deref()));
            if observed.gone {
                commands.extend(instance.gone(now, rng));
            }
            return (instance, commands);
        }
        let Some(pid) = observed.pid else {
            // The launch is recorded, its process is not there yet: `Started` or `Exited` follows.
            instance.enter(Phase::Launching, now);
            if instance.record.intent != InstanceIntent::Run {
                commands.extend(instance.begin_stop(now, "stop after recovery".to_owned()));
            }
            return (instance, commands);
        };
        instance.started = Some(now);
        commands.push(Command::Note(EventKind::InstanceAdopted, format!("process {pid} runs")));
        instance.enter(Phase::Starting, now);
        if observed.notified_ready {
            instance.set_fact(|check| matches!(check, Check::Notify), true, "");
        }
        if observed.line_matched {
            instance.set_fact(|check| matches!(check, Check::Log), true, "");
        }
        if instance.record.was_ready {
            instance.enter(Phase::Ready, now);
        }
        match instance.record.intent {
            InstanceIntent::Run => {
                commands.push(Command::StartProbes(Which::Ready));
                if instance.phase == Phase::Ready {
                    commands.push(Command::StartProbes(Which::Live));
                } else {
                    commands.extend(instance.judge(now, rng));
                }
            }
            InstanceIntent::Drain => {
                // It was routed, or it would have been stopped at once; its spec may say otherwise by now.
                instance.policy.routed = true;
                instance.proven = true;
                commands.extend(instance.drain(now, "drain after recovery".to_owned(), false));
            }
            InstanceIntent::Stop => commands.extend(instance.stop(now, "stop after recovery".to_owned())),
        }
        (instance, commands)
    }
}
