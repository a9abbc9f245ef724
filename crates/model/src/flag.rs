//! Feature flags: values of a running program that change without a release.
//!
//! A [`FlagSet`] is what one environment serves: the flags that its stack file defines, and overrides that a person or a
//! verdict laid over them. It is data only. It crosses from the control plane to the process that answers programs, so it
//! serializes to the same bytes for the same content, and its digest names its version. `orchestra-flags` evaluates it.
//!
//! Names inside a flag (variants in rules and splits) are texts that may lead nowhere: [`Flag::problems`] finds them.

use std::{
    borrow::{Borrow, Cow},
    collections::BTreeMap,
    fmt,
    str::FromStr,
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Number, Value};

use crate::{
    id::{Digest, ParseIdError, ReleaseNumber, text_serde},
    quantity::Percent,
    time::UnixMillis,
};

mod check;
mod version;

#[cfg(test)]
mod tests;

pub use check::{FlagError, Problem};
pub use version::{Version, VersionRange};

/// All flags of one environment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlagSet {
    /// Definitions by name.
    #[serde(default)]
    pub flags: BTreeMap<FlagName, Flag>,
    /// What is laid over them. An override of a flag or variant that does not exist (any more) has no effect.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub overrides: BTreeMap<FlagName, Override>,
}

impl FlagSet {
    /// Whether there is nothing in it, so that it need not be written.
    pub fn is_empty(&self) -> bool {
        self.flags.is_empty() && self.overrides.is_empty()
    }

    /// Digest of the whole: its version.
    pub fn digest(&self) -> Digest {
        Digest::of(self)
    }

    /// Everything that is wrong with its flags.
    pub fn problems(&self) -> impl Iterator<Item = (&FlagName, Problem)> {
        self.flags.iter().flat_map(|(name, flag)| flag.problems().into_iter().map(move |problem| (name, problem)))
    }
}

/// The flags of an environment as the data plane answers with them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServedFlags {
    /// The flags.
    pub set: FlagSet,
    /// When they last changed.
    pub changed_at: UnixMillis,
}

/// One flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Flag {
    /// What all its values are.
    pub kind: FlagKind,
    /// Values by name. `null` leaves the value to the program: it uses the default in its own code.
    pub variants: BTreeMap<VariantName, Value>,
    /// Served where no rule applies.
    pub default: VariantName,
    /// Whether rules and default apply; otherwise `off` is served to everybody.
    pub enabled: bool,
    /// Served while the flag is off.
    pub off: VariantName,
    /// The first rule that applies decides.
    pub rules: Vec<Rule>,
    /// Passed on to programs with every answer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, Scalar>,
}

/// Kinds of values. The protocol tells integers from other numbers, and so do the clients of typed languages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FlagKind {
    /// `true` or `false`.
    Boolean,
    /// A text.
    String,
    /// A whole number.
    Integer,
    /// A number; written with a fraction even if that is 0.
    Float,
    /// A mapping.
    Object,
}

impl FlagKind {
    /// The kind of a value; `None` for `null`, which fits every kind, and for lists, which fit none.
    pub fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(_) => Some(Self::Boolean),
            Value::String(_) => Some(Self::String),
            Value::Number(number) if number.is_f64() => Some(Self::Float),
            Value::Number(_) => Some(Self::Integer),
            Value::Object(_) => Some(Self::Object),
            Value::Null | Value::Array(_) => None,
        }
    }
}

impl fmt::Display for FlagKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Boolean => "boolean",
            Self::String => "string",
            Self::Integer => "integer",
            Self::Float => "float",
            Self::Object => "object",
        })
    }
}

impl Flag {
    /// Whether anybody gets another value than they would if it were off.
    pub fn differs_when_off(&self) -> bool {
        let value = |variant: &VariantName| self.variants.get(variant);
        let given = self.rules.iter().flat_map(|rule| rule.serve.variants()).chain([&self.default]);
        self.enabled && given.into_iter().any(|variant| value(variant) != value(&self.off))
    }
}

/// Who gets what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rule {
    /// What answers call it; its position, from 1, if it has no name.
    pub name: String,
    /// Whom it applies to; an empty `all` is everybody.
    pub when: Condition,
    /// What they get.
    pub serve: Serve,
}

/// What a rule gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Serve {
    /// One variant.
    Variant(VariantName),
    /// Each one gets always the same of several variants.
    Split(Split),
}

impl Serve {
    /// All that somebody may get.
    fn variants(&self) -> Vec<&VariantName> {
        match self {
            Self::Variant(variant) => vec![variant],
            Self::Split(split) => {
                let given = split.shares.iter().filter(|share| share.share > Percent::default());
                given.map(|share| &share.variant).collect()
            }
        }
    }
}

