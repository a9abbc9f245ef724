//! What services and jobs have in common: the program, what it waits for and how it is stopped.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use orchestra_model::{
    Name, ResourceId, ResourceKind, Text,
    desired::{Condition, Dependency, Limit, OnLoss, Program, Resources, Signal, Stop},
    diagnostic::Code,
    quantity::{ByteSize, Cpu},
};

use super::{
    Fields, Scope, choice, expected, integer, invalid, number, quantity, size,
    template::{absolute, main_port},
    text, unknown,
};
use crate::{
    graph::Edge,
    report::{Report, help},
    source::Span,
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

/// Reads workloads: everything that needs to know what else is in the stack.
pub(crate) struct Decoder<'d, 'n, 'a> {
    pub(crate) report: &'d mut Report<'a>,
    pub(crate) scope: &'d Scope<'n, 'a>,
    /// Bytes that expressions produced so far.
    pub(crate) expanded: &'d mut usize,
    /// Waits between resources, found so far.
    pub(crate) edges: &'d mut Vec<Edge>,
    /// Whose texts are read.
    pub(crate) workload: Workload,
    /// Volumes that its texts refer to.
    pub(crate) used_volumes: BTreeSet<Name>,
    /// The pattern of its `log` check, and where it stands.
    pub(crate) ready_line: Option<(String, Span)>,
    /// It has a `notify` check.
    pub(crate) notify: bool,
}

/// A service or a job.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    pub(crate) kind: ResourceKind,
    pub(crate) name: Name,
}

impl Workload {
    pub(crate) fn is_service(&self) -> bool {
        self.kind == ResourceKind::Service
    }

    pub(crate) fn id(&self) -> ResourceId {
        ResourceId::new(self.kind, self.name.clone())
    }
}

const COMMAND: &str = "a command: a list such as `[\"./api\", \"--verbose\"]`, or a text for the shell";

