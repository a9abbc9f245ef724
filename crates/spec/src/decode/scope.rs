//! The first pass: everything that has a name, its ports and its paths, so that the second pass can refer to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use orchestra_model::{
    Name, ResourceId, ResourceKind,
    desired::{Port, Protocol, Volume},
    diagnostic::Code,
    route::RouteId,
    secret::SecretSource,
    traffic::{PortPolicy, Tls},
};

use super::{Fields, choice, expected, integer, invalid, name, named, scale, secret::source, template};
use crate::{
    load::Context,
    preview,
    report::{Report, help},
    source::Span,
    tables,
    yaml::{Entry, Node, Scalar, Value},
};

/// All that expressions and dependencies can name.
pub(crate) struct Scope<'n, 'a> {
    pub(crate) context: &'n Context,
    pub(crate) stack: Name,
    pub(crate) environment: Name,
    pub(crate) services: BTreeMap<Name, ServiceOutline<'n, 'a>>,
    pub(crate) jobs: BTreeMap<Name, &'n Entry<'a>>,
    pub(crate) volumes: BTreeMap<Name, VolumeOutline>,
    /// Where they come from; nothing for those with errors.
    pub(crate) secrets: BTreeMap<Name, Option<SecretSource>>,
    /// What a preview uses of the environment that it is made from.
    pub(crate) shared: BTreeSet<ResourceId>,
    /// Names of flags, also of those with errors.
    pub(crate) flags: BTreeSet<String>,
    /// Those that give everybody the same if they are off.
    pub(crate) idle_flags: BTreeSet<String>,
}

/// What others may know of a service.
pub(crate) struct ServiceOutline<'n, 'a> {
    pub(crate) entry: &'n Entry<'a>,
    pub(crate) ports: BTreeMap<Name, Port>,
    pub(crate) replicas: u32,
    /// Its ports have errors: nothing is said about references to them.
    pub(crate) broken: bool,
}

/// A volume with the line that defines it.
pub(crate) struct VolumeOutline {
    pub(crate) volume: Volume,
    pub(crate) span: Span,
}

/// What to do about a section that is not a mapping.
const NAMED: &str = "give each one a name as its key: `NAME: {…}`";

/// A published number.
struct Published {
    number: u16,
    host: IpAddr,
    span: Span,
    service: Name,
    port: Name,
}

impl<'n, 'a> Scope<'n, 'a> {
    /// Reads names, ports, replicas and paths.
    pub(crate) fn read(
        report: &mut Report<'_>,
        context: &'n Context,
        stack: Name,
        environment: Name,
        [services, jobs, volumes, flags, secrets]: [Option<&'n Node<'a>>; 5],
    ) -> Self {
        let mut scope = Self {
            context,
            stack,
            environment,
            services: BTreeMap::new(),
            jobs: BTreeMap::new(),
            volumes: BTreeMap::new(),
            secrets: BTreeMap::new(),
            shared: BTreeSet::new(),
            flags: flags.and_then(Node::entries).into_iter().flatten().map(|entry| entry.key.to_string()).collect(),
            idle_flags: BTreeSet::new(),
        };
        for entry in volumes.map_or(&[][..], |node| named(report, node, true, NAMED)) {
            scope.volume(report, entry);
        }
        for entry in secrets.map_or(&[][..], |node| named(report, node, true, NAMED)) {
            scope.secret(report, entry);
        }
        let mut published = Vec::new();
        for entry in services.map_or(&[][..], |node| named(report, node, true, NAMED)) {
            if let Some(name) = name(report, &entry.key, entry.key_span, "a service") {
                if name.as_str() == RouteId::FLAGS {
                    let message = || format!("`{name}` cannot be the name of a service");
                    let remedy = help("rename it: the proxy serves the flags under this name");
                    report.error(Code::INVALID_NAME, entry.key_span, message, remedy);
                }
                let mut outline = service(report, entry, &name, &mut published);
                if let (Some(span), Some(from)) = (preview::says_shared(report, entry), &context.preview) {
                    published.retain(|published| published.service != name);
                    let ports = preview::ports_of(report, from, &name, span);
                    outline.broken |= ports.is_none();
                    outline.ports = ports.unwrap_or_default();
                    scope.shared.insert(ResourceId::new(ResourceKind::Service, name.clone()));
                } else if context.preview.is_some() {
                    // The numbers are those of the other environment.
                    published.retain(|published| published.service != name);
                    outline.ports.values_mut().for_each(|port| port.port = None);
                }
                scope.services.insert(name, outline);
            }
        }
        for entry in jobs.map_or(&[][..], |node| named(report, node, true, NAMED)) {
            let Some(name) = name(report, &entry.key, entry.key_span, "a job") else { continue };
            if let Some(service) = scope.services.get(&name) {
                let other = service.entry.key_span;
                let message = || format!("`{name}` is the name of a service and of a job");
                report.error(Code::CONFLICTING_KEYS, entry.key_span, message, |diagnostic, sources| {
                    diagnostic
                        .at(sources.location(other), "the service")
                        .help("rename one: instances are named after their workload")
                });
            }
            if let (Some(span), Some(from)) = (preview::says_shared(report, entry), &context.preview) {
                preview::shared(report, from, ResourceKind::Job, &name, span);
                scope.shared.insert(ResourceId::new(ResourceKind::Job, name.clone()));
            }
            scope.jobs.insert(name, entry);
        }
        conflicts(report, published);
        scope
    }

