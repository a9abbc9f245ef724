//! Texts with typed holes: what `{{ … }}` leaves behind when a value is known only once something runs.
//!
//! `spec` replaces every reference that is known before apply. The rest stays as [`Reference`]s, which plan shows and
//! which the engine fills in at launch.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::Name;

/// A text in which some parts are not known yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Text(pub Vec<Segment>);

/// A part of a [`Text`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Segment {
    /// Known characters.
    Literal(String),
    /// Known after apply.
    Reference(Reference),
}

/// A value that exists only once an instance or an address does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// `{{ instance.id }}`: id of the instance that is being launched.
    InstanceId,
    /// `{{ instance.ordinal }}`: its ordinal.
    InstanceOrdinal,
    /// `{{ instance.ports.NAME }}`: the port on which this instance must listen.
    InstancePort {
        /// Name of the port.
        port: Name,
    },
    /// `{{ services.SERVICE.ports.PORT }}` of a published port that the machine chooses.
    ServicePort {
        /// Name of the service.
        service: Name,
        /// Name of the port.
        port: Name,
    },
    /// `{{ services.SERVICE.url }}` or `{{ services.SERVICE.urls.PORT }}` of such a port.
    ServiceUrl {
        /// Name of the service.
        service: Name,
        /// Name of the port.
        port: Name,
    },
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InstanceId => f.write_str("instance.id"),
            Self::InstanceOrdinal => f.write_str("instance.ordinal"),
            Self::InstancePort { port } => write!(f, "instance.ports.{port}"),
            Self::ServicePort { service, port } => write!(f, "services.{service}.ports.{port}"),
            Self::ServiceUrl { service, port } => write!(f, "services.{service}.urls.{port}"),
        }
    }
}

impl Text {
    /// A text without holes.
    pub fn literal(text: impl Into<String>) -> Self {
        Self(vec![Segment::Literal(text.into())])
    }

    /// The text, if it has no holes.
    pub fn known(&self) -> Option<String> {
        self.fill(|_| None).ok()
    }

    /// The holes, in order.
    pub fn references(&self) -> impl Iterator<Item = &Reference> {
        self.0.iter().filter_map(|segment| match segment {
            Segment::Literal(_) => None,
            Segment::Reference(reference) => Some(reference),
        })
    }

    /// The text with every hole filled by `value`, or the first hole for which there is none.
    pub fn fill(&self, mut value: impl FnMut(&Reference) -> Option<String>) -> Result<String, Reference> {
        let mut text = String::new();
        for segment in &self.0 {
            match segment {
                Segment::Literal(literal) => text.push_str(literal),
                Segment::Reference(reference) => text.push_str(&value(reference).ok_or_else(|| reference.clone())?),
            }
        }
        Ok(text)
    }
}

/// Holes are shown as `(known after apply: services.api.urls.http)`.
impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|segment| match segment {
            Segment::Literal(literal) => f.write_str(literal),
            Segment::Reference(reference) => write!(f, "(known after apply: {reference})"),
        })
    }
}
