//! Identities. Each is a newtype with one textual form, used in files, logs, the API and on the screen alike.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is no valid identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// A name has the wrong characters or length.
    #[error(
        "`{text}` is not a valid name: use 1 to {max} lowercase letters, digits and `-`, starting with a letter and not ending with `-`"
    )]
    Name {
        /// What was given (cut to 80 characters).
        text: String,
        /// Longest allowed.
        max: usize,
    },
    /// The text does not have the form of this kind of id.
    #[error("`{text}` is not a valid {kind}: expected {form}")]
    Form {
        /// What was given (cut to 80 characters).
        text: String,
        /// The noun.
        kind: &'static str,
        /// An example.
        form: &'static str,
    },
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! text_serde {
    ($type:ty, $name:literal, $pattern:expr, $description:literal) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }
            fn inline_schema() -> bool {
                true
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "pattern": $pattern, "description": $description})
            }
        }
    };
}
pub(crate) use text_serde;

/// A name that a user gives to a stack, environment, resource or port: a DNS label, so that it is safe as a file name,
/// a host name and a metric label everywhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// Longest name: leaves room for the suffixes of instance ids within the 63 characters of a DNS label.
    pub const MAX: usize = 40;

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let bytes = text.as_bytes();
        let valid = (1..=Self::MAX).contains(&bytes.len())
            && bytes[0].is_ascii_lowercase()
            && bytes[bytes.len() - 1] != b'-'
            && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-');
        if valid { Ok(Self(text.to_owned())) } else { Err(ParseIdError::Name { text: cut(text), max: Self::MAX }) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

text_serde!(Name, "Name", r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$", "A lowercase DNS label of at most 40 characters.");

/// A stack in one environment: what is deployed, kept running and rolled back as one. Written `stack/environment`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EnvironmentId {
    /// The stack's name.
    pub stack: Name,
    /// The environment's name.
    pub environment: Name,
}

impl fmt::Display for EnvironmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.stack, self.environment)
    }
}

impl FromStr for EnvironmentId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let (stack, environment) = text.split_once('/').ok_or_else(|| ParseIdError::Form {
            text: cut(text),
            kind: "environment id",
            form: "`stack/environment`",
        })?;
        Ok(Self { stack: stack.parse()?, environment: environment.parse()? })
    }
}

text_serde!(EnvironmentId, "EnvironmentId", r"^[a-z][a-z0-9-]*/[a-z][a-z0-9-]*$", "`stack/environment`");

/// Kinds of resources, in the order in which equal-ranked ones are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResourceKind {
    /// A directory that outlives instances.
    Volume,
    /// A program that runs to completion.
    Job,
    /// A program that is kept running.
    Service,
}

impl ResourceKind {
    /// All kinds, in order.
    pub const ALL: [Self; 3] = [Self::Volume, Self::Job, Self::Service];

    /// The word used in ids.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Volume => "volume",
            Self::Job => "job",
            Self::Service => "service",
        }
    }
}

impl fmt::Display for ResourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A node of the graph. Written `service.api`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceId {
    /// What it is.
    pub kind: ResourceKind,
    /// Its name, unique within its kind.
    pub name: Name,
}

impl ResourceId {
    /// An id from its parts.
    pub fn new(kind: ResourceKind, name: Name) -> Self {
        Self { kind, name }
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}.{}", self.kind, self.name))
    }
}

impl FromStr for ResourceId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let form = || ParseIdError::Form {
            text: cut(text),
            kind: "resource id",
            form: "`service.NAME`, `job.NAME` or `volume.NAME`",
        };
        let (kind, name) = text.split_once('.').ok_or_else(form)?;
        let kind = ResourceKind::ALL.into_iter().find(|k| k.as_str() == kind).ok_or_else(form)?;
        Ok(Self { kind, name: name.parse()? })
    }
}

text_serde!(ResourceId, "ResourceId", r"^(service|job|volume)\.[a-z][a-z0-9-]*$", "`kind.name`, such as `service.api`");

/// One replica of a workload, unique within its environment for all time: workload, release it was made for, and an
/// ordinal that is never used again. Written `api-r3-1`. A restart after an exit keeps the id and counts an attempt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId {
    /// The service or job it belongs to.
    pub workload: Name,
    /// The release it was made for.
    pub release: ReleaseNumber,
    /// Counts up within workload and release.
    pub ordinal: u32,
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}-r{}-{}", self.workload, self.release.0, self.ordinal))
    }
}

impl FromStr for InstanceId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let form = || ParseIdError::Form {
            text: cut(text),
            kind: "instance id",
            form: "`WORKLOAD-rRELEASE-ORDINAL`, such as `api-r3-1`",
        };
        let (rest, ordinal) = text.rsplit_once('-').ok_or_else(form)?;
        let (workload, release) = rest.rsplit_once("-r").ok_or_else(form)?;
        Ok(Self {
            workload: workload.parse()?,
            release: ReleaseNumber(release.parse().map_err(|_| form())?),
            ordinal: ordinal.parse().map_err(|_| form())?,
        })
    }
}

text_serde!(InstanceId, "InstanceId", r"^[a-z][a-z0-9-]*-r[0-9]+-[0-9]+$", "`workload-rRELEASE-ORDINAL`");

/// Number of a release within its environment, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ReleaseNumber(pub u64);

impl fmt::Display for ReleaseNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// One execution of one plan. Written `run_17`; numbers count up within one state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub u64);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("run_{}", self.0))
    }
}

impl FromStr for RunId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.strip_prefix("run_").and_then(|n| n.parse().ok()).map(Self).ok_or_else(|| ParseIdError::Form {
            text: cut(text),
            kind: "run id",
            form: "`run_NUMBER`",
        })
    }
}

text_serde!(RunId, "RunId", r"^run_[0-9]+$", "`run_NUMBER`");

/// Fencing number of an environment: each run takes the next; whoever holds an older one is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Generation(pub u64);

/// SHA-256 over the canonical form of something, as 64 lowercase hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Digest(String);

impl Digest {
    /// Digest of a value's JSON form. Deterministic because our types hold ordered maps only.
    pub fn of<T: Serialize + ?Sized>(value: &T) -> Self {
        use sha2::{Digest as _, Sha256};
        let json = serde_json::to_vec(value).expect("our types serialize to JSON");
        let hash = Sha256::digest(json);
        Self(hash.iter().fold(String::with_capacity(64), |mut text, byte| {
            use fmt::Write as _;
            let _ = write!(text, "{byte:02x}");
            text
        }))
    }

    /// All 64 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 digits, for people.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "api", "web-2", &"a".repeat(40)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "..", "é", "1a", "a\0", &"a".repeat(41)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_round_trip() {
        for text in ["api-r3-1", "a-r1-r2-7"] {
            assert_eq!(text.parse::<InstanceId>().unwrap().to_string(), text);
        }
        assert_eq!("service.api".parse::<ResourceId>().unwrap().to_string(), "service.api");
        assert_eq!("demo/dev".parse::<EnvironmentId>().unwrap().to_string(), "demo/dev");
        assert_eq!("run_7".parse::<RunId>().unwrap(), RunId(7));
        assert!("run-7".parse::<RunId>().is_err());
        assert!("api-3-1".parse::<InstanceId>().is_err());
    }
}
