//! Texts with typed holes: what `{{ … }}` leaves behind when a value is known only once something runs.
//!
//! `spec` replaces every reference that is known before apply. The rest stays as [`Reference`]s, which plan shows and
//! which the engine fills in at launch.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{id::Name, secret::SecretVersion};

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
    /// `{{ secrets.NAME }}`: filled where a program is started and nowhere else.
    Secret {
        /// Name of the secret.
        secret: Name,
        /// Which value; `None` until a release is made.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<SecretVersion>,
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
            Self::Secret { secret, .. } => write!(f, "secrets.{secret}"),
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

    /// Whether a secret is a part of it.
    pub fn is_secret(&self) -> bool {
        self.references().any(|reference| matches!(reference, Reference::Secret { .. }))
    }

    /// The secrets in it, to be given their versions.
    pub fn secrets_mut(&mut self) -> impl Iterator<Item = (&Name, &mut Option<SecretVersion>)> {
        self.0.iter_mut().filter_map(|segment| match segment {
            Segment::Reference(Reference::Secret { secret, version }) => Some((&*secret, version)),
            _ => None,
        })
    }

    /// The text with every hole but secrets filled by `value`, or the first hole for which there is none.
    pub fn fill_but_secrets(&self, mut value: impl FnMut(&Reference) -> Option<String>) -> Result<Self, Reference> {
        let filled = self.0.iter().map(|segment| match segment {
            Segment::Reference(reference) if !matches!(reference, Reference::Secret { .. }) => {
                value(reference).map(Segment::Literal).ok_or_else(|| reference.clone())
            }
            segment => Ok(segment.clone()),
        });
        filled.collect::<Result<_, _>>().map(Self)
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

/// Holes are shown as `(known after apply: services.api.urls.http)`, secrets as `(secret db 0f3a77c1)`.
impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|segment| match segment {
            Segment::Literal(literal) => f.write_str(literal),
            Segment::Reference(Reference::Secret { secret, version: None }) => write!(f, "(secret {secret})"),
            Segment::Reference(Reference::Secret { secret, version: Some(version) }) => {
                write!(f, "(secret {secret} {version})")
            }
            Segment::Reference(reference) => write!(f, "(known after apply: {reference})"),
        })
    }
}
