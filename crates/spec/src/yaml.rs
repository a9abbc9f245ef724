//! YAML text to a tree of nodes that know where they stand.
//!
//! The parser (granit-parser) is an event stream behind this module; nothing else in the product sees it. The tree is
//! built without recursion and within bounds that hold before anything is allocated for them: depth, number of values
//! and bytes of text, each counted once per use of an alias. Aliases share their target, so that a bomb is refused by
//! arithmetic and not by memory.

use std::{borrow::Cow, collections::HashMap, rc::Rc};

use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, Tag};
use orchestra_model::diagnostic::Code;

use crate::{
    report::{Report, help, plain},
    source::Span,
};

/// Deepest nesting of lists and mappings.
pub(crate) const MAX_DEPTH: usize = 64;
/// Values in a file, each use of an alias counted.
pub(crate) const MAX_NODES: usize = 1_000_000;
/// Bytes of text that aliases may repeat, and that interpolation may produce.
pub(crate) const MAX_EXPANSION: usize = 10_000_000;

/// A value with its place.
#[derive(Debug)]
pub(crate) struct Node<'s> {
    pub(crate) span: Span,
    pub(crate) value: Value<'s>,
}

#[derive(Debug)]
pub(crate) enum Value<'s> {
    Scalar(Scalar, Cow<'s, str>),
    List(Vec<Rc<Node<'s>>>),
    Mapping(Vec<Entry<'s>>),
}

/// What a scalar means by the core schema of YAML 1.2. `no`, `on` and `1.2.3` are texts, `010` is the number ten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    Null,
    Boolean,
    Integer,
    Float,
    Text,
    /// It was reported already; nothing more is said about it.
    Broken,
}

/// Stands for a value that was reported and dropped.
const BROKEN: Value<'static> = Value::Scalar(Scalar::Broken, Cow::Borrowed(""));

/// A key with its value.
#[derive(Clone, Debug)]
pub(crate) struct Entry<'s> {
    pub(crate) key: Cow<'s, str>,
    pub(crate) key_span: Span,
    pub(crate) value: Rc<Node<'s>>,
}

impl<'s> Node<'s> {
    pub(crate) fn is_null(&self) -> bool {
        matches!(self.value, Value::Scalar(Scalar::Null, _))
    }

    pub(crate) fn entries(&self) -> Option<&[Entry<'s>]> {
        if let Value::Mapping(entries) = &self.value { Some(entries) } else { None }
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&Entry<'s>> {
        self.entries()?.iter().find(|entry| entry.key == key)
    }
}

/// Reads one source. `None` after errors from which nothing can be concluded.
pub(crate) fn parse<'s>(text: &'s str, source: u16, report: &mut Report<'_>) -> Option<Rc<Node<'s>>> {
    Builder { report, source, stack: Vec::new(), anchors: HashMap::new(), root: None, nodes: 0, repeated: 0 }.run(text)
}

struct Builder<'s, 'r, 'a> {
    report: &'r mut Report<'a>,
    source: u16,
    stack: Vec<Frame<'s>>,
    anchors: HashMap<usize, (Rc<Node<'s>>, Weight)>,
    root: Option<Rc<Node<'s>>>,
    nodes: usize,
    repeated: usize,
}

/// What a finished value amounts to when it is used again.
#[derive(Clone, Copy, Default)]
struct Weight {
    nodes: usize,
    bytes: usize,
    height: usize,
}

struct Frame<'s> {
    span: Span,
    anchor: usize,
    weight: Weight,
    content: Content<'s>,
    /// It stands where a key should, was reported, and will be dropped.
    is_key: bool,
    /// One of its keys was dropped.
    refused: bool,
}

enum Content<'s> {
    List(Vec<Rc<Node<'s>>>),
    Mapping(Vec<Pair<'s>>, Option<Key<'s>>),
}

enum Key<'s> {
    /// A usable key; `true` if it is a plain `<<`.
    Text(Cow<'s, str>, Span, bool),
    /// A key that was reported; its value will be dropped.
    Refused,
}

struct Pair<'s> {
    entry: Entry<'s>,
    merge: bool,
}

/// Stops the parse after an error was reported.
struct Stop;

