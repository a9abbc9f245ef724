//! What a simulated program does: its command says it, so that a stack file is a complete scenario.
//!
//! `["program", "ready=300ms", "exit=1@2s", "times=1"]` is ready 300 ms after its start and exits with code 1 after two
//! seconds, but only in its first start.

use std::time::Duration;

use orchestra_model::{launch::Exit, quantity::Timespan};

/// What one start of a program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behaviour {
    /// `ready=300ms`, `never-ready`: time from start to readiness.
    pub ready: Option<Duration>,
    /// `exit=1@2s`, `kill@2s`: how and when it ends by itself.
    pub exit: Option<(Duration, Exit)>,
    /// `flaky=3s`: every second such period it is not ready.
    pub flaky: Option<Duration>,
    /// `hang=5s`: from then on it fails its live check.
    pub hang: Option<Duration>,
    /// `term=1s`, `term=ignore`: time from the stop signal to its exit.
    pub term: Option<Duration>,
    /// `missing`: there is no such program.
    pub missing: bool,
    /// `linger=1s`: time that the rest of its tree outlives its main process.
    pub linger: Duration,
}

impl Behaviour {
    /// Reads a command. `attempt` counts the starts of the instance; `times=2` limits misbehaviour to the first two.
    ///
    /// # Panics
    /// On a word that it does not know: a scenario with a typing error must not pass.
    pub fn parse(command: &[String], attempt: u32) -> Self {
        let mut it = Self {
            ready: Some(Duration::from_millis(50)),
            exit: None,
            flaky: None,
            hang: None,
            term: Some(Duration::from_millis(20)),
            missing: false,
            linger: Duration::from_millis(1),
        };
        let good = it.clone();
        let mut times = u32::MAX;
        let mut after = None;
        for word in &command[1..] {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "ready" => it.ready = Some(span(value)),
                "never-ready" => it.ready = None,
                "exit" => {
                    let (code, at) = value.split_once('@').expect("exit=CODE@TIME");
                    it.exit = Some((span(at), Exit::Code(code.parse().expect("an exit code"))));
                }
                "then-exit" => {
                    let (code, at) = value.split_once('@').expect("then-exit=CODE@TIME");
                    after = Some((span(at), Exit::Code(code.parse().expect("an exit code"))));
                }
                "flaky" => it.flaky = Some(span(value)),
                "hang" => it.hang = Some(span(value)),
                "term" if value == "ignore" => it.term = None,
                "term" => it.term = Some(span(value)),
                "linger" => it.linger = span(value),
                "missing" => it.missing = true,
                "times" => times = value.parse().expect("times=NUMBER"),
                "v" => {}
                other => panic!("unknown word `{other}` in the command of a simulated program"),
            }
        }
        if attempt > times { Self { exit: after, term: it.term, linger: it.linger, ..good } } else { it }
    }

    /// Whether it becomes ready and then stays so until it is told to stop, in every start.
    pub fn is_solid(command: &[String]) -> bool {
        let it = Self::parse(command, 1);
        it.ready.is_some() && it.exit.is_none() && it.flaky.is_none() && it.hang.is_none() && !it.missing
    }

    /// Whether it is ready `age` after its start.
    pub fn is_ready(&self, age: Duration) -> bool {
        let Some(ready) = self.ready else { return false };
        let flaps = self.flaky.is_some_and(|period| (age.as_millis() / period.as_millis().max(1)) % 2 == 1);
        age >= ready && !flaps
    }

    /// Whether it is alive in the sense of its live check `age` after its start.
    pub fn is_live(&self, age: Duration) -> bool {
        self.hang.is_none_or(|hang| age < hang)
    }
}

fn span(text: &str) -> Duration {
    text.parse::<Timespan>().expect("a duration").duration()
}
