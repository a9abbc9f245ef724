use std::collections::BTreeMap;

use orchestra_model::{
    desired::{Restart, Strategy},
    quantity::{Amount, Percent, Timespan},
    rollout::{HookCall, OnInconclusive, PauseStep},
    traffic::RequestMatch,
};

use super::*;
use crate::environment::fixture;

const START: UnixMillis = 1_000_000;

fn service(strategy: Strategy) -> Service {
    let service = fixture::service(1, strategy);
    let restart = Restart { budget: None, ..service.restart.clone() };
    Service { replicas: 4, ports: BTreeMap::new(), restart, ..service }
}

/// A rollout in a world that does at once what is asked.
struct Bench {
    rollout: Rollout,
    now: UnixMillis,
    /// Instances come as soon as they are wanted.
    prompt: bool,
    log: Vec<String>,
    failed: Option<String>,
    hooks: Vec<u32>,
}

impl Bench {
    fn new(steps: Vec<RolloutStep>) -> Self {
        Self::guarded(steps, None)
    }

    fn guarded(steps: Vec<RolloutStep>, guard: Option<Guard>) -> Self {
        let stepped = Stepped { steps, keep_warm: Timespan::seconds(60), guard };
        let service = service(Strategy::Canary(stepped));
        let (from, to) = (ReleaseNumber(1), ReleaseNumber(2));
        let rollout = Rollout::begin(RunId(1), (from, &service), (to, &service), START);
        let mut bench = Self { rollout, now: START, prompt: true, log: vec![], failed: None, hooks: vec![] };
        bench.look();
        bench
    }

    fn seen(&self) -> Seen {
        let available = if self.prompt { self.rollout.canary_wanted(4) } else { 0 };
        Seen { replicas: 4, available, routed: true }
    }

    fn send(&mut self, event: Event) {
        let seen = self.seen();
        let commands = self.rollout.handle(self.now, event, &seen);
        for command in commands {
            match command {
                Command::Note(kind, cause) => self.log.push(format!("{}: {cause}", kind.as_str())),
                Command::CallHook(call, _) => self.hooks.push(call),
                Command::Fail(problem) => {
                    assert!(problem.help.is_some() || problem.code != Code::HOOK, "what to do about it: {problem:?}");
                    self.failed = Some(problem.message);
                }
                Command::Persist => {}
            }
        }
    }

    /// Looks until nothing moves at this moment.
    fn look(&mut self) {
        for _ in 0..20 {
            self.send(Event::Look);
        }
    }

    fn wait(&mut self, seconds: u64) {
        self.now += seconds * 1000;
        self.look();
    }

    fn ask(&mut self, command: RolloutCommand) {
        self.send(Event::Command { command, by: "ada".to_owned() });
        self.look();
    }

    fn phase(&self) -> RolloutPhase {
        self.rollout.record().phase
    }

    fn weight(&self) -> u16 {
        self.rollout.record().weight.get()
    }
}

fn weight(permille: u16) -> RolloutStep {
    RolloutStep::Weight(Permille::new(permille))
}

fn pause(seconds: u64) -> RolloutStep {
    RolloutStep::Pause(PauseStep {
        duration: Some(Timespan::seconds(seconds)),
        owner: None,
        expires: Timespan::seconds(3600),
        on_expiry: OnExpiry::RollBack,
    })
}

fn ask(on_expiry: OnExpiry) -> RolloutStep {
    let owner = Some("the release manager".to_owned());
    RolloutStep::Pause(PauseStep { duration: None, owner, expires: Timespan::seconds(1000), on_expiry })
}

fn analysis(inconclusive: Option<OnInconclusive>) -> RolloutStep {
    RolloutStep::Analysis(AnalysisStep { duration: Timespan::seconds(30), inconclusive })
}

fn hook(retries: u32) -> RolloutStep {
    RolloutStep::Hook(Hook {
        name: "check".to_owned(),
        call: HookCall::Command(vec!["true".to_owned()]),
        timeout: Timespan::seconds(5),
        retries,
    })
}

