//! Text scenarios: stacks and what an operator and chance do with them, played exactly, with an output for people.
//!
//! A scenario has sections. `=== NAME` begins a stack file; `=== script` begins the commands, one a line:
//!
//! ```text
//! up NAME                    start a run towards a stack        until settled | ended | EVENT [SUBJECT]
//! down [volumes]             take everything down               wait 2s
//! scale SERVICE=COUNT        another number of replicas         kill INSTANCE | proxy
//! restart SERVICE            new instances                      silence 3s
//! rollback NUMBER            an earlier release                 traffic REQUESTS STREAMS TIME
//! cancel                     end the run                        foreign PORT
//! promote [fully] | pause | abort    move its rollouts          clock +2h | -2h
//! crash                      kill the server now                show
//! crash at EVENT [SUBJECT] before commit | before effects | after N effects
//! # words                    said in the output
//! ```
//!
//! Every call takes a millisecond and nothing is random but the jitter of back-offs, whose seed is fixed.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use orchestra_model::{
    Desired, Event, EventKind, Now, ReleaseNumber, Resource, ResourceId, ResourceKind, quantity::Timespan,
    record::RunKind, rollout::RolloutCommand, route::EndpointState,
};

use crate::{
    operator, stack,
    world::{CrashPoint, Faults, World},
};

/// Longest virtual time that a command may wait.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Plays a scenario. Returns what a person should see of it.
///
/// # Errors
/// What was seen until then, with the law that was broken or the line that is not understood.
pub fn play(scenario: &str) -> Result<String, String> {
    let mut stacks = BTreeMap::new();
    let mut script = "";
    for section in scenario.split("=== ").skip(1) {
        let (name, body) = section.split_once('\n').unwrap_or((section, ""));
        match name.trim() {
            "script" => script = body,
            name => {
                let desired = stack::load(body).map_err(|problems| format!("stack {name}: {problems}"))?;
                stacks.insert(name.to_owned(), desired);
            }
        }
    }
    let mut world = World::new("demo/dev".parse().expect("a valid id"), 1, Faults::default());
    world.exact = true;
    world.traffic = Some((0, 0, Duration::ZERO));
    world.downtime = Some(Duration::from_secs(1));
    let mut player = Player { world, stacks, out: String::new(), shown: 0 };
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(words) = line.strip_prefix('#') {
            let _ = writeln!(player.out, "\n#{words}");
            continue;
        }
        let _ = writeln!(player.out, "> {line}");
        let done = player.play(line);
        player.show_events();
        done.map_err(|why| format!("{}\n{line}: {why}", player.out))?;
        if let Some(law) = player.world.failure() {
            return Err(format!("{}\nBROKEN {law}", player.out));
        }
    }
    Ok(player.out)
}

struct Player {
    world: World,
    stacks: BTreeMap<String, Desired>,
    out: String,
    shown: usize,
}

