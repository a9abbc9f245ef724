//! Automatic scaling: what it looks at, and how far and how fast it goes.

use std::ops::RangeInclusive;

use orchestra_model::{
    autoscale::{Autoscale, Behavior, Change, Level, Metric, MetricSource, ScalePolicy, Select, ToZero},
    consult::Selector,
    desired::{Protocol, Resources},
    diagnostic::Code,
    quantity::{Cpu, Measure, Timespan},
};

use super::{Decoder, Fields, conflict, expected, integer, invalid, number, quantity, size, text, timespan};
use crate::{
    report::{Report, help},
    table::Table,
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

/// Longest stabilisation window and longest period of a policy, as Kubernetes has them.
const WINDOW: RangeInclusive<u64> = 0..=3_600;
const PERIOD: RangeInclusive<u64> = 1..=1_800;
/// Most metrics of a service.
const METRICS: usize = 16;

/// The number of instances to begin with of a service that does not say `replicas`: `min`, and 1 if that is 0, so that a
/// release shows that it works before it sleeps. Mistakes are reported when `scale` is read.
pub(super) fn first_replicas(service: &Entry<'_>) -> u32 {
    let min = service.value.get("scale").and_then(|scale| scale.value.get("min"));
    let number = min.and_then(|min| match &min.value.value {
        Value::Scalar(Scalar::Integer, text) => number(text),
        _ => None,
    });
    number.and_then(|number| u32::try_from(number).ok()).filter(|number| *number <= 10_000).unwrap_or(1).max(1)
}

impl<'n, 'a> Decoder<'_, 'n, 'a> {
    /// The policy under `scale` of a service.
    pub(super) fn scale(
        &mut self,
        service: &Fields<'n, 'a>,
        entry: &'n Entry<'a>,
        resources: &Resources,
    ) -> Option<Autoscale> {
        let fields = Fields::read(self.report, &entry.value, &tables::SCALE, entry.key_span)?;
        let min = fields.integer(self.report, "min", 0..=10_000);
        let max = fields.get("max").and_then(|entry| integer(self.report, &entry.value, 1..=10_000));
        let max = max.and_then(|max| u32::try_from(max).ok());
        let on = match fields.get("on") {
            Some(on) => self.metrics(on, max, resources),
            None => self.default_metrics(entry, max, resources),
        };
        let policy = Autoscale {
            min,
            // A stand-in where it is missing.
            max: max.unwrap_or(10_000),
            on,
            every: between(self.report, &fields, "every", 1..=3_600),
            up: self.behavior(&fields, "up", &tables::SCALE_UP),
            down: self.behavior(&fields, "down", &tables::SCALE_DOWN),
            cpu_initialization: fields.timespan(self.report, "cpu_initialization"),
            initial_readiness: fields.timespan(self.report, "initial_readiness"),
            to_zero: self.sleeps(&fields, min),
        };
        if let (Some(least), true) = (fields.get("min"), policy.min > policy.max) {
            let message = || format!("`min` ({}) is more than `max` ({})", policy.min, policy.max);
            invalid(self.report, least.value.span, message, "lower `min` or raise `max`");
        } else {
            self.replicas_within(service, entry, &policy);
        }
        Some(policy)
    }

    fn replicas_within(&mut self, service: &Fields<'n, 'a>, scale: &Entry<'a>, policy: &Autoscale) {
        let Some(replicas) = service.get("replicas") else { return };
        let Value::Scalar(Scalar::Integer, text) = &replicas.value.value else { return };
        let Some(number) = number(text) else { return };
        let (min, max) = (policy.min, policy.max);
        if (u64::from(min)..=u64::from(max)).contains(&number) {
            return;
        }
        let message = || format!("`replicas` ({number}) is not between `min` ({min}) and `max` ({max}) of `scale`");
        self.report.error(Code::CONFLICTING_KEYS, replicas.value.span, message, |diagnostic, sources| {
            diagnostic
                .at(sources.location(scale.key_span), "the bounds")
                .help("delete `replicas`: with `scale` it is only the number to begin with")
        });
    }

    // === What it looks at ===

    fn metrics(&mut self, entry: &'n Entry<'a>, max: Option<u32>, resources: &Resources) -> Vec<Metric> {
        let Value::List(items) = &entry.value.value else {
            expected(self.report, &entry.value, "a list of metrics", "write `on: [{cpu: 70%}]`");
            return Vec::new();
        };
        if items.is_empty() && max != Some(1) {
            let remedy = "add one, such as `{cpu: 70%}` or `{requests_per_second: 100}`";
            invalid(self.report, entry.value.span, || "the list of metrics is empty".to_owned(), remedy);
        }
        if items.len() > METRICS {
            let message = || format!("{} metrics are too many", items.len());
            invalid(self.report, entry.value.span, message, &format!("{METRICS} are the most"));
        }
        items.iter().filter_map(|item| self.metric(item, resources)).collect()
    }

    /// Kubernetes' default, where there is something to decide.
    fn default_metrics(&mut self, scale: &Entry<'a>, max: Option<u32>, resources: &Resources) -> Vec<Metric> {
        if max.is_none_or(|max| max == 1) {
            return Vec::new();
        }
        if resources.cpu.is_none_or(|cpu| cpu.as_millis() == 0) {
            let message =
                || "without `on` it scales on `cpu: 80%`, a share of `resources.cpu`, which is missing".to_owned();
            let remedy =
                "say what to scale on, such as `on: [{requests_per_second: 100}]`, or add `resources: {cpu: 250m}`";
            self.report.error(Code::MISSING_KEY, scale.key_span, message, help(remedy));
        }
        vec![Metric { source: MetricSource::Cpu, target: Level::Utilization(80) }]
    }

    fn metric(&mut self, node: &'n Node<'a>, resources: &Resources) -> Option<Metric> {
        let fields = Fields::read(self.report, node, &tables::SCALE_METRIC, node.span.part(0, 1))?;
        let entry =
            one(self.report, &fields, node, "write each metric as an item of its own: `[{cpu: 70%}, {memory: 1Gi}]`")?;
        let value = entry.value.as_ref();
        let (source, target) = match entry.key.as_ref() {
            "cpu" => (
                MetricSource::Cpu,
                self.of_resource(entry, resources.cpu.map(Cpu::as_millis), |report, node| {
                    quantity::<Cpu>(report, node, "a share such as `70%`, or CPU such as `500m`")
                        .map(|cpu| Measure::thousandths(cpu.as_millis()))
                })?,
            ),
            "memory" => {
                let needed = resources.memory.map(orchestra_model::quantity::ByteSize::as_bytes);
                let read = |report: &mut Report<'_>, node: &Node<'_>| {
                    size(report, node).map(|size| Measure::whole(size.as_bytes()))
                };
                (MetricSource::Memory, self.of_resource(entry, needed, read)?)
            }
            "exported" => return self.exported(entry),
            "queue_depth" => return self.queue(entry),
            key => {
                self.counts_requests(entry);
                let source = match key {
                    "requests_per_second" => MetricSource::RequestsPerSecond,
                    "requests_in_flight" => MetricSource::RequestsInFlight,
                    _ => MetricSource::TokensInFlight,
                };
                (source, self.level(value)?)
            }
        };
        Some(Metric { source, target })
    }

    /// A share of what the service asks for, or an amount per instance.
    fn of_resource(
        &mut self,
        entry: &Entry<'a>,
        needed: Option<u64>,
        amount: impl FnOnce(&mut Report<'_>, &Node<'_>) -> Option<Measure>,
    ) -> Option<Level> {
        let node = entry.value.as_ref();
        let share = match &node.value {
            Value::Scalar(Scalar::Text, text) => text.strip_suffix('%').map(str::trim_end),
            _ => None,
        };
        let Some(share) = share else {
            return self.positive_measure(node, amount).map(Level::Average);
        };
        let percent = share.parse::<u32>().ok().filter(|percent| (1..=1_000).contains(percent));
        let Some(percent) = percent else {
            let message =
                || format!("`{}%` is not a share to scale on: write whole percent from `1%` to `1000%`", cut(share));
            invalid(self.report, node.span, message, "");
            return None;
        };
        if needed.is_none_or(|needed| needed == 0) {
            let key = entry.key.as_ref();
            let message = || format!("`{key}: {percent}%` is a share of `resources.{key}`, which is missing");
            let (need, absolute) = if key == "cpu" { ("250m", "500m") } else { ("512Mi", "1Gi") };
            let remedy =
                format!("add `resources: {{{key}: {need}}}`, or scale on an amount such as `{key}: {absolute}`");
            self.report.error(Code::MISSING_KEY, entry.key_span, message, help(remedy));
        }
        Some(Level::Utilization(percent))
    }

    fn exported(&mut self, entry: &'n Entry<'a>) -> Option<Metric> {
        let node = entry.value.as_ref();
        let fields = Fields::read(self.report, node, &tables::SCALE_EXPORTED, entry.key_span)?;
        let target = self.average_or_value(&fields, node);
        let source = fields.get("name").and_then(|entry| self.series(entry, fields.get("labels")));
        Some(Metric { source: source?, target: target? })
    }

    /// Requests that wait, or a metric that says what does.
    fn queue(&mut self, entry: &'n Entry<'a>) -> Option<Metric> {
        let node = entry.value.as_ref();
        if node.entries().is_none() {
            self.counts_requests(entry);
            return Some(Metric { source: MetricSource::QueueDepth, target: self.level(node)? });
        }
        let fields = Fields::read(self.report, node, &tables::SCALE_QUEUE, entry.key_span)?;
        let target = self.average_or_value(&fields, node);
        let source = if let Some(metric) = fields.get("metric") {
            self.series(metric, fields.get("labels"))
        } else {
            if let Some(labels) = fields.get("labels") {
                let message = || "`labels` belong to a metric, and none is named".to_owned();
                self.report.error(Code::MISSING_KEY, labels.key_span, message, help("add `metric: NAME`"));
            }
            self.counts_requests(entry);
            Some(MetricSource::QueueDepth)
        };
        Some(Metric { source: source?, target: target? })
    }

    /// A metric that is exported: a name as in a query, with labels there or apart.
    fn series(&mut self, entry: &Entry<'a>, labels: Option<&'n Entry<'a>>) -> Option<MetricSource> {
        let name = text(self.report, &entry.value, "the name of a metric")?;
        let labels = labels.map(|labels| self.pairs(labels)).unwrap_or_default();
        let selector = name.parse::<Selector>().and_then(|mut selector| {
            selector.labels.extend(labels);
            selector.checked()
        });
        match selector {
            Ok(Selector { name, labels }) => Some(MetricSource::Exported { name, labels }),
            Err(error) => {
                let rule = "letters, digits, `_` and `:`, not beginning with a digit";
                self.report.error(Code::INVALID_NAME, entry.value.span, || error.to_string(), help(rule));
                None
            }
        }
    }

    /// A number is an average per instance.
    fn level(&mut self, node: &'n Node<'a>) -> Option<Level> {
        if node.entries().is_none() {
            return self.positive_measure(node, measure).map(Level::Average);
        }
        let fields = Fields::read(self.report, node, &tables::SCALE_LEVEL, node.span.part(0, 1))?;
        self.average_or_value(&fields, node)
    }

    fn average_or_value(&mut self, fields: &Fields<'n, 'a>, node: &'n Node<'a>) -> Option<Level> {
        let remedy = "keep `average` for a level per instance, or `value` for one of the service as a whole";
        let entry = one(self.report, fields, node, remedy)?;
        let measure = self.positive_measure(&entry.value, measure)?;
        Some(if entry.key == "average" { Level::Average(measure) } else { Level::Value(measure) })
    }

    fn positive_measure(
        &mut self,
        node: &Node<'_>,
        read: impl FnOnce(&mut Report<'_>, &Node<'_>) -> Option<Measure>,
    ) -> Option<Measure> {
        let measure = read(self.report, node)?;
        if measure == Measure::default() {
            let message = || "a target of 0 can never be reached by more instances".to_owned();
            invalid(self.report, node.span, message, "write what one instance can take");
            return None;
        }
        Some(measure)
    }

    fn counts_requests(&mut self, entry: &Entry<'a>) {
        if self.publishes_http() == Some(false) {
            let key = entry.key.as_ref();
            let message =
                || format!("`{key}` is counted at published HTTP ports, and `{}` has none", self.workload.name);
            let remedy = "add `ports: {http: auto}`, or scale on something else, such as `cpu: 70%`";
            self.report.error(Code::UNKNOWN_REFERENCE, entry.key_span, message, help(remedy));
        }
    }

    /// Whether the service has a port whose requests the proxy can count and hold; `None` if its ports have errors.
    fn publishes_http(&self) -> Option<bool> {
        let outline = self.scope.services.get(&self.workload.name).filter(|outline| !outline.broken)?;
        let http = |protocol| matches!(protocol, Protocol::Http | Protocol::H2c | Protocol::Grpc);
        Some(outline.ports.values().any(|port| http(port.protocol)))
    }

    // === How far and how fast it goes ===

    fn behavior(&mut self, scale: &Fields<'n, 'a>, key: &str, table: &'static Table) -> Behavior {
        const SELECTS: &[(&str, Select)] =
            &[("max", Select::Max), ("min", Select::Min), ("disabled", Select::Disabled)];
        let entry = scale.get(key);
        let fields = entry.and_then(|entry| Fields::read(self.report, &entry.value, table, entry.key_span));
        let fields = fields.unwrap_or_else(|| Fields::empty(table));
        let policies = fields.get("policies").map(|entry| self.policies(entry));
        Behavior {
            window: between(self.report, &fields, "window", WINDOW),
            tolerance: fields
                .value(self.report, "tolerance", |report, node| quantity(report, node, "a share such as `10%`")),
            policies: policies.unwrap_or_else(|| {
                let per = Timespan::seconds(15);
                let percent = ScalePolicy { change: Change::Percent(100), per };
                let instances = ScalePolicy { change: Change::Instances(4), per };
                if key == "up" { vec![percent, instances] } else { vec![percent] }
            }),
            select: fields.choice(self.report, "select", SELECTS),
        }
    }

    fn policies(&mut self, entry: &'n Entry<'a>) -> Vec<ScalePolicy> {
        let Value::List(items) = &entry.value.value else {
            let remedy = "write `policies: [{percent: 50, per: 1m}]`";
            expected(self.report, &entry.value, "a list of policies", remedy);
            return Vec::new();
        };
        if items.is_empty() {
            let remedy = "add one, delete the key for the default, or write `select: disabled`";
            invalid(self.report, entry.value.span, || "the list of policies is empty".to_owned(), remedy);
        }
        items.iter().filter_map(|item| self.policy(item)).collect()
    }

    fn policy(&mut self, node: &'n Node<'a>) -> Option<ScalePolicy> {
        let fields = Fields::read(self.report, node, &tables::SCALE_POLICY, node.span.part(0, 1))?;
        let remedy = "write each as an item of its own, and choose with `select`";
        let entry = one(self.report, &fields, node, remedy);
        let per = fields.get("per").and_then(|entry| {
            let per = timespan(self.report, &entry.value)?;
            within(self.report, &entry.value, "per", per, PERIOD);
            Some(per)
        });
        let entry = entry?;
        let most = if entry.key == "percent" { 1_000 } else { 10_000 };
        let number = u32::try_from(integer(self.report, &entry.value, 1..=most)?).ok()?;
        let change = if entry.key == "percent" { Change::Percent(number) } else { Change::Instances(number) };
        Some(ScalePolicy { change, per: per? })
    }

    fn sleeps(&mut self, scale: &Fields<'n, 'a>, min: u32) -> Option<ToZero> {
        let entry = scale.get("to_zero");
        let fields = entry.and_then(|entry| Fields::read(self.report, &entry.value, &tables::TO_ZERO, entry.key_span));
        let fields = fields.unwrap_or_else(|| Fields::empty(&tables::TO_ZERO));
        let to_zero = ToZero {
            idle_for: fields.positive(self.report, "idle_for"),
            cold_start: fields.positive(self.report, "cold_start"),
        };
        if min > 0 {
            if let Some(entry) = entry {
                let message =
                    || format!("`to_zero` says how a service sleeps, and this one never does: `min` is {min}");
                self.report.error(
                    Code::CONFLICTING_KEYS,
                    entry.key_span,
                    message,
                    help("write `min: 0`, or delete `to_zero`"),
                );
            }
            return None;
        }
        if let (Some(false), Some(entry)) = (self.publishes_http(), scale.get("min")) {
            let message = || {
                format!(
                    "a service that sleeps is woken by a request, and `{}` publishes no HTTP port",
                    self.workload.name
                )
            };
            self.report.error(
                Code::CONFLICTING_KEYS,
                entry.value.span,
                message,
                help("write `min: 1`, or add `ports: {http: auto}`"),
            );
        }
        Some(to_zero)
    }
}