fn verdict(outcome: VerdictOutcome) -> Event {
    Event::Judged { outcome, reason: "so it seems".to_owned() }
}

#[test]
fn a_canary_grows_by_its_steps_and_is_promoted_in_place() {
    let mut bench = Bench::new(vec![weight(50), pause(120), weight(250), pause(300)]);
    assert_eq!((bench.weight(), bench.rollout.canary_wanted(4)), (50, 1));
    bench.wait(119);
    assert_eq!(bench.weight(), 50);
    bench.wait(1);
    assert_eq!((bench.weight(), bench.rollout.canary_wanted(4)), (250, 1));
    bench.wait(300);
    assert_eq!((bench.phase(), bench.weight(), bench.rollout.canary_wanted(4)), (RolloutPhase::Warm, 1000, 4));
    assert_eq!(bench.failed, None);
}

#[test]
fn no_weight_without_the_instances_for_it() {
    let mut bench = Bench::new(vec![weight(50), pause(10), weight(750)]);
    bench.prompt = false;
    bench.wait(10);
    assert_eq!((bench.weight(), bench.rollout.canary_wanted(4)), (50, 3));
    assert!(bench.rollout.waits_for(&bench.seen()).contains("0 of 3"));
    bench.prompt = true;
    bench.look();
    assert_eq!((bench.phase(), bench.weight()), (RolloutPhase::Warm, 1000));
}

#[test]
fn without_progress_it_turns_back() {
    let mut bench = Bench::new(vec![weight(50), pause(10), weight(750), pause(10)]);
    bench.prompt = false;
    bench.wait(10);
    bench.wait(99);
    assert_eq!(bench.failed, None);
    bench.wait(2);
    assert!(bench.failed.unwrap().contains("became available"));
}

#[test]
fn nothing_outlives_the_absolute_deadline() {
    // 300 s of its own and 10 s of pause.
    let mut bench = Bench::new(vec![weight(50), pause(10), weight(750)]);
    bench.prompt = false;
    bench.wait(10);
    for _ in 0..40 {
        // One of three comes and goes: always some progress.
        bench.now += 10_000;
        let seen = |available| Seen { replicas: 4, available, routed: true };
        let mut commands = bench.rollout.handle(bench.now, Event::Look, &seen(1));
        commands.extend(bench.rollout.handle(bench.now, Event::Look, &seen(0)));
        if failed(&commands) {
            assert_eq!(bench.now, START + 310_000);
            return;
        }
    }
    panic!("it went on for ever");
}

#[test]
fn a_person_promotes_a_pause_and_the_time_does_not_count() {
    let mut bench = Bench::new(vec![weight(50), ask(OnExpiry::RollBack), weight(500), pause(10)]);
    bench.wait(900);
    assert_eq!((bench.failed.clone(), bench.weight()), (None, 50));
    assert!(bench.rollout.waits_for(&bench.seen()).contains("the release manager"));
    bench.ask(RolloutCommand::Promote);
    assert_eq!(bench.weight(), 500);
    bench.wait(10);
    assert_eq!(bench.phase(), RolloutPhase::Warm);
}

#[test]
fn an_expired_pause_does_what_it_says() {
    for on_expiry in [OnExpiry::RollBack, OnExpiry::Promote] {
        let mut bench = Bench::new(vec![weight(50), ask(on_expiry)]);
        bench.wait(999);
        let then = if on_expiry == OnExpiry::RollBack { "turned back after" } else { "promoted after" };
        assert!(bench.rollout.waits_for(&bench.seen()).contains(then), "{}", bench.rollout.waits_for(&bench.seen()));
        assert_eq!((bench.failed.clone(), bench.phase()), (None, RolloutPhase::Stepping));
        bench.wait(1);
        assert_eq!(bench.failed.is_some(), on_expiry == OnExpiry::RollBack);
        assert_eq!(bench.phase() == RolloutPhase::Warm, on_expiry == OnExpiry::Promote);
    }
}

