//! Numbers from elsewhere: where instances export metrics, which of their counters are guarded, and questions to Prometheus
//! servers.

use std::ops::RangeInclusive;

use orchestra_model::{
    Name,
    autoscale::Autoscale,
    consult::{Exporter, Selector},
    desired::Protocol,
    diagnostic::Code,
    quantity::Timespan,
    rollout::{Guard, PrometheusMetric, Rollout, RolloutStep},
    secret::SecretSource,
    traffic::Permille,
};
use orchestra_stats::Condition;

use super::{
    Decoder, Fields, address::cannot_be_asked, expected, integer, invalid, scope::ServiceOutline, secret::source,
    template::main_port, text, unknown,
};
use crate::{
    report::{Report, help},
    source::Span,
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

/// Most counters, each of which takes a share of `alpha`.
const COUNTERS: usize = 16;
/// Most questions.
const METRICS: usize = 16;

impl<'n, 'a> Decoder<'_, 'n, 'a> {
    /// Where the instances export metrics, if that is said or somebody looks at them.
    pub(super) fn exporter(
        &mut self,
        service: &Fields<'n, 'a>,
        outline: &ServiceOutline<'n, 'a>,
        rollout: &Rollout,
        scale: Option<&Autoscale>,
    ) -> Option<Exporter> {
        let entry = service.get("metrics");
        self.warn_of_blind(service, outline, rollout);
        let guard = rollout.strategy.stepped().and_then(|stepped| stepped.guard.as_ref());
        let counts = guard.is_some_and(|guard: &Guard| !guard.counters.is_empty());
        let scales = scale.is_some_and(|scale| scale.on.iter().any(|metric| metric.source.selector().is_some()));
        if entry.is_none() && !counts && !scales {
            return None;
        }
        let short = entry.filter(|entry| matches!(&entry.value.value, Value::Scalar(..)));
        let fields = match entry.filter(|_| short.is_none()) {
            Some(entry) => Fields::read(self.report, &entry.value, &tables::METRICS, entry.key_span)?,
            None => Fields::empty(&tables::METRICS),
        };
        let path = match short.or_else(|| fields.get("path")) {
            Some(entry) => self.metrics_path(entry),
            None => Some("/metrics".to_owned()),
        };
        let every = bounded(self.report, &fields, "every", 1..=300);
        let timeout = bounded(self.report, &fields, "timeout", 0..=30);
        let at = entry.or(if counts { service.get("rollout") } else { service.get("scale") });
        let span = at.map_or(service.at, |entry| entry.key_span);
        let port = self.exporter_port(fields.get("port"), outline, span);
        Some(Exporter { port: port?.clone(), path: path?, every, timeout })
    }

    /// Warns of an analysis that nothing can be measured for: without a port whose requests the data plane reads it sees
    /// no response, and without any traffic there is none.
    fn warn_of_blind(&mut self, service: &Fields<'n, 'a>, outline: &ServiceOutline<'n, 'a>, rollout: &Rollout) {
        let Some(stepped) = rollout.strategy.stepped().filter(|_| !outline.broken) else { return };
        let guard = stepped.guard.as_ref();
        let Some(entry) = service.get("rollout").filter(|_| guard.is_none_or(|guard| guard.prometheus.is_empty()))
        else {
            return;
        };
        let name = &self.workload.name;
        let analysis = |step: &RolloutStep| matches!(step, RolloutStep::Analysis(_));
        if outline.ports.values().all(|port| port.protocol == Protocol::Tcp) {
            if !stepped.steps.iter().any(analysis) {
                return;
            }
            let none = if outline.ports.is_empty() { "no port" } else { "no port but `tcp`" };
            let message =
                || format!("`{name}` publishes {none}, so an analysis has nothing to judge and ends without a verdict");
            let remedy = "say whom to ask with `guard: {prometheus: …}`, or write `steps` with `pause` or `hook`";
            self.report.warning(Code::INVALID_VALUE, entry.key_span, message, help(remedy));
            return;
        }
        let before = stepped.steps.iter().take_while(|step| !analysis(step)).count();
        let served = |step: &RolloutStep| matches!(step, RolloutStep::Weight(weight) if *weight > Permille::ZERO);
        let asked = guard.is_some_and(|guard| guard.probe.is_some() || guard.raise_to.is_some());
        if before < stepped.steps.len() && !stepped.steps[..before].iter().any(served) && !asked {
            let message = || {
                format!("an analysis comes before the new set of `{name}` has any traffic, and ends without a verdict")
            };
            let remedy = "put a step `weight` before it, or `blue_green: {after: [{analysis: 5m}]}`";
            self.report.warning(Code::INVALID_VALUE, entry.key_span, message, help(remedy));
        }
    }

    /// The port that is named, or the one that is meant; `span` is to blame if there is none.
    fn exporter_port<'o>(
        &mut self,
        named: Option<&Entry<'_>>,
        outline: &'o ServiceOutline<'n, 'a>,
        span: Span,
    ) -> Option<&'o Name> {
        if let Some(entry) = named {
            let wanted = text(self.report, &entry.value, "the name of a port")?;
            let found = outline.ports.keys().find(|port| port.as_str() == wanted);
            if found.is_none() && !outline.broken {
                let message = || format!("`{}` publishes no port `{}`", self.workload.name, cut(wanted));
                unknown(self.report, entry.value.span, message, outline.ports.keys().map(Name::as_str), wanted);
            }
            return found;
        }
        let found = main_port(&outline.ports, &["metrics", "http"]);
        if found.is_none() && !outline.broken {
            let name = &self.workload.name;
            let (message, remedy) = if outline.ports.is_empty() {
                (format!("metrics are read at a port, and `{name}` publishes none"), "add `ports: {http: auto}`")
            } else {
                let message = format!("`{name}` has several ports, and none of them is called `metrics` or `http`");
                (message, "say which one exports metrics: `metrics: {port: NAME}`")
            };
            self.report.error(Code::UNKNOWN_REFERENCE, span, || message, help(remedy));
        }
        found
    }

    fn metrics_path(&mut self, entry: &Entry<'_>) -> Option<String> {
        let path = text(self.report, &entry.value, "a path such as `/metrics`")?;
        if !path.starts_with('/') || path.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            let message = || format!("`{}` is not the path of a request", cut(path));
            invalid(self.report, entry.value.span, message, "write a path that begins with `/`, such as `/metrics`");
            return None;
        }
        Some(path.to_owned())
    }

    /// Names of counters.
    pub(super) fn counters(&mut self, entry: &Entry<'_>) -> Vec<Selector> {
        let Value::List(items) = &entry.value.value else {
            expected(self.report, &entry.value, "a list of counters", "write `counters: [errors_total]`");
            return Vec::new();
        };
        if items.len() > COUNTERS {
            let message = || format!("{} counters are too many", items.len());
            invalid(self.report, entry.value.span, message, "16 are the most: each takes a share of `alpha`");
        }
        let mut counters: Vec<Selector> = Vec::new();
        for item in items {
            let Some(selector) = self.selector(item) else { continue };
            if counters.contains(&selector) {
                invalid(self.report, item.span, || format!("`{selector}` is there twice"), "delete one");
            }
            counters.push(selector);
        }
        counters
    }

    fn selector(&mut self, node: &Node<'_>) -> Option<Selector> {
        let words = text(self.report, node, "the name of a counter")?;
        match words.parse::<Selector>() {
            Ok(selector) => Some(selector),
            Err(error) => {
                let rule = "letters, digits, `_` and `:`, perhaps with labels: `http_total{code=\"500\"}`";
                self.report.error(Code::INVALID_NAME, node.span, || error.to_string(), help(rule));
                None
            }
        }
    }

    /// One question or several.
    pub(super) fn prometheus(&mut self, entry: &'n Entry<'a>) -> Vec<PrometheusMetric> {
        let items = match &entry.value.value {
            Value::List(items) => items.as_slice(),
            _ => std::slice::from_ref(&entry.value),
        };
        if items.len() > METRICS {
            let message = || format!("{} questions are too many", items.len());
            invalid(self.report, entry.value.span, message, "16 are the most");
        }
        let mut metrics: Vec<PrometheusMetric> = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let Some(metric) = self.question(item, entry, index) else { continue };
            if metrics.iter().any(|other| other.name == metric.name) {
                let message = || format!("two questions are called `{}`", cut(&metric.name));
                invalid(self.report, item.span.part(0, 1), message, "give each a `name` of its own");
            }
            metrics.push(metric);
        }
        metrics
    }

    fn question(&mut self, node: &'n Node<'a>, entry: &Entry<'a>, index: usize) -> Option<PrometheusMetric> {
        let at = if index == 0 { entry.key_span } else { node.span.part(0, 1) };
        let fields = Fields::read(self.report, node, &tables::PROMETHEUS, at)?;
        let name = match fields.get("name") {
            Some(entry) => self.line(entry, "a text"),
            None if index == 0 => Some("prometheus".to_owned()),
            None => Some(format!("prometheus-{}", index + 1)),
        };
        let address = fields.get("address").and_then(|entry| self.address(entry));
        let query = fields.get("query").and_then(|entry| self.line(entry, "a query"));
        let success = fields.get("success").and_then(|entry| self.condition(entry));
        let failure = fields.get("failure").and_then(|entry| self.condition(entry));
        if fields.get("success").is_none() && fields.get("failure").is_none() {
            let message = || "it says neither what is good nor what is bad".to_owned();
            let remedy = "add `success: \"result < 0.01\"`, or `failure`, or both";
            self.report.error(Code::MISSING_KEY, at, message, help(remedy));
        }
        let every = bounded(self.report, &fields, "every", 1..=3_600);
        let timeout = bounded(self.report, &fields, "timeout", 0..=60);
        let initial_delay = fields.timespan(self.report, "initial_delay");
        let mut limit = |key, least| limit(self.report, &fields, key, least..=100_000);
        let (count, success_limit) = (limit("count", 1), limit("consecutive_success_limit", 1));
        let (failure_limit, inconclusive_limit) = (limit("failure_limit", 0), limit("inconclusive_limit", 0));
        let error_limit = limit("consecutive_error_limit", 0);
        let token = fields.get("token").and_then(|entry| self.token(entry));
        let plain = address.as_ref().is_some_and(|address| address.starts_with("http://"));
        let ca = fields.get("ca").and_then(|entry| self.authorities(entry, plain));
        let dry_run = fields.boolean(self.report, "dry_run");
        Some(PrometheusMetric {
            name: name?,
            address: address?,
            query: query?,
            success,
            failure,
            every,
            initial_delay,
            timeout,
            count,
            failure_limit,
            inconclusive_limit,
            error_limit,
            success_limit,
            token,
            ca,
            dry_run: dry_run.unwrap_or(false),
        })
    }

    fn address(&mut self, entry: &Entry<'_>) -> Option<String> {
        let address = text(self.report, &entry.value, "an address such as `http://127.0.0.1:9090`")?;
        if let Some(why) = cannot_be_asked(address, false) {
            let message = || format!("`{}` is not an address that can be asked: {why}", cut(address));
            let remedy = "write `http://HOST:PORT` or `https://HOST`, perhaps with the path in front of `/api/v1`";
            invalid(self.report, entry.value.span, message, remedy);
            return None;
        }
        Some(address.trim_end_matches('/').to_owned())
    }

    /// A file with certificates.
    fn authorities(&mut self, entry: &Entry<'_>, plain: bool) -> Option<String> {
        if plain {
            let message = || "`ca` says nothing about an address with `http://`".to_owned();
            invalid(self.report, entry.value.span, message, "write `https://` in `address`, or delete it");
            return None;
        }
        super::template::stack_path(self.report, self.scope, &entry.value, "certificates")
    }

    fn condition(&mut self, entry: &Entry<'_>) -> Option<String> {
        let words = text(self.report, &entry.value, "a condition such as `result < 0.01`")?;
        if let Err(error) = words.parse::<Condition>() {
            let remedy = "compare `result` with a number, such as `result < 0.01` or `result >= 95%`";
            let message = || format!("`{}` is not a condition: {error}", cut(words));
            invalid(self.report, entry.value.span, message, remedy);
            return None;
        }
        Some(words.to_owned())
    }

    fn token(&mut self, entry: &'n Entry<'a>) -> Option<SecretSource> {
        let fields = Fields::read(self.report, &entry.value, &tables::TOKEN, entry.key_span)?;
        source(self.report, self.scope, &fields, "a token")
    }

    /// A text that is not empty, without control characters but line ends and tabs.
    pub(super) fn line(&mut self, entry: &Entry<'_>, what: &str) -> Option<String> {
        let words = text(self.report, &entry.value, what)?;
        if let Some(strange) = words.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
            let message = || format!("`{}` has the control character `{}`", entry.key, strange.escape_debug());
            invalid(self.report, entry.value.span, message, "delete it");
            return None;
        }
        if words.trim().is_empty() {
            let remedy = "write what is meant, or delete the key where it is not needed";
            invalid(self.report, entry.value.span, || format!("`{}` is empty", entry.key), remedy);
            return None;
        }
        Some(words.trim().to_owned())
    }
}

/// A number, or `unlimited`.
fn limit(report: &mut Report<'_>, fields: &Fields<'_, '_>, key: &str, range: RangeInclusive<u64>) -> Option<u32> {
    let Some(entry) = fields.get(key) else {
        return fields.table.key(key).and_then(|key| key.default.parse().ok());
    };
    if matches!(&entry.value.value, Value::Scalar(Scalar::Text, text) if text == "unlimited") {
        return None;
    }
    integer(report, &entry.value, range).and_then(|number| u32::try_from(number).ok())
}

/// A duration of at most so many seconds that is longer than 0, and no shorter than the first of them.
fn bounded(report: &mut Report<'_>, fields: &Fields<'_, '_>, key: &str, seconds: RangeInclusive<u64>) -> Timespan {
    let span = fields.positive(report, key);
    let (from, to) = (Timespan::seconds(*seconds.start()), Timespan::seconds(*seconds.end()));
    if let Some(entry) = fields.get(key)
        && span != Timespan::default()
        && !(from..=to).contains(&span)
    {
        let message = || match *seconds.start() {
            0 => format!("`{key}` must be at most {to}"),
            _ => format!("`{key}` must be from {from} to {to}"),
        };
        invalid(report, entry.value.span, message, "");
    }
    span
}
