//! Secrets: where they come from, which value of one a release has, and a value that shows itself nowhere.
//!
//! What is written down of a secret is its name and its [`SecretVersion`]. A value is a [`Secret`] from the moment it is
//! read until it stands in the environment of a program; it can be neither printed nor serialised.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the value of a secret is read when a release is made.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SecretSource {
    /// The content of a file, without one line end at its end.
    ///
    /// The text is its absolute path.
    File(String),
    /// A variable of the server's environment, by its name.
    Env(String),
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "the file `{path}`"),
            Self::Env(name) => write!(f, "the server's variable `{name}`"),
        }
    }
}

/// Tells values of a secret apart without saying anything of them: a keyed hash, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct SecretVersion(pub String);

impl SecretVersion {
    /// Whether it is one that can have been made: no text from elsewhere becomes a part of a path.
    pub fn is_well_formed(&self) -> bool {
        self.0.len() == 32 && self.0.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }
}

/// As much of it as tells two apart to the eye.
impl fmt::Display for SecretVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.get(..8).unwrap_or(&self.0))
    }
}

/// The value of a secret. It has no `Display` and no `Serialize`, and `Debug` says nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// From now on this is a secret.
    pub const fn new(value: String) -> Self {
        Self(value)
    }

    /// The value, for whoever gives it to a program or seals it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(a secret)")
    }
}