#[test]
fn a_person_pauses_anything_and_a_bad_verdict_still_turns_back() {
    let mut bench = Bench::new(vec![weight(50), pause(10), weight(500), pause(10)]);
    bench.ask(RolloutCommand::Pause);
    bench.wait(5000);
    assert_eq!((bench.weight(), bench.failed.clone()), (50, None));
    bench.ask(RolloutCommand::Promote);
    // The pause that was interrupted still has its ten seconds.
    bench.wait(9);
    assert_eq!(bench.weight(), 50);
    bench.wait(1);
    assert_eq!(bench.weight(), 500);
    bench.ask(RolloutCommand::Pause);
    bench.send(verdict(VerdictOutcome::Fail));
    assert!(bench.failed.unwrap().contains("worse"));
}

#[test]
fn one_word_ends_a_pause_that_came_while_a_person_was_asked_already() {
    let mut bench = Bench::new(vec![weight(50), ask(OnExpiry::RollBack), weight(500), ask(OnExpiry::RollBack)]);
    bench.wait(1);
    bench.ask(RolloutCommand::Pause);
    bench.wait(1);
    bench.ask(RolloutCommand::Promote);
    bench.look();
    assert_eq!((bench.weight(), bench.phase()), (500, RolloutPhase::Stepping));
    // What is asked next is another question.
    bench.wait(1);
    assert_eq!(bench.phase(), RolloutPhase::Stepping);
}

#[test]
fn a_forgotten_pause_is_turned_back_after_a_day() {
    let mut bench = Bench::new(vec![weight(50), pause(10)]);
    bench.ask(RolloutCommand::Pause);
    bench.wait(86_399);
    assert_eq!(bench.failed, None);
    bench.wait(1);
    assert!(bench.failed.is_some());
}

#[test]
fn full_promotion_takes_no_further_step_from_any_state() {
    for advance in [0, 10, 20] {
        let mut bench = Bench::new(vec![weight(50), pause(10), hook(0), ask(OnExpiry::RollBack), weight(500)]);
        bench.wait(advance);
        bench.ask(RolloutCommand::PromoteFully);
        assert_eq!((bench.phase(), bench.weight()), (RolloutPhase::Warm, 1000));
    }
    let mut bench = Bench::new(vec![weight(50), pause(10)]);
    bench.ask(RolloutCommand::Pause);
    bench.ask(RolloutCommand::PromoteFully);
    assert_eq!(bench.phase(), RolloutPhase::Warm);
}

#[test]
fn verdicts_mean_what_the_stack_says() {
    let steps = |policy| vec![weight(50), analysis(policy), weight(500), pause(10)];
    let mut bench = Bench::new(steps(None));
    bench.send(verdict(VerdictOutcome::Inconclusive));
    assert_eq!(bench.weight(), 50);
    bench.send(verdict(VerdictOutcome::Pass));
    bench.look();
    assert_eq!(bench.weight(), 500);

    let mut bench = Bench::new(steps(None));
    bench.send(verdict(VerdictOutcome::Inconclusive));
    bench.wait(30);
    assert!(bench.rollout.record().paused.is_some());
    assert_eq!(bench.failed, None);

    let mut bench = Bench::new(steps(Some(OnInconclusive::RollBack)));
    bench.wait(30);
    assert!(bench.failed.unwrap().ends_with("the verdict about release 2 could not be measured"));

    let mut bench = Bench::new(steps(Some(OnInconclusive::PromoteAndWatch)));
    bench.send(verdict(VerdictOutcome::Inconclusive));
    bench.wait(30);
    assert_eq!((bench.phase(), bench.weight()), (RolloutPhase::Watching, 1000));
    let mut bad = Bench { rollout: bench.rollout.clone(), log: vec![], hooks: vec![], ..bench };
    bad.send(verdict(VerdictOutcome::Fail));
    assert!(bad.failed.is_some());
    bench.failed = None;
    bench.wait(60);
    assert_eq!(bench.phase(), RolloutPhase::Warm);
}