impl<'n, 'a> Decoder<'_, 'n, 'a> {
    /// The program without what only health checks decide.
    pub(super) fn program(&mut self, fields: &Fields<'n, 'a>) -> Program {
        let command = fields.get("command").map(|entry| self.command(&entry.value)).unwrap_or_default();
        let directory = match fields.get("directory") {
            None => self.scope.context.directory.clone(),
            Some(entry) => {
                let path = self.known(&entry.value, "a path");
                let base = &self.scope.context.directory;
                path.map(|path| absolute(self.report, base, &path, entry.value.span)).unwrap_or_default()
            }
        };
        Program {
            command,
            directory,
            env: fields.get("env").map(|entry| self.env(&entry.value)).unwrap_or_default(),
            user: fields.get("user").and_then(|entry| self.user(&entry.value)),
            umask: fields.get("umask").and_then(|entry| umask(self.report, &entry.value)),
            limits: fields.get("limits").map(|entry| self.limits(entry)).unwrap_or_default(),
            ports: BTreeSet::new(),
            resources: fields.get("resources").map(|entry| self.resources(entry)).unwrap_or_default(),
            ready_line: None,
            notify: false,
            watchdog: None,
        }
    }

    pub(super) fn command(&mut self, node: &Node<'_>) -> Vec<Text> {
        match &node.value {
            Value::List(items) => {
                if items.is_empty() {
                    invalid(self.report, node.span, || "the command is empty".to_owned(), "name a program");
                }
                let command: Vec<Option<Text>> = items.iter().map(|item| self.template(item, "a text")).collect();
                if self.workload.is_service() && !runs_a_shell(items) {
                    for item in items {
                        self.warn_of_unexpanded_port(item);
                    }
                }
                if let (Some(Some(first)), Some(node)) = (command.first(), items.first())
                    && first.known().is_some_and(|program| program.is_empty())
                {
                    invalid(self.report, node.span, || "the program has an empty name".to_owned(), "name a program");
                }
                for (item, text) in items.iter().zip(&command) {
                    if let Some(text) = text {
                        self.without_secret(item, text);
                    }
                }
                command.into_iter().flatten().collect()
            }
            Value::Scalar(Scalar::Text, source) => {
                if source.trim().is_empty() {
                    invalid(self.report, node.span, || "the command is empty".to_owned(), "name a program");
                }
                let script = self.template(node, COMMAND).unwrap_or_default();
                self.without_secret(node, &script);
                vec![Text::literal("/bin/sh"), Text::literal("-c"), script]
            }
            _ => {
                expected(self.report, node, COMMAND, "");
                Vec::new()
            }
        }
    }

    /// `$PORT` in an argument of a list reaches the program as it is written: there is no shell in between.
    fn warn_of_unexpanded_port(&mut self, node: &Node<'_>) {
        let Value::Scalar(Scalar::Text, text) = &node.value else { return };
        let Some(variable) = port_variable(text) else { return };
        let message = || format!("`${variable}` stays as it is: a command in a list is run without a shell");
        let ports = self.scope.services.get(&self.workload.name).map(|service| &service.ports);
        let port = ports.and_then(|ports| match variable.strip_prefix("PORT_") {
            Some(suffix) => ports.keys().find(|port| port.as_str().to_ascii_uppercase().replace('-', "_") == suffix),
            None => main_port(ports, &["http"]),
        });
        let port = port.map_or("NAME", Name::as_str);
        let remedy =
            format!("write `{{{{ instance.ports.{port} }}}}`, or the whole command as one text, which the shell runs");
        self.report.warning(Code::INVALID_VALUE, node.span, message, help(remedy));
    }

    fn env(&mut self, node: &'n Node<'a>) -> BTreeMap<String, Text> {
        let Value::Mapping(entries) = &node.value else {
            expected(self.report, node, "a mapping of variables", "write `env: {NAME: value}`, one key per variable");
            return BTreeMap::new();
        };
        let mut env = BTreeMap::new();
        for Entry { key, key_span, value } in entries {
            let bad = |c: char| c == '=' || c.is_whitespace() || c.is_control();
            if key.is_empty() || key.contains(bad) {
                let message = || format!("`{}` cannot be the name of a variable", cut(key));
                self.report.error(Code::INVALID_NAME, *key_span, message, help("use letters, digits and `_`"));
                continue;
            }
            let text = match &value.value {
                Value::Scalar(Scalar::Null, _) => {
                    let remedy = format!("write `{}: \"\"` for an empty value, or delete the line", cut(key));
                    expected(self.report, value, &format!("a value for `{}`", cut(key)), &remedy);
                    continue;
                }
                Value::Mapping(entries)
                    if entries.first().is_some_and(|e| matches!(e.key.as_ref(), "secret" | "from")) =>
                {
                    self.variable_of_secret(value, *key_span)
                }
                _ => self.template(value, "a text"),
            };
            env.extend(text.map(|text| (key.clone().into_owned(), text)));
        }
        env
    }

    fn user(&mut self, node: &Node<'_>) -> Option<String> {
        let user = self.known(node, "a user's name or number")?;
        if user.is_empty() || user.contains(|c: char| c == ':' || c == '/' || c.is_whitespace() || c.is_control()) {
            let message = || format!("`{}` is not a user's name or number", cut(&user));
            let remedy = "write a name such as `www-data` or a number; groups follow from the user";
            invalid(self.report, node.span, message, remedy);
        }
        Some(user)
    }

    fn limits(&mut self, entry: &'n Entry<'a>) -> BTreeMap<Limit, u64> {
        let mut limits = BTreeMap::new();
        let Some(fields) = Fields::read(self.report, &entry.value, &tables::LIMITS, entry.key_span) else {
            return limits;
        };
        for (key, limit, is_size) in [
            ("nofile", Limit::Nofile, false),
            ("nproc", Limit::Nproc, false),
            ("core", Limit::Core, true),
            ("as", Limit::As, true),
            ("memlock", Limit::Memlock, true),
            ("stack", Limit::Stack, true),
            ("fsize", Limit::Fsize, true),
            ("cpu", Limit::Cpu, false),
        ] {
            let Some(Entry { value, .. }) = fields.get(key) else { continue };
            let amount = if matches!(&value.value, Value::Scalar(Scalar::Text, text) if text == "unlimited") {
                // RLIM_INFINITY of Linux.
                Some(u64::MAX)
            } else if is_size {
                size(self.report, value).map(ByteSize::as_bytes)
            } else {
                integer(self.report, value, 0..=u64::from(u32::MAX))
            };
            limits.extend(amount.map(|amount| (limit, amount)));
        }
        limits
    }

    fn resources(&mut self, entry: &'n Entry<'a>) -> Resources {
        let mut resources = Resources::default();
        let Some(fields) = Fields::read(self.report, &entry.value, &tables::RESOURCES, entry.key_span) else {
            return resources;
        };
        let cpu = |report: &mut Report<'_>, entry: &Entry<'_>| {
            quantity::<Cpu>(report, &entry.value, "an amount of CPU such as `250m` or `2`")
        };
        resources.cpu = fields.get("cpu").and_then(|entry| cpu(self.report, entry));
        resources.memory = fields.get("memory").and_then(|entry| size(self.report, &entry.value));
        let Some(entry) = fields.get("limits") else { return resources };
        let Some(limits) = Fields::read(self.report, &entry.value, &tables::RESOURCE_LIMITS, entry.key_span) else {
            return resources;
        };
        if let Some(entry) = limits.get("cpu") {
            resources.cpu_limit = cpu(self.report, entry);
            if resources
                .cpu_limit
                .is_some_and(|limit| limit == Cpu::default() || resources.cpu.is_some_and(|need| need > limit))
            {
                invalid(
                    self.report,
                    entry.value.span,
                    || "the limit of `cpu` is below what is needed".to_owned(),
                    "raise the limit, or lower `resources.cpu`",
                );
            }
        }
        if let Some(entry) = limits.get("memory") {
            resources.memory_limit = size(self.report, &entry.value);
            if resources
                .memory_limit
                .is_some_and(|limit| limit == ByteSize::default() || resources.memory.is_some_and(|need| need > limit))
            {
                invalid(
                    self.report,
                    entry.value.span,
                    || "the limit of `memory` is below what is needed".to_owned(),
                    "raise the limit, or lower `resources.memory`",
                );
            }
        }
        resources
    }

    pub(super) fn stop(&mut self, fields: &Fields<'n, 'a>) -> Stop {
        const SIGNALS: &[(&str, Signal)] = &[
            ("TERM", Signal::Term),
            ("INT", Signal::Int),
            ("QUIT", Signal::Quit),
            ("HUP", Signal::Hup),
            ("USR1", Signal::Usr1),
            ("USR2", Signal::Usr2),
            ("KILL", Signal::Kill),
        ];
        let entry = fields.get("stop");
        let stop = entry.and_then(|entry| Fields::read(self.report, &entry.value, &tables::STOP, entry.key_span));
        let stop = stop.unwrap_or_else(|| Fields::empty(&tables::STOP));
        Stop { signal: stop.choice(self.report, "signal", SIGNALS), grace: stop.timespan(self.report, "grace") }
    }

    /// Declared dependencies, and the volumes that texts refer to. Must come after all texts were read.
    pub(super) fn depends_on(&mut self, fields: &Fields<'n, 'a>) -> BTreeMap<ResourceId, Dependency> {
        let mut dependencies: BTreeMap<ResourceId, Dependency> = BTreeMap::new();
        if let Some(entry) = fields.get("depends_on") {
            match &entry.value.value {
                Value::List(items) => {
                    for item in items {
                        let Some(name) = text(self.report, item, "the name of a service, job or volume") else {
                            continue;
                        };
                        let Some(id) = self.dependency_id(name, item.span) else { continue };
                        if self.is_elsewhere(&id) {
                            continue;
                        }
                        let dependency = Dependency { until: default_condition(id.kind), on_loss: OnLoss::Ignore };
                        self.edges.push(Edge::new(self.workload.id(), &id, dependency.until, item.span));
                        if dependencies.insert(id, dependency).is_some() {
                            invalid(
                                self.report,
                                item.span,
                                || format!("`{}` is listed twice", cut(name)),
                                "delete one of them",
                            );
                        }
                    }
                }
                Value::Mapping(entries) => {
                    for entry in entries {
                        let Some(id) = self.dependency_id(&entry.key, entry.key_span) else { continue };
                        let Some(dependency) = self.dependency(&id, entry) else { continue };
                        if self.is_elsewhere(&id) {
                            continue;
                        }
                        self.edges.push(Edge::new(self.workload.id(), &id, dependency.until, entry.key_span));
                        dependencies.insert(id, dependency);
                    }
                }
                Value::Scalar(..) => expected(
                    self.report,
                    &entry.value,
                    "a list of names, or a mapping of names to conditions",
                    "write `depends_on: [NAME]` or `depends_on: {NAME: ready}`",
                ),
            }
        }
        for volume in std::mem::take(&mut self.used_volumes) {
            let dependency = Dependency { until: Condition::Started, on_loss: OnLoss::Ignore };
            dependencies.entry(ResourceId::new(ResourceKind::Volume, volume)).or_insert(dependency);
        }
        dependencies
    }

    /// Whether a workload is the business of the environment that a preview is made from: it runs there already, and
    /// what happens to it there is nothing to wait for.
    fn is_elsewhere(&self, id: &ResourceId) -> bool {
        id.kind != ResourceKind::Volume && self.scope.shared.contains(id)
    }

    /// Refuses what needs a service to be of this environment.
    pub(super) fn must_be_here(&mut self, service: &Name, span: Span, what: &str) {
        if self.is_elsewhere(&ResourceId::new(ResourceKind::Service, service.clone())) {
            let message = || format!("{what} cannot name `{service}`, which this preview shares");
            let remedy = help("replace it under `previews`, or write `preview: own` for the service");
            self.report.error(Code::PREVIEW, span, message, remedy);
        }
    }

    fn dependency_id(&mut self, name: &str, span: Span) -> Option<ResourceId> {
        let scope = self.scope;
        let found = (scope.services.get_key_value(name).map(|(name, _)| (ResourceKind::Service, name)))
            .or_else(|| scope.jobs.get_key_value(name).map(|(name, _)| (ResourceKind::Job, name)))
            .or_else(|| scope.volumes.get_key_value(name).map(|(name, _)| (ResourceKind::Volume, name)));
        if let Some((kind, name)) = found {
            return Some(ResourceId::new(kind, name.clone()));
        }
        let known = scope.services.keys().chain(scope.jobs.keys()).chain(scope.volumes.keys()).map(Name::as_str);
        let message = || format!("there is no service, job or volume `{}`", cut(name));
        let own = self.workload.name.as_str();
        unknown(self.report, span, message, known.filter(move |known| *known != own), name);
        None
    }

    fn dependency(&mut self, id: &ResourceId, entry: &'n Entry<'a>) -> Option<Dependency> {
        const CONDITIONS: &[(&str, Condition)] =
            &[("started", Condition::Started), ("ready", Condition::Ready), ("completed", Condition::Completed)];
        const LOSSES: &[(&str, OnLoss)] = &[("ignore", OnLoss::Ignore), ("hold", OnLoss::Hold), ("stop", OnLoss::Stop)];
        let (until, on_loss, span) = if entry.value.entries().is_some() {
            let fields = Fields::read(self.report, &entry.value, &tables::DEPENDENCY, entry.key_span)?;
            let until = match fields.get("until") {
                Some(until) => choice(self.report, &until.value, CONDITIONS)?,
                None => default_condition(id.kind),
            };
            let span = fields.get("until").map_or(entry.key_span, |until| until.value.span);
            (until, fields.choice(self.report, "on_loss", LOSSES), span)
        } else {
            (choice(self.report, &entry.value, CONDITIONS)?, OnLoss::Ignore, entry.value.span)
        };
        let name = &id.name;
        match (id.kind, until) {
            (ResourceKind::Service, Condition::Completed) => {
                let message = || format!("`{name}` is a service: it never completes");
                invalid(self.report, span, message, "write `ready`, or make it a job");
            }
            (ResourceKind::Job, Condition::Ready) => {
                let message = || format!("`{name}` is a job: it is never ready");
                invalid(self.report, span, message, "write `completed`");
            }
            (ResourceKind::Volume, Condition::Ready | Condition::Completed) => {
                let message = || format!("`{name}` is a volume: it exists or not");
                invalid(self.report, span, message, "write `started`");
            }
            _ => {}
        }
        Some(Dependency { until, on_loss })
    }
}

