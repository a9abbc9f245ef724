//! Nodes to typed values, with one message per mistake.
//!
//! Readers never stop: what is wrong is reported and a stand-in is returned, so that the rest of the file is read too.
//! Nothing made of stand-ins leaves the crate, because a load with errors has no result.

use std::{ops::RangeInclusive, str::FromStr};

use orchestra_model::{
    Name,
    diagnostic::Code,
    id::ParseIdError,
    quantity::{ByteSize, Timespan},
};

use crate::{
    report::{Report, help, plain},
    source::Span,
    suggest::nearest,
    table::Table,
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

mod address;
mod consult;
mod flags;
mod health;
mod policy;
mod program;
mod rollout;
mod scale;
mod scope;
mod secret;
mod service;
mod template;

pub(crate) use flags::flags;
pub(crate) use program::Decoder;
pub(crate) use scope::Scope;
use template::main_port;

/// The entries of a mapping that a [`Table`] describes.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'n, 'a> {
    table: &'static Table,
    entries: &'n [Entry<'a>],
    /// Where to point when a key is missing.
    at: Span,
}

impl<'n, 'a> Fields<'n, 'a> {
    /// Checks the keys of `node`. What is not a mapping is reported, and read as one without keys.
    pub(crate) fn read(report: &mut Report<'_>, node: &'n Node<'a>, table: &'static Table, at: Span) -> Option<Self> {
        let Value::Mapping(entries) = &node.value else {
            expected(report, node, "a mapping", "");
            return None;
        };
        let fields = Self { table, entries, at };
        for entry in entries {
            fields.check_key(report, entry);
        }
        for key in table.all_keys().filter(|key| key.required) {
            if fields.get(key.name).is_none() && !fields.is_meant(key.name) {
                let message = || format!("the key `{}` is missing in {}", key.name, table.noun);
                report.error(Code::MISSING_KEY, at, message, help(format!("add `{}: …`: {}", key.name, key.doc)));
            }
        }
        Some(fields)
    }

    /// A mapping without keys, for what was left out.
    pub(crate) fn empty(table: &'static Table) -> Self {
        Self { table, entries: &[], at: Span { source: 0, start: 0, end: 0 } }
    }

    fn is_unknown(&self, entry: &Entry<'_>) -> bool {
        self.table.key(&entry.key).is_none() && !entry.key.starts_with("x-")
    }

    /// Whether an unknown key, which is reported, is a misspelling of this one or what others call it.
    fn is_meant(&self, name: &str) -> bool {
        let known = || self.table.all_keys().map(|key| key.name);
        self.entries.iter().filter(|entry| self.is_unknown(entry)).any(|entry| {
            match tables::workload_habit(self.table, &entry.key) {
                Some(remedy) => remedy.contains(&format!("`{name}`")),
                None => nearest(&entry.key, known()) == Some(name),
            }
        })
    }

    fn check_key(self, report: &mut Report<'_>, entry: &Entry<'_>) {
        let (table, key) = (self.table, entry.key.as_ref());
        if !self.is_unknown(entry) {
            return;
        }
        if table.later.contains(&key) {
            let message = || format!("`{key}` in {} is not supported yet", table.noun);
            report.error(
                Code::NOT_YET_SUPPORTED,
                entry.key_span,
                message,
                help("delete it; a later version brings it"),
            );
            return;
        }
        let message = || format!("unknown key `{}` in {}", cut(key), table.noun);
        let known = || table.all_keys().map(|key| key.name);
        report.error(Code::UNKNOWN_KEY, entry.key_span, message, |diagnostic, _| {
            if let Some(remedy) = tables::workload_habit(table, key) {
                diagnostic.help(remedy)
            } else if let Some(near) = nearest(key, known()) {
                diagnostic.help(format!("did you mean `{near}`?"))
            } else {
                diagnostic.help(format!("known keys: {}", known().collect::<Vec<_>>().join(", ")))
            }
        });
    }

