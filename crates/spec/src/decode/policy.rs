//! How requests are treated at a published port. The second pass reads it, because a fallback names another service.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Name,
    desired::{Port, Protocol},
    diagnostic::Code,
    network::Network,
    quantity::{ByteSize, Percent, Timespan},
    traffic::{
        Breaker, DEVELOPMENT_DOMAINS, Fallback, Outlier, PortPolicy, RequestKey, Retry, RouteLimits, RouteTimeouts,
        Tls, is_development_name,
    },
};

use super::{
    Decoder, Fields, conflict, expected, integer, invalid, quantity, scope::ServiceOutline, size, template, text,
    timespan, unknown,
};
use crate::{
    report::{Report, help},
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

/// Most bytes of bodies that the proxy reads ahead at a time, over all routes.
const BUFFERED: ByteSize = ByteSize::bytes(64 << 20);

/// Keys without a meaning where bytes are passed on and not requests.
const OF_REQUESTS: &[&str] = &["sticky", "pin", "limits", "buffer", "retry", "fallback", "trusted_proxies"];

impl<'n, 'a> Decoder<'_, 'n, 'a> {
    /// The ports of the first pass with what is said of their requests.
    pub(super) fn ports(&mut self, service: &Fields<'n, 'a>, outline: &ServiceOutline<'n, 'a>) -> BTreeMap<Name, Port> {
        let mut ports = outline.ports.clone();
        let entries = service.get("ports").and_then(|ports| ports.value.entries()).unwrap_or_default();
        for entry in entries {
            if let Some((name, port)) = ports.iter_mut().find(|(name, _)| name.as_str() == entry.key)
                && let Value::Mapping(entries) = &entry.value.value
            {
                let fields = Fields { table: &tables::PORT, entries, at: entry.key_span };
                let name = name.clone();
                port.policy = self.port_policy(fields, &name, port.protocol);
            }
        }
        ports
    }

    fn port_policy(&mut self, fields: Fields<'n, 'a>, port: &Name, protocol: Protocol) -> PortPolicy {
        if protocol == Protocol::Tcp {
            for entry in OF_REQUESTS.iter().filter_map(|key| fields.get(key)) {
                let message = || format!("`{}` is said of requests, and the port `{port}` speaks `tcp`", entry.key);
                let remedy = help("delete it, or write `protocol: http`");
                self.report.error(Code::CONFLICTING_KEYS, entry.key_span, message, remedy);
            }
        }
        PortPolicy {
            tls: fields.get("tls").and_then(|entry| self.tls(entry)),
            sticky: fields.get("sticky").and_then(|entry| self.sticky(entry)),
            pin: fields.boolean(self.report, "pin").unwrap_or(false),
            limits: self.request_limits(fields),
            timeouts: self.timeouts(fields),
            buffer: fields.get("buffer").and_then(|entry| self.buffer(entry)),
            retry: self.retry(fields),
            outlier: self.outlier(fields),
            breaker: self.breaker(fields),
            fallback: fields.get("fallback").and_then(|entry| self.fallback(entry, port)),
            trusted_proxies: fields.get("trusted_proxies").map(|entry| self.trusted_proxies(entry)).unwrap_or_default(),
        }
    }

    fn buffer(&mut self, entry: &'n Entry<'a>) -> Option<ByteSize> {
        let buffer = size(self.report, &entry.value)?;
        if buffer > BUFFERED {
            let message = || format!("`buffer` is longer than what all bodies together may take, {BUFFERED}");
            let remedy = "longer bodies are passed on as they come, and need none";
            invalid(self.report, entry.value.span, message, remedy);
        }
        Some(buffer)
    }

    fn tls(&mut self, entry: &'n Entry<'a>) -> Option<Tls> {
        let node = entry.value.as_ref();
        if is_word(node, tables::DEVELOPMENT) {
            return Some(Tls::Development { names: BTreeSet::new() });
        }
        if node.entries().is_none() {
            let remedy = "write `tls: {certificate: ./tls.crt, key: ./tls.key}` or `tls: development`";
            expected(self.report, node, "`development` or a mapping", remedy);
            return None;
        }
        let fields = Fields::read(self.report, node, &tables::TLS, entry.key_span)?;
        let files = ["certificate", "key"].map(|key| fields.get(key));
        if let (Some(file), Some(names)) = (files.iter().flatten().next(), fields.get("names")) {
            let remedy =
                "keep the files, whose certificate has its own names, or `names` for the development authority";
            conflict(self.report, file, names, remedy);
            return None;
        }
        if let Some(names) = fields.get("names") {
            return self.names(names).map(|names| Tls::Development { names });
        }
        let [Some(certificate), Some(key)] = files else {
            let missing = if files[0].is_none() { "certificate" } else { "key" };
            let message = || format!("the key `{missing}` is missing in `tls`");
            let remedy = help("a certificate from files needs `certificate` and `key`; `tls: development` needs none");
            self.report.error(Code::MISSING_KEY, entry.key_span, message, remedy);
            return None;
        };
        let path = |decoder: &mut Self, entry: &'n Entry<'a>| {
            template::stack_path(decoder.report, decoder.scope, &entry.value, "a certificate")
        };
        Some(Tls::Files { certificate: path(self, certificate)?, key: path(self, key)?, named: None })
    }

    fn names(&mut self, entry: &'n Entry<'a>) -> Option<BTreeSet<String>> {
        let Value::List(items) = &entry.value.value else {
            expected(self.report, &entry.value, "a list of names", "write `names: [app.localhost]`");
            return None;
        };
        let mut names = BTreeSet::new();
        for item in items {
            let Some(name) = text(self.report, item, "a name such as `app.localhost`") else { continue };
            if is_dns_name(name) && is_development_name(name) {
                names.insert(name.to_ascii_lowercase());
            } else if is_dns_name(name) {
                let domains = DEVELOPMENT_DOMAINS.map(|domain| format!("`{domain}`")).join(", ");
                let message = || format!("the development authority cannot vouch for `{}`", cut(name));
                let remedy = format!("use a name below {domains}, or a certificate from files");
                invalid(self.report, item.span, message, &remedy);
            } else {
                let message = || format!("`{}` is not a name that a certificate can have", cut(name));
                let remedy = "write a DNS name such as `app.localhost` or `*.app.localhost`";
                invalid(self.report, item.span, message, remedy);
            }
        }
        Some(names)
    }

    fn sticky(&mut self, entry: &'n Entry<'a>) -> Option<RequestKey> {
        let node = entry.value.as_ref();
        if is_word(node, tables::CLIENT) {
            return Some(RequestKey::Client);
        }
        if node.entries().is_none() {
            expected(self.report, node, "`client` or a mapping", "write `sticky: {cookie: sid}`");
            return None;
        }
        let fields = Fields::read(self.report, node, &tables::STICKY, entry.key_span)?;
        let entry = fields.only(self.report)?;
        let value = text(self.report, &entry.value, "a name")?;
        // RFC 9110 section 5.6.2: token.
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        let fits = match entry.key.as_ref() {
            "query" => !value.contains(|c: char| c.is_control() || "&=#?".contains(c)),
            _ => value.chars().all(token),
        };
        if value.is_empty() || value.len() > 100 || !fits {
            let message = || format!("`{}` cannot be the name of a {}", cut(value), entry.key);
            invalid(self.report, entry.value.span, message, "use 1 to 100 letters, digits, `-` and `_`");
            return None;
        }
        Some(match entry.key.as_ref() {
            "cookie" => RequestKey::Cookie(value.to_owned()),
            "header" => RequestKey::Header(value.to_ascii_lowercase()),
            _ => RequestKey::Query(value.to_owned()),
        })
    }

    fn trusted_proxies(&mut self, entry: &'n Entry<'a>) -> Vec<Network> {
        let Value::List(items) = &entry.value.value else {
            let remedy = "write `trusted_proxies: [10.0.0.0/8]`";
            expected(self.report, &entry.value, "a list of IP addresses and networks", remedy);
            return Vec::new();
        };
        items
            .iter()
            .filter_map(|item| quantity(self.report, item, "an IP address or a network such as `10.0.0.0/8`"))
            .collect()
    }

    fn request_limits(&mut self, fields: Fields<'n, 'a>) -> RouteLimits {
        let limits = self.section(&fields, "limits", &tables::REQUEST_LIMITS);
        RouteLimits {
            body: limits.get("body").and_then(|entry| size(self.report, &entry.value)),
            requests_per_second: count(self.report, &limits, "requests_per_second", 10_000_000),
        }
    }

    fn timeouts(&mut self, fields: Fields<'n, 'a>) -> RouteTimeouts {
        let timeouts = self.section(&fields, "timeouts", &tables::TIMEOUTS);
        let none = Timespan::default();
        let bound = |report: &mut Report<'_>, key: &str, default: Timespan| {
            let Some(entry) = timeouts.get(key) else { return default };
            let span = timespan(report, &entry.value).unwrap_or(default);
            if span > none && span < Timespan::millis(1) {
                let message = || format!("`{key}` is shorter than any answer: a millisecond is the least");
                invalid(report, entry.value.span, message, "write `0` if there shall be no bound");
            }
            span
        };
        RouteTimeouts {
            first_byte: bound(self.report, "first_byte", none),
            response: bound(self.report, "response", none),
            idle: bound(self.report, "idle", RouteTimeouts::default().idle),
        }
    }

    fn retry(&mut self, fields: Fields<'n, 'a>) -> Retry {
        let Some(retry) = self.unless_none(fields, "retry", &tables::RETRY) else {
            return Retry { attempts: 0, budget_percent: 0 };
        };
        Retry {
            attempts: retry.integer(self.report, "attempts", 0..=10),
            budget_percent: percent(self.report, &retry, "budget"),
        }
    }

    fn outlier(&mut self, fields: Fields<'n, 'a>) -> Outlier {
        let Some(outlier) = self.unless_none(fields, "outlier", &tables::OUTLIER) else {
            return Outlier { failures: 0, ..Outlier::default() };
        };
        Outlier {
            failures: outlier.integer(self.report, "failures", 1..=1_000),
            eject_for: outlier.positive(self.report, "eject_for"),
            max_percent: percent(self.report, &outlier, "max"),
            panic_percent: percent(self.report, &outlier, "panic"),
        }
    }

    fn breaker(&mut self, fields: Fields<'n, 'a>) -> Breaker {
        let breaker = self.section(&fields, "breaker", &tables::BREAKER);
        let bound = |report: &mut Report<'_>, key: &str| count(report, &breaker, key, 1_000_000).unwrap_or(0);
        Breaker { per_instance: bound(self.report, "per_instance"), total: bound(self.report, "total") }
    }

    /// The mapping under a key with defaults for what is missing; `None` if the word `none` stands there.
    fn unless_none(
        &mut self,
        fields: Fields<'n, 'a>,
        key: &str,
        table: &'static crate::table::Table,
    ) -> Option<Fields<'n, 'a>> {
        match fields.get(key) {
            Some(entry) if is_word(&entry.value, tables::NONE) => None,
            _ => Some(self.section(&fields, key, table)),
        }
    }

    fn fallback(&mut self, entry: &'n Entry<'a>, port: &Name) -> Option<Fallback> {
        let node = entry.value.as_ref();
        let (service, wanted) = if node.entries().is_some() {
            let fields = Fields::read(self.report, node, &tables::FALLBACK, entry.key_span)?;
            (fields.get("service")?.value.as_ref(), fields.get("port").map(|port| port.value.as_ref()))
        } else {
            (node, None)
        };
        let name = text(self.report, service, "the name of a service")?;
        let Some((name, outline)) = self.scope.services.iter().find(|(known, _)| known.as_str() == name) else {
            let message = || format!("there is no service `{}`", cut(name));
            let known = self.scope.services.keys().map(Name::as_str);
            unknown(self.report, service.span, message, known, name);
            return None;
        };
        if *name == self.workload.name {
            let message = || "a service cannot be its own fallback".to_owned();
            invalid(self.report, service.span, message, "name another service");
            return None;
        }
        self.must_be_here(name, service.span, "a `fallback`");
        if outline.broken {
            return None;
        }
        let http = |port: &Port| port.protocol != Protocol::Tcp;
        let found = match wanted {
            Some(node) => {
                let wanted = text(self.report, node, "the name of a port")?;
                let Some((found, port)) = outline.ports.iter().find(|(known, _)| known.as_str() == wanted) else {
                    let message = || format!("`{name}` publishes no port `{}`", cut(wanted));
                    unknown(self.report, node.span, message, outline.ports.keys().map(Name::as_str), wanted);
                    return None;
                };
                http(port).then_some(found)
            }
            None => match outline.ports.get_key_value(port).filter(|(_, found)| http(found)) {
                Some((found, _)) => Some(found),
                None => super::main_port(&outline.ports, &["http"]).filter(|found| http(&outline.ports[*found])),
            },
        };
        let Some(found) = found else {
            let message = || format!("`{name}` has no port that could answer requests instead of this one");
            let remedy = "write `fallback: {service: …, port: …}` with a port that speaks `http`, `h2c` or `grpc`";
            invalid(self.report, wanted.unwrap_or(service).span, message, remedy);
            return None;
        };
        Some(Fallback { service: name.clone(), port: found.clone() })
    }
}