/// The one entry of those that exclude each other.
fn one<'n, 'a>(
    report: &mut Report<'_>,
    fields: &Fields<'n, 'a>,
    node: &'n Node<'a>,
    remedy: &str,
) -> Option<&'n Entry<'a>> {
    let Value::Mapping(entries) = &node.value else { return None };
    let mut found = entries.iter().filter(|entry| fields.table.one_of.contains(&entry.key.as_ref()));
    let Some(first) = found.next() else {
        let noun = fields.table.noun;
        let words = fields.table.one_of.join(", ");
        // An unknown key was reported, and is probably meant.
        if entries.iter().all(|entry| fields.table.key(&entry.key).is_some() || entry.key.starts_with("x-")) {
            let message = || format!("{noun} says nothing");
            report.error(Code::MISSING_KEY, fields.at, message, help(format!("add one of: {words}")));
        }
        return None;
    };
    if let Some(second) = found.next() {
        conflict(report, first, second, remedy);
    }
    Some(first)
}

fn measure(report: &mut Report<'_>, node: &Node<'_>) -> Option<Measure> {
    quantity(report, node, "a number such as `100`")
}

/// A duration with a default in the table, and bounds.
fn between(report: &mut Report<'_>, fields: &Fields<'_, '_>, key: &str, seconds: RangeInclusive<u64>) -> Timespan {
    let span = fields.timespan(report, key);
    if let Some(entry) = fields.get(key) {
        within(report, &entry.value, key, span, seconds);
    }
    span
}

fn within(report: &mut Report<'_>, node: &Node<'_>, key: &str, span: Timespan, seconds: RangeInclusive<u64>) {
    let (from, to) = (Timespan::seconds(*seconds.start()), Timespan::seconds(*seconds.end()));
    // What could not be read has been reported.
    let read = matches!(&node.value, Value::Scalar(_, text) if text.parse::<Timespan>().is_ok());
    if read && !(from..=to).contains(&span) {
        invalid(report, node.span, || format!("`{key}` must be from {from} to {to}"), "");
    }
}