impl<'s> Builder<'s, '_, '_> {
    fn run(mut self, text: &'s str) -> Option<Rc<Node<'s>>> {
        let options = granit_parser::options! {
            emit_comments: false,
            emit_unresolved_aliases: true,
            flow_nesting_limit: MAX_DEPTH,
            block_nesting_limit: MAX_DEPTH,
        };
        let mut documents = 0;
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, place) = match event {
                Ok(event) => event,
                Err(error) => {
                    let at = error.marker().byte_offset().unwrap_or(0);
                    self.syntax_error(error.kind(), self.span(at, at + 1));
                    return None;
                }
            };
            let range = place.byte_range().unwrap_or(0..0);
            let span = self.span(range.start, range.end);
            let tag_span = place.tag_span().and_then(|t| t.byte_range()).map(|r| self.span(r.start, r.end));
            if matches!(event, Event::DocumentStart(..)) {
                documents += 1;
                if documents > 1 {
                    let message = || "a stack file holds one YAML document, and a second one begins here".to_owned();
                    self.report.error(
                        Code::YAML_SYNTAX,
                        span,
                        message,
                        help("delete the `---`, or move what follows into a file of its own"),
                    );
                    return None;
                }
            }
            if let Err(Stop) = self.event(event, span, tag_span) {
                return None;
            }
        }
        self.root
    }

    fn span(&self, start: usize, end: usize) -> Span {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Span { source: self.source, start: number(start), end: number(end) }
    }

    fn event(&mut self, event: Event<'s>, span: Span, tag_span: Option<Span>) -> Result<(), Stop> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let kind = self.scalar_kind(&text, style, tag.as_deref(), tag_span.unwrap_or(span));
                let merge = style == ScalarStyle::Plain && text == "<<";
                if let Some(Frame { content: Content::Mapping(_, key @ None), .. }) = self.stack.last_mut() {
                    *key = Some(Key::Text(text, span, merge));
                    return self.count(1, span);
                }
                let weight = Weight { nodes: 1, bytes: text.len(), height: 0 };
                self.add(Rc::new(Node { span, value: Value::Scalar(kind, text) }), anchor, weight);
                self.count(1, span)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.collection_tag(tag.as_deref(), "seq", tag_span.unwrap_or(span));
                self.open(span, anchor, Content::List(Vec::new()))
            }
            Event::MappingStart(_, anchor, tag) => {
                self.collection_tag(tag.as_deref(), "map", tag_span.unwrap_or(span));
                self.open(span, anchor, Content::Mapping(Vec::new(), None))
            }
            Event::SequenceEnd | Event::MappingEnd => {
                self.close(span);
                Ok(())
            }
            Event::Alias(id) => self.alias(id, span),
            Event::UnresolvedAlias(name) => {
                let message = || format!("`*{name}` names an anchor that is not defined before it");
                self.report.error(
                    Code::YAML_SYNTAX,
                    span,
                    message,
                    help("define it above with `&`, or put the text into quotes if it only begins with `*`"),
                );
                if self.expects_key() {
                    self.refuse_key();
                } else {
                    self.add(Rc::new(Node { span, value: BROKEN }), 0, Weight::default());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn expects_key(&self) -> bool {
        matches!(self.stack.last(), Some(Frame { content: Content::Mapping(_, None), .. }))
    }

    /// Drops a key of the innermost mapping, and the value that will follow.
    fn refuse_key(&mut self) {
        if let Some(Frame { content: Content::Mapping(_, key), refused, .. }) = self.stack.last_mut() {
            *key = Some(Key::Refused);
            *refused = true;
        }
    }

    fn open(&mut self, span: Span, anchor: usize, content: Content<'s>) -> Result<(), Stop> {
        // The parser bounds flow and block nesting each by itself, not their sum.
        if self.stack.len() >= MAX_DEPTH {
            return self.too_deep(span);
        }
        let is_key = self.expects_key();
        if is_key {
            let before = Span { start: span.start.saturating_sub(1), end: span.start.saturating_add(1), ..span };
            let remedy = if self.report.sources.text(before) == "{{" {
                "a value that begins with `{{` must be quoted: \"{{ … }}\""
            } else {
                "write keys as plain text"
            };
            let message = || "a key must be text, not a list or a mapping".to_owned();
            self.report.error(Code::WRONG_TYPE, before, message, help(remedy));
        }
        self.stack.push(Frame { span, anchor, weight: Weight::default(), content, is_key, refused: false });
        self.count(1, span)
    }

    fn close(&mut self, end: Span) {
        let Some(frame) = self.stack.pop() else { return };
        if frame.is_key {
            self.refuse_key();
            return;
        }
        let span = Span { end: end.end.max(frame.span.end), ..frame.span };
        let value = match frame.content {
            Content::List(mut items) => {
                items.shrink_to_fit();
                Value::List(items)
            }
            Content::Mapping(pairs, _) if pairs.is_empty() && frame.refused => BROKEN,
            Content::Mapping(pairs, _) => Value::Mapping(self.unique(pairs)),
        };
        let weight = Weight { nodes: frame.weight.nodes + 1, height: frame.weight.height + 1, ..frame.weight };
        self.add(Rc::new(Node { span, value }), frame.anchor, weight);
    }

    /// Hands a finished value to what contains it.
    fn add(&mut self, node: Rc<Node<'s>>, anchor: usize, weight: Weight) {
        if anchor > 0 {
            self.anchors.insert(anchor, (Rc::clone(&node), weight));
        }
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(node);
            return;
        };
        let sum = &mut frame.weight;
        sum.nodes = sum.nodes.saturating_add(weight.nodes);
        sum.bytes = sum.bytes.saturating_add(weight.bytes);
        sum.height = sum.height.max(weight.height);
        match &mut frame.content {
            Content::List(items) => items.push(node),
            Content::Mapping(pairs, key) => {
                if let Some(Key::Text(key, key_span, merge)) = key.take() {
                    sum.nodes = sum.nodes.saturating_add(1);
                    sum.bytes = sum.bytes.saturating_add(key.len());
                    pairs.push(Pair { entry: Entry { key, key_span, value: node }, merge });
                }
            }
        }
    }

    fn alias(&mut self, id: usize, span: Span) -> Result<(), Stop> {
        let Some((node, weight)) = self.anchors.get(&id).map(|(node, weight)| (Rc::clone(node), *weight)) else {
            let message = || "an alias inside its own anchor would repeat without end".to_owned();
            self.report.error(
                Code::TOO_COMPLEX,
                span,
                message,
                help("move the anchor to a value that does not contain the alias"),
            );
            return Err(Stop);
        };
        if self.expects_key() {
            self.refuse_key();
            let message = || "a key must be text, not an alias".to_owned();
            self.report.error(Code::WRONG_TYPE, span, message, help("write the key out"));
            return Ok(());
        }
        if self.stack.len() + weight.height > MAX_DEPTH {
            return self.too_deep(span);
        }
        self.repeated = self.repeated.saturating_add(weight.bytes);
        if self.repeated > MAX_EXPANSION {
            let message = || format!("aliases repeat more than {MAX_EXPANSION} bytes of text");
            self.report.error(Code::TOO_COMPLEX, span, message, help("repeat less by aliases"));
            return Err(Stop);
        }
        self.count(weight.nodes, span)?;
        self.add(node, 0, weight);
        Ok(())
    }

    fn count(&mut self, nodes: usize, span: Span) -> Result<(), Stop> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes <= MAX_NODES {
            return Ok(());
        }
        let message = || format!("the file has more than {MAX_NODES} values, aliases counted at each use");
        self.report.error(Code::TOO_COMPLEX, span, message, help("split the stack, or repeat less by aliases"));
        Err(Stop)
    }

    fn too_deep(&mut self, span: Span) -> Result<(), Stop> {
        let message = || format!("lists and mappings nest more than {MAX_DEPTH} deep");
        self.report.error(Code::TOO_COMPLEX, span, message, plain);
        Err(Stop)
    }

    /// Reports keys that appear twice (the first one stays) and resolves merge keys: a key that stands in the mapping
    /// itself wins over a merged one, and an earlier merged one over a later one.
    fn unique(&mut self, pairs: Vec<Pair<'s>>) -> Vec<Entry<'s>> {
        let mut entries: Vec<Entry<'s>> = Vec::with_capacity(pairs.len());
        let mut merges = Vec::new();
        let mut index = Index::default();
        for Pair { entry, merge } in pairs {
            if merge {
                merges.push(entry);
            } else if let Some(first) = index.find(&entries, &entry.key) {
                let first = entries[first].key_span;
                let Entry { key, key_span, .. } = entry;
                self.report.error(
                    Code::DUPLICATE_KEY,
                    key_span,
                    || format!("the key `{}` appears twice", cut(&key)),
                    |mut d, sources| {
                        "again here".clone_into(&mut d.labels[0].message);
                        d.at(sources.location(first), "first here")
                            .help("delete one of them, or put their values together")
                    },
                );
            } else {
                entries.push(entry);
                index.grown(&entries);
            }
        }
        for merge in merges {
            let sources = match &merge.value.value {
                Value::List(items) => items.clone(),
                _ => vec![Rc::clone(&merge.value)],
            };
            for source in sources {
                let Value::Mapping(merged) = &source.value else {
                    if matches!(source.value, Value::Scalar(Scalar::Broken, _)) {
                        continue;
                    }
                    let message = || "`<<` merges a mapping or a list of mappings".to_owned();
                    self.report.error(
                        Code::WRONG_TYPE,
                        source.span,
                        message,
                        help("refer to an anchored mapping: `<<: *name`"),
                    );
                    continue;
                };
                for entry in merged {
                    if index.find(&entries, &entry.key).is_none() {
                        entries.push(entry.clone());
                        index.grown(&entries);
                    }
                }
            }
        }
        entries
    }

    fn scalar_kind(&mut self, text: &str, style: ScalarStyle, tag: Option<&Tag>, span: Span) -> Scalar {
        let plain = if style == ScalarStyle::Plain { resolve(text) } else { Scalar::Text };
        let Some(tag) = tag else { return plain };
        // `! text` is the non-specific tag: a text.
        if tag.handle().is_empty() && tag.suffix() == "!" || tag.handle() == "!" && tag.suffix().is_empty() {
            return Scalar::Text;
        }
        let Some(core) = tag.core_suffix() else {
            self.unknown_tag(tag, span);
            return plain;
        };
        let tagged = match core {
            "str" => return Scalar::Text,
            "int" => Scalar::Integer,
            "float" => Scalar::Float,
            "bool" => Scalar::Boolean,
            "null" => Scalar::Null,
            _ => {
                self.report.error(
                    Code::WRONG_TYPE,
                    span,
                    || format!("the tag `!!{core}` does not fit a plain value"),
                    help("delete the tag"),
                );
                return plain;
            }
        };
        let value = resolve(text);
        if value == tagged || (tagged == Scalar::Float && value == Scalar::Integer) {
            return tagged;
        }
        self.report.error(
            Code::INVALID_VALUE,
            span,
            || format!("`{}` does not fit its tag `!!{core}`", cut(text)),
            help("delete the tag"),
        );
        plain
    }

    fn collection_tag(&mut self, tag: Option<&Tag>, kind: &str, span: Span) {
        if let Some(tag) = tag
            && tag.core_suffix() != Some(kind)
        {
            self.unknown_tag(tag, span);
        }
    }

    fn unknown_tag(&mut self, tag: &Tag, span: Span) {
        let written = format!("{}{}", tag.original_handle(), tag.suffix());
        self.report.error(
            Code::INVALID_VALUE,
            span,
            || format!("the tag `{}` has no meaning in a stack file", cut(&written)),
            help("delete the tag"),
        );
    }

    fn syntax_error(&mut self, kind: &ErrorKind, span: Span) {
        let (code, message, remedy) = explain(kind);
        let opened = self.stack.last().map(|frame| frame.span).filter(|_| in_brackets(kind));
        let bracket = opened.map(|span| span.part(0, 1));
        self.report.error(
            code,
            span,
            || message,
            |diagnostic, sources| {
                let diagnostic = match bracket.map(|span| (span, sources.text(span))) {
                    Some((span, open @ ("[" | "{"))) => {
                        let mut diagnostic = diagnostic;
                        diagnostic.message = format!("`{open}` is not closed before this");
                        diagnostic.at(sources.location(span), "opened here")
                    }
                    _ => diagnostic,
                };
                help(remedy)(diagnostic, sources)
            },
        );
    }
}