    fn secret(&mut self, report: &mut Report<'_>, entry: &'n Entry<'a>) {
        let Some(name) = name(report, &entry.key, entry.key_span, "a secret") else { return };
        let source = Fields::read(report, &entry.value, &tables::SECRET, entry.key_span)
            .and_then(|fields| source(report, self, &fields, "a secret"));
        self.secrets.insert(name, source);
    }

    fn volume(&mut self, report: &mut Report<'_>, entry: &'n Entry<'a>) {
        let Some(name) = name(report, &entry.key, entry.key_span, "a volume") else { return };
        let node = entry.value.as_ref();
        let path = (!node.is_null())
            .then(|| Fields::read(report, node, &tables::VOLUME, entry.key_span))
            .flatten()
            .and_then(|fields| fields.get("path"))
            .map(|path| template::stack_path(report, self, &path.value, "a volume").unwrap_or_default());
        let (says_shared, from) = (preview::says_shared(report, entry), self.context.preview.as_ref());
        let managed = path.is_none() || from.is_some();
        let chosen = || format!("{}/{}/{}/{name}", self.context.volumes, self.stack, self.environment);
        let mut volume = Volume { path: path.filter(|_| !managed).unwrap_or_else(chosen), managed };
        if let (Some(span), Some(from)) = (says_shared, from) {
            volume = preview::volume_of(report, from, &name, span).unwrap_or(volume);
            self.shared.insert(ResourceId::new(ResourceKind::Volume, name.clone()));
        }
        self.volumes.insert(name, VolumeOutline { volume, span: entry.key_span });
    }
}

fn service<'n, 'a>(
    report: &mut Report<'_>,
    entry: &'n Entry<'a>,
    service: &Name,
    published: &mut Vec<Published>,
) -> ServiceOutline<'n, 'a> {
    let mut outline = ServiceOutline { entry, ports: BTreeMap::new(), replicas: 1, broken: false };
    if let Some(node) = entry.value.get("replicas")
        && let Some(number) = integer(report, &node.value, 0..=10_000)
    {
        outline.replicas = u32::try_from(number).unwrap_or(0);
    } else if entry.value.get("replicas").is_none() {
        outline.replicas = scale::first_replicas(entry);
    }
    let Some(ports) = entry.value.get("ports") else { return outline };
    let remedy = "give the port a name: `ports: {http: 8080}`";
    outline.broken = ports.value.entries().is_none();
    for entry in named(report, &ports.value, false, remedy) {
        let Some(name) = name(report, &entry.key, entry.key_span, "a port") else {
            outline.broken = true;
            continue;
        };
        let Some(port) = port(report, entry) else {
            outline.broken = true;
            continue;
        };
        if let Some(number) = port.port {
            let span = entry.value.span;
            published.push(Published { number, host: port.host, span, service: service.clone(), port: name.clone() });
        }
        outline.ports.insert(name, port);
    }
    outline
}

/// Protocols by their words.
const PROTOCOLS: &[(&str, Protocol)] =
    &[("http", Protocol::Http), ("h2c", Protocol::H2c), ("grpc", Protocol::Grpc), ("tcp", Protocol::Tcp)];

