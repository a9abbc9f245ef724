//! Checks: what is asked, of which port, and how often.

use std::collections::BTreeMap;

use orchestra_model::{
    Name, ResourceId, ResourceKind,
    desired::{Check, Port, Probe, Protocol},
    diagnostic::Code,
    quantity::Timespan,
    rollout::PairProbe,
};

use super::{Decoder, Fields, expected, invalid, is_token, template::main_port, text, unknown, without_nul};
use crate::{
    graph::Edge,
    report::{help, plain},
    table::Table,
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

/// Shortest pause between pairs of synthetic requests: they stand in for real ones, and are no load.
const OFTEN: Timespan = Timespan::millis(100);

/// What a check may refer to, and how it counts.
#[derive(Clone, Copy)]
struct Surroundings<'p> {
    ports: &'p BTreeMap<Name, Port>,
    /// The ports have errors: nothing is said about references to them.
    broken: bool,
    /// It judges liveness.
    live: bool,
    /// The whole passes only if this part does.
    required: bool,
}

impl<'n, 'a> Decoder<'_, 'n, 'a> {
    pub(super) fn probe(
        &mut self,
        entry: &'n Entry<'a>,
        table: &'static Table,
        ports: &BTreeMap<Name, Port>,
        broken: bool,
    ) -> Option<Probe> {
        let fields = Fields::read(self.report, &entry.value, table, entry.key_span)?;
        let surroundings =
            Surroundings { ports, broken, live: std::ptr::eq(table, &raw const tables::LIVE), required: true };
        let check = self.check(&fields, surroundings);
        self.timed(&fields, check)
    }

    /// What both sets of a rollout are asked in pairs.
    pub(super) fn pair_probe(&mut self, entry: &'n Entry<'a>) -> Option<PairProbe> {
        let node = entry.value.as_ref();
        let fields = if node.entries().is_some() {
            Fields::read(self.report, node, &tables::PAIR_PROBE, entry.key_span)?
        } else {
            Fields::empty(&tables::PAIR_PROBE)
        };
        let outline = self.scope.services.get(&self.workload.name)?;
        let around = Surroundings { ports: &outline.ports, broken: outline.broken, live: false, required: true };
        let port = match fields.get("port") {
            Some(port) => self.own_port(&port.value, around),
            None => self.some_port(entry, around, &["http"]),
        };
        let path = match fields.get("path") {
            Some(path) => path.value.as_ref(),
            // That it is missing, or misspelt, is said already.
            None if node.entries().is_some() => return None,
            None => node,
        };
        let written = text(self.report, path, "a path such as `/ready`")?;
        self.check_path(path, written);
        if let Some(port) = port.as_ref().and_then(|name| outline.ports.get(name))
            && port.protocol != Protocol::Http
        {
            let message = || "probes speak HTTP/1.1, and the port does not".to_owned();
            invalid(self.report, entry.value.span, message, "name a port with `protocol: http`");
        }
        let every = fields.positive(self.report, "every");
        if let Some(entry) = fields.get("every")
            && every != Timespan::default()
            && every < OFTEN
        {
            let message = || format!("`every` must be at least {OFTEN}");
            invalid(
                self.report,
                entry.value.span,
                message,
                "pairs are for services with little traffic: `1s` is usual",
            );
        }
        Some(PairProbe {
            port: port?,
            path: written.to_owned(),
            every,
            timeout: fields.positive(self.report, "timeout"),
        })
    }

    /// The readiness check of a service that names none: each of its ports accepts connections. An open port is little,
    /// but a program that ends at its start never gets that far, and so replaces nothing that works.
    pub(super) fn ports_accept(&mut self, ports: &BTreeMap<Name, Port>) -> Option<Probe> {
        let mut checks: Vec<Check> = ports.keys().map(|port| Check::Tcp { port: port.clone() }).collect();
        let check = if checks.len() > 1 { Check::All(checks) } else { checks.pop()? };
        self.timed(&Fields::empty(&tables::READY), Some(check))
    }

    /// A check with its timing. That is read also if the check is broken, so that its errors show.
    fn timed(&mut self, fields: &Fields<'n, 'a>, check: Option<Check>) -> Option<Probe> {
        let probe = Probe {
            every: fields.positive(self.report, "every"),
            every_starting: fields.positive(self.report, "every_starting"),
            timeout: fields.positive(self.report, "timeout"),
            pass_after: fields.integer(self.report, "pass_after", 1..=1_000),
            fail_after: fields.integer(self.report, "fail_after", 1..=1_000),
            check: check?,
        };
        Some(probe)
    }

    fn check(&mut self, fields: &Fields<'n, 'a>, around: Surroundings<'_>) -> Option<Check> {
        let entry = fields.only(self.report)?;
        let node = entry.value.as_ref();
        match entry.key.as_ref() {
            "http" => self.http(entry, around),
            "tcp" => Some(Check::Tcp { port: self.named_port(entry, around, &["http"])? }),
            "grpc" => self.grpc(entry, around),
            "exec" => Some(Check::Exec { command: self.command(node) }),
            "log" => self.log(node, around),
            "notify" => {
                if !matches!(&node.value, Value::Scalar(Scalar::Boolean, text) if text.eq_ignore_ascii_case("true")) {
                    expected(self.report, node, "`true`", "delete the key if the program does not notify");
                }
                self.passes_once(entry, around);
                self.notify = true;
                Some(Check::Notify)
            }
            "dependency" => self.on_service(node, around),
            key @ ("all" | "any") => {
                let required = around.required && key == "all";
                let parts = self.parts(node, Surroundings { required, ..around })?;
                Some(if key == "all" { Check::All(parts) } else { Check::Any(parts) })
            }
            _ => self.at_least(entry, around),
        }
    }

    fn parts(&mut self, node: &'n Node<'a>, around: Surroundings<'_>) -> Option<Vec<Check>> {
        let Value::List(items) = &node.value else {
            expected(self.report, node, "a list of checks", "write `[{http: /ready}, {tcp: true}]`");
            return None;
        };
        if items.is_empty() {
            invalid(self.report, node.span, || "the list of checks is empty".to_owned(), "add a check");
        }
        // As many parts as could be read: one bad part must not hide mistakes in the next.
        let read = items.iter().filter_map(|item| {
            let fields = Fields::read(self.report, item, &tables::PART, item.span.part(0, 1))?;
            self.check(&fields, around)
        });
        Some(read.collect())
    }

    fn at_least(&mut self, entry: &'n Entry<'a>, around: Surroundings<'_>) -> Option<Check> {
        let fields = Fields::read(self.report, &entry.value, &tables::AT_LEAST, entry.key_span)?;
        let (counted, parts) = (fields.get("count"), fields.get("of"));
        let count = counted.and_then(|entry| super::integer(self.report, &entry.value, 1..=1_000));
        let of = self.parts(&parts?.value, Surroundings { required: false, ..around })?;
        let count = u32::try_from(count?).ok()?;
        let parts = if let Value::List(items) = &parts?.value.value { items.len() } else { 0 };
        if count as usize > parts {
            let span = counted?.value.span;
            invalid(
                self.report,
                span,
                || format!("{count} of {parts} checks can never pass"),
                "lower `count` or add checks",
            );
        }
        Some(Check::AtLeast { count, of })
    }

    fn http(&mut self, entry: &'n Entry<'a>, around: Surroundings<'_>) -> Option<Check> {
        let node = entry.value.as_ref();
        let (fields, path) = if node.entries().is_some() {
            let fields = Fields::read(self.report, node, &tables::HTTP_CHECK, entry.key_span)?;
            (fields, fields.get("path")?.value.as_ref())
        } else if matches!(node.value, Value::Scalar(Scalar::Text, _)) {
            (Fields::empty(&tables::HTTP_CHECK), node)
        } else {
            expected(self.report, node, "a path such as `/ready`, or a mapping with `path`", "");
            return None;
        };
        let port = match fields.get("port") {
            Some(port) => self.own_port(&port.value, around),
            None => self.some_port(entry, around, &["http"]),
        };
        let written = self.known(path, "a path such as `/ready`");
        if let Some(written) = &written {
            self.check_path(path, written);
        }
        let method = fields.choice(self.report, "method", &[("GET", "GET"), ("HEAD", "HEAD"), ("POST", "POST")]);
        Some(Check::Http {
            port: port?,
            method: method.to_owned(),
            path: written?,
            headers: fields.get("headers").map(|entry| self.headers(entry)).unwrap_or_default(),
            body: fields.get("body").and_then(|entry| self.known(&entry.value, "a text")),
            status: fields.get("status").map(|entry| self.numbers(entry, 100, 599)).unwrap_or_default(),
            contains: fields.get("contains").and_then(|entry| self.known(&entry.value, "a text")),
        })
    }

    fn check_path(&mut self, node: &Node<'_>, path: &str) {
        if !path.starts_with('/') {
            let message = || format!("the path `{}` does not begin with `/`", cut(path));
            let whole = path.contains("://");
            let remedy =
                if whole { "write only the path: checks go to the instance itself" } else { "begin it with `/`" };
            invalid(self.report, node.span, message, remedy);
        } else if path.contains(|c: char| c == ' ' || c.is_control()) {
            let message = || "a path cannot contain spaces or control characters".to_owned();
            invalid(self.report, node.span, message, "encode them, a space as `%20`");
        }
    }

    fn headers(&mut self, entry: &Entry<'_>) -> BTreeMap<String, String> {
        let Value::Mapping(entries) = &entry.value.value else {
            expected(self.report, &entry.value, "a mapping of header fields", "");
            return BTreeMap::new();
        };
        let mut headers = BTreeMap::new();
        for Entry { key, key_span, value } in entries {
            if !is_token(key) {
                let message = || format!("`{}` is not the name of a header field", cut(key));
                self.report.error(Code::INVALID_NAME, *key_span, message, plain);
            }
            let Some(content) = self.known(value, "a text") else { continue };
            if content.contains(|c: char| c.is_control() && c != '\t') {
                let message = || "a header field cannot contain control characters".to_owned();
                invalid(self.report, value.span, message, "write it on one line");
            }
            headers.insert(key.clone().into_owned(), content);
        }
        headers
    }

    fn grpc(&mut self, entry: &'n Entry<'a>, around: Surroundings<'_>) -> Option<Check> {
        const PREFERRED: &[&str] = &["grpc", "http"];
        if entry.value.entries().is_none() {
            return Some(Check::Grpc { port: self.named_port(entry, around, PREFERRED)?, service: String::new() });
        }
        let fields = Fields::read(self.report, &entry.value, &tables::GRPC_CHECK, entry.key_span)?;
        let port = match fields.get("port") {
            Some(port) => self.own_port(&port.value, around),
            None => self.some_port(entry, around, PREFERRED),
        };
        let service = fields.get("service").and_then(|s| text(self.report, &s.value, "the name of a gRPC service"));
        Some(Check::Grpc { port: port?, service: service.unwrap_or_default().to_owned() })
    }

    /// `true` for the main port, or the name of one.
    fn named_port(&mut self, entry: &'n Entry<'a>, around: Surroundings<'_>, preferred: &[&str]) -> Option<Name> {
        match &entry.value.value {
            Value::Scalar(Scalar::Boolean, text) if text.eq_ignore_ascii_case("true") => {
                self.some_port(entry, around, preferred)
            }
            Value::Scalar(Scalar::Text, _) => self.own_port(&entry.value, around),
            _ => {
                expected(self.report, &entry.value, "the name of a port, or `true` for the main one", "");
                None
            }
        }
    }

    fn own_port(&mut self, node: &Node<'_>, around: Surroundings<'_>) -> Option<Name> {
        let name = text(self.report, node, "the name of a port")?;
        let found = around.ports.get_key_value(name).map(|(name, _)| name.clone());
        if found.is_none() && !around.broken {
            let message = || format!("`{}` has no port `{}`", self.workload.name, cut(name));
            unknown(self.report, node.span, message, around.ports.keys().map(Name::as_str), name);
        }
        found
    }

    fn some_port(&mut self, entry: &Entry<'_>, around: Surroundings<'_>, preferred: &[&str]) -> Option<Name> {
        let found = main_port(around.ports, preferred).cloned();
        if found.is_none() && !around.broken {
            let none = around.ports.is_empty();
            let message = || {
                let what = if none { "publishes no port" } else { "publishes several ports and none is the main one" };
                format!("the check needs a port, and `{}` {what}", self.workload.name)
            };
            let remedy = if none {
                "add `ports: {http: auto}`, or use another kind of check"
            } else {
                "name the port in the check, or call one `http`"
            };
            self.report.error(Code::UNKNOWN_REFERENCE, entry.key_span, message, help(remedy));
        }
        found
    }

    fn log(&mut self, node: &Node<'_>, around: Surroundings<'_>) -> Option<Check> {
        let Value::Scalar(Scalar::Text, pattern) = &node.value else {
            expected(self.report, node, "a regular expression in quotes", "");
            return None;
        };
        if !without_nul(self.report, node, pattern) {
            return None;
        }
        if let Err(error) = regex_lite::Regex::new(pattern) {
            let message = || format!("the pattern is not a regular expression: {error}");
            invalid(self.report, node.span, message, "write a backslash before characters that stand for themselves");
            return None;
        }
        if let Some((other, span)) = &self.ready_line {
            if other.as_str() != pattern.as_ref() {
                let span = *span;
                let message = || "a service can wait for one pattern only".to_owned();
                self.report.error(Code::CONFLICTING_KEYS, node.span, message, |diagnostic, sources| {
                    diagnostic.at(sources.location(span), "the other one").help("join them: `first|second`")
                });
            }
        } else {
            self.ready_line = Some((pattern.clone().into_owned(), node.span));
        }
        if around.live {
            self.once(node.span, "log");
        }
        Some(Check::Log)
    }

    fn passes_once(&mut self, entry: &Entry<'_>, around: Surroundings<'_>) {
        if around.live {
            self.once(entry.key_span, "notify");
        }
    }

    fn once(&mut self, span: crate::source::Span, kind: &str) {
        let message =
            || format!("a `{kind}` check passes once and never fails again: as a liveness check it says nothing");
        let remedy = help("use `watchdog`, or a check that asks again, such as `http` or `exec`");
        self.report.warning(Code::INVALID_VALUE, span, message, remedy);
    }

    fn on_service(&mut self, node: &Node<'_>, around: Surroundings<'_>) -> Option<Check> {
        let name = text(self.report, node, "the name of a service")?;
        let Some((service, _)) = self.scope.services.get_key_value(name) else {
            let own = self.workload.name.as_str();
            let known = self.scope.services.keys().map(Name::as_str).filter(move |known| *known != own);
            unknown(self.report, node.span, || format!("there is no service `{}`", cut(name)), known, name);
            return None;
        };
        self.must_be_here(service, node.span, "a `dependency` check");
        if around.required && !around.live {
            let to = ResourceId::new(ResourceKind::Service, service.clone());
            self.edges.push(Edge::health(self.workload.id(), &to, node.span));
        } else if *service == self.workload.name {
            invalid(
                self.report,
                node.span,
                || "a service cannot depend on its own readiness".to_owned(),
                "name another service",
            );
        }
        Some(Check::Dependency { service: service.clone() })
    }
}