/// Finds keys of a mapping: by looking at each while there are few, by hash once there are many.
#[derive(Default)]
struct Index<'s> {
    map: HashMap<Cow<'s, str>, usize>,
}

impl<'s> Index<'s> {
    const FEW: usize = 8;

    fn find(&self, entries: &[Entry<'s>], key: &str) -> Option<usize> {
        if entries.len() <= Self::FEW {
            return entries.iter().position(|entry| entry.key == key);
        }
        self.map.get(key).copied()
    }

    /// Notes the last of `entries`.
    fn grown(&mut self, entries: &[Entry<'s>]) {
        if entries.len() > Self::FEW {
            let from = if self.map.is_empty() { 0 } else { entries.len() - 1 };
            self.map.extend(entries.iter().enumerate().skip(from).map(|(at, entry)| (entry.key.clone(), at)));
        }
    }
}

/// What a plain scalar means in the core schema of YAML 1.2 (section 10.3.2 of the specification).
fn resolve(text: &str) -> Scalar {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Scalar::Null,
        "true" | "True" | "TRUE" | "false" | "False" | "FALSE" => return Scalar::Boolean,
        ".nan" | ".NaN" | ".NAN" => return Scalar::Float,
        _ => {}
    }
    let digits = |t: &str, valid: fn(&u8) -> bool| !t.is_empty() && t.as_bytes().iter().all(valid);
    let prefixed = |prefix: &str, valid: fn(&u8) -> bool| text.strip_prefix(prefix).is_some_and(|t| digits(t, valid));
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits(unsigned, u8::is_ascii_digit)
        || prefixed("0o", |b| (b'0'..=b'7').contains(b))
        || prefixed("0x", u8::is_ascii_hexdigit)
    {
        return Scalar::Integer;
    }
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        return Scalar::Float;
    }
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).map_or((unsigned, None), |(m, e)| (m, Some(e)));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all_digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    let number = all_digits(whole) && all_digits(fraction) && !(whole.is_empty() && fraction.is_empty());
    let power = exponent.is_none_or(|e| digits(e.strip_prefix(['-', '+']).unwrap_or(e), u8::is_ascii_digit));
    if number && power { Scalar::Float } else { Scalar::Text }
}