    /// The entry of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&'n Entry<'a>> {
        debug_assert!(self.table.key(key).is_some(), "`{key}` is not in the table `{}`", self.table.id);
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// What a key with `true` or `false` says; `None` also where it says neither.
    pub(crate) fn boolean(&self, report: &mut Report<'_>, key: &str) -> Option<bool> {
        self.get(key).and_then(|entry| boolean(report, &entry.value))
    }

    /// The one entry of those that exclude each other, if there is exactly one.
    pub(crate) fn only(&self, report: &mut Report<'_>) -> Option<&'n Entry<'a>> {
        let check = self.table.one_of.contains(&"http");
        let mut found = self.entries.iter().filter(|entry| self.table.one_of.contains(&entry.key.as_ref()));
        let Some(first) = found.next() else {
            // An unknown key was reported, and is probably meant.
            if self.entries.iter().any(|entry| self.is_unknown(entry)) {
                return None;
            }
            let noun = self.table.noun;
            let words = self.table.one_of.join(", ");
            report.error(
                Code::MISSING_KEY,
                self.at,
                || if check { format!("{noun} says nothing to check") } else { format!("{noun} says nothing") },
                help(format!("add one of: {words}")),
            );
            return None;
        };
        if let Some(second) = found.next() {
            let remedy = if check {
                "keep one, or combine them under `all` or `any`; an overlay deletes a key with `null`"
            } else {
                "keep one; a list has an entry for each"
            };
            conflict(report, first, second, remedy);
        }
        Some(first)
    }

    fn default<T: FromStr>(&self, key: &str) -> T {
        let text = self.table.key(key).map_or("", |key| key.default);
        match text.parse() {
            Ok(value) => value,
            Err(_) => unreachable!("the default `{text}` of `{key}` is a valid value"),
        }
    }

    /// A value with a default in the table.
    fn value<T: FromStr>(
        &self,
        report: &mut Report<'_>,
        key: &str,
        read: impl FnOnce(&mut Report<'_>, &Node<'_>) -> Option<T>,
    ) -> T {
        self.get(key).and_then(|entry| read(report, &entry.value)).unwrap_or_else(|| self.default(key))
    }

    pub(crate) fn timespan(&self, report: &mut Report<'_>, key: &str) -> Timespan {
        self.value(report, key, timespan)
    }

    /// A duration that must not be zero.
    pub(crate) fn positive(&self, report: &mut Report<'_>, key: &str) -> Timespan {
        let span = self.timespan(report, key);
        if span == Timespan::default()
            && let Some(entry) = self.get(key)
        {
            invalid(report, entry.value.span, || format!("`{key}` must be longer than 0"), "");
        }
        span
    }

    pub(crate) fn integer(&self, report: &mut Report<'_>, key: &str, range: RangeInclusive<u32>) -> u32 {
        self.value(report, key, |report, node| {
            let range = u64::from(*range.start())..=u64::from(*range.end());
            integer(report, node, range).and_then(|n| u32::try_from(n).ok())
        })
    }

    /// One of the words, with the value that it stands for; the first is the default.
    pub(crate) fn choice<T: Copy>(&self, report: &mut Report<'_>, key: &str, words: &[(&str, T)]) -> T {
        self.get(key).and_then(|entry| choice(report, &entry.value, words)).unwrap_or(words[0].1)
    }
}

/// Reports that a value is of the wrong kind, unless it was reported before.
pub(crate) fn expected(report: &mut Report<'_>, node: &Node<'_>, what: &str, remedy: &str) {
    if !matches!(node.value, Value::Scalar(Scalar::Broken, _)) {
        let message = || format!("expected {what}, found {}", found(node));
        report.error(Code::WRONG_TYPE, head(node), message, help(remedy));
    }
}

/// Reports that a value is not allowed.
pub(crate) fn invalid(report: &mut Report<'_>, span: Span, message: impl FnOnce() -> String, remedy: &str) {
    report.error(Code::INVALID_VALUE, span, message, help(remedy));
}

