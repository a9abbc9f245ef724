//! What an evaluation comes to.

use std::collections::BTreeMap;

use orchestra_model::flag::{FlagKind, Override, Scalar, VariantName};
use serde_json::Value;

/// The value of a flag for one context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation<'c> {
    /// What the value is.
    pub kind: FlagKind,
    /// Name of the value.
    pub variant: &'c VariantName,
    /// The value; `None` leaves it to the default in the program's code.
    pub value: Option<&'c Value>,
    /// How it came about.
    pub reason: Reason,
    /// Name of the rule that decided.
    pub rule: Option<&'c str>,
    /// The override that decided.
    pub overridden: Option<&'c Override>,
    /// What the flag's definition passes on.
    pub metadata: &'c BTreeMap<String, Scalar>,
}

/// How a value came about, in the terms of the OpenFeature specification (types, resolution reason).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The same for everybody: there are no rules, or an override decided.
    Static,
    /// A rule applied.
    TargetingMatch,
    /// A split decided.
    Split,
    /// The flag is off.
    Disabled,
    /// There are rules, and none applied.
    Default,
}

impl Reason {
    /// The word of the OpenFeature specification.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Static => "STATIC",
            Self::TargetingMatch => "TARGETING_MATCH",
            Self::Split => "SPLIT",
            Self::Disabled => "DISABLED",
            Self::Default => "DEFAULT",
        }
    }
}

/// Why there is no value. Programs then use the default in their own code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{details}")]
pub struct Failure {
    /// Kind.
    pub code: ErrorCode,
    /// One sentence for people.
    pub details: String,
}

/// Kinds of failures, in the terms of the OpenFeature specification (types, error code).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// There is no such flag.
    FlagNotFound,
    /// The request, or the flag's definition, cannot be understood.
    ParseError,
    /// The flag splits by the targeting key, and the context has none.
    TargetingKeyMissing,
    /// The context is no object, or lacks the attribute that the flag splits by.
    InvalidContext,
    /// The flag is of another kind than the one asked for.
    TypeMismatch,
    /// Anything else.
    General,
}

impl ErrorCode {
    /// The word of the OpenFeature specification.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FlagNotFound => "FLAG_NOT_FOUND",
            Self::ParseError => "PARSE_ERROR",
            Self::TargetingKeyMissing => "TARGETING_KEY_MISSING",
            Self::InvalidContext => "INVALID_CONTEXT",
            Self::TypeMismatch => "TYPE_MISMATCH",
            Self::General => "GENERAL",
        }
    }
}
