//! Servers elsewhere that are named by a URL: Prometheus servers and webhooks, over TCP or TLS.
//!
//! A name with several addresses is tried at each of them in order, because `localhost` is often `::1` first. Certificates
//! are verified against the file that is named, or against those that the machine trusts; the file is read for each
//! connection, so that a new one counts at once. Nothing is verified less strictly on request.

use std::{net::SocketAddr, path::Path, sync::Arc, sync::LazyLock};

use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::{TcpStream, lookup_host};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::{CryptoProvider, aws_lc_rs},
    },
};

use crate::check::{Socket, connect, words};

/// Where distributions keep the certificates that a machine trusts: Debian, Fedora, openSUSE, Alpine.
const TRUSTED: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));

/// A URL in its parts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place<'a> {
    is_tls: bool,
    /// Host, and port if one is said.
    pub(crate) authority: &'a str,
    /// Path with query; empty if the URL has none, and without a first `/` if it has only a query.
    pub(crate) path: &'a str,
}

/// A connection to such a server.
pub(crate) enum Connection {
    Plain(Socket),
    Tls(Box<TlsStream<TcpStream>>),
}

// === impl Place ===

impl<'a> Place<'a> {
    pub(crate) fn of(url: &'a str) -> Result<Self, String> {
        let (is_tls, rest) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (None, Some(rest)) => (true, rest),
            (None, None) => return Err("only http:// and https:// can be asked".to_owned()),
        };
        let (authority, path) = rest.find(['/', '?']).map_or((rest, ""), |at| rest.split_at(at));
        Ok(Self { is_tls, authority, path })
    }

    /// The host as DNS and certificates know it, and the port.
    fn target(&self) -> (&'a str, String) {
        let host_ends = self.authority.rfind(']').map_or(0, |at| at + 1);
        let (host, target) = match self.authority[host_ends..].find(':') {
            Some(at) => (&self.authority[..host_ends + at], self.authority.to_owned()),
            None => (self.authority, format!("{}:{}", self.authority, if self.is_tls { 443 } else { 80 })),
        };
        (host.trim_start_matches('[').trim_end_matches(']'), target)
    }

    /// Connects; `ca` is the file with the certificates that are trusted, `None` those of the machine. `stage` always says
    /// what is being waited for.
    ///
    /// # Errors
    ///
    /// Why there is no connection, in one clause.
    pub(crate) async fn connect(
        &self,
        ca: Option<&str>,
        stage: &mut &'static str,
    ) -> Result<(Connection, SocketAddr), String> {
        let (host, target) = self.target();
        *stage = "while looking for its address";
        let addresses = lookup_host(&target).await.map_err(|error| format!("{}: {error}", self.authority))?;
        let mut refused = format!("{} has no address", self.authority);
        for address in addresses {
            *stage = "while connecting";
            match connect(address).await {
                Ok(stream) if self.is_tls => {
                    *stage = "while agreeing on TLS";
                    return Ok((Connection::Tls(Box::new(encrypt(stream, host, ca).await?)), address));
                }
                Ok(stream) => return Ok((Connection::Plain(Socket::of(stream)), address)),
                Err(error) => refused = format!("{} while connecting", words(&error)),
            }
        }
        Err(refused)
    }
}

async fn encrypt(stream: TcpStream, host: &str, ca: Option<&str>) -> Result<TlsStream<TcpStream>, String> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| format!("{host} is no name of a TLS server"))?;
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots(ca).await?)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let connected = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    connected.map_err(|error| format!("TLS: {error}"))
}

async fn roots(ca: Option<&str>) -> Result<RootCertStore, String> {
    let path = match ca {
        Some(path) => path,
        None => TRUSTED.into_iter().find(|path| Path::new(path).exists()).ok_or_else(|| {
            "this machine has no list of trusted certificates: install ca-certificates, or name a `ca`".to_owned()
        })?,
    };
    let text = tokio::fs::read(path).await.map_err(|error| format!("certificates in {path}: {error}"))?;
    let mut roots = RootCertStore::empty();
    // One that cannot be used trusts nobody; the others still do.
    let parsed = CertificateDer::pem_slice_iter(&text).flatten();
    let (usable, _) = roots.add_parsable_certificates(parsed);
    if usable == 0 {
        return Err(format!("{path} has no certificate in PEM that can be trusted"));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        for (url, host, target, path) in [
            ("http://a", "a", "a:80", ""),
            ("https://a/b?c=1", "a", "a:443", "/b?c=1"),
            ("https://a.example:8443/", "a.example", "a.example:8443", "/"),
            ("http://[::1]:9090/x", "::1", "[::1]:9090", "/x"),
            ("https://[::1]", "::1", "[::1]:443", ""),
            ("http://a:1?x=/", "a", "a:1", "?x=/"),
        ] {
            let place = Place::of(url).unwrap();
            assert_eq!((place.target(), place.path), ((host, target.to_owned()), path), "{url}");
        }
        assert!(Place::of("ftp://a").is_err());
    }
}
