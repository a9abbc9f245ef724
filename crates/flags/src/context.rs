//! The evaluation context: what is known of whoever asks.

use orchestra_model::flag::Attribute;
use serde_json::{Map, Value};

/// Attributes of whoever asks, `targetingKey` among them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Context {
    attributes: Map<String, Value>,
}

/// Why attributes are no context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// It is something else than a mapping.
    #[error("the context is not an object")]
    NotAnObject,
    /// The targeting key is something else than a text.
    #[error("the `targetingKey` of the context is not a string")]
    TargetingKey,
}

impl Context {
    /// A context with a targeting key and nothing else.
    pub fn of(targeting_key: impl Into<String>) -> Self {
        let key = (Attribute::TARGETING_KEY.to_owned(), Value::String(targeting_key.into()));
        Self { attributes: std::iter::once(key).collect() }
    }

    /// Adds an attribute, or replaces it.
    #[must_use]
    pub fn with(mut self, attribute: &str, value: impl Into<Value>) -> Self {
        self.attributes.insert(attribute.to_owned(), value.into());
        self
    }

    /// The attribute at a path: the one with exactly this name, dots included, or else the one inside the others. What
    /// is `null` is absent.
    pub(crate) fn get(&self, path: &Path) -> Option<&Value> {
        let whole = self.attributes.get(path.whole.as_str());
        let found = whole.or_else(|| {
            let (first, rest) = path.parts.split_first()?;
            rest.iter().try_fold(self.attributes.get(first.as_str())?, |value, part| value.get(part.as_str()))
        });
        found.filter(|value| !value.is_null())
    }
}

impl TryFrom<Value> for Context {
    type Error = ContextError;
    fn try_from(value: Value) -> Result<Self, ContextError> {
        let Value::Object(attributes) = value else { return Err(ContextError::NotAnObject) };
        match attributes.get(Attribute::TARGETING_KEY) {
            None | Some(Value::Null | Value::String(_)) => Ok(Self { attributes }),
            Some(_) => Err(ContextError::TargetingKey),
        }
    }
}

/// An [`Attribute`], taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    whole: String,
    /// None if there is only the whole.
    parts: Vec<String>,
}

impl Path {
    pub(crate) fn new(attribute: &Attribute) -> Self {
        let parts: Vec<String> = attribute.parts().map(str::to_owned).collect();
        let parts = if parts.len() > 1 { parts } else { Vec::new() };
        Self { whole: attribute.as_str().to_owned(), parts }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.whole
    }

    pub(crate) fn is_targeting_key(&self) -> bool {
        self.whole == Attribute::TARGETING_KEY
    }
}
