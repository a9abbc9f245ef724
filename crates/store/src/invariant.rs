//! Which state may follow which. Pure; the look-ups are in `write`.

use orchestra_model::{
    Digest, EnvironmentId, ReleaseNumber, RunId,
    record::{EnvironmentRecord, InstanceRecord, ReleaseRecord, ReleaseState, RunRecord, RunState},
};

use crate::{
    error::Violation,
    write::{ReleaseRow, RunRow},
};

/// Of a release only the state moves.
pub(crate) fn release_is_the_same(
    before: &ReleaseRow,
    after: &ReleaseRecord,
    desired: &Digest,
) -> Result<(), Violation> {
    let field = if before.created_at != after.created_at {
        "time of creation"
    } else if before.run != after.run {
        "run"
    } else if before.reason != after.reason {
        "reason"
    } else if before.desired != *desired {
        "desired state"
    } else {
        return Ok(());
    };
    Err(Violation::ReleaseImmutable { environment: after.environment.clone(), number: after.number, field })
}

/// What identifies a run stays, and its state goes forward.
pub(crate) fn run_moves_on(before: &RunRow, after: &RunRecord) -> Result<(), Violation> {
    let field = if before.environment != after.environment {
        "environment"
    } else if before.kind != after.kind {
        "kind"
    } else if before.generation != after.generation {
        "generation"
    } else {
        return run_transition(after.id, before.state, after.state);
    };
    Err(Violation::RunImmutable { run: after.id, field })
}

/// ```text
/// Deploying ──> Stable <──> Retired
///     └───────> Failed | Superseded
/// ```
///
/// A retired release is in force again when the run that replaced it is reverted.
pub(crate) fn release_transition(
    environment: &EnvironmentId,
    number: ReleaseNumber,
    from: ReleaseState,
    to: ReleaseState,
) -> Result<(), Violation> {
    use ReleaseState::{Deploying, Failed, Retired, Stable, Superseded};
    match (from, to) {
        (Deploying, _) | (Stable, Retired) | (Retired, Stable) => Ok(()),
        _ if from == to => Ok(()),
        (Stable | Retired | Failed | Superseded, _) => {
            Err(Violation::ReleaseTransition { environment: environment.clone(), number, from, to })
        }
    }
}

/// ```text
/// Running ──> Succeeded
///    │──────> Reverting ──> Failed | Cancelled
///    └──────> Failed | Cancelled
/// ```
fn run_transition(run: RunId, from: RunState, to: RunState) -> Result<(), Violation> {
    use RunState::{Cancelled, Failed, Reverting, Running};
    match (from, to) {
        _ if from == to => Ok(()),
        _ if from.is_final() => Err(Violation::RunReopens { run, from, to }),
        (Running, _) | (Reverting, Failed | Cancelled) => Ok(()),
        _ => Err(Violation::RunTransition { run, from, to }),
    }
}

/// Numbers of an environment only grow.
pub(crate) fn environment_moves_on(from: &EnvironmentRecord, to: &EnvironmentRecord) -> Result<(), Violation> {
    let environment = to.id.clone();
    if to.generation < from.generation {
        return Err(Violation::GenerationDecreases { environment, from: from.generation, to: to.generation });
    }
    if to.last_release < from.last_release {
        return Err(Violation::ReleaseDecreases { environment, from: from.last_release, to: to.last_release });
    }
    Ok(())
}

/// What an instance was born with stays; attempts only count up. An instance that is not known must look newborn: one
/// that does not was forgotten, and somebody who missed that is writing it again.
pub(crate) fn instance_moves_on(from: Option<&InstanceRecord>, to: &InstanceRecord) -> Result<(), Violation> {
    let environment = to.environment.clone();
    let instance = to.id.clone();
    let Some(from) = from else {
        let newborn = to.attempt <= 1 && to.last_exit.is_none();
        return if newborn { Ok(()) } else { Err(Violation::InstanceForgotten { environment, instance }) };
    };
    let field = if from.kind != to.kind {
        "kind"
    } else if from.launch_digest != to.launch_digest {
        "launch digest"
    } else if from.created_at != to.created_at {
        "time of creation"
    } else if to.attempt < from.attempt {
        return Err(Violation::AttemptDecreases { environment, instance, from: from.attempt, to: to.attempt });
    } else {
        return Ok(());
    };
    Err(Violation::InstanceImmutable { environment, instance, field })
}
