//! Flags: which ones differ, and in what.
//!
//! A flag is no resource: nothing waits for it, nothing of it runs, and a change of it restarts nothing. It has a step of
//! its own kind, so that a plan shows it, a saved plan is bound to it, and a change of flags alone makes a release.

use orchestra_model::{
    Digest,
    flag::FlagSet,
    plan::{Action, FlagStep},
};

use crate::diff;

/// From the flags in force to those that are desired; `None` takes everything down, and flags go without saying.
pub(crate) fn steps(current: &FlagSet, desired: Option<&FlagSet>) -> Vec<FlagStep> {
    let Some(desired) = desired else { return Vec::new() };
    let step = |flag: &orchestra_model::flag::FlagName| {
        let (before, after) = (current.flags.get(flag), desired.flags.get(flag));
        let (action, changes) = match (before, after) {
            (Some(before), Some(after)) if before == after => return None,
            (Some(before), Some(after)) => (Action::Update, diff::flag_changes(before, after)),
            (None, _) => (Action::Create, Vec::new()),
            (Some(_), None) => (Action::Delete, Vec::new()),
        };
        let (base, target) = (before.map(Digest::of), after.map(Digest::of));
        Some(FlagStep { flag: flag.clone(), action, changes, base, target })
    };
    let names: std::collections::BTreeSet<_> = current.flags.keys().chain(desired.flags.keys()).collect();
    names.into_iter().filter_map(step).collect()
}
