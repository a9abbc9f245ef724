//! Hooks of a rollout: somebody outside who must agree before it goes on.
//!
//! Each call has a number that is written down before it is made, so no answer is taken for another one's, and a server
//! that died while it waited asks anew.

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind,
    rollout::{Hook, RolloutStep},
    time::UnixMillis,
};

use super::{Command, Rollout};

/// Where the hook of a step stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum HookState {
    /// Not called by this server.
    #[default]
    Idle,
    /// Called; no answer yet.
    Asked,
    /// It said no; to be called again.
    Refused(UnixMillis, String),
    /// It said yes.
    Agreed,
}

/// Pause between two calls of a hook.
pub(super) const HOOK_PAUSE: Duration = Duration::from_secs(10);

impl Rollout {
    pub(super) fn take_hook(&mut self, at: UnixMillis, hook: &Hook, out: &mut Vec<Command>) -> bool {
        match self.hook.clone() {
            HookState::Agreed => self.next_step(at, out),
            HookState::Refused(since, reason) => {
                if self.record.hook_calls > hook.retries {
                    let message = format!("{} did not agree: {reason}", hook_words(&hook.name));
                    out.push(Command::Fail(refused(message)));
                } else if at >= self.after(since, HOOK_PAUSE) {
                    self.call_hook(hook, out);
                }
                false
            }
            HookState::Idle => {
                self.call_hook(hook, out);
                false
            }
            HookState::Asked if at >= self.after(self.record.since, hook_time(hook)) => {
                let message = format!("{} did not answer", hook_words(&hook.name));
                out.push(Command::Fail(refused(message)));
                false
            }
            HookState::Asked => false,
        }
    }

    fn call_hook(&mut self, hook: &Hook, out: &mut Vec<Command>) {
        self.record.hook_calls += 1;
        self.hook = HookState::Asked;
        out.push(Command::Persist);
        out.push(Command::Note(EventKind::Hook, format!("{} is asked", hook_words(&hook.name))));
        out.push(Command::CallHook(self.record.hook_calls, hook.clone()));
    }

    /// Whether an answer to this call is still waited for.
    pub(crate) fn waits_for_hook(&self, call: u32) -> bool {
        self.hook == HookState::Asked && call == self.record.hook_calls && self.is_trying()
    }

    pub(super) fn hook_done(&mut self, at: UnixMillis, call: u32, answer: Result<(), String>, out: &mut Vec<Command>) {
        let Some(RolloutStep::Hook(hook)) = self.step() else { return };
        if call != self.record.hook_calls || self.hook != HookState::Asked {
            return;
        }
        let name = hook.name.clone();
        self.hook = match answer {
            Ok(()) => {
                out.push(Command::Note(EventKind::Hook, format!("{} agreed", hook_words(&name))));
                HookState::Agreed
            }
            Err(reason) => {
                out.push(Command::Note(EventKind::Hook, format!("{} did not agree: {reason}", hook_words(&name))));
                HookState::Refused(at, reason)
            }
        };
    }
}

/// A hook by its name, unless that is the one that all have.
pub(super) fn hook_words(name: &str) -> String {
    if name == "hook" { "the hook".to_owned() } else { format!("hook {name}") }
}

fn refused(message: String) -> Diagnostic {
    Diagnostic::error(Code::HOOK, message)
        .help("correct what it complains about, or the hook, and run `orchestra up` again; `orchestra events` has all its answers")
}

pub(super) fn hook_time(hook: &Hook) -> Duration {
    (hook.timeout.duration() + HOOK_PAUSE).saturating_mul(hook.retries.saturating_add(1)) + HOOK_PAUSE
}
