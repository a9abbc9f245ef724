//! Query strings, typed: the server extracts these, the client writes them, the OpenAPI document lists their fields.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    str::FromStr,
};

use orchestra_model::{InstanceId, Name, ReleaseNumber, ResourceId, time::UnixMillis};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::observe::LogStream;

/// Names with commas between them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameList(pub Vec<Name>);

impl fmt::Display for NameList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, name) in self.0.iter().enumerate() {
            write!(f, "{}{name}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for NameList {
    type Err = orchestra_model::id::ParseIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split(',').filter(|part| !part.is_empty()).map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

impl Serialize for NameList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NameList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for NameList {
    fn schema_name() -> Cow<'static, str> {
        "NameList".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "description": "Names with commas between them."})
    }
}

/// Which part of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    /// Only what comes after this: the `next` of the previous part.
    #[serde(default)]
    pub after: Option<String>,
    /// At most so many items; 100 if missing, 1000 at most.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Also say what each one uses, which takes a moment.
    #[serde(default)]
    pub usage: bool,
}

/// What to validate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidateQuery {
    /// Validate every environment that the stack file defines, beside the one that is meant.
    #[serde(default)]
    pub all: bool,
}

/// Which releases. The newest comes first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleasesQuery {
    /// Only what comes after this release in the list, so older ones.
    #[serde(default)]
    pub after: Option<ReleaseNumber>,
    /// At most so many items; 100 if missing, 1000 at most.
    #[serde(default)]
    pub limit: Option<u32>,
}

/// Which events. The oldest comes first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Only events with a larger sequence number. `Last-Event-ID` does the same.
    #[serde(default)]
    pub after: Option<u64>,
    /// Only the last so many of these.
    #[serde(default)]
    pub tail: Option<u32>,
    /// Only events about this resource and its instances.
    #[serde(default)]
    pub resource: Option<ResourceId>,
    /// At most so many items in one page; 1000 if missing, 10000 at most. Not used with `follow`.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Answer with server-sent events, and go on with what will happen.
    #[serde(default)]
    pub follow: bool,
}

/// Which lines of output. Lines of one instance come in the order in which they were written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    /// Only of these services and jobs; all if missing.
    #[serde(default)]
    pub workload: Option<NameList>,
    /// Only of this instance.
    #[serde(default)]
    pub instance: Option<InstanceId>,
    /// Only of instances that were made for this release.
    #[serde(default)]
    pub release: Option<ReleaseNumber>,
    /// Only this stream.
    #[serde(default)]
    pub stream: Option<LogStream>,
    /// Only the last so many lines of each instance.
    #[serde(default)]
    pub tail: Option<u32>,
    /// Only what was written since.
    #[serde(default)]
    pub since: Option<UnixMillis>,
    /// Go on with what will be written.
    #[serde(default)]
    pub follow: bool,
}

/// A query string for `value`, with its `?`; empty if nothing is set. Fields that are missing or false are left out.
pub(crate) fn query_string(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).expect("queries serialize to JSON");
    let mut text = String::new();
    for (key, value) in value.as_object().into_iter().flatten() {
        let value = match value {
            serde_json::Value::String(text) => encode(text),
            serde_json::Value::Number(number) => number.to_string(),
            serde_json::Value::Bool(true) => "true".to_owned(),
            _ => continue,
        };
        text.push(if text.is_empty() { '?' } else { '&' });
        text.push_str(key);
        text.push('=');
        text.push_str(&value);
    }
    text
}

/// Percent-encodes everything but RFC 3986's unreserved characters and the comma.
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~,".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_hold_only_what_is_set() {
        assert_eq!(query_string(&LogsQuery::default()), "");
        let query = LogsQuery {
            workload: Some("api,worker".parse().unwrap()),
            tail: Some(10),
            follow: true,
            ..LogsQuery::default()
        };
        assert_eq!(query_string(&query), "?workload=api,worker&tail=10&follow=true");
        assert_eq!(
            query_string(&PageQuery { after: Some("a/b &".into()), ..PageQuery::default() }),
            "?after=a%2Fb%20%26"
        );
    }
}