fn is_word(node: &Node<'_>, word: &str) -> bool {
    matches!(&node.value, Value::Scalar(Scalar::Text, text) if text == word)
}

fn count(report: &mut Report<'_>, fields: &Fields<'_, '_>, key: &str, most: u64) -> Option<u32> {
    let entry = fields.get(key)?;
    integer(report, &entry.value, 1..=most).and_then(|number| u32::try_from(number).ok())
}

/// A share with a default in the table, in whole percents.
fn percent(report: &mut Report<'_>, fields: &Fields<'_, '_>, key: &str) -> u32 {
    let share: Percent =
        fields.value(report, key, |report, node| super::quantity(report, node, "a share such as `20%`"));
    let thousandths = share.as_thousandths();
    if !thousandths.is_multiple_of(1_000)
        && let Some(entry) = fields.get(key)
    {
        invalid(report, entry.value.span, || format!("`{key}` is said in whole percents"), "write it without decimals");
    }
    thousandths / 1_000
}

/// A DNS name with at most one `*` as its first label (RFC 1035 section 2.3.1, RFC 6125 section 6.4.3).
fn is_dns_name(name: &str) -> bool {
    let plain = name.strip_prefix("*.").unwrap_or(name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    (1..=253).contains(&plain.len()) && plain.split('.').all(label)
}