/// A division of everybody into variants. Who is in which one depends only on the flag's name, the variant's name and the
/// value of `by`; `orchestra-flags` has the formula.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Split {
    /// Attribute that says who it is.
    pub by: Attribute,
    /// Shares, in the order of the file; their sum is 100 %.
    pub shares: Vec<Share>,
}

/// A part of a [`Split`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Share {
    /// What they get.
    pub variant: VariantName,
    /// How many get it.
    pub share: Percent,
}

/// A question about the evaluation context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// All parts hold; holds without parts.
    All(Vec<Condition>),
    /// One part holds; does not hold without parts.
    Any(Vec<Condition>),
    /// The part does not hold.
    Not(Box<Condition>),
    /// An attribute passes a test. One that is absent passes only `present: false`.
    Is {
        /// Which.
        attribute: Attribute,
        /// What is asked of it.
        test: Test,
    },
}

impl Condition {
    /// The condition that holds always.
    pub const EVERYBODY: Self = Self::All(Vec::new());

    /// Whether it is [`Condition::EVERYBODY`].
    pub fn is_everybody(&self) -> bool {
        matches!(self, Self::All(parts) if parts.is_empty())
    }
}

/// What is asked of an attribute. Values of different types are never equal; whole and other numbers are one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Test {
    /// It is this value.
    Equals(Scalar),
    /// It is one of these values.
    In(Vec<Scalar>),
    /// It is a text that begins with one of these.
    StartsWith(Vec<String>),
    /// It is a text that ends with one of these.
    EndsWith(Vec<String>),
    /// It is a text that has one of these in it, or a list that has one of these as an item.
    Contains(Vec<Scalar>),
    /// It is a larger number.
    Above(Number),
    /// It is this number or a larger one.
    AtLeast(Number),
    /// It is a smaller number.
    Below(Number),
    /// It is this number or a smaller one.
    AtMost(Number),
    /// It is a version in this range.
    Version(VersionRange),
    /// It is there and not `null`; or it is not, for `false`.
    Present(bool),
}

/// A value without parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Scalar {
    /// `true` or `false`.
    Boolean(bool),
    /// A number.
    Number(Number),
    /// A text.
    Text(String),
}

/// A decision laid over a flag's own rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Override {
    /// What everybody gets.
    pub serve: OverrideServe,
    /// Who decided.
    pub by: OverrideBy,
    /// Why, for people.
    pub reason: String,
    /// Since when.
    pub since: UnixMillis,
}

/// What an override gives to everybody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OverrideServe {
    /// The flag is off: its `off` variant.
    Off,
    /// This variant.
    Variant(VariantName),
}

/// Who made an override.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OverrideBy {
    /// A person, with `orchestra flags`.
    Person,
    /// The verdict about a release that names the flag.
    Verdict {
        /// Which.
        release: ReleaseNumber,
    },
}

/// Longest name of a flag or variant.
const MAX_NAME: usize = 100;

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=MAX_NAME).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b))
}

macro_rules! name {
    ($type:ident, $name:literal, $noun:literal) => {
        impl $type {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                if is_name(text) {
                    return Ok(Self(text.to_owned()));
                }
                let form = "1 to 100 letters, digits, `.`, `_` and `-`, beginning with a letter or digit";
                Err(ParseIdError::Form { text: text.chars().take(80).collect(), kind: $noun, form })
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        text_serde!($type, $name, r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", $noun);
    };
}

/// Name of a flag, as programs ask for it. Wider than other names: it is part of code in many languages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlagName(String);

name!(FlagName, "FlagName", "name of a flag");

/// Name of one of a flag's values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VariantName(String);

name!(VariantName, "VariantName", "name of a variant");

/// An attribute of the evaluation context: `country`, or `account.plan` for one inside another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attribute(String);

impl Attribute {
    /// The attribute that says who is asking.
    pub const TARGETING_KEY: &'static str = "targetingKey";

    /// [`Attribute::TARGETING_KEY`] as an attribute.
    pub fn targeting_key() -> Self {
        Self(Self::TARGETING_KEY.to_owned())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its parts, from the outside in; never none.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }
}

impl FromStr for Attribute {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let valid =
            text.len() <= 200 && text.split('.').all(|part| !part.is_empty()) && !text.contains(char::is_control);
        if valid {
            return Ok(Self(text.to_owned()));
        }
        let form = "at most 200 characters, parts separated by single dots, such as `account.plan`";
        Err(ParseIdError::Form { text: text.chars().take(80).collect(), kind: "attribute", form })
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

text_serde!(
    Attribute,
    "Attribute",
    r"^[^.]+(\.[^.]+)*$",
    "An attribute of the evaluation context, such as `account.plan`."
);
