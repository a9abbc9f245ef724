//! The way of a stack file from bytes to desired state.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use orchestra_model::{
    Desired, EnvironmentId, Name, Resource, ResourceId, ResourceKind,
    desired::Target,
    diagnostic::{Code, Diagnostic},
    flag::FlagSet,
    preview::Preview,
    secret::SecretSource,
};

use crate::{
    decode::{self, Decoder, Fields, Scope, expected, name, named},
    graph, layer,
    preview::{PreviewContext, Previews},
    report::{Report, help, plain},
    source::{File, Source, Sources, Span},
    suggest::nearest,
    tables,
    yaml::{self, Entry, Node, Scalar, Value, cut},
};

/// What a stack file needs to know of the world around it. The caller finds it out; this crate asks nobody.
#[derive(Clone, Debug)]
pub struct Context {
    /// Absolute path of the folder that holds the stack file; relative paths in it start there.
    pub directory: String,
    /// Absolute path of the folder for managed volumes: `<volumes>/<stack>/<environment>/<name>`.
    pub volumes: String,
    /// The environment to load; `None` is the default one: `dev` if there is one, else the only one, else an implicit
    /// `dev` on the target `process`.
    pub environment: Option<Name>,
    /// What makes it a preview, if it is one; `environment` is its name then.
    pub preview: Option<PreviewContext>,
}

/// A stack file that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// What should exist.
    pub desired: Desired,
    /// What is allowed and probably not meant.
    pub warnings: Vec<Diagnostic>,
    /// Environments that the file defines, in order of their names; may be none.
    pub environments: Vec<Name>,
    /// Most previews at one time.
    pub preview_limit: u32,
    /// Line of the file on which each resource begins.
    pub lines: BTreeMap<ResourceId, u32>,
}

/// Reads a stack file for one environment. Equal arguments give equal results.
///
/// # Errors
/// Everything that is wrong with the file as this environment sees it, in the order of its lines; of very many errors
/// the first hundred found, with the number of the others.
pub fn load(source: Source<'_>, context: &Context) -> Result<Loaded, Vec<Diagnostic>> {
    let sources = Sources(vec![File::new(source).map_err(|diagnostic| vec![diagnostic])?]);
    let mut report = Report::new(&sources);
    // The tree ends here, before the maps of the result are built.
    let root = yaml::parse(sources.0[0].text, 0, &mut report);
    if root.is_none() && !report.has_errors() {
        empty(&mut report);
    }
    let parts = root.and_then(|root| assemble(&mut report, &root, context));
    let (errors, warnings) = report.finish();
    let Some(Parts { environment, resources, flags, environments, lines, preview, preview_limit, secrets }) =
        parts.filter(|_| errors.is_empty())
    else {
        return Err(errors);
    };
    let desired = Desired {
        environment,
        target: Target::Process,
        resources: resources.into_iter().collect(),
        flags,
        preview: preview.map(Box::new),
        secrets,
    };
    Ok(Loaded { desired, warnings, environments, preview_limit, lines: lines.into_iter().collect() })
}

/// What can be said of a stack file before an environment is chosen, as far as it can be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    /// Name of the stack.
    pub stack: Option<Name>,
    /// Environments that it defines, in the order of their names.
    pub environments: Vec<Name>,
    /// Whether it says anything of previews: what lies over them, or what they share.
    pub previews: bool,
}

impl Outline {
    /// Whether an environment can be made of the file: one that it defines, or the one that is always there.
    pub fn defines(&self, environment: &Name) -> bool {
        environment.as_str() == IMPLICIT_ENVIRONMENT || self.environments.contains(environment)
    }
}

