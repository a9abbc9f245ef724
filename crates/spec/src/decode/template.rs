//! Texts with expressions: what is known is put in, the rest stays a typed hole.

use orchestra_model::{
    Name, Text,
    diagnostic::Code,
    text::{Reference, Segment},
};

use super::{Decoder, invalid, scope::Scope, scope::ServiceOutline, text, without_nul};
use crate::{
    expression::{Piece, Unclosed, pieces},
    report::{Report, help, plain},
    source::Span,
    suggest::nearest,
    yaml::{MAX_EXPANSION, Node, cut},
};

/// Longest path of a file on Linux (`PATH_MAX`, without the final zero).
const MAX_PATH: usize = 4095;

/// What an expression stands for.
enum Found {
    Known(String),
    Later(Reference),
    /// What it names has errors of its own.
    Broken,
}

/// Why an expression has no value.
struct Trouble {
    code: Code,
    message: String,
    help: Option<String>,
}

impl Trouble {
    fn expression(message: impl Into<String>) -> Self {
        Self { code: Code::INTERPOLATION, message: message.into(), help: None }
    }

    fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// `word` is none of `known`.
    fn unknown<'c>(code: Code, message: String, word: &str, known: impl Iterator<Item = &'c str> + Clone) -> Self {
        let help = nearest(word, known.clone()).map(|near| format!("did you mean `{near}`?")).or_else(|| {
            let few: Vec<&str> = known.take(12).collect();
            (!few.is_empty()).then(|| format!("known are: {}", few.join(", ")))
        });
        Self { code, message, help }
    }
}

const ROOTS: [&str; 7] = ["stack", "environment", "services", "volumes", "secrets", "instance", "self"];
const LATER_ROOTS: [&str; 5] = ["models", "stores", "config", "routes", "frontends"];
const OF_SERVICE: [&str; 6] = ["url", "host", "port", "replicas", "ports", "urls"];
const OF_INSTANCE: [&str; 3] = ["id", "ordinal", "ports"];