/// Reports two keys that exclude each other.
pub(crate) fn conflict(report: &mut Report<'_>, first: &Entry<'_>, second: &Entry<'_>, remedy: &str) {
    let message = || format!("`{}` and `{}` exclude each other", first.key, second.key);
    report.error(Code::CONFLICTING_KEYS, second.key_span, message, |diagnostic, sources| {
        diagnostic.at(sources.location(first.key_span), "the other one").help(remedy)
    });
}

/// Where a value begins: the whole of a scalar, the first line of anything else.
fn head(node: &Node<'_>) -> Span {
    match node.value {
        Value::Scalar(..) => node.span,
        _ => node.span.part(0, 1),
    }
}

/// A value in words.
fn found(node: &Node<'_>) -> String {
    match &node.value {
        Value::Scalar(Scalar::Null | Scalar::Broken, _) => "nothing".to_owned(),
        Value::Scalar(Scalar::Boolean, text) => format!("`{text}`"),
        Value::Scalar(Scalar::Integer | Scalar::Float, text) => format!("the number {}", cut(text)),
        Value::Scalar(Scalar::Text, text) => format!("the text `{}`", cut(text)),
        Value::List(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
    }
}

/// The characters of any scalar but null.
pub(crate) fn text<'n>(report: &mut Report<'_>, node: &'n Node<'_>, what: &str) -> Option<&'n str> {
    if let Value::Scalar(kind, text) = &node.value
        && !matches!(kind, Scalar::Null | Scalar::Broken)
    {
        return Some(text);
    }
    expected(report, node, what, "");
    None
}

pub(crate) fn timespan(report: &mut Report<'_>, node: &Node<'_>) -> Option<Timespan> {
    const WHAT: &str = "a duration such as `30s`";
    if let Value::Scalar(Scalar::Integer | Scalar::Float, text) = &node.value
        && !text.trim_start_matches(['0', '.']).is_empty()
    {
        let text = cut(text.trim_start_matches('+'));
        let remedy = if text.starts_with('-') || !text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            "write a number with a unit, such as `250ms`, `30s` or `2h`".to_owned()
        } else {
            format!("write `{text}s` if seconds are meant")
        };
        expected(report, node, WHAT, &remedy);
        return None;
    }
    quantity(report, node, WHAT)
}

/// A quantity of the model in its own notation.
pub(crate) fn quantity<T: FromStr<Err: std::fmt::Display>>(
    report: &mut Report<'_>,
    node: &Node<'_>,
    what: &str,
) -> Option<T> {
    if let Value::Scalar(Scalar::Text | Scalar::Integer | Scalar::Float, text) = &node.value {
        return text.parse().map_err(|error: T::Err| invalid(report, node.span, || error.to_string(), "")).ok();
    }
    expected(report, node, what, "");
    None
}

pub(crate) fn size(report: &mut Report<'_>, node: &Node<'_>) -> Option<ByteSize> {
    quantity(report, node, "a size such as `512Mi`")
}

pub(crate) fn integer(report: &mut Report<'_>, node: &Node<'_>, range: RangeInclusive<u64>) -> Option<u64> {
    let what = format!("a whole number from {} to {}", range.start(), range.end());
    let Value::Scalar(Scalar::Integer, text) = &node.value else {
        let quoted = matches!(&node.value, Value::Scalar(Scalar::Text, text) if text.parse::<u64>().is_ok());
        expected(report, node, &what, if quoted { "write it without quotes or tag" } else { "" });
        return None;
    };
    let number = number(text).filter(|number| range.contains(number));
    if number.is_none() {
        invalid(report, node.span, || format!("{} is out of range: expected {what}", cut(text)), "");
    }
    number
}

/// A plain integer of YAML 1.2 as a number; `None` if negative or too large.
pub(crate) fn number(text: &str) -> Option<u64> {
    if let Some(octal) = text.strip_prefix("0o") {
        return u64::from_str_radix(octal, 8).ok();
    }
    if let Some(hexadecimal) = text.strip_prefix("0x") {
        return u64::from_str_radix(hexadecimal, 16).ok();
    }
    text.strip_prefix('+').unwrap_or(text).parse().ok()
}

