//! How instances are replaced: strategies, steps and guards.

use std::collections::BTreeMap;

use orchestra_model::{
    desired::Drain,
    diagnostic::Code,
    quantity::{Amount, Percent, Timespan},
    rollout::{
        AnalysisStep, Guard, Hook, HookCall, LatencyBound, OnExpiry, OnInconclusive, PauseStep, Rollout, RolloutStep,
        Stepped, Strategy,
    },
    traffic::{Permille, RequestMatch},
};

use super::{
    Decoder, Fields, address::cannot_be_asked, conflict, expected, invalid, is_token, quantity, text, timespan,
    unknown, without_nul,
};
use crate::{
    report::{Report, help},
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

const STRATEGIES: &[&str] = &["rolling", "recreate", "hold", "canary", "blue_green"];
const EXPIRY: &[(&str, OnExpiry)] = &[("roll_back", OnExpiry::RollBack), ("promote", OnExpiry::Promote)];
const INCONCLUSIVE: &[(&str, OnInconclusive)] = &[
    ("hold", OnInconclusive::Hold),
    ("promote_and_watch", OnInconclusive::PromoteAndWatch),
    ("roll_back", OnInconclusive::RollBack),
];

impl<'n, 'a> Decoder<'_, 'n, 'a> {
    pub(super) fn rollout(&mut self, fields: &Fields<'n, 'a>, replicas: u32) -> Rollout {
        let rollout = self.section(fields, "rollout", &tables::ROLLOUT);
        let mut strategies = STRATEGIES.iter().filter_map(|key| rollout.get(key));
        let strategy = strategies.next();
        if let (Some(first), Some(second)) = (strategy, strategies.next()) {
            conflict(self.report, first, second, "keep one strategy; an overlay deletes a key with `null`");
        }
        let guard = rollout.get("guard");
        let strategy = match strategy.map(|entry| (entry.key.as_ref(), entry)) {
            Some(("recreate", entry)) => {
                if !is_true(&entry.value) {
                    expected(self.report, &entry.value, "`true`", "write `recreate: true`, or delete it");
                }
                Strategy::Recreate
            }
            Some(("hold", entry)) => {
                let hold = self.strategy(entry, &tables::HOLD);
                Strategy::Hold {
                    queue: hold.integer(self.report, "queue", 1..=1_000_000),
                    timeout: hold.positive(self.report, "timeout"),
                }
            }
            Some(("canary", entry)) => Strategy::Canary(self.canary(entry, guard, replicas)),
            Some(("blue_green", entry)) => Strategy::BlueGreen(self.blue_green(entry, guard)),
            _ => self.rolling(&rollout, replicas),
        };
        if strategy.stepped().is_none()
            && let Some(guard) = guard
        {
            let message = || format!("`guard` says nothing about a {} rollout", strategy.name());
            let remedy = help("write `canary: {…}` or `blue_green: {…}` beside it, or delete it");
            self.report.error(Code::CONFLICTING_KEYS, guard.key_span, message, remedy);
        }
        let drain = self.section(&rollout, "drain", &tables::DRAIN);
        let drain = Drain {
            requests: drain.timespan(self.report, "requests"),
            streams: drain.timespan(self.report, "streams"),
        };
        let (deadline, min_ready) =
            (rollout.positive(self.report, "deadline"), rollout.timespan(self.report, "min_ready"));
        let progress = rollout.positive(self.report, "progress_deadline");
        let steps = strategy.stepped().is_some();
        self.can_become_available(&rollout, min_ready, ("deadline", deadline));
        if steps && progress < deadline {
            self.can_become_available(&rollout, min_ready, ("progress_deadline", progress));
        }
        Rollout { strategy, drain, deadline, min_ready, progress }
    }

    /// Reports a time of being ready that no deadline leaves room for: no release could ever succeed.
    fn can_become_available(&mut self, rollout: &Fields<'n, 'a>, min_ready: Timespan, within: (&str, Timespan)) {
        let (key, deadline) = within;
        let none = Timespan::default();
        // What is 0 was not read, and is reported.
        let Some(entry) = rollout.get("min_ready").filter(|_| deadline > none && min_ready >= deadline) else { return };
        let message =
            || format!("`min_ready` ({min_ready}) takes all of `{key}` ({deadline}): no release could succeed");
        let remedy = format!("make `{key}` longer, or `min_ready` shorter");
        self.report.error(Code::CONFLICTING_KEYS, entry.value.span, message, help(remedy));
    }

    fn rolling(&mut self, rollout: &Fields<'n, 'a>, replicas: u32) -> Strategy {
        let rolling = self.section(rollout, "rolling", &tables::ROLLING);
        let max_surge = amount(self.report, &rolling, "max_surge");
        let max_unavailable = amount(self.report, &rolling, "max_unavailable");
        // With no replicas the next number is unknown: only what is 0 for every number is refused.
        let replicas = if replicas == 0 { u32::MAX } else { replicas };
        if max_surge.rounded_up(replicas) == 0
            && max_unavailable.rounded_down(replicas) == 0
            && let Some(entry) = rolling.get("max_surge").or_else(|| rolling.get("max_unavailable"))
        {
            let message = || {
                format!(
                    "`max_surge` ({max_surge}) and `max_unavailable` ({max_unavailable}) both come out as 0: nothing could ever be replaced"
                )
            };
            invalid(
                self.report,
                entry.value.span,
                message,
                "raise one of them; a share of `max_unavailable` is rounded down",
            );
        }
        Strategy::Rolling { max_surge, max_unavailable }
    }

    fn canary(&mut self, entry: &'n Entry<'a>, guard: Option<&'n Entry<'a>>, replicas: u32) -> Stepped {
        let fields = self.strategy(entry, &tables::CANARY);
        let default = || {
            let analysis = AnalysisStep { duration: Timespan::seconds(120), inconclusive: None };
            let weights = [50, 250, 500].map(|weight| RolloutStep::Weight(Permille::new(weight)));
            weights.into_iter().flat_map(|weight| [weight, RolloutStep::Analysis(analysis.clone())]).collect()
        };
        let steps = fields.get("steps").map_or_else(default, |steps| {
            let taken = self.steps(&steps.value);
            self.warn_of_few(&steps.value, &taken, replicas);
            taken
        });
        Stepped { steps, keep_warm: fields.timespan(self.report, "keep_warm"), guard: Some(self.guard(guard)) }
    }

    fn blue_green(&mut self, entry: &'n Entry<'a>, guard: Option<&'n Entry<'a>>) -> Stepped {
        let fields = self.strategy(entry, &tables::BLUE_GREEN);
        let mut steps = vec![RolloutStep::Scale(Amount::Share(Percent::whole(100)))];
        for key in ["before", "after"] {
            if key == "after" {
                steps.push(RolloutStep::Weight(Permille::ALL));
            }
            if let Some(entry) = fields.get(key) {
                let own = self.steps(&entry.value);
                if let Some(RolloutStep::Weight(_) | RolloutStep::Scale(_)) =
                    own.iter().find(|step| matches!(step, RolloutStep::Weight(_) | RolloutStep::Scale(_)))
                {
                    let message =
                        || format!("`{key}` of a blue-green rollout cannot set weights or numbers of instances");
                    let remedy = "write `canary: {steps: […]}` for a rollout with weights";
                    invalid(self.report, entry.key_span, message, remedy);
                }
                steps.extend(own);
            }
        }
        Stepped { steps, keep_warm: fields.timespan(self.report, "keep_warm"), guard: Some(self.guard(guard)) }
    }

    /// The mapping of a strategy; `true` stands for one without keys.
    fn strategy(&mut self, entry: &'n Entry<'a>, table: &'static crate::table::Table) -> Fields<'n, 'a> {
        if is_true(&entry.value) {
            return Fields::empty(table);
        }
        Fields::read(self.report, &entry.value, table, entry.key_span).unwrap_or_else(|| Fields::empty(table))
    }

    fn steps(&mut self, node: &'n Node<'a>) -> Vec<RolloutStep> {
        let Value::List(items) = &node.value else {
            expected(self.report, node, "a list of steps", "write `[{weight: 5}, {pause: 2m}]`");
            return Vec::new();
        };
        if items.len() > 100 {
            invalid(self.report, node.span, || format!("{} steps are too many", items.len()), "100 are the most");
        }
        items.iter().filter_map(|item| self.step(item)).collect()
    }

    /// Warns of steps that give more traffic to the new set than it has instances for, as far as that can be known.
    fn warn_of_few(&mut self, node: &'n Node<'a>, steps: &[RolloutStep], replicas: u32) {
        // Steps that could not be read are missing, and that is said already.
        let Value::List(items) = &node.value else { return };
        if items.len() != steps.len() {
            return;
        }
        let (mut share, mut scale) = (Permille::ZERO, None);
        for (item, step) in items.iter().zip(steps) {
            match step {
                RolloutStep::Weight(weight) => share = *weight,
                RolloutStep::Scale(amount) => scale = Some(amount.rounded_up(replicas).max(1)),
                _ => continue,
            }
            let Some(few) = scale.filter(|scale| *scale < share.of_rounded_up(replicas)) else { continue };
            let message = || {
                let instances = if few == 1 { "instance" } else { "instances" };
                format!("{share} of the traffic of {replicas} instances would go to {few} {instances}")
            };
            let percent = f64::from(share.get()) / 10.0;
            let remedy =
                format!("write `{{scale: {percent}%}}` before it, or leave `scale` out: a share brings its instances");
            self.report.warning(Code::INVALID_VALUE, item.span.part(0, 1), message, help(remedy));
        }
    }

    fn step(&mut self, item: &'n Node<'a>) -> Option<RolloutStep> {
        if item.entries().is_none() {
            expected(self.report, item, "a step", "write `{weight: 5}`, `{pause: 2m}` or `{analysis: 5m}`");
            return None;
        }
        let fields = Fields::read(self.report, item, &tables::STEP, item.span.part(0, 1))?;
        let entry = fields.only(self.report)?;
        let node = entry.value.as_ref();
        match entry.key.as_ref() {
            "weight" => weight(self.report, node).map(RolloutStep::Weight),
            "scale" => {
                quantity(self.report, node, "a number such as `1`, or a share such as `25%`").map(RolloutStep::Scale)
            }
            "pause" => self.pause(entry).map(RolloutStep::Pause),
            "analysis" => {
                if node.entries().is_none() {
                    let duration = timespan(self.report, node)?;
                    if duration == Timespan::default() {
                        let message = || "an analysis of no time has nothing to judge".to_owned();
                        invalid(self.report, node.span, message, "write how long it may take, such as `5m`");
                    }
                    return Some(RolloutStep::Analysis(AnalysisStep { duration, inconclusive: None }));
                }
                let fields = Fields::read(self.report, node, &tables::ANALYSIS, entry.key_span)?;
                let inconclusive = fields.get("inconclusive");
                Some(RolloutStep::Analysis(AnalysisStep {
                    duration: fields.positive(self.report, "for"),
                    inconclusive: inconclusive.and_then(|entry| super::choice(self.report, &entry.value, INCONCLUSIVE)),
                }))
            }
            "hook" => self.hook(entry).map(RolloutStep::Hook),
            "match" => self.matches(node).map(RolloutStep::Match),
            _ => {
                if node.entries().is_none() {
                    return weight(self.report, node).map(|share| RolloutStep::Mirror { share, unsafe_methods: false });
                }
                let fields = Fields::read(self.report, node, &tables::MIRROR, entry.key_span)?;
                let share = fields.get("share").and_then(|entry| weight(self.report, &entry.value));
                let unsafe_methods = fields.boolean(self.report, "unsafe_methods").unwrap_or(false);
                Some(RolloutStep::Mirror { share: share?, unsafe_methods })
            }
        }
    }

    fn pause(&mut self, entry: &'n Entry<'a>) -> Option<PauseStep> {
        let node = entry.value.as_ref();
        let manual = matches!(&node.value, Value::Scalar(Scalar::Text, text) if text == "manual");
        let fields = if node.entries().is_some() {
            Fields::read(self.report, node, &tables::PAUSE, entry.key_span)?
        } else {
            Fields::empty(&tables::PAUSE)
        };
        if matches!(node.value, Value::Scalar(Scalar::Null, _) | Value::List(_)) {
            let remedy = "write a time such as `5m`, or `manual` for one that a person ends";
            expected(self.report, node, "a time to pause", remedy);
            return None;
        }
        let duration = if manual || node.entries().is_some() { None } else { Some(timespan(self.report, node)?) };
        Some(PauseStep {
            duration,
            owner: fields.get("owner").and_then(|entry| self.line(entry, "a text")),
            expires: fields.positive(self.report, "expires"),
            on_expiry: fields.choice(self.report, "on_expiry", EXPIRY),
        })
    }

    fn hook(&mut self, entry: &'n Entry<'a>) -> Option<Hook> {
        let fields = Fields::read(self.report, &entry.value, &tables::HOOK, entry.key_span)?;
        let way = fields.only(self.report)?;
        let call = if way.key == "url" {
            let url = self.words(way, "an address such as `http://127.0.0.1:9000/gate`")?;
            if let Some(why) = cannot_be_asked(&url, true) {
                let remedy = "webhooks are asked over `http://` or `https://`: `http://127.0.0.1:9000/gate`; for anything else write `command: […]`";
                invalid(self.report, way.value.span, || format!("`{}` cannot be asked: {why}", cut(&url)), remedy);
            }
            HookCall::Webhook { url }
        } else {
            HookCall::Command(self.words_list(way)?)
        };
        if matches!(&call, HookCall::Command(command) if command.first().is_none_or(String::is_empty)) {
            invalid(self.report, way.value.span, || "the command is empty".to_owned(), "name a program");
        }
        Some(Hook {
            name: fields.get("name").and_then(|entry| self.line(entry, "a text")).unwrap_or_else(|| "hook".to_owned()),
            call,
            timeout: fields.positive(self.report, "timeout"),
            retries: fields.integer(self.report, "retries", 0..=100),
        })
    }

    fn matches(&mut self, node: &'n Node<'a>) -> Option<Vec<RequestMatch>> {
        let Value::List(items) = &node.value else {
            expected(self.report, node, "a list of matches", "write `[{headers: {x-beta: \"1\"}}]`");
            return None;
        };
        let read = items.iter().filter_map(|item| {
            let fields = Fields::read(self.report, item, &tables::MATCH, item.span.part(0, 1))?;
            let headers = fields.get("headers").map(|entry| self.asked_of(entry, "a header field"));
            let cookies = fields.get("cookies").map(|entry| self.asked_of(entry, "a cookie"));
            let (headers, cookies) = (headers.unwrap_or_default(), cookies.unwrap_or_default());
            // A key that is not known was meant to be a condition, and is reported.
            let known = |entry: &Entry<'_>| matches!(entry.key.as_ref(), "headers" | "cookies");
            if headers.is_empty() && cookies.is_empty() && item.entries().is_some_and(|keys| keys.iter().all(known)) {
                let message = || "a match without a condition would take every request".to_owned();
                invalid(self.report, item.span, message, "add `headers` or `cookies`, or set a `weight`");
            }
            let given = headers.len();
            let headers: BTreeMap<_, _> =
                headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect();
            if headers.len() < given {
                let message = || "a header field is there twice: upper and lower case do not differ".to_owned();
                invalid(self.report, item.span.part(0, 1), message, "delete one");
            }
            Some(RequestMatch { headers, cookies })
        });
        Some(read.collect())
    }

    /// Names and values of header fields or cookies. What no request can carry would never match.
    fn asked_of(&mut self, entry: &Entry<'_>, of: &str) -> BTreeMap<String, String> {
        let pairs = self.pairs(entry);
        for pair in entry.value.entries().unwrap_or_default() {
            let name = pair.key.as_ref();
            let Some(value) = pairs.get(name) else { continue };
            if !is_token(name) {
                let message = || format!("`{}` cannot be the name of {of}", cut(name));
                let remedy = "letters, digits and any of `!#$%&'*+-.^_`|~`";
                invalid(self.report, pair.key_span, message, remedy);
            }
            if value.chars().any(char::is_control) || value.trim() != value {
                let message = || format!("no request carries `{}` as the value of {of}", cut(value).escape_debug());
                let remedy = "write it without control characters, and without blanks at its ends";
                invalid(self.report, pair.value.span, message, remedy);
            }
        }
        pairs
    }

    fn guard(&mut self, entry: Option<&'n Entry<'a>>) -> Guard {
        let fields = entry
            .and_then(|entry| Fields::read(self.report, &entry.value, &tables::GUARD, entry.key_span))
            .unwrap_or_else(|| Fields::empty(&tables::GUARD));
        let share = |report: &mut Report<'_>, key: &str| fields.get(key).and_then(|entry| weight(report, &entry.value));
        let alpha = share(self.report, "alpha").unwrap_or(Permille::new(10));
        if alpha == Permille::ZERO || alpha > Permille::new(200) {
            let span = fields.get("alpha").map_or(fields.at, |entry| entry.value.span);
            let message = || format!("`alpha` cannot be {alpha}");
            invalid(self.report, span, message, "write a share from 0.1% to 20%; 1% is usual");
        }
        let raise_to = share(self.report, "raise_to");
        if raise_to.is_some_and(|share| share > Permille::new(500)) {
            let span = fields.get("raise_to").map_or(fields.at, |entry| entry.value.span);
            let message = || "`raise_to` cannot be above 50 %".to_owned();
            invalid(
                self.report,
                span,
                message,
                "write at most `50%`: there each response says most about the difference",
            );
        }
        let max_errors = share(self.report, "max_errors");
        if max_errors == Some(Permille::ZERO) {
            let span = fields.get("max_errors").map_or(fields.at, |entry| entry.value.span);
            let message = || "`max_errors` cannot be 0 %: one bad response among any number would fail".to_owned();
            invalid(self.report, span, message, "write at least `0.1%`");
        }
        let probe = fields.get("probe").and_then(|entry| self.pair_probe(entry));
        let optional = |report: &mut Report<'_>, key: &str| {
            fields.get(key).and_then(|entry| timespan(report, &entry.value)).filter(|span| *span != Timespan::default())
        };
        Guard {
            alpha,
            errors: fields.choice(self.report, "errors", &[("auto", true), ("off", false)]),
            max_errors,
            latency: fields.get("latency").and_then(|entry| self.latency(entry)),
            first_byte: optional(self.report, "first_byte"),
            first_token: optional(self.report, "first_token"),
            counters: fields.get("counters").map(|entry| self.counters(entry)).unwrap_or_default(),
            per_client: fields.integer(self.report, "per_client", 1..=1000),
            clients: fields.integer(self.report, "clients", 1..=1000),
            warm_up: fields.timespan(self.report, "warm_up"),
            inconclusive: fields.choice(self.report, "inconclusive", INCONCLUSIVE),
            raise_to,
            probe,
            flag: fields.get("flag").and_then(|entry| self.flag(entry)),
            prometheus: fields.get("prometheus").map(|entry| self.prometheus(entry)).unwrap_or_default(),
        }
    }

    /// The name of a flag that the stack defines.
    fn flag(&mut self, entry: &Entry<'_>) -> Option<String> {
        let name = self.words(entry, "the name of a flag")?;
        if !self.scope.flags.contains(&name) {
            let message = || format!("there is no flag `{}`", cut(&name));
            if self.scope.flags.is_empty() {
                let remedy = help(format!("define it at the top of the file: `flags: {{{}: true}}`", cut(&name)));
                self.report.error(Code::UNKNOWN_REFERENCE, entry.value.span, message, remedy);
                return Some(name);
            }
            let known = self.scope.flags.iter().map(String::as_str);
            unknown(self.report, entry.value.span, message, known, &name);
        } else if self.scope.idle_flags.contains(&name) {
            let message = || format!("turning the flag `{}` off changes nothing", cut(&name));
            self.report.warning(Code::INVALID_VALUE, entry.value.span, message, |diagnostic, _| {
                let note = "it is off already, or gives everybody what it gives while it is off: a bad verdict rolls the release back";
                diagnostic.note(note).help("let its `default` or a rule give another value than its `off`")
            });
        }
        Some(name)
    }

    fn latency(&mut self, entry: &'n Entry<'a>) -> Option<LatencyBound> {
        let node = entry.value.as_ref();
        if matches!(&node.value, Value::Scalar(Scalar::Text, text) if text == "auto") {
            return Some(LatencyBound::Stable);
        }
        let bound = if node.entries().is_none() {
            node
        } else {
            Fields::read(self.report, node, &tables::LATENCY, entry.key_span)?.get("p95")?.value.as_ref()
        };
        let span = timespan(self.report, bound)?;
        if span == Timespan::default() {
            let message = || "with a bound of 0 every response is late".to_owned();
            invalid(self.report, bound.span, message, "write a time such as `500ms`, or `auto`, or delete `latency`");
        }
        Some(LatencyBound::Fixed(span))
    }

    /// A text without NUL.
    fn words(&mut self, entry: &Entry<'_>, what: &str) -> Option<String> {
        let words = text(self.report, &entry.value, what)?;
        without_nul(self.report, &entry.value, words).then(|| words.to_owned())
    }

    /// A program with its arguments; `None` if it is no list.
    fn words_list(&mut self, entry: &Entry<'_>) -> Option<Vec<String>> {
        let Value::List(items) = &entry.value.value else {
            let remedy = "write `[./check, --strict]`; what a shell is to read is `[/bin/sh, -c, \"…\"]`";
            expected(self.report, &entry.value, "a list with the program and its arguments", remedy);
            return None;
        };
        let read = items.iter().filter_map(|item| {
            let words = text(self.report, item, "a text")?;
            without_nul(self.report, item, words).then(|| words.to_owned())
        });
        Some(read.collect())
    }

    pub(super) fn pairs(&mut self, entry: &Entry<'_>) -> BTreeMap<String, String> {
        let Value::Mapping(entries) = &entry.value.value else {
            expected(self.report, &entry.value, "a mapping of names to values", "");
            return BTreeMap::new();
        };
        let read = entries.iter().filter_map(|pair| Some((pair.key.clone().into_owned(), self.words(pair, "a text")?)));
        read.collect()
    }
}

