//! Certificates and their keys as values: PEM texts to a [`Pair`], and the [`Facts`] that stand in a certificate.
//!
//! The proxy serves pairs and says when they end; the development authority issues them and renews those that are about
//! to end; the command line shows them. What all three need is here, and no more: this crate opens no file, reads no
//! clock, verifies no signature and decides about no trust. That is rustls' part.

mod der;
mod facts;
mod pair;

/// Where the certificate of a state directory's development authority is: what clients trust. Programs find the path in
/// `ORCHESTRA_CA_FILE`.
pub fn authority_path(home: &std::path::Path) -> std::path::PathBuf {
    home.join("tls/authority/certificate.pem")
}

pub use facts::{Facts, Malformed, hex};
pub use pair::{Pair, PairError};
