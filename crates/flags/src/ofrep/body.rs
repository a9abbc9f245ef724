//! Bodies of responses, in the words of the protocol.

use std::fmt::Write as _;

use orchestra_model::flag::{OverrideBy, Scalar};
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::Served;
use crate::{Context, Evaluation, Failure, Reason};

#[derive(Serialize)]
struct Success<'a> {
    key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a Value>,
    reason: &'static str,
    variant: &'a str,
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    metadata: Metadata<'a>,
}

impl<'a> Success<'a> {
    fn new(key: &'a str, evaluation: &'a Evaluation<'a>) -> Self {
        Self {
            key,
            value: evaluation.value,
            // The protocol's list of reasons is closed.
            reason: if evaluation.reason == Reason::Default { "UNKNOWN" } else { evaluation.reason.as_str() },
            variant: evaluation.variant.as_str(),
            metadata: Metadata(evaluation),
        }
    }
}

/// The flag's own metadata, and how the value came about.
struct Metadata<'a>(&'a Evaluation<'a>);

impl Metadata<'_> {
    fn is_empty(&self) -> bool {
        let Evaluation { metadata, rule, overridden, reason, .. } = self.0;
        metadata.is_empty() && rule.is_none() && overridden.is_none() && *reason != Reason::Default
    }
}

impl Serialize for Metadata<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in self.0.metadata {
            // What a flag says of itself cannot pass for what we say of it.
            if !name.starts_with("orchestra.") {
                map.serialize_entry::<str, Scalar>(name, value)?;
            }
        }
        if let Some(rule) = self.0.rule {
            map.serialize_entry("orchestra.rule", rule)?;
        }
        if self.0.reason == Reason::Default {
            map.serialize_entry("orchestra.reason", self.0.reason.as_str())?;
        }
        if let Some(over) = self.0.overridden {
            match over.by {
                OverrideBy::Person => map.serialize_entry("orchestra.override", "person")?,
                OverrideBy::Verdict { release } => {
                    map.serialize_entry("orchestra.override", "verdict")?;
                    map.serialize_entry("orchestra.override.release", &release)?;
                }
            }
            map.serialize_entry("orchestra.override.reason", &over.reason)?;
            map.serialize_entry("orchestra.override.since", &over.since)?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Failed<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(rename = "errorCode")]
    code: &'static str,
    #[serde(rename = "errorDetails")]
    details: &'a str,
}

impl<'a> Failed<'a> {
    fn new(key: Option<&'a str>, failure: &'a Failure) -> Self {
        Self { key, code: failure.code.as_str(), details: &failure.details }
    }
}

pub(super) fn success(key: &str, evaluation: &Evaluation<'_>) -> Vec<u8> {
    bytes(&Success::new(key, evaluation))
}

pub(super) fn failure(key: Option<&str>, failure: &Failure) -> Vec<u8> {
    bytes(&Failed::new(key, failure))
}

/// The answer for all flags, and where changes are announced. Equal answers are equal bytes.
pub(super) fn bulk(served: &Served, context: &Context, events: &str) -> Vec<u8> {
    let mut body = b"{\"flags\":[".to_vec();
    for (position, (name, answer)) in served.flags.evaluate_all(context).enumerate() {
        if position > 0 {
            body.push(b',');
        }
        match answer {
            Ok(evaluation) => write(&mut body, &Success::new(name.as_str(), &evaluation)),
            Err(failure) => write(&mut body, &Failed::new(Some(name.as_str()), &failure)),
        }
    }
    body.extend_from_slice(b"],\"eventStreams\":");
    write(&mut body, &json!([{"type": "sse", "endpoint": {"requestUri": events}}]));
    if let Some(environment) = &served.settings.environment {
        body.extend_from_slice(b",\"metadata\":");
        write(&mut body, &json!({"orchestra.environment": environment}));
    }
    body.push(b'}');
    body
}

/// The first half of SHA-256, in hexadecimal digits.
pub(super) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(16).fold(String::with_capacity(32), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn bytes<T: Serialize>(value: &T) -> Vec<u8> {
    let mut body = Vec::with_capacity(256);
    write(&mut body, value);
    body
}

fn write<T: Serialize>(body: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(body, value).expect("texts, numbers and maps with text keys can be written to memory");
}