fn port(report: &mut Report<'_>, entry: &Entry<'_>) -> Option<Port> {
    let node = entry.value.as_ref();
    let mut port = Port {
        host: IpAddr::from([127, 0, 0, 1]),
        port: None,
        protocol: protocol_of(&entry.key),
        policy: PortPolicy::default(),
    };
    match &node.value {
        Value::Scalar(Scalar::Integer, _) => {
            port.port = Some(port_number(report, node)?);
        }
        Value::Scalar(Scalar::Text, text) if text == "auto" => {}
        Value::Scalar(Scalar::Text, text) => {
            let Ok(address) = text.parse::<std::net::SocketAddr>() else {
                bad_address(report, node, text);
                return None;
            };
            if address.port() == 0 {
                invalid(
                    report,
                    node.span,
                    || "port 0 cannot be published".to_owned(),
                    "write `auto` to let the machine choose",
                );
                return None;
            }
            port.host = address.ip();
            port.port = Some(address.port());
        }
        Value::Mapping(_) => {
            let fields = Fields::read(report, node, &tables::PORT, entry.key_span)?;
            if let Some(number) = fields.get("port")
                && !matches!(&number.value.value, Value::Scalar(Scalar::Text, text) if text == "auto")
            {
                port.port = Some(port_number(report, &number.value)?);
            }
            if let Some(host) = fields.get("host") {
                port.host = address(report, &host.value)?;
            }
            if let Some(protocol) = fields.get("protocol") {
                port.protocol = choice(report, &protocol.value, PROTOCOLS)?;
            }
            // URLs have to tell; the rest of the policy comes with the second pass.
            port.policy.tls = fields.get("tls").map(|_| Tls::Development { names: BTreeSet::new() });
        }
        _ => {
            expected(report, node, "a port such as `8080`, `127.0.0.1:8080` or `auto`", "");
            return None;
        }
    }
    Some(port)
}

/// As Istio chooses: the port's name, or its part before the first `-`, if that is a protocol.
fn protocol_of(name: &str) -> Protocol {
    let prefix = name.split('-').next().unwrap_or(name);
    PROTOCOLS.iter().find(|(word, _)| *word == prefix).map_or(Protocol::Http, |(_, protocol)| *protocol)
}

fn port_number(report: &mut Report<'_>, node: &Node<'_>) -> Option<u16> {
    integer(report, node, 1..=65_535).and_then(|number| u16::try_from(number).ok())
}

fn bad_address(report: &mut Report<'_>, node: &Node<'_>, text: &str) {
    let numbers: Vec<&str> = text.split(':').collect();
    let is_number = |t: &&str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    let remedy = match numbers.as_slice() {
        [one] if is_number(one) => "remove the quotes".to_owned(),
        [published, inner] if is_number(published) && is_number(inner) => {
            format!("write `{published}`: each instance gets a free port of its own in its environment")
        }
        ["localhost", number] if is_number(number) => format!("write `127.0.0.1:{number}`"),
        ["" | "*", number] if is_number(number) => format!("write `0.0.0.0:{number}` to listen on all addresses"),
        _ => "write a number, an IP address with a number such as `127.0.0.1:8080`, or `auto`".to_owned(),
    };
    invalid(report, node.span, || format!("`{}` is not an address to publish", crate::yaml::cut(text)), &remedy);
}

fn address(report: &mut Report<'_>, node: &Node<'_>) -> Option<IpAddr> {
    let text = super::text(report, node, "an IP address such as `127.0.0.1`")?;
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let remedy =
        if text == "localhost" { "write `127.0.0.1`" } else { "write an IP address such as `127.0.0.1` or `0.0.0.0`" };
    invalid(report, node.span, || format!("`{}` is not an IP address", crate::yaml::cut(text)), remedy);
    None
}

/// Whether listening on both would fail. An unspecified address takes a port on all addresses of its family, and
/// Linux lets `::` take it on those of IPv4 as well.
fn overlap(a: IpAddr, b: IpAddr) -> bool {
    let all = |ip: IpAddr| ip.is_unspecified();
    a == b || (all(a) && (a.is_ipv6() || b.is_ipv4())) || (all(b) && (b.is_ipv6() || a.is_ipv4()))
}

fn conflicts(report: &mut Report<'_>, mut published: Vec<Published>) {
    published.sort_by_key(|p| (p.number, p.span));
    for group in published.chunk_by(|a, b| a.number == b.number) {
        for (index, second) in group.iter().enumerate().skip(1) {
            let Some(first) = group[..index].iter().find(|first| overlap(first.host, second.host)) else { continue };
            let (message, number) = (|| format!("port {} is published twice", second.number), second.number);
            report.error(Code::PORT_CONFLICT, second.span, message, |mut diagnostic, sources| {
                diagnostic.labels[0].message = format!("`{}` of `{}`, on {}", second.port, second.service, second.host);
                let other = format!("`{}` of `{}`, on {}", first.port, first.service, first.host);
                help(format!("give one of them another number, or `auto` instead of {number}"))(
                    diagnostic.at(sources.location(first.span), other),
                    sources,
                )
            });
            if report.is_full() {
                return;
            }
        }
    }
}