pub(crate) fn choice<T: Copy>(report: &mut Report<'_>, node: &Node<'_>, words: &[(&str, T)]) -> Option<T> {
    let list = || words.iter().map(|(word, _)| format!("`{word}`")).collect::<Vec<_>>().join(", ");
    let Value::Scalar(Scalar::Text | Scalar::Boolean | Scalar::Integer | Scalar::Float, text) = &node.value else {
        expected(report, node, &format!("one of {}", list()), "");
        return None;
    };
    if let Some((_, value)) = words.iter().find(|(word, _)| word == text) {
        return Some(*value);
    }
    report.error(
        Code::INVALID_VALUE,
        node.span,
        || format!("`{}` is not one of {}", cut(text), list()),
        |diagnostic, _| match nearest(text.trim_start_matches("SIG"), words.iter().map(|(word, _)| *word)) {
            Some(near) => diagnostic.help(format!("did you mean `{near}`?")),
            None => diagnostic,
        },
    );
    None
}

/// A name that the user gives: the key of a resource, port or environment, or the name of the stack.
pub(crate) fn name(report: &mut Report<'_>, text: &str, span: Span, of: &str) -> Option<Name> {
    let error = match text.parse::<Name>() {
        Ok(name) => return Some(name),
        Err(ParseIdError::Name { max, .. }) => max,
        Err(ParseIdError::Form { .. }) => Name::MAX,
    };
    let message = || format!("`{}` cannot be the name of {of}", cut(text));
    report.error(Code::INVALID_NAME, span, message, |diagnostic, _| {
        let rule = format!(
            "a name has 1 to {error} lowercase letters, digits and `-`, begins with a letter and does not end with `-`"
        );
        let lower = text.to_lowercase().replace(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit(), "-");
        let better = lower.trim_matches('-');
        let diagnostic = diagnostic.note(rule);
        if better.parse::<Name>().is_ok() { diagnostic.help(format!("write `{better}`")) } else { diagnostic }
    });
    None
}

/// The entries of a mapping whose keys are names. `null` counts as empty where `null` is `true`.
pub(crate) fn named<'n, 'a>(report: &mut Report<'_>, node: &'n Node<'a>, null: bool, remedy: &str) -> &'n [Entry<'a>] {
    match &node.value {
        Value::Mapping(entries) => entries,
        Value::Scalar(Scalar::Null, _) if null => &[],
        _ => {
            expected(report, node, "a mapping", remedy);
            &[]
        }
    }
}

/// Reports a name that leads nowhere, with the nearest one that does.
pub(crate) fn unknown<'c>(
    report: &mut Report<'_>,
    span: Span,
    message: impl FnOnce() -> String,
    known: impl Iterator<Item = &'c str> + Clone,
    name: &str,
) {
    report.error(Code::UNKNOWN_REFERENCE, span, message, |diagnostic, _| {
        if let Some(near) = nearest(name, known.clone()) {
            return diagnostic.help(format!("did you mean `{near}`?"));
        }
        let few: Vec<&str> = known.take(12).collect();
        if few.is_empty() { diagnostic } else { diagnostic.help(format!("known are: {}", few.join(", "))) }
    });
}

/// Reports a NUL character, which no program, file name or header can carry.
pub(crate) fn without_nul(report: &mut Report<'_>, node: &Node<'_>, text: &str) -> bool {
    if text.contains('\0') {
        report.error(
            Code::INVALID_VALUE,
            node.span,
            || "a NUL character cannot be passed to a program".to_owned(),
            plain,
        );
        return false;
    }
    true
}

/// Whether it is a token of RFC 9110 5.6.2, as names of header fields and cookies are.
pub(crate) fn is_token(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(allowed)
}

pub(crate) fn boolean(report: &mut Report<'_>, node: &Node<'_>) -> Option<bool> {
    if let Value::Scalar(Scalar::Boolean, text) = &node.value {
        return Some(text.eq_ignore_ascii_case("true"));
    }
    expected(report, node, "`true` or `false`", "");
    None
}