impl Decoder<'_, '_, '_> {
    /// A text whose holes may be filled at launch. `None` after an error.
    pub(super) fn template(&mut self, node: &Node<'_>, what: &str) -> Option<Text> {
        let source = text(self.report, node, what)?;
        if !without_nul(self.report, node, source) {
            return None;
        }
        if !source.contains("{{") {
            return Some(Text::literal(source));
        }
        self.expand(node, source)
    }

    /// A text that must be known before apply. `None` after an error.
    pub(super) fn known(&mut self, node: &Node<'_>, what: &str) -> Option<String> {
        let template = self.template(node, what)?;
        if let Some(reference) = template.references().next() {
            let message = || format!("`{reference}` is known only after apply, and this text must be known before");
            let remedy = match reference {
                Reference::Secret { .. } => "secrets can be used in `env`",
                Reference::ServicePort { .. } | Reference::ServiceUrl { .. } => {
                    "publish that port with a number instead of `auto`"
                }
                _ => "values of `instance` can be used in `command`, `env` and `exec`",
            };
            self.report.error(Code::INTERPOLATION, node.span, message, help(remedy));
        }
        template.known()
    }

    fn expand(&mut self, node: &Node<'_>, source: &str) -> Option<Text> {
        let mut complete = true;
        let mut segments: Vec<Segment> = Vec::new();
        let mut places = Places { written: self.report.sources.text(node.span), at: 0 };
        for piece in pieces(source) {
            let literal = match piece {
                Err(Unclosed { .. }) => {
                    unclosed(self.report, node);
                    return None;
                }
                Ok(Piece::Literal(literal)) => literal.to_owned(),
                Ok(Piece::Path { path, start, end }) => {
                    let span = places.find(node.span, &source[start..end]);
                    match self.evaluate(path) {
                        Ok(Found::Known(value)) => value,
                        Ok(Found::Later(reference)) => {
                            segments.push(Segment::Reference(reference));
                            continue;
                        }
                        Ok(Found::Broken) => {
                            complete = false;
                            continue;
                        }
                        Err(trouble) => {
                            complete = false;
                            trouble_at(self.report, span, trouble);
                            continue;
                        }
                    }
                }
            };
            *self.expanded = self.expanded.saturating_add(literal.len());
            if *self.expanded > MAX_EXPANSION {
                too_long(self.report, node.span);
                return None;
            }
            if let Some(Segment::Literal(last)) = segments.last_mut() {
                last.push_str(&literal);
            } else {
                segments.push(Segment::Literal(literal));
            }
        }
        complete.then_some(Text(segments))
    }

    fn evaluate(&mut self, path: &str) -> Result<Found, Trouble> {
        let parts = parts(path)?;
        let scope = self.scope;
        match parts.as_slice() {
            ["volumes", volume, "path"] => {
                let Some((name, found)) = scope.volumes.get_key_value(*volume) else {
                    let known = scope.volumes.keys().map(Name::as_str);
                    return Err(Trouble::unknown(
                        Code::UNKNOWN_REFERENCE,
                        format!("there is no volume `{}`", cut(volume)),
                        volume,
                        known,
                    ));
                };
                self.used_volumes.insert(name.clone());
                Ok(Found::Known(found.volume.path.clone()))
            }
            ["volumes", _] | ["volumes", _, _, ..] => {
                Err(Trouble::expression(format!("`{}` names no value of a volume", cut(path)))
                    .help("write `volumes.NAME.path`"))
            }
            ["secrets", secret] => {
                let Some((name, _)) = scope.secrets.get_key_value(*secret) else {
                    let known = scope.secrets.keys().map(Name::as_str);
                    let message = format!("there is no secret `{}`", cut(secret));
                    return Err(Trouble::unknown(Code::UNKNOWN_REFERENCE, message, secret, known));
                };
                Ok(Found::Later(Reference::Secret { secret: name.clone(), version: None }))
            }
            ["self", "name"] => Ok(Found::Known(self.workload.name.to_string())),
            ["self", rest @ ..] => match scope.services.get_key_value(&self.workload.name) {
                Some((name, service)) if !rest.is_empty() => of_service(path, name, service, rest),
                _ => Err(Trouble::expression(format!("`{}` names no value of a job", cut(path)))
                    .help("a job has only `self.name`")),
            },
            ["services", service, rest @ ..] if !rest.is_empty() => {
                let Some((name, found)) = scope.services.get_key_value(*service) else {
                    let known = scope.services.keys().map(Name::as_str);
                    let message = format!("there is no service `{}`", cut(service));
                    return Err(Trouble::unknown(Code::UNKNOWN_REFERENCE, message, service, known));
                };
                of_service(path, name, found, rest)
            }
            ["services", ..] => Err(Trouble::expression(format!("`{}` names no value", cut(path)))
                .help("write a value of the service, such as `services.NAME.url`")),
            ["instance", "id"] => Ok(Found::Later(Reference::InstanceId)),
            ["instance", "ordinal"] => Ok(Found::Later(Reference::InstanceOrdinal)),
            ["instance", "ports", port] => {
                let own = scope.services.get(&self.workload.name).filter(|_| self.workload.is_service());
                match own.map(|service| (service.ports.get_key_value(*port), service)) {
                    Some((Some((port, _)), _)) => Ok(Found::Later(Reference::InstancePort { port: port.clone() })),
                    Some((None, service)) if service.broken => Ok(Found::Broken),
                    Some((None, service)) => Err(Trouble::unknown(
                        Code::UNKNOWN_REFERENCE,
                        format!("`{}` has no port `{}`", self.workload.name, cut(port)),
                        port,
                        service.ports.keys().map(Name::as_str),
                    )),
                    None => Err(Trouble::expression("a job has no ports").help("only services have ports")),
                }
            }
            ["instance", other, ..] => Err(Trouble::unknown(
                Code::INTERPOLATION,
                format!("`{}` names no value of an instance", cut(path)),
                other,
                OF_INSTANCE.into_iter(),
            )),
            _ => of_stack(scope, path, &parts),
        }
    }
}

/// The parts of a path, if it is one.
fn parts(path: &str) -> Result<Vec<&str>, Trouble> {
    if path.is_empty() {
        return Err(Trouble::expression("the expression is empty")
            .help("write a path such as `services.api.url`, or `{{{{` for a literal `{{`"));
    }
    let parts: Vec<&str> = path.split('.').collect();
    let word = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    if parts.iter().all(word) {
        return Ok(parts);
    }
    Err(Trouble::expression(format!("`{}` is not a path", cut(path)))
        .help("an expression is a path such as `services.api.url`; there are no operators, functions or defaults. Write `{{{{` for a literal `{{`"))
}

