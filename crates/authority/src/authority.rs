//! The authority itself: made once, opened ever after, and what it signs.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orchestra_certificate::{Facts, Pair, PairError, authority_path, hex};
use orchestra_model::traffic::is_development_name;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, string::Ia5String,
};
use sha2::{Digest as _, Sha256};

use crate::{
    constraints::{constraints, permitted_address},
    folder::{self, CERTIFICATE, KEY},
};

const DAY: Duration = Duration::from_secs(86_400);
/// Life of the authority: long enough that nobody meets its end, as with other development authorities.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Life of what it issues. Far below the 825 days that macOS accepts; a server renews it long before.
const LIFE: Duration = Duration::from_secs(90 * 86_400);
/// Clocks of clients may be this far behind.
const SKEW: Duration = DAY;

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Its files cannot be read or written.
    #[error("cannot use {}", path.display())]
    Files {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What lies there is no authority.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// Folder of the authority.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[source] rcgen::Error),
}

/// The development authority of a state directory.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    facts: Facts,
}

impl Authority {
    /// Opens the authority of a state directory; the first time it is made. Whoever else does the same at the same time
    /// gets the same one.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn open(home: &Path, now: SystemTime) -> Result<Self, AuthorityError> {
        if let Some(found) = Self::find(home)? {
            return Ok(found);
        }
        let folder = folder_of(home);
        let key = KeyPair::generate().map_err(AuthorityError::Make)?;
        let certificate = own_params(&key, now).self_signed(&key).map_err(AuthorityError::Make)?.pem();
        let files = [(CERTIFICATE, certificate.as_str(), 0o644), (KEY, &key.serialize_pem(), 0o600)];
        let above = folder.parent().expect("a folder of a state directory has one above it");
        let published = folder::make(above).and_then(|()| folder::publish(&folder, &files));
        let found = Self::find(home)?;
        // Somebody else's is as good.
        let found = found.ok_or_else(|| AuthorityError::Files {
            path: folder.clone(),
            source: published.err().unwrap_or_else(|| io::Error::other("it is gone again")),
        })?;
        folder::tidy(above);
        Ok(found)
    }

    /// The authority of a state directory, if there is one.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn find(home: &Path) -> Result<Option<Self>, AuthorityError> {
        let folder = folder_of(home);
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|source| AuthorityError::Files { path, source })
        };
        let pem = match read(CERTIFICATE) {
            Err(AuthorityError::Files { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let key = read(KEY)?;
        let damaged = |reason: String| AuthorityError::Damaged { path: folder.clone(), reason };
        let pair = Pair::read(pem.as_bytes(), key.as_bytes()).map_err(|error: PairError| damaged(error.to_string()))?;
        let key = KeyPair::from_pem(&key).map_err(|error| damaged(error.to_string()))?;
        // The name contains a digest of the key, so that it says whether both belong together.
        if pair.facts.subject != name(&key) {
            return Err(damaged("its key is another one's".to_owned()));
        }
        let issuer = Issuer::new(own_params(&key, UNIX_EPOCH), key);
        Ok(Some(Self { issuer, pem, facts: pair.facts }))
    }

    /// Its certificate in PEM: what clients trust.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// What stands in its certificate.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Issues a certificate for these names and `localhost`, and for these addresses. What the authority cannot vouch
    /// for is left out. Returns the certificate and its key in one PEM text.
    ///
    /// # Errors
    /// [`AuthorityError::Make`]
    pub fn issue<'a>(
        &self,
        subject: &str,
        names: impl IntoIterator<Item = &'a str>,
        addresses: &[IpAddr],
        now: SystemTime,
    ) -> Result<String, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Make)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(subject);
        params.not_before = (now - SKEW).into();
        let own_end = UNIX_EPOCH + Duration::from_secs(self.facts.not_after);
        params.not_after = (now + LIFE).min(own_end).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        for name in wanted_names(names) {
            params.subject_alt_names.push(SanType::DnsName(Ia5String::try_from(name).map_err(AuthorityError::Make)?));
        }
        let addresses = addresses.iter().copied().filter(|ip| permitted_address(*ip));
        params.subject_alt_names.extend(addresses.map(SanType::IpAddress));
        let certificate = params.signed_by(&key, &self.issuer).map_err(AuthorityError::Make)?;
        Ok(format!("{}{}", certificate.pem(), key.serialize_pem()))
    }
}

/// Folder of the authority of a state directory.
fn folder_of(home: &Path) -> PathBuf {
    authority_path(home).parent().expect("the certificate is in a folder").to_owned()
}

/// DNS names of a certificate, `localhost` first.
pub(crate) fn wanted_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut all = vec!["localhost".to_owned()];
    for name in names {
        let name = name.to_ascii_lowercase();
        if is_development_name(&name) && !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

/// Addresses of a certificate, loopback first.
pub(crate) fn wanted_addresses(listen: IpAddr) -> Vec<IpAddr> {
    let loopback = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16])];
    let further = Some(listen).filter(|ip| permitted_address(*ip) && !loopback.contains(ip));
    loopback.into_iter().chain(further).collect()
}

/// What the authority's certificate says. Everything but the dates follows from the key.
fn own_params(key: &KeyPair, now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished(&name(key));
    params.not_before = now.checked_sub(SKEW).unwrap_or(now).into();
    params.not_after = (now + AUTHORITY_LIFE).into();
    // It signs no authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Servers only: no mail, no code, no clients.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.name_constraints = Some(constraints());
    params
}

/// Tells authorities of different state directories apart in a trust store.
fn name(key: &KeyPair) -> String {
    let digest = Sha256::digest(key.subject_public_key_info());
    format!("Orchestra development authority {}", hex(&digest[..4]))
}

fn distinguished(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

#[cfg(test)]
mod tests;
