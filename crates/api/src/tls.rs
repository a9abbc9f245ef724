//! The development authority, and what ports with TLS show.

use orchestra_model::{EnvironmentId, Name, time::UnixMillis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The TLS of a state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TlsStatus {
    /// The development authority; missing if it could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<AuthorityStatus>,
    /// Every port with TLS that is in force.
    pub certificates: Vec<CertificateStatus>,
}

/// The development authority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuthorityStatus {
    /// Its name, in which a part of its key's digest tells it from others.
    pub name: String,
    /// SHA-256 of its certificate, in lower-case hexadecimal.
    pub fingerprint: String,
    /// When its certificate ends.
    pub expires_at: UnixMillis,
    /// Where its certificate is on the server's machine: what programs find in `ORCHESTRA_CA_FILE`.
    pub path: String,
    /// Its certificate in PEM.
    pub certificate: String,
}

/// What a port with TLS shows to clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CertificateStatus {
    /// Stack and environment.
    pub environment: EnvironmentId,
    /// Service.
    pub service: Name,
    /// Port.
    pub port: Name,
    /// Whether the development authority issues it; otherwise it comes from files.
    pub development: bool,
    /// PEM file that it comes from, if it comes from files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// DNS names and addresses that it is for. Empty while there is none.
    pub names: Vec<String>,
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// When it ends; missing while there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMillis>,
    /// Why its files cannot be used as they are. What is shown then is an older certificate, or none, unless it is
    /// `flawed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The problem is one of the certificate that is shown all the same: clients will not like it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub flawed: bool,
}