fn is_true(node: &Node<'_>) -> bool {
    matches!(&node.value, Value::Scalar(Scalar::Boolean, text) if text.eq_ignore_ascii_case("true"))
}

fn amount(report: &mut Report<'_>, fields: &Fields<'_, '_>, key: &str) -> Amount {
    fields.value::<Amount>(report, key, |report, node| {
        quantity(report, node, "a number such as `1`, or a share such as `25%`")
    })
}

/// A share in percent, exact to a tenth, with or without the sign.
pub(super) fn weight(report: &mut Report<'_>, node: &Node<'_>) -> Option<Permille> {
    const WHAT: &str = "a percentage such as `5`, `0.1%` or `25%`";
    let Value::Scalar(Scalar::Text | Scalar::Integer | Scalar::Float, text) = &node.value else {
        expected(report, node, WHAT, "");
        return None;
    };
    let number = text.strip_suffix('%').map_or(text.as_ref(), str::trim_end);
    let thousandths = format!("{number}%").parse::<Percent>().ok().map(Percent::as_thousandths);
    let Some(thousandths) = thousandths else {
        invalid(report, node.span, || format!("`{}` is not {WHAT}", cut(text)), "write a number from 0 to 100");
        return None;
    };
    if thousandths % 100 != 0 {
        let message = || format!("`{}` is finer than a tenth of a percent", cut(text));
        invalid(report, node.span, message, "shares are exact to 0.1 %");
        return None;
    }
    u16::try_from(thousandths / 100).ok().map(Permille::new)
}