#[test]
fn a_hook_is_asked_again_and_its_last_no_turns_back() {
    let mut bench = Bench::new(vec![hook(1), weight(50), pause(1)]);
    assert_eq!((bench.hooks.clone(), bench.rollout.canary_wanted(4)), (vec![1], 0));
    bench.send(Event::HookDone { call: 1, answer: Err("503".to_owned()) });
    let waits = bench.rollout.waits_for(&bench.seen());
    assert!(waits.contains("which it did not (503); it is asked again"), "{waits}");
    bench.wait(10);
    assert_eq!(bench.hooks, [1, 2]);
    // An answer to an earlier call is late.
    bench.send(Event::HookDone { call: 1, answer: Ok(()) });
    assert_eq!(bench.weight(), 0);
    bench.send(Event::HookDone { call: 2, answer: Ok(()) });
    bench.look();
    assert_eq!(bench.weight(), 50);

    let mut bench = Bench::new(vec![hook(0), weight(50)]);
    bench.send(Event::HookDone { call: 1, answer: Err("no".to_owned()) });
    assert!(bench.failed.unwrap().contains("no"));

    let mut bench = Bench::new(vec![hook(0), weight(50)]);
    bench.wait(60);
    assert!(bench.failed.unwrap().contains("did not answer"));
}

#[test]
fn it_goes_on_from_its_record() {
    let mut bench = Bench::new(vec![weight(50), pause(60), hook(0), weight(250), pause(10)]);
    bench.wait(60);
    assert_eq!(bench.hooks, [1]);
    let spec = service(Strategy::Canary(bench.rollout.stepped().unwrap().clone()));
    bench.rollout = Rollout::resume(bench.rollout.record().clone(), &spec, bench.now);
    bench.look();
    // Nobody knows what the hook answered: it is asked again.
    assert_eq!(bench.hooks, [1, 2]);
    bench.send(Event::HookDone { call: 2, answer: Ok(()) });
    bench.look();
    assert_eq!(bench.weight(), 250);
}

#[test]
fn blue_green_is_scale_then_all_at_once() {
    let full = RolloutStep::Scale(Amount::Share(Percent::whole(100)));
    let mut bench = Bench::new(vec![full, pause(10), weight(1000), pause(10)]);
    assert_eq!((bench.weight(), bench.rollout.canary_wanted(4)), (0, 4));
    bench.wait(10);
    assert_eq!((bench.weight(), bench.phase()), (1000, RolloutPhase::Stepping));
    bench.wait(10);
    assert_eq!(bench.phase(), RolloutPhase::Warm);
}

#[test]
fn matched_requests_and_copies_need_an_instance() {
    let matched = RequestMatch { headers: [("x-beta".to_owned(), "1".to_owned())].into(), ..RequestMatch::default() };
    let steps = vec![
        RolloutStep::Match(vec![matched]),
        pause(10),
        RolloutStep::Mirror { share: Permille::new(100), unsafe_methods: false },
        pause(10),
    ];
    let mut bench = Bench::new(steps);
    assert_eq!((bench.rollout.canary_wanted(4), bench.rollout.split().unwrap().matches.len()), (1, 1));
    assert_eq!(bench.rollout.split().unwrap().canary, Some(Permille::ZERO));
    bench.wait(10);
    assert_eq!(bench.rollout.split().unwrap().mirror.unwrap().share, Permille::new(100));
    bench.wait(10);
    let split = bench.rollout.split().unwrap();
    assert_eq!((split.matches.len(), split.mirror, split.canary), (0, None, Some(Permille::ALL)));
}

fn raising(limit: u16) -> Guard {
    Guard { raise_to: Some(Permille::new(limit)), ..fixture::guard() }
}