/// Values that do not depend on who asks.
fn of_stack(scope: &Scope<'_, '_>, path: &str, parts: &[&str]) -> Result<Found, Trouble> {
    match parts {
        ["stack", "name"] => Ok(Found::Known(scope.stack.to_string())),
        ["environment", "name"] => Ok(Found::Known(scope.environment.to_string())),
        ["stack" | "environment", ..] => {
            Err(Trouble::expression(format!("`{}` names no value", cut(path)))
                .help(format!("write `{}.name`", parts[0])))
        }
        [root, ..] if LATER_ROOTS.contains(root) => Err(Trouble {
            code: Code::NOT_YET_SUPPORTED,
            message: format!("`{root}` is not supported yet"),
            help: Some("delete the expression; a later version brings it".to_owned()),
        }),
        [root, ..] if ROOTS.contains(root) => Err(Trouble::expression(format!("`{}` names no value", cut(path)))),
        _ => {
            let root = parts.first().copied().unwrap_or_default();
            let message = format!("`{}` names no value", cut(path));
            Err(Trouble::unknown(Code::INTERPOLATION, message, root, ROOTS.into_iter()))
        }
    }
}

fn of_service(path: &str, name: &Name, service: &ServiceOutline<'_, '_>, rest: &[&str]) -> Result<Found, Trouble> {
    let (property, port) = match rest {
        ["replicas"] => return Ok(Found::Known(service.replicas.to_string())),
        [property @ ("url" | "host" | "port")] => (*property, None),
        ["urls", port] => ("url", Some(*port)),
        ["ports", port] => ("port", Some(*port)),
        [property @ ("urls" | "ports")] => {
            return Err(Trouble::expression(format!("`{}` is not one value", cut(path)))
                .help(format!("add the name of the port: `{property}.NAME`")));
        }
        [other, ..] => {
            let message = format!("`{}` names no value of a service", cut(path));
            return Err(Trouble::unknown(Code::INTERPOLATION, message, other, OF_SERVICE.into_iter()));
        }
        [] => return Err(Trouble::expression(format!("`{}` names no value", cut(path)))),
    };
    let known = || service.ports.keys().map(Name::as_str);
    let found = match port {
        Some(port) => service.ports.get_key_value(port),
        None => main_port(&service.ports, &["http"]).and_then(|port| service.ports.get_key_value(port)),
    };
    let Some((port_name, port)) = found else {
        if service.broken {
            return Ok(Found::Broken);
        }
        return Err(match port {
            Some(port) => {
                let message = format!("service `{name}` has no port `{}`", cut(port));
                Trouble::unknown(Code::UNKNOWN_REFERENCE, message, port, known())
            }
            None if service.ports.is_empty() => Trouble {
                code: Code::UNKNOWN_REFERENCE,
                message: format!("service `{name}` publishes no port"),
                help: Some("give it one: `ports: {http: auto}`".to_owned()),
            },
            None => Trouble {
                code: Code::UNKNOWN_REFERENCE,
                message: format!("service `{name}` publishes several ports and none is named `http`"),
                help: Some(format!(
                    "name the port: `services.{name}.urls.PORT` or `services.{name}.ports.PORT` with one of {}",
                    known().take(12).collect::<Vec<_>>().join(", ")
                )),
            },
        });
    };
    let (service, port_name) = (name.clone(), port_name.clone());
    Ok(match (property, port.port) {
        ("host", _) => Found::Known(reachable(port)),
        ("port", Some(number)) => Found::Known(number.to_string()),
        ("url", Some(number)) => Found::Known(port.url(number)),
        ("port", None) => Found::Later(Reference::ServicePort { service, port: port_name }),
        _ => Found::Later(Reference::ServiceUrl { service, port: port_name }),
    })
}

/// The host as [`orchestra_model::desired::Port::url`] names it.
fn reachable(port: &orchestra_model::desired::Port) -> String {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    match port.host {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.to_string(),
        ip => ip.to_string(),
    }
}