impl Player {
    fn play(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["up", name] => {
                let desired = self.stacks.get(name).cloned().ok_or("there is no such stack")?;
                self.begin(|world| operator::up(world, desired))
            }
            ["down"] => self.begin(|world| operator::submit(world, RunKind::Down { volumes: false }, None)),
            ["down", "volumes"] => self.begin(|world| operator::submit(world, RunKind::Down { volumes: true }, None)),
            ["scale", change] => {
                let (name, count) = change.split_once('=').ok_or("SERVICE=COUNT")?;
                let count: u32 = count.parse().map_err(|_| "a count")?;
                let name = name.parse().map_err(|_| "a name")?;
                let desired = self.changed(&name, |service| service.replicas = count)?;
                let kind = RunKind::Scale { replicas: BTreeMap::from([(name, count)]) };
                self.begin(|world| operator::submit(world, kind, Some(&desired)))
            }
            ["restart", name] => {
                let name = name.parse().map_err(|_| "a name")?;
                let desired = self.changed(&name, |service| service.restarts += 1)?;
                self.begin(|world| operator::submit(world, RunKind::Restart { services: vec![name] }, Some(&desired)))
            }
            ["rollback", number] => {
                let to = ReleaseNumber(number.parse().map_err(|_| "a number")?);
                let desired = self.world.disk.releases.get(&to).ok_or("there is no such release")?.desired.clone();
                self.begin(|world| operator::submit(world, RunKind::Rollback { to }, Some(&desired)))
            }
            ["cancel"] => self.begin(operator::cancel),
            ["promote"] => self.begin(|world| operator::rollout(world, RolloutCommand::Promote)),
            ["promote", "fully"] => self.begin(|world| operator::rollout(world, RolloutCommand::PromoteFully)),
            ["pause"] => self.begin(|world| operator::rollout(world, RolloutCommand::Pause)),
            ["abort"] => self.begin(|world| operator::rollout(world, RolloutCommand::Abort)),
            ["clock", change] => {
                let (sign, length) = change.split_at_checked(1).ok_or("+TIME or -TIME")?;
                let length = u64::try_from(span(length)?.as_millis()).map_err(|error| error.to_string())?;
                let clock = &mut self.world.clock;
                *clock = match sign {
                    "+" => clock.saturating_add(length),
                    "-" => clock.saturating_sub(length),
                    _ => return Err("+TIME or -TIME".to_owned()),
                };
                Ok(())
            }
            ["crash"] => {
                self.world.crash();
                self.say("server crashed");
                Ok(())
            }
            ["crash", "at", event, ref rest @ ..] => {
                let kind = event_kind(event)?;
                let (resource, rest) = match rest.first().and_then(|word| word.parse::<ResourceId>().ok()) {
                    Some(id) => (Some(id), &rest[1..]),
                    None => (None, rest),
                };
                let point = match rest {
                    ["before", "commit"] => CrashPoint::BeforeCommit,
                    ["before", "effects"] => CrashPoint::AfterEffects(0),
                    ["after", count, "effects"] => CrashPoint::AfterEffects(count.parse().map_err(|_| "a number")?),
                    _ => return Err("before commit, before effects, or after N effects".to_owned()),
                };
                self.world.crash_at = Some((kind, resource, point));
                Ok(())
            }
            ["kill", "proxy"] => {
                self.world.kill_data_plane();
                Ok(())
            }
            ["kill", instance] => {
                let key =
                    self.world.provider.alive().map(|(key, _)| key).find(|key| key.instance.to_string() == instance);
                let key = key.cloned().ok_or("it does not run")?;
                self.world.kill(&key);
                Ok(())
            }
            ["silence", time] => {
                let time = span(time)?;
                self.world.silence(time);
                Ok(())
            }
            ["traffic", requests, streams, time] => {
                let number = |text: &str| text.parse::<u32>().map_err(|_| "a number".to_owned());
                self.world.traffic = Some((number(requests)?, number(streams)?, span(time)?));
                Ok(())
            }
            ["foreign", port] => {
                self.world.data_plane.foreign.insert(port.parse().map_err(|_| "a port")?);
                Ok(())
            }
            ["wait", time] => {
                let limit = self.world.now + span(time)?;
                operator::until(&mut self.world, limit, |_| false);
                Ok(())
            }
            ["until", "ended"] => self.until(|world| world.server.is_some() && world.disk.active_run().is_none()),
            ["until", "settled"] => {
                self.until(World::is_settled)?;
                // Time for the last routes and reports.
                let limit = self.world.now + Duration::from_secs(1);
                operator::until(&mut self.world, limit, |_| false);
                self.world.check_quiet();
                Ok(())
            }
            ["until", event, ref subject @ ..] => {
                let kind = event_kind(event)?;
                let from = self.world.disk.events.len();
                let subject = subject.first().map(|subject| (*subject).to_owned());
                self.until(|world| {
                    let fits = |event: &Event| {
                        event.kind == kind && subject.as_ref().is_none_or(|subject| *subject == subject_of(event))
                    };
                    world.disk.events[from..].iter().any(fits)
                })
            }
            ["show"] => {
                self.show_events();
                self.show();
                Ok(())
            }
            _ => Err("this command is not known".to_owned()),
        }
    }

    fn begin(&mut self, what: impl FnOnce(&mut World) -> bool) -> Result<(), String> {
        if self.world.server.is_none() {
            return Err("the server is not there".to_owned());
        }
        if !what(&mut self.world) {
            self.say("nothing to do");
        }
        Ok(())
    }

    fn changed(
        &self,
        name: &orchestra_model::Name,
        change: impl FnOnce(&mut orchestra_model::desired::Service),
    ) -> Result<Desired, String> {
        let mut desired = self.world.disk.stable().ok_or("nothing is deployed")?.desired.clone();
        match desired.resources.get_mut(&ResourceId::new(ResourceKind::Service, name.clone())) {
            Some(Resource::Service(service)) => change(service),
            _ => return Err("there is no such service".to_owned()),
        }
        Ok(desired)
    }

    fn until(&mut self, condition: impl Fn(&World) -> bool) -> Result<(), String> {
        let limit = self.world.now + PATIENCE;
        if operator::until(&mut self.world, limit, condition) || self.world.failure().is_some() {
            return Ok(());
        }
        Err(format!("it did not happen within {PATIENCE:?}"))
    }

    fn say(&mut self, what: &str) {
        self.show_events();
        let _ = writeln!(self.out, "{:>10} {what}", time(self.world.now));
    }

    fn show_events(&mut self) {
        let from = std::mem::replace(&mut self.shown, self.world.disk.events.len());
        for (at, event) in self.world.disk.times[from..].iter().zip(&self.world.disk.events[from..]) {
            let _ = writeln!(self.out, "{:>10} {}", time(*at), event_line(event));
        }
    }

    /// What runs, where requests go, and what waits.
    fn show(&mut self) {
        let world = &self.world;
        let mut lines = Vec::new();
        lines.push(match world.disk.stable() {
            Some(release) => format!("release {} is in force", release.number),
            None => "no release is in force".to_owned(),
        });
        if let Some(server) = &world.server {
            for resource in server.status(world.now).resources {
                let waits = resource.waits_for.map(|waits| format!(", waits for {waits}")).unwrap_or_default();
                let release = resource.release.map(|release| format!(" release {release}")).unwrap_or_default();
                lines.push(format!("{} {}{release}{waits}", resource.id, resource.state));
                for instance in resource.instances {
                    lines.push(format!("  {} #{} {}", instance.id, instance.attempt, instance.phase));
                }
            }
        }
        for route in &world.data_plane.routes {
            let endpoints = route.backends.iter().flat_map(|backend| &backend.endpoints);
            let endpoints: Vec<String> = endpoints
                .map(|endpoint| {
                    let leaves = if endpoint.state == EndpointState::Draining { " (draining)" } else { "" };
                    format!("{} #{}{leaves}", endpoint.instance, endpoint.attempt)
                })
                .collect();
            let port = world.data_plane.addresses.get(&route.id).copied().unwrap_or_default();
            let to = if endpoints.is_empty() { "nobody".to_owned() } else { endpoints.join(", ") };
            let share = route.split.canary.map(|share| format!(", {share} to the new set")).unwrap_or_default();
            lines.push(format!("requests to {} at port {port} go to {to}{share}", route.id.service));
        }
        for (key, _) in world.provider.alive() {
            lines.push(format!("process of {} #{}", key.instance, key.attempt));
        }
        for line in lines {
            let _ = writeln!(self.out, "           | {line}");
        }
    }
}

