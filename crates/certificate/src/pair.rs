//! A certificate with its chain and its key, out of PEM texts.

use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{Error as PemError, PemObject as _},
};

use crate::{Facts, Malformed};

/// A certificate with its chain and its key. Whether key and certificate belong together is not known yet.
#[derive(Debug)]
pub struct Pair {
    /// The certificate, then those that lead to its authority.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of the first.
    pub key: PrivateKeyDer<'static>,
    /// What stands in the first.
    pub facts: Facts,
}

/// Why there is no pair in two texts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PairError {
    /// Nothing between `BEGIN CERTIFICATE` and `END CERTIFICATE`.
    #[error("there is no certificate in PEM")]
    NoCertificate,
    /// What stands there is none.
    #[error("the certificate cannot be read: {0}")]
    Certificate(Malformed),
    /// Some section of the text is damaged.
    #[error("the PEM text is damaged")]
    Damaged,
    /// No private key.
    #[error("there is no private key in PEM")]
    NoKey,
    /// A key that a password protects.
    #[error("the private key is encrypted; nobody could enter its password here")]
    EncryptedKey,
}

impl Pair {
    /// Reads both texts, which may be one and the same.
    ///
    /// # Errors
    /// See [`PairError`].
    pub fn read(certificate: &[u8], key: &[u8]) -> Result<Self, PairError> {
        let chain = chain(certificate)?;
        let facts = of_first(&chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| match error {
            PemError::NoItemsFound if is_encrypted(key) => PairError::EncryptedKey,
            PemError::NoItemsFound => PairError::NoKey,
            _ => PairError::Damaged,
        })?;
        Ok(Self { chain, key, facts })
    }

    /// What stands in the first certificate of a text.
    ///
    /// # Errors
    /// See [`PairError`].
    pub fn facts(certificate: &[u8]) -> Result<Facts, PairError> {
        of_first(&chain(certificate)?)
    }
}

fn chain(certificate: &[u8]) -> Result<Vec<CertificateDer<'static>>, PairError> {
    let chain: Result<_, PemError> = CertificateDer::pem_slice_iter(certificate).collect();
    chain.map_err(|_| PairError::Damaged)
}

fn of_first(chain: &[CertificateDer<'static>]) -> Result<Facts, PairError> {
    Facts::read(chain.first().ok_or(PairError::NoCertificate)?).map_err(PairError::Certificate)
}

/// Both ways in which OpenSSL marks a key that needs a password.
fn is_encrypted(key: &[u8]) -> bool {
    [&b"ENCRYPTED PRIVATE KEY"[..], b"Proc-Type: 4,ENCRYPTED"]
        .iter()
        .any(|mark| key.windows(mark.len()).any(|part| part == *mark))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pair() -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn one_text_may_hold_both() {
        let (certificate, key) = pair();
        assert_eq!(Pair::read(certificate.as_bytes(), key.as_bytes()).unwrap().facts.names, ["localhost"]);
        let both = format!("some words\n{key}\n{certificate}{certificate}");
        assert_eq!(Pair::read(both.as_bytes(), both.as_bytes()).unwrap().chain.len(), 2);
    }

    #[test]
    fn says_what_is_wrong() {
        let (certificate, key) = pair();
        let read = |certificate: &str, key: &str| Pair::read(certificate.as_bytes(), key.as_bytes()).unwrap_err();
        assert_eq!(read("", &key), PairError::NoCertificate);
        assert_eq!(read(&key, &key), PairError::NoCertificate);
        assert_eq!(read(&certificate, ""), PairError::NoKey);
        assert_eq!(read(&certificate[..certificate.len() / 2], &key), PairError::Damaged);
        assert_eq!(read(&certificate, &key[..key.len() / 2]), PairError::Damaged);
        assert_eq!(read(&certificate, &key.replace("PRIVATE", "ENCRYPTED PRIVATE")), PairError::EncryptedKey);
        let other = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(read(other, &key), PairError::Certificate(Malformed));
    }
}