/// Looks through a stack file without judging it.
pub fn outline(source: Source<'_>) -> Outline {
    let Ok(file) = File::new(source) else { return Outline::default() };
    let sources = Sources(vec![file]);
    let root = yaml::parse(sources.0[0].text, 0, &mut Report::new(&sources));
    let section = root.as_ref().and_then(|root| root.get("environments"));
    let entries = section.and_then(|entry| entry.value.entries()).unwrap_or_default();
    let names: BTreeSet<Name> = entries.iter().filter_map(|entry| entry.key.parse().ok()).collect();
    let stack = root.as_ref().and_then(|root| match &root.get("name")?.value.value {
        Value::Scalar(_, text) => text.parse().ok(),
        _ => None,
    });
    let previews = root.as_ref().is_some_and(|root| {
        let overlays = entries.iter().map(|entry| &entry.value);
        root.get("previews").is_some() || [root].into_iter().chain(overlays).any(|layer| shares(layer))
    });
    Outline { stack, environments: names.into_iter().collect(), previews }
}

/// Whether a resource of a file or of an overlay says what a preview has of it.
fn shares(layer: &Node<'_>) -> bool {
    let sections =
        ["services", "jobs", "volumes"].into_iter().filter_map(|section| layer.get(section)?.value.entries());
    sections.flatten().any(|resource| resource.value.get("preview").is_some())
}

/// What exists, in the order of the file's sections.
type Resources = Vec<(ResourceId, Resource)>;
/// Line of the file on which each begins.
type Lines = Vec<(ResourceId, u32)>;

/// A result in lists: maps grown one by one would be half empty.
struct Parts {
    environment: EnvironmentId,
    resources: Resources,
    flags: FlagSet,
    environments: Vec<Name>,
    lines: Lines,
    preview: Option<Preview>,
    preview_limit: u32,
    secrets: BTreeMap<Name, SecretSource>,
}

/// The environment that is there without being defined: the stack as it is written, on this machine.
pub const IMPLICIT_ENVIRONMENT: &str = "dev";
/// The beginning of the first source.
const START: Span = Span { source: 0, start: 0, end: 0 };

fn empty(report: &mut Report<'_>) {
    let message = || "the stack file is empty".to_owned();
    report.error(
        Code::MISSING_KEY,
        START,
        message,
        help("run `orchestra init` to write one, or begin with `version: 1` and `name: …`"),
    );
}

fn assemble<'a>(report: &mut Report<'a>, root: &Rc<Node<'a>>, context: &Context) -> Option<Parts> {
    if root.is_null() {
        empty(report);
        return None;
    }
    if root.entries().is_some() && !version(report, root) {
        return None;
    }
    let fields = Fields::read(report, root, &tables::ROOT, START)?;
    let stack = fields.get("name").and_then(|entry| {
        let text = crate::decode::text(report, &entry.value, "a name")?;
        name(report, text, entry.value.span, "a stack")
    });
    let previews = Previews::read(report, &fields);
    let (environment, environments, overlay) = environment(report, &fields, context, &previews);
    let made_from = context.preview.as_ref();
    // What is made from an environment that nobody defined shares nothing with it: that alone is to be said.
    let alone = Context { preview: None, ..context.clone() };
    let is_there = |from: &Name| environments.contains(from) || from.as_str() == IMPLICIT_ENVIRONMENT;
    let context = if made_from.is_some_and(|made| !is_there(&made.from)) { &alone } else { context };

    let section = |report: &mut Report<'_>, key: &str| -> Option<Rc<Node<'a>>> {
        let base = fields.get(key).map(|entry| &entry.value);
        let layers = [overlay.as_ref().and_then(|overlay| overlay.get(key)), made_from.and_then(|_| previews.get(key))];
        layers
            .into_iter()
            .flatten()
            .filter(|entry| !entry.value.is_null())
            .fold(base.cloned(), |below, entry| Some(layer::over(report, below.as_ref(), &entry.value)))
    };
    let services = section(report, "services");
    let jobs = section(report, "jobs");
    let volumes = section(report, "volumes");
    let flags = section(report, "flags");
    let secrets = section(report, "secrets");

    // Without a name of its own the stack is read on under a stand-in, so that the other errors show as well.
    let stand_in = || "stack".parse::<Name>().expect("`stack` is a name");
    let stack = stack.unwrap_or_else(stand_in);
    let environment = environment.unwrap_or_else(stand_in);
    let sections = [&services, &jobs, &volumes, &flags, &secrets].map(Option::as_deref);
    let mut scope = Scope::read(report, context, stack.clone(), environment.clone(), sections);
    let flags = flags.as_deref().map(|node| decode::flags(report, node)).unwrap_or_default();
    let idle = flags.flags.iter().filter(|(_, flag)| !flag.differs_when_off());
    scope.idle_flags = idle.map(|(name, _)| name.to_string()).collect();

    let (resources, lines) = resources(report, &scope);
    if scope.services.is_empty() && scope.jobs.is_empty() {
        let message = || "the stack has no services and no jobs".to_owned();
        report.warning(Code::MISSING_KEY, START, message, help("add one under `services`"));
    }
    Some(Parts {
        environment: EnvironmentId { stack, environment },
        resources,
        flags,
        environments,
        lines,
        preview: made_from.map(|from| previews.preview(from, scope.shared.clone())),
        secrets: scope.secrets.into_iter().filter_map(|(name, source)| Some((name, source?))).collect(),
        preview_limit: previews.limit,
    })
}