fn time(now: Now) -> String {
    format!("{:.3}", now.since_origin().as_secs_f64())
}

fn span(text: &str) -> Result<Duration, String> {
    text.parse::<Timespan>().map(Timespan::duration).map_err(|error| error.to_string())
}

fn event_kind(word: &str) -> Result<EventKind, String> {
    use EventKind as K;
    let all = [
        K::RunStarted,
        K::RunSucceeded,
        K::RunReverting,
        K::RunFailed,
        K::RunCancelled,
        K::StepStarted,
        K::StepSucceeded,
        K::StepFailed,
        K::ReleaseStable,
        K::RolloutStarted,
        K::RolloutStep,
        K::RolloutPaused,
        K::RolloutResumed,
        K::RolloutPromoted,
        K::InstancePending,
        K::InstanceLaunching,
        K::InstanceStarting,
        K::InstanceReady,
        K::InstanceUnready,
        K::InstanceDraining,
        K::InstanceStopping,
        K::InstanceExited,
        K::InstanceGone,
        K::InstanceFailed,
        K::InstanceAdopted,
        K::DependencyLost,
        K::DependencyRestored,
    ];
    all.into_iter().find(|kind| kind.as_str() == word).ok_or_else(|| format!("there is no event `{word}`"))
}

fn subject_of(event: &Event) -> String {
    match (&event.instance, &event.resource) {
        (Some(instance), _) => instance.to_string(),
        (None, Some(resource)) => resource.to_string(),
        (None, None) => event.run.map(|run| run.to_string()).unwrap_or_default(),
    }
}

/// An event as one line.
pub fn event_line(event: &Event) -> String {
    format!("{:<20} {:<16} {}", event.kind.as_str(), subject_of(event), event.cause).trim_end().to_owned()
}
