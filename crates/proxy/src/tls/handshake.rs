//! From a TCP connection to one with TLS, or to the reason why not.

use std::{io, time::Duration};

use bytes::BytesMut;
use orchestra_model::desired::Protocol;
use rustls::AlertDescription;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::Instant,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{Outcome, Terminator, stream::ClientStream};
use crate::{
    idle::{Awaits, Lull},
    state::Proxy,
    stream::Stream,
};

/// Time until the first byte, then until there is a place, then for the handshake: who waits for us is not late.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Type of a record with handshake messages, the first byte of every TLS connection (RFC 8446 5.1).
const HANDSHAKE: u8 = 22;
/// A fatal alert, `internal_error`, in a record of its own: what a client can be told without a certificate.
const NO_CERTIFICATE: &[u8] = &[21, 3, 3, 0, 2, 2, 80];
/// What HTTP clients without TLS are told.
const PLAIN_HTTP: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 58\r\n\
    Connection: close\r\n\r\nthis port speaks TLS: the address begins with `https://`.\n";
/// Time for a client that was told something to read it and leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Makes a connection one with TLS. `None` if that failed: everything is said and counted then.
pub(crate) async fn accept(
    proxy: &Proxy,
    terminator: &Terminator,
    mut stream: Stream,
    lull: &Lull,
    drain: &CancellationToken,
) -> Option<ClientStream> {
    let mut first = BytesMut::with_capacity(1024);
    let begun = tokio::select! {
        begun = tokio::time::timeout(TIMEOUT, stream.read_buf(&mut first)) => begun,
        // Nothing was asked on it yet.
        () = drain.cancelled() => return None,
    };
    // Who connects and leaves, or says nothing, did not begin a handshake.
    let Ok(Ok(1..)) = begun else { return None };
    if first[0] != HANDSHAKE {
        terminator.count(Outcome::NotTls);
        if terminator.protocol != Protocol::Tcp {
            last_words(stream, PLAIN_HTTP).await;
        }
        return None;
    }
    stream.rewind(first.freeze());
    let socket = std::sync::Arc::clone(stream.socket());
    // From here it waits for us, until it has a place.
    lull.ends();
    let Ok(slot) = tokio::time::timeout(TIMEOUT, proxy.tls.slots.take(&socket)).await else {
        terminator.count(Outcome::Late);
        return None;
    };
    lull.begins(Awaits::Rest, Instant::now());
    let handshake = async {
        match terminator.config().await {
            Some(config) => Ok(TlsAcceptor::from(config).accept(stream).await),
            None => Err(stream),
        }
    };
    // A handshake that is given up leaves nothing behind: the client was promised nothing yet.
    let outcome = tokio::select! {
        outcome = tokio::time::timeout(TIMEOUT, handshake) => outcome.ok(),
        () = slot.leave.cancelled() => None,
    };
    drop(slot);
    match outcome {
        Some(Ok(Ok(tls))) => {
            terminator.count(Outcome::Done);
            if tls.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed) {
                terminator.counts.resumed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
            Some(ClientStream::encrypted(tls))
        }
        Some(Ok(Err(error))) => {
            terminator.count(if is_untrusted(&error) { Outcome::Untrusted } else { Outcome::Failed });
            tracing::debug!(route = %terminator.route, %error, "a TLS handshake failed");
            None
        }
        Some(Err(stream)) => {
            terminator.count(Outcome::NoCertificate);
            last_words(stream, NO_CERTIFICATE).await;
            None
        }
        None => {
            terminator.count(Outcome::Late);
            None
        }
    }
}

/// Whether the client says that it does not accept the certificate (RFC 8446 6.2).
fn is_untrusted(error: &io::Error) -> bool {
    let alert = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    let Some(rustls::Error::AlertReceived(alert)) = alert else { return false };
    [
        AlertDescription::UnknownCA,
        AlertDescription::BadCertificate,
        AlertDescription::CertificateUnknown,
        AlertDescription::CertificateExpired,
        AlertDescription::CertificateRevoked,
        AlertDescription::UnsupportedCertificate,
    ]
    .contains(alert)
}

/// Says something and closes once the client did: closing with unread bytes would reset the connection and take along
/// what was said.
async fn last_words(mut stream: Stream, words: &[u8]) {
    let said = async {
        stream.write_all(words).await?;
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    // A client that goes on sending has heard enough.
    let _ = tokio::time::timeout(LAST_WORDS, said).await;
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_answer_to_plain_http_says_how_long_it_is() {
        let text = std::str::from_utf8(super::PLAIN_HTTP).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
        assert_eq!(length.parse::<usize>().unwrap(), body.len());
    }
}