/// Decodes everything that the environment has of its own, with the line on which each begins.
fn resources<'a>(report: &mut Report<'a>, scope: &Scope<'_, 'a>) -> (Resources, Lines) {
    let count = scope.volumes.len() + scope.jobs.len() + scope.services.len();
    let mut resources = Vec::with_capacity(count);
    let mut lines = Vec::with_capacity(count);
    let (mut expanded, mut edges) = (0, Vec::new());
    for (name, outline) in &scope.volumes {
        let id = ResourceId::new(ResourceKind::Volume, name.clone());
        lines.push((id.clone(), report.sources.file(outline.span).line(outline.span.start)));
        resources.push((id, Resource::Volume(outline.volume.clone())));
    }
    let workloads = (scope.jobs.iter().map(|(name, entry)| (ResourceKind::Job, name, *entry)))
        .chain(scope.services.iter().map(|(name, outline)| (ResourceKind::Service, name, outline.entry)));
    for (kind, name, entry) in workloads {
        if scope.shared.contains(&ResourceId::new(kind, name.clone())) {
            continue;
        }
        let decoder = Decoder::new(report, scope, &mut expanded, &mut edges, kind, name.clone());
        let resource = match kind {
            ResourceKind::Service => decoder.service(entry).map(Resource::Service),
            _ => decoder.job(entry).map(Resource::Job),
        };
        let id = ResourceId::new(kind, name.clone());
        lines.push((id.clone(), report.sources.file(entry.key_span).line(entry.key_span.start)));
        resources.extend(resource.map(|resource| (id, resource)));
    }
    graph::check(report, &edges);
    (resources, lines)
}

/// Checks the version before anything else: another one may mean anything else by its keys.
fn version(report: &mut Report<'_>, root: &Node<'_>) -> bool {
    let Some(entry) = root.get("version") else { return true };
    match &entry.value.value {
        Value::Scalar(Scalar::Integer | Scalar::Text, text) if text == "1" => true,
        Value::Scalar(Scalar::Integer | Scalar::Float | Scalar::Text, text) => {
            let message = || format!("version {} of the stack file is not supported", cut(text));
            report.error(
                Code::UNSUPPORTED_VERSION,
                entry.value.span,
                message,
                help("this version of Orchestra reads `version: 1`"),
            );
            false
        }
        _ => {
            expected(report, &entry.value, "the number 1", "write `version: 1`");
            false
        }
    }
}

