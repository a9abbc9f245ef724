//! Conditions with their attributes taken apart, and what they say of a context.

use std::cmp::Ordering;

use orchestra_model::flag::{Condition, Scalar, Test, Version};
use serde_json::{Number, Value};

use crate::context::{Context, Path};

/// A [`Condition`], ready to be asked.
#[derive(Clone, Debug)]
pub(crate) enum Ready {
    All(Vec<Ready>),
    Any(Vec<Ready>),
    Not(Box<Ready>),
    Is(Path, Test),
}

impl Ready {
    pub(crate) fn new(condition: &Condition) -> Self {
        match condition {
            Condition::All(parts) => Self::All(parts.iter().map(Self::new).collect()),
            Condition::Any(parts) => Self::Any(parts.iter().map(Self::new).collect()),
            Condition::Not(part) => Self::Not(Box::new(Self::new(part))),
            Condition::Is { attribute, test } => Self::Is(Path::new(attribute), test.clone()),
        }
    }

    pub(crate) fn holds(&self, context: &Context) -> bool {
        match self {
            Self::All(parts) => parts.iter().all(|part| part.holds(context)),
            Self::Any(parts) => parts.iter().any(|part| part.holds(context)),
            Self::Not(part) => !part.holds(context),
            Self::Is(path, Test::Present(wanted)) => context.get(path).is_some() == *wanted,
            Self::Is(path, test) => context.get(path).is_some_and(|value| passes(test, value)),
        }
    }
}

fn passes(test: &Test, value: &Value) -> bool {
    let text = || value.as_str();
    let ordered = |bound: &Number, accepted: fn(Ordering) -> bool| match value {
        Value::Number(number) => compare(number, bound).is_some_and(accepted),
        _ => false,
    };
    match test {
        Test::Equals(wanted) => equal(wanted, value),
        Test::In(wanted) => wanted.iter().any(|wanted| equal(wanted, value)),
        Test::StartsWith(prefixes) => text().is_some_and(|text| prefixes.iter().any(|p| text.starts_with(p.as_str()))),
        Test::EndsWith(suffixes) => text().is_some_and(|text| suffixes.iter().any(|s| text.ends_with(s.as_str()))),
        Test::Contains(wanted) => wanted.iter().any(|wanted| match (value, wanted) {
            (Value::String(text), Scalar::Text(part)) => text.contains(part.as_str()),
            (Value::Array(items), wanted) => items.iter().any(|item| equal(wanted, item)),
            _ => false,
        }),
        Test::Above(bound) => ordered(bound, Ordering::is_gt),
        Test::AtLeast(bound) => ordered(bound, Ordering::is_ge),
        Test::Below(bound) => ordered(bound, Ordering::is_lt),
        Test::AtMost(bound) => ordered(bound, Ordering::is_le),
        Test::Version(range) => {
            text().and_then(|text| text.parse::<Version>().ok()).is_some_and(|version| range.contains(&version))
        }
        Test::Present(wanted) => *wanted,
    }
}

fn equal(wanted: &Scalar, value: &Value) -> bool {
    match (wanted, value) {
        (Scalar::Boolean(wanted), Value::Bool(value)) => wanted == value,
        (Scalar::Text(wanted), Value::String(value)) => wanted == value,
        (Scalar::Number(wanted), Value::Number(value)) => compare(value, wanted) == Some(Ordering::Equal),
        _ => false,
    }
}

/// Whole numbers exactly, others as floats.
fn compare(a: &Number, b: &Number) -> Option<Ordering> {
    match (a.as_i128(), b.as_i128()) {
        (Some(a), Some(b)) => Some(a.cmp(&b)),
        _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
    }
}