#[test]
fn little_traffic_raises_the_share_and_no_later_step_lowers_it() {
    let steps = vec![weight(50), analysis(None), weight(100), analysis(None), weight(10), pause(10)];
    let mut bench = Bench::guarded(steps, Some(raising(400)));
    // Not before there is a notion of how much traffic there is.
    assert_eq!(bench.rollout.may_raise(bench.now), None);
    bench.wait(10);
    assert_eq!(bench.rollout.may_raise(bench.now), Some(Duration::from_secs(20)));
    bench.prompt = false;
    bench.send(Event::Scarce { weight: Permille::new(60) });
    // It grows when there are instances for it, and is not raised again meanwhile.
    assert_eq!((bench.weight(), bench.rollout.record().raised), (50, Some(Permille::new(100))));
    assert_eq!(bench.rollout.may_raise(bench.now), None);
    bench.prompt = true;
    bench.look();
    assert_eq!(bench.weight(), 100);
    assert!(bench.log.iter().any(|line| line.contains("raised from 5 % to 10 %")), "{:?}", bench.log);
    bench.send(Event::Scarce { weight: Permille::new(900) });
    bench.look();
    assert_eq!(bench.weight(), 400);
    assert_eq!(bench.rollout.canary_wanted(4), 2);
    assert_eq!(bench.rollout.may_raise(bench.now), None);
    assert_eq!(bench.rollout.step_words(), "step 2 of 6: analysis for at most 30s, traffic raised to 40 %");
    // It survives its server.
    let spec = service(Strategy::Canary(bench.rollout.stepped().unwrap().clone()));
    bench.rollout = Rollout::resume(bench.rollout.record().clone(), &spec, bench.now);
    bench.send(verdict(VerdictOutcome::Pass));
    bench.look();
    assert_eq!((bench.rollout.record().step, bench.weight()), (3, 400));
    bench.send(verdict(VerdictOutcome::Pass));
    bench.look();
    // This one asks for less than the one before.
    assert_eq!((bench.rollout.record().step, bench.weight()), (5, 10));
    assert_eq!(bench.rollout.record().raised, None);
}

#[test]
fn nothing_is_raised_without_leave() {
    let mut guard = raising(400);
    guard.raise_to = None;
    let mut bench = Bench::guarded(vec![weight(50), analysis(None)], Some(guard));
    bench.wait(10);
    assert_eq!(bench.rollout.may_raise(bench.now), None);
    bench.send(Event::Scarce { weight: Permille::new(500) });
    bench.look();
    assert_eq!(bench.weight(), 50);
    let mut bench = Bench::guarded(vec![weight(50), analysis(None)], Some(raising(400)));
    bench.wait(10);
    bench.ask(RolloutCommand::Pause);
    bench.send(Event::Scarce { weight: Permille::new(500) });
    assert_eq!((bench.weight(), bench.rollout.record().raised), (50, None));
}

#[test]
fn a_clock_that_was_set_back_prolongs_nothing() {
    let mut bench = Bench::new(vec![weight(50), pause(60), weight(500), pause(10)]);
    bench.wait(5);
    bench.ask(RolloutCommand::Pause);
    let record = bench.rollout.record().clone();
    let spec = service(Strategy::Canary(bench.rollout.stepped().unwrap().clone()));
    let hour = 3_600_000;
    let earlier = bench.now - hour.min(bench.now - 1);
    let resumed = Rollout::resume(record.clone(), &spec, earlier);
    let (budget, day) = (millis(budget(&spec.rollout)), 86_400_000);
    assert_eq!(resumed.record().deadline, record.deadline.min(earlier + budget));
    assert!(resumed.record().since <= earlier);
    assert_eq!(resumed.record().paused.as_ref().unwrap().expires, earlier + day);
    // One that goes on as it should stays as it is.
    assert_eq!(*Rollout::resume(record.clone(), &spec, bench.now).record(), record);
}
