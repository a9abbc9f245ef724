//! The files that a certificate comes from: whether they changed, what is in them, and what is made of it.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, LazyLock},
};

use orchestra_certificate::{Facts, Pair};
use orchestra_model::desired::Protocol;
use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
};

/// Longest file that is read: a chain of a few certificates has some kilobytes.
const MAX_FILE: u64 = 1 << 20;

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));

/// Where a pair is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Files<'a> {
    pub(super) certificate: &'a str,
    pub(super) key: &'a str,
    /// Another pair, in one file, for clients that ask for a name.
    pub(super) named: Option<&'a str>,
}

/// What tells each file from another one in its place: device, inode, size, and the times of its last changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp(Vec<[i128; 7]>);

/// A pair that belongs together, or two of them.
#[derive(Debug)]
pub(super) struct Loaded {
    choice: Arc<Choice>,
    pub(super) facts: Facts,
}

/// Which certificate a client is shown.
#[derive(Debug)]
struct Choice {
    key: Arc<CertifiedKey>,
    /// For clients that ask for a name.
    named: Option<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Choice {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let named = self.named.as_ref().filter(|_| hello.server_name().is_some());
        Some(Arc::clone(named.unwrap_or(&self.key)))
    }
}

impl Loaded {
    /// Whether clients are shown the same by both.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let named = |loaded: &Self| loaded.choice.named.as_ref().map(|named| named.cert.clone());
        self.facts.fingerprint == other.facts.fingerprint && named(self) == named(other)
    }
}

impl Files<'_> {
    /// As they are now; `None` if one of them is not there.
    pub(super) fn stamp(self) -> Option<Stamp> {
        let stamp = |path: &str| {
            let meta = fs::metadata(path).ok()?;
            let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()].map(i128::from);
            let [a, b, c, d] = times;
            Some([i128::from(meta.dev()), i128::from(meta.ino()), i128::from(meta.size()), a, b, c, d])
        };
        [Some(self.certificate), Some(self.key), self.named]
            .into_iter()
            .flatten()
            .map(stamp)
            .collect::<Option<_>>()
            .map(Stamp)
    }

    /// Reads and checks them. The error is for users.
    pub(super) fn load(self) -> Result<Loaded, String> {
        let named = self.named.map(|named| Files { certificate: named, key: named, named: None }.pair()).transpose()?;
        let (key, facts) = self.pair()?;
        Ok(Loaded { choice: Arc::new(Choice { key, named: named.map(|(key, _)| key) }), facts })
    }

    fn pair(self) -> Result<(Arc<CertifiedKey>, Facts), String> {
        let certificate = read(self.certificate)?;
        let key = if self.key == self.certificate { certificate.clone() } else { read(self.key)? };
        let pair = Pair::read(&certificate, &key).map_err(|error| match error {
            orchestra_certificate::PairError::NoKey | orchestra_certificate::PairError::EncryptedKey => {
                format!("{}: {error}", self.key)
            }
            _ if self.key == self.certificate => format!("{}: {error}", self.certificate),
            orchestra_certificate::PairError::Damaged => format!("{} or {}: {error}", self.certificate, self.key),
            _ => format!("{}: {error}", self.certificate),
        })?;
        let key = CertifiedKey::from_der(pair.chain, pair.key, &PROVIDER).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                format!("the key in {} does not belong to the certificate in {}", self.key, self.certificate)
            }
            error => format!("{}: {error}", self.key),
        })?;
        Ok((Arc::new(key), pair.facts))
    }
}

fn read(path: &str) -> Result<Vec<u8>, String> {
    let failed = |error: io::Error| format!("cannot read {path}: {error}");
    // Opening a pipe would wait for somebody who writes.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(format!("{path} is no file"));
    }
    let mut bytes = Vec::new();
    let mut file = File::open(Path::new(path)).map_err(failed)?.take(MAX_FILE + 1);
    file.read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE { Err(format!("{path} is longer than {MAX_FILE} bytes")) } else { Ok(bytes) }
}

/// What handshakes of a route are made with: TLS 1.3 and 1.2, tickets for resumption, no early data (which could be
/// played again by others).
pub(super) fn config(loaded: &Loaded, protocol: Protocol) -> Result<Arc<ServerConfig>, String> {
    let failed = |error: rustls::Error| format!("TLS cannot be set up: {error}");
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(failed)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::clone(&loaded.choice) as Arc<dyn ResolvesServerCert>);
    // Keys of its own: a session of one route or one certificate is not resumed with another.
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(failed)?;
    // With tickets the client remembers, and nothing is kept here.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 1;
    config.alpn_protocols = match protocol {
        Protocol::Http => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
        Protocol::H2c | Protocol::Grpc => vec![b"h2".to_vec()],
        Protocol::Tcp => Vec::new(),
    };
    Ok(Arc::new(config))
}
