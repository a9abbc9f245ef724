//! Layers: one tree of nodes laid over another.
//!
//! Mappings merge key by key; everything else replaces; an explicit `null` deletes. Nodes keep their spans, so a value
//! is blamed on the layer that set it. An environment is the only layer yet; more of them are more calls of [`over`].

use std::{collections::HashMap, rc::Rc};

use orchestra_model::diagnostic::Code;

use crate::{
    report::{Report, help},
    yaml::{Entry, Node, Value},
};

/// `layer` over `base`.
pub(crate) fn over<'a>(report: &mut Report<'_>, base: Option<&Rc<Node<'a>>>, layer: &Rc<Node<'a>>) -> Rc<Node<'a>> {
    let Value::Mapping(changes) = &layer.value else { return Rc::clone(layer) };
    let below = base.and_then(|base| base.entries()).unwrap_or_default();
    let mut index: HashMap<&str, usize> = HashMap::new();
    if below.len() > 8 {
        index.extend(below.iter().enumerate().map(|(at, entry)| (entry.key.as_ref(), at)));
    }
    let find = |key: &str| {
        if below.len() > 8 { index.get(key).copied() } else { below.iter().position(|entry| entry.key == key) }
    };
    let mut merged: Vec<Option<Entry<'a>>> = below.iter().cloned().map(Some).collect();
    for change in changes {
        let place = find(&change.key);
        if change.value.is_null() {
            if let Some(place) = place {
                merged[place] = None;
            } else if !change.key.starts_with("x-") {
                let message = || format!("`{}: null` deletes nothing: the key is not set below", change.key);
                let remedy = "delete the line; to add something empty, write `{}`";
                report.warning(Code::INVALID_VALUE, change.key_span, message, help(remedy));
            }
            continue;
        }
        let value = over(report, place.map(|place| &below[place].value), &change.value);
        match place {
            // The place of a mapping is where it began; the place of anything else is where it was set last.
            Some(place) if value.entries().is_some() && below[place].value.entries().is_some() => {
                merged[place] = Some(Entry { value, ..below[place].clone() });
            }
            Some(place) => merged[place] = Some(Entry { value, ..change.clone() }),
            None => merged.push(Some(Entry { value, ..change.clone() })),
        }
    }
    Rc::new(Node { span: layer.span, value: Value::Mapping(merged.into_iter().flatten().collect()) })
}
