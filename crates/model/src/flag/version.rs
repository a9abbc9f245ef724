//! Versions and ranges of them, by the precedence of Semantic Versioning 2.0.0 (semver.org, clause 11).
//!
//! Versions come from programs in the field, so they are read generously: a leading `v` and missing numbers are fine.

use std::{borrow::Cow, cmp::Ordering, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::id::{ParseIdError, text_serde};

/// A version such as `2.4.1-beta.2`. Build metadata (`+…`) is dropped: it has no part in precedence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    numbers: [u64; 3],
    /// How many numbers were written.
    written: usize,
    /// Identifiers of the pre-release; none for a release.
    pre: Vec<Identifier>,
}

/// Derived order is the right one: numeric identifiers come before others, each kind by its own order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Identifier {
    Number(u64),
    Text(String),
}

impl Version {
    /// Order of precedence.
    pub fn precedence(&self, other: &Self) -> Ordering {
        self.numbers.cmp(&other.numbers).then_with(|| match (self.pre.is_empty(), other.pre.is_empty()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            (false, false) => self.pre.cmp(&other.pre),
        })
    }
}

impl FromStr for Version {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let error = || ParseIdError::Form {
            text: text.chars().take(80).collect(),
            kind: "version",
            form: "numbers such as `2.4.1` or `2.4.1-beta.2`",
        };
        let rest = text.strip_prefix(['v', 'V']).unwrap_or(text);
        let rest = rest.split_once('+').map_or(rest, |(version, _)| version);
        let (core, pre) = rest.split_once('-').map_or((rest, None), |(core, pre)| (core, Some(pre)));
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let (mut numbers, mut written) = ([0; 3], 0);
        for part in core.split('.') {
            let place = numbers.get_mut(written).filter(|_| digits(part)).ok_or_else(error)?;
            *place = part.parse().map_err(|_| error())?;
            written += 1;
        }
        let mut identifiers = Vec::new();
        for part in pre.into_iter().flat_map(|pre| pre.split('.')) {
            if part.is_empty() || !part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
                return Err(error());
            }
            let number = part.parse().ok().filter(|_| digits(part));
            identifiers.push(number.map_or_else(|| Identifier::Text(part.to_owned()), Identifier::Number));
        }
        Ok(Self { numbers, written, pre: identifiers })
    }
}

/// Bounds that a version must meet, all of them: `>=2.4, <3`, `^1.2.3`, `~1.2`, `2.4.1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionRange {
    text: String,
    bounds: Vec<(Operator, Version)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
    /// The same up to and including the first number that is not 0.
    Caret,
    /// The same but for the last number.
    Tilde,
}

/// Longer ones first, so that `>=` is not read as `>`.
const OPERATORS: &[(&str, Operator)] = &[
    ("!=", Operator::Unequal),
    ("<=", Operator::AtMost),
    (">=", Operator::AtLeast),
    ("=", Operator::Equal),
    ("<", Operator::Less),
    (">", Operator::Greater),
    ("^", Operator::Caret),
    ("~", Operator::Tilde),
];

impl VersionRange {
    /// Whether `version` meets all bounds.
    pub fn contains(&self, version: &Version) -> bool {
        self.bounds.iter().all(|(operator, bound)| operator.admits(version, bound))
    }
}

impl Operator {
    fn admits(self, version: &Version, bound: &Version) -> bool {
        let order = version.precedence(bound);
        match self {
            Self::Equal => Self::equal(version, bound),
            Self::Unequal => !Self::equal(version, bound),
            Self::Less => order.is_lt(),
            Self::AtMost => order.is_le(),
            Self::Greater => order.is_gt(),
            Self::AtLeast => order.is_ge(),
            Self::Caret => {
                let fixed = bound.numbers.iter().take(bound.written).position(|n| *n != 0).unwrap_or(bound.written - 1);
                order.is_ge() && version.numbers[..=fixed] == bound.numbers[..=fixed]
            }
            Self::Tilde => {
                let fixed = bound.written.min(2);
                order.is_ge() && version.numbers[..fixed] == bound.numbers[..fixed]
            }
        }
    }

    /// Numbers that the bound does not write do not matter: `2.4` is every 2.4.
    fn equal(version: &Version, bound: &Version) -> bool {
        if bound.written < 3 && bound.pre.is_empty() {
            return version.numbers[..bound.written] == bound.numbers[..bound.written];
        }
        version.precedence(bound).is_eq()
    }
}

impl FromStr for VersionRange {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let error = || ParseIdError::Form {
            text: text.chars().take(80).collect(),
            kind: "range of versions",
            form: "bounds such as `>=2.4, <3`, `^1.2.3`, `~1.2` or `2.4.1`",
        };
        let separator = |c: char| c == ',' || c == ' ';
        let (mut rest, mut bounds) = (text.trim_matches(' '), Vec::new());
        while !rest.is_empty() && text.len() <= 200 {
            let found = OPERATORS.iter().find_map(|(word, op)| rest.strip_prefix(word).map(|rest| (*op, rest)));
            let (operator, after) = found.unwrap_or((Operator::Equal, rest));
            let after = after.trim_start_matches(' ');
            let end = after.find(separator).unwrap_or(after.len());
            bounds.push((operator, after[..end].parse().map_err(|_| error())?));
            let next = after[end..].trim_start_matches(' ');
            // One comma, and something after it.
            rest = match next.strip_prefix(',').map(|next| next.trim_start_matches(' ')) {
                Some("") => return Err(error()),
                Some(next) => next,
                None => next,
            };
        }
        if bounds.is_empty() { Err(error()) } else { Ok(Self { text: text.to_owned(), bounds }) }
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

text_serde!(VersionRange, "VersionRange", r"^[ ,.<>=!^~+0-9A-Za-z-]+$", "A range of versions such as `>=2.4, <3`.");