/// Chooses the environment: its name, the names of all, and its overlay.
fn environment<'a>(
    report: &mut Report<'_>,
    fields: &Fields<'_, 'a>,
    context: &Context,
    previews: &Previews<'a>,
) -> (Option<Name>, Vec<Name>, Option<Rc<Node<'a>>>) {
    let entries: &[Entry<'a>] = fields.get("environments").map_or(&[], |entry| named(report, &entry.value, true, ""));
    let mut found: BTreeMap<Name, &Entry<'a>> = BTreeMap::new();
    for entry in entries {
        if let Some(name) = name(report, &entry.key, entry.key_span, "an environment") {
            found.insert(name, entry);
        }
    }
    let names: Vec<Name> = found.keys().cloned().collect();
    let dev: Name = IMPLICIT_ENVIRONMENT.parse().expect("it is a name");
    let below = context.preview.as_ref().map(|preview| &preview.from);
    let chosen = match below.or(context.environment.as_ref()) {
        Some(name) => name.clone(),
        None if found.contains_key(&dev) || names.len() != 1 => dev.clone(),
        None => names[0].clone(),
    };
    // What the chosen overlay makes: the environment itself, or a preview of it.
    let made = if below.is_some() { context.environment.clone() } else { Some(chosen.clone()) };
    if let (Some(below), Some(made)) = (below, &made)
        && (found.contains_key(made) || *made == dev)
    {
        let span = found.get(made).map_or(START, |entry| entry.key_span);
        let message = || format!("`{made}` is an environment of the stack file and not a preview of `{below}`");
        report.error(Code::PREVIEW, span, message, help("choose another name with `--env`, or leave `--from` out"));
    }
    // What is meant for a later version is no mistake until a preview is made.
    if let Some(target) = previews.get("target").filter(|target| below.is_none() && !is_later_target(target)) {
        check_target(report, target);
    }
    for (name, entry) in &found {
        if *name != chosen && entry.value.entries().is_none() && !entry.value.is_null() {
            expected(report, &entry.value, "a mapping", "");
        }
    }
    let Some(entry) = found.get(&chosen) else {
        // `dev` exists always: it is the stack as it is written, on this machine.
        if chosen != dev {
            undefined(report, fields, &chosen, &names);
        }
        return (made, names, None);
    };
    if entry.value.is_null() {
        return (made, names, None);
    }
    let own_target = below.and_then(|_| previews.get("target"));
    let target = own_target.or_else(|| entry.value.get("target"));
    let known_target = target.is_none_or(|target| check_target(report, target)) && own_target.is_none();
    // What belongs to another target is not judged by the rules of this one.
    if known_target {
        let _ = Fields::read(report, &entry.value, &tables::ENVIRONMENT, entry.key_span);
    }
    (made, names, Some(Rc::clone(&entry.value)))
}

fn is_later_target(entry: &Entry<'_>) -> bool {
    matches!(&entry.value.value, Value::Scalar(Scalar::Text, text) if tables::LATER_TARGETS.contains(&text.as_ref()))
}

fn check_target(report: &mut Report<'_>, entry: &Entry<'_>) -> bool {
    if let Value::Scalar(_, text) = &entry.value.value
        && is_later_target(entry)
    {
        let message = || format!("the target `{text}` is not supported yet");
        report.error(Code::NOT_YET_SUPPORTED, entry.value.span, message, help("write `target: process`"));
        return false;
    }
    crate::decode::choice(report, &entry.value, &[("process", Target::Process)]).is_some()
}

fn undefined(report: &mut Report<'_>, fields: &Fields<'_, '_>, chosen: &Name, names: &[Name]) {
    let message = || format!("the environment `{chosen}` is not defined");
    let span = fields.get("environments").map_or(START, |entry| entry.key_span);
    let near = nearest(chosen.as_str(), names.iter().map(Name::as_str).chain([IMPLICIT_ENVIRONMENT]));
    let list = names.iter().take(12).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    report.error(Code::UNKNOWN_ENVIRONMENT, span, message, |diagnostic, sources| match near {
        Some(near) => diagnostic.help(format!("did you mean `{near}`?")),
        None if list.is_empty() => {
            plain(diagnostic, sources).help("the file defines none; without `--env` it runs as `dev`")
        }
        None => diagnostic.help(format!("defined are: {list}")),
    });
}