/// The port that is meant when none is named: the first of the `preferred` names that there is, or the only port.
pub(super) fn main_port<'p, P>(ports: &'p std::collections::BTreeMap<Name, P>, preferred: &[&str]) -> Option<&'p Name> {
    let preferred = preferred.iter().find_map(|name| ports.get_key_value(*name)).map(|(name, _)| name);
    preferred.or_else(|| ports.keys().next().filter(|_| ports.len() == 1))
}

/// A path in which only values of the stack itself may stand, so that no two paths can depend on each other.
pub(super) fn stack_path(report: &mut Report<'_>, scope: &Scope<'_, '_>, node: &Node<'_>, of: &str) -> Option<String> {
    let source = text(report, node, "a path")?;
    if !without_nul(report, node, source) {
        return None;
    }
    let mut places = Places { written: report.sources.text(node.span), at: 0 };
    let mut path = String::new();
    for piece in pieces(source) {
        match piece {
            Err(Unclosed { .. }) => {
                unclosed(report, node);
                return None;
            }
            Ok(Piece::Literal(literal)) => path.push_str(literal),
            Ok(Piece::Path { path: expression, start, end }) => {
                let span = places.find(node.span, &source[start..end]);
                let value = parts(expression).and_then(|parts| match parts[0] {
                    "services" | "volumes" | "secrets" | "instance" | "self" => {
                        Err(Trouble::expression(format!("`{}` cannot be used in the path of {of}", cut(expression)))
                            .help("only values of `stack` and `environment` can"))
                    }
                    _ => of_stack(scope, expression, &parts),
                });
                match value {
                    Ok(Found::Known(value)) => path.push_str(&value),
                    Ok(Found::Later(_) | Found::Broken) => return None,
                    Err(trouble) => {
                        trouble_at(report, span, trouble);
                        return None;
                    }
                }
            }
        }
        if path.len() > MAX_PATH {
            break;
        }
    }
    Some(absolute(report, &scope.context.directory, &path, node.span))
}

/// A path against the folder of the stack file. `..` stays, because behind a symbolic link it means something else.
pub(super) fn absolute(report: &mut Report<'_>, directory: &str, path: &str, span: Span) -> String {
    if path.is_empty() {
        invalid(report, span, || "a path cannot be empty".to_owned(), "write `.` for the folder of the stack file");
        return String::new();
    }
    let base = if path.starts_with('/') { "" } else { directory };
    let mut joined = String::with_capacity(base.len() + path.len().min(MAX_PATH) + 1);
    let parts = base.split('/').chain(path.split('/')).filter(|part| !part.is_empty() && *part != ".");
    for part in parts {
        joined.push('/');
        joined.push_str(part);
        if joined.len() > MAX_PATH {
            invalid(report, span, || format!("the path is longer than {MAX_PATH} bytes"), "");
            return String::new();
        }
    }
    if joined.is_empty() { "/".to_owned() } else { joined }
}

/// Finds expressions again in the text as it is written, quotes and escapes included.
struct Places<'t> {
    written: &'t str,
    at: usize,
}

impl Places<'_> {
    fn find(&mut self, whole: Span, expression: &str) -> Span {
        let Some(found) = self.written[self.at..].find(expression) else {
            // Escapes or folded lines: searching on for each expression would take quadratic time.
            self.at = self.written.len();
            return whole;
        };
        let start = self.at + found;
        self.at = start + expression.len();
        whole.part(start, expression.len())
    }
}

fn unclosed(report: &mut Report<'_>, node: &Node<'_>) {
    let written = report.sources.text(node.span);
    let span = written.rfind("{{").map_or(node.span, |at| node.span.part(at, 2));
    let message = || "`{{` is not closed".to_owned();
    report.error(Code::INTERPOLATION, span, message, help("close it with `}}`, or write `{{{{` for a literal `{{`"));
}

fn too_long(report: &mut Report<'_>, span: Span) {
    let message = || format!("expressions produce more than {MAX_EXPANSION} bytes of text");
    report.error(Code::TOO_COMPLEX, span, message, plain);
}

fn trouble_at(report: &mut Report<'_>, span: Span, trouble: Trouble) {
    let Trouble { code, message, help: remedy } = trouble;
    report.error(code, span, || message, help(remedy.unwrap_or_default()));
}