/// What people expect of a dependency that says no more than a name.
fn default_condition(kind: ResourceKind) -> Condition {
    match kind {
        ResourceKind::Service => Condition::Ready,
        ResourceKind::Job => Condition::Completed,
        ResourceKind::Volume => Condition::Started,
    }
}

/// Octal digits that say so: `"0022"`, `0022` or `0o022`. A bare `22` could be either and is refused.
/// Whether a list begins with a program that expands variables by itself.
fn runs_a_shell(items: &[Rc<Node<'_>>]) -> bool {
    const SHELLS: &[&str] = &["sh", "bash", "dash", "ash", "zsh", "ksh", "fish", "busybox", "envsubst"];
    let texts = items.iter().filter_map(|item| match &item.value {
        Value::Scalar(Scalar::Text, text) => Some(text.as_ref()),
        _ => None,
    });
    // Also behind `env`, `nice` and the like.
    texts.take(3).any(|text| SHELLS.contains(&text.rsplit('/').next().unwrap_or_default()))
}

/// The variable of a port that a text names as a shell would, such as `PORT` or `PORT_GRPC`.
fn port_variable(text: &str) -> Option<&str> {
    text.split('$').skip(1).find_map(|rest| {
        let rest = rest.strip_prefix('{').unwrap_or(rest);
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let name = &rest[..end];
        (name == "PORT" || name.strip_prefix("PORT_").is_some_and(|port| !port.is_empty())).then_some(name)
    })
}

fn umask(report: &mut Report<'_>, node: &Node<'_>) -> Option<u32> {
    const REMEDY: &str = "write it in octal with a leading 0, such as `0022`";
    let Value::Scalar(Scalar::Text | Scalar::Integer, text) = &node.value else {
        expected(report, node, "a mask such as `0022`", REMEDY);
        return None;
    };
    let octal = match text.strip_prefix('0') {
        Some(digits) => {
            number(&format!("0o{}", digits.strip_prefix('o').unwrap_or(digits))).or((text == "0").then_some(0))
        }
        None => None,
    };
    let mask = octal.and_then(|mask| u32::try_from(mask).ok()).filter(|mask| *mask <= 0o777);
    if mask.is_none() {
        invalid(report, node.span, || format!("`{}` is not a mask from 0000 to 0777", cut(text)), REMEDY);
    }
    mask
}
