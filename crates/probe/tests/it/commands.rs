//! Exec checks through a provider.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use orchestra_model::{
    Code,
    launch::{Exec, ExecOutcome, Exit, LaunchKey},
};
use orchestra_probe::{Leaf, Limits, Outcome, ProbeId, Prober, Target};
use orchestra_provider::{Error, Retry};
use orchestra_task::TaskTree;

use crate::world::{Commands, next};

pub(crate) fn exec(command: &str) -> Exec {
    let key = LaunchKey { environment: "shop/dev".parse().unwrap(), instance: "api-r1-1".parse().unwrap(), attempt: 1 };
    Exec { key, command: vec![command.to_owned()], timeout: Duration::from_secs(99) }
}

async fn outcome(commands: Commands) -> Outcome {
    let tree = TaskTree::new();
    let (prober, mut outcomes) = Prober::new(Arc::new(commands), &tree, Limits::default());
    let timeout = Duration::from_secs(3);
    prober.set(Target { id: ProbeId(1), leaf: Leaf::Exec(exec("check")), every: Duration::from_secs(10), timeout });
    next(&mut outcomes).await
}

fn ended(exit: Option<Exit>, output: &str) -> Commands {
    let output = output.to_owned();
    Commands::new(move |exec| {
        assert_eq!(exec.timeout, Duration::from_secs(3), "the target's timeout counts");
        let output = output.clone();
        Box::pin(async move { Ok(ExecOutcome { exit, output }) })
    })
}

#[tokio::test(start_paused = true)]
async fn exits_and_what_was_said() {
    for (exit, output, passed, detail) in [
        (Some(Exit::Code(0)), "all well\n", true, "exit code 0"),
        (Some(Exit::Code(2)), "\n  queue is full\nmore\n", false, "exit code 2: queue is full"),
        (Some(Exit::Code(1)), "", false, "exit code 1"),
        (Some(Exit::Signal(11)), "", false, "signal 11 (SIGSEGV)"),
        (Some(Exit::NotStarted), "no such file", false, "not started: no such file"),
        (None, "half", false, "timeout after 3s: half"),
    ] {
        let outcome = outcome(ended(exit, output)).await;
        assert_eq!((outcome.passed, outcome.detail.as_str()), (passed, detail));
    }
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_never_answers_does_not_hold_the_check() {
    let outcome = outcome(Commands::none()).await;
    assert_eq!((outcome.passed, outcome.detail.as_str()), (false, "timeout after 3s"));
    assert_eq!(outcome.took.as_secs(), 4, "one second more than the command had");
}

#[tokio::test(start_paused = true)]
async fn a_busy_provider_is_no_answer_of_the_target() {
    let answers = Mutex::new(BTreeMap::from([(1, Retry::After(Duration::from_secs(1))), (2, Retry::Never)]));
    let commands = Commands::new(move |_| {
        let (_, retry) = answers.lock().unwrap().pop_first().unwrap();
        Box::pin(async move { Err(Error::new(Code::START_FAILED, retry, "the shim does not answer")) })
    });
    let outcome = outcome(commands).await;
    assert_eq!((outcome.passed, outcome.detail.as_str()), (false, "the shim does not answer"));
}