/// Text of a message, kept short.
pub(crate) fn cut(text: &str) -> String {
    if text.chars().nth(60).is_none() {
        text.to_owned()
    } else {
        format!("{}…", text.chars().take(60).collect::<String>())
    }
}

/// Whether an error most likely means an open bracket further up.
fn in_brackets(kind: &ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::InvalidColonPlacement
            | ErrorKind::ExpectedFlowSequenceSeparator
            | ErrorKind::ExpectedFlowMappingSeparator
            | ErrorKind::UnexpectedEofFlowSequence
            | ErrorKind::UnexpectedEofFlowMapping
            | ErrorKind::UnexpectedEofImplicitFlowMapping
            | ErrorKind::BlockEntryInFlowCollection
    )
}

/// A syntax error in our words: code, message, what to do.
fn explain(kind: &ErrorKind) -> (Code, String, &'static str) {
    let (message, remedy) = match kind {
        ErrorKind::RecursionLimitExceeded => {
            return (Code::TOO_COMPLEX, format!("lists and mappings nest more than {MAX_DEPTH} deep"), "");
        }
        ErrorKind::DirectiveByteLimitExceeded { .. } | ErrorKind::TooManyReservedDirectiveParams { .. } => {
            return (Code::TOO_COMPLEX, "a YAML directive is too long".to_owned(), "delete the directive");
        }
        ErrorKind::TabNotAllowed
        | ErrorKind::TabInBlockIndentation
        | ErrorKind::TabInIndentation
        | ErrorKind::TabAtBlockScalarStart
        | ErrorKind::TabInPlainScalar => ("a tab cannot indent YAML".to_owned(), "indent with spaces"),
        ErrorKind::UnclosedQuotedScalar => {
            ("a quoted text is not closed".to_owned(), "add the closing quote, on the same line if the text is short")
        }
        ErrorKind::UnclosedFlowCollection { open } => (
            format!("`{open}` is not closed"),
            if *open == '[' { "add the closing `]`" } else { "add the closing `}`" },
        ),
        ErrorKind::MismatchedFlowCollectionEnd { open, close } => {
            (format!("`{open}` is closed by `{close}`"), "close each bracket by its own kind")
        }
        ErrorKind::MappingValueNotAllowed => (
            "a `:` cannot begin a value here".to_owned(),
            "put the text into quotes if the `:` belongs to it; else look whether the key above lacks its `:`",
        ),
        kind if in_brackets(kind) => {
            ("a list or mapping in brackets is not closed".to_owned(), "close it, or put a `,` between its parts")
        }
        ErrorKind::SimpleKeyExpected | ErrorKind::InvalidSimpleKey => {
            ("a `:` is missing after a key".to_owned(), "write `key: value`, with a space after the `:`")
        }
        ErrorKind::ExpectedBlockMappingKey => (
            "a key is expected here".to_owned(),
            "indent it like the other keys of its mapping, and write `key: value`",
        ),
        ErrorKind::InvalidIndentation | ErrorKind::InvalidQuotedScalarIndent | ErrorKind::InvalidFlowScalarIndent => {
            ("the indentation fits nothing above".to_owned(), "indent it like its neighbours")
        }
        ErrorKind::UnexpectedCharacter { character } => {
            (format!("a text cannot begin with `{}`", character.escape_default()), "put the text into quotes")
        }
        ErrorKind::BlockSequenceEntryNotAllowed | ErrorKind::ExpectedBlockSequenceEntry => (
            "a list item cannot begin here".to_owned(),
            "put the `-` on a line of its own, indented like the other items",
        ),
        ErrorKind::UnknownQuotedScalarEscape => (
            "this escape is not known in double quotes".to_owned(),
            "write `\\\\` for a backslash, or use single quotes",
        ),
        other => (other.to_string(), ""),
    };
    (Code::YAML_SYNTAX, message, remedy)
}

#[cfg(test)]
mod tests;
