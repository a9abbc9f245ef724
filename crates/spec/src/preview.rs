//! Previews: environments that are made from another one.
//!
//! The overlay of that environment lies over the file, and `previews` over both. What is `shared` is not a resource of
//! the preview: its addresses and paths are those that are in force in the other environment, which therefore must run
//! it. Everything else is the preview's own: published numbers become automatic, and volumes are chosen by Orchestra.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use orchestra_model::{
    Name, Resource, ResourceId, ResourceKind,
    desired::{Port, Volume},
    diagnostic::Code,
    preview::{BaseResource, Preview, Prices},
    quantity::Timespan,
};

use crate::{
    decode::{Fields, choice, expected, invalid},
    report::{Report, help},
    source::Span,
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

/// What is asked of a preview, and what it is made from.
#[derive(Clone, Debug)]
pub struct PreviewContext {
    /// The environment that it is made from.
    pub from: Name,
    /// How long it stays; `None` is what the stack file says.
    pub ttl: Option<Timespan>,
    /// Whose it is.
    pub owner: Option<String>,
    /// What is in force in the environment that it is made from.
    pub base: BTreeMap<ResourceId, BaseResource>,
}

/// The section `previews`.
pub(crate) struct Previews<'a> {
    node: Option<Rc<Node<'a>>>,
    pub(crate) ttl: Timespan,
    pub(crate) limit: u32,
    prices: Prices,
}

impl<'a> Previews<'a> {
    /// Reads the section, also where nothing is a preview.
    pub(crate) fn read(report: &mut Report<'_>, root: &Fields<'_, 'a>) -> Self {
        let entry = root.get("previews").filter(|entry| !entry.value.is_null());
        let fields = entry.and_then(|entry| Fields::read(report, &entry.value, &tables::PREVIEWS, entry.key_span));
        let fields = fields.unwrap_or_else(|| Fields::empty(&tables::PREVIEWS));
        let prices = fields.get("prices").and_then(|entry| prices(report, entry)).unwrap_or_default();
        let (ttl, limit) = (fields.timespan(report, "ttl"), fields.integer(report, "limit", 1..=1_000));
        Self { node: entry.map(|entry| Rc::clone(&entry.value)), ttl, limit, prices }
    }

    /// Its overlay of a section, or its target.
    pub(crate) fn get(&self, key: &str) -> Option<&Entry<'a>> {
        self.node.as_ref()?.get(key).filter(|entry| !entry.value.is_null())
    }

    /// What is put into force.
    pub(crate) fn preview(&self, context: &PreviewContext, shared: BTreeSet<ResourceId>) -> Preview {
        Preview {
            from: context.from.clone(),
            ttl: context.ttl.unwrap_or(self.ttl),
            owner: context.owner.clone(),
            shared,
            prices: self.prices.clone(),
        }
    }
}

fn prices(report: &mut Report<'_>, entry: &Entry<'_>) -> Option<Prices> {
    let fields = Fields::read(report, &entry.value, &tables::PRICES, entry.key_span)?;
    let standard = Prices::default();
    let mut price =
        |key: &str, default: u64| fields.get(key).map_or(Some(default), |entry| millionths(report, &entry.value));
    let (cpu_hour, memory_hour) = (price("cpu_hour", standard.cpu_hour), price("memory_hour", standard.memory_hour));
    let currency = match fields.get("currency") {
        None => Some(standard.currency),
        Some(entry) => currency(report, &entry.value),
    };
    Some(Prices { cpu_hour: cpu_hour?, memory_hour: memory_hour?, currency: currency? })
}

fn currency(report: &mut Report<'_>, node: &Node<'_>) -> Option<String> {
    let text = crate::decode::text(report, node, "a currency such as `EUR`")?;
    if text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Some(text.to_owned());
    }
    invalid(
        report,
        node.span,
        || format!("`{}` is not a currency", cut(text)),
        "write three capital letters, such as `EUR`",
    );
    None
}

/// A decimal number in millionths.
fn millionths(report: &mut Report<'_>, node: &Node<'_>) -> Option<u64> {
    const WHAT: &str = "a price such as `0.04`";
    let Value::Scalar(Scalar::Integer | Scalar::Float | Scalar::Text, text) = &node.value else {
        expected(report, node, WHAT, "");
        return None;
    };
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let valid = !whole.is_empty() && whole.len() <= 9 && part.len() <= 6 && digits(whole) && digits(part);
    if !valid {
        let remedy = "write a number with at most six decimals, such as `0.04048`";
        invalid(report, node.span, || format!("`{}` is not a price", cut(text)), remedy);
        return None;
    }
    format!("{whole}{part:0<6}").parse().ok()
}

// === one resource ===

/// Whether a resource says `preview: shared`. The word is checked in every environment.
pub(crate) fn says_shared(report: &mut Report<'_>, entry: &Entry<'_>) -> Option<Span> {
    let word = entry.value.get("preview")?;
    let shared = choice(report, &word.value, &[("own", false), ("shared", true)])?;
    shared.then_some(word.value.span)
}

/// What is in force of a resource that a preview shares.
pub(crate) fn shared<'b>(
    report: &mut Report<'_>,
    preview: &'b PreviewContext,
    kind: ResourceKind,
    name: &Name,
    span: Span,
) -> Option<&'b BaseResource> {
    let found = preview.base.get(&ResourceId::new(kind, name.clone()));
    if found.is_none() {
        let from = &preview.from;
        let message = || format!("`{name}` is shared with `{from}`, which does not run it");
        let remedy = help(format!("bring that up first: `orchestra up --env {from}`; or write `preview: own`"));
        report.error(Code::PREVIEW, span, message, remedy);
    }
    found
}

/// The ports of a shared service with the numbers on which they are reached.
pub(crate) fn ports_of(
    report: &mut Report<'_>,
    preview: &PreviewContext,
    name: &Name,
    span: Span,
) -> Option<BTreeMap<Name, Port>> {
    let base = shared(report, preview, ResourceKind::Service, name, span)?;
    let Resource::Service(service) = &base.applied else { return None };
    let ports = service.ports.iter().map(|(name, port)| {
        let number = port.port.or_else(|| base.chosen_ports.get(name).copied());
        (name.clone(), Port { port: number, ..port.clone() })
    });
    let ports: BTreeMap<Name, Port> = ports.collect();
    if let Some((port, _)) = ports.iter().find(|(_, port)| port.port.is_none()) {
        let message =
            || format!("the port `{port}` of `{name}`, which is shared with `{}`, has no number yet", preview.from);
        report.error(Code::PREVIEW, span, message, help("wait until that environment is ready"));
        return None;
    }
    Some(ports)
}

/// A shared volume. It stays the other environment's: nothing of the preview deletes it.
pub(crate) fn volume_of(report: &mut Report<'_>, preview: &PreviewContext, name: &Name, span: Span) -> Option<Volume> {
    match &shared(report, preview, ResourceKind::Volume, name, span)?.applied {
        Resource::Volume(volume) => Some(Volume { path: volume.path.clone(), managed: false }),
        _ => None,
    }
}
