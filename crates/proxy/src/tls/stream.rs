//! A client's connection as the layers above see it: with TLS or without, the same bytes.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

use crate::stream::{Socket, Stream};

/// A connection of a client.
#[derive(Debug)]
pub(crate) enum ClientStream {
    Plain(Stream),
    Tls(Box<Encrypted>),
}

/// A connection with TLS. What it gathers, meters and aborts is the socket below, with what is encrypted.
#[derive(Debug)]
pub(crate) struct Encrypted {
    tls: TlsStream<Stream>,
    socket: Arc<Socket>,
    /// Bytes that were read to find out what is spoken.
    prefix: Bytes,
}

impl ClientStream {
    pub(super) fn encrypted(tls: TlsStream<Stream>) -> Self {
        let socket = Arc::clone(tls.get_ref().0.socket());
        Self::Tls(Box::new(Encrypted { tls, socket, prefix: Bytes::new() }))
    }

    pub(crate) fn socket(&self) -> &Arc<Socket> {
        match self {
            Self::Plain(stream) => stream.socket(),
            Self::Tls(encrypted) => &encrypted.socket,
        }
    }

    /// Gives bytes back that were read already.
    pub(crate) fn rewind(&mut self, bytes: Bytes) {
        match self {
            Self::Plain(stream) => stream.rewind(bytes),
            Self::Tls(encrypted) => encrypted.prefix = bytes,
        }
    }

    /// Whether both sides agreed on HTTP/2 (ALPN, RFC 7301); `None` if they agreed on nothing.
    pub(crate) fn agreed_on_h2(&self) -> Option<bool> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(encrypted) => encrypted.tls.get_ref().1.alpn_protocol().map(|protocol| protocol == b"h2"),
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(encrypted) if encrypted.prefix.is_empty() => Pin::new(&mut encrypted.tls).poll_read(cx, buf),
            Self::Tls(encrypted) => {
                let count = encrypted.prefix.len().min(buf.remaining());
                buf.put_slice(&encrypted.prefix[..count]);
                encrypted.prefix.advance(count);
                encrypted.socket.reread(count);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl ClientStream {
    /// Writes what is to be said now, be it `between` two responses or because it was begun.
    fn poll_interjection(&mut self, cx: &mut Context<'_>, between: bool) -> Poll<io::Result<()>> {
        while let Some(bytes) = self.socket().interjection.next(between) {
            let written = match self {
                Self::Plain(stream) => Pin::new(stream).poll_write(cx, &bytes),
                Self::Tls(encrypted) => Pin::new(&mut encrypted.tls).poll_write(cx, &bytes),
            };
            match ready!(written)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.socket().interjection.advance(count),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_interjection(cx, false))?;
        self.socket().flushes(false);
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(encrypted) => Pin::new(&mut encrypted.tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_interjection(cx, false))?;
        self.socket().flushes(false);
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(encrypted) => Pin::new(&mut encrypted.tls).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Whoever flushes has nothing left to write.
        ready!(self.poll_interjection(cx, true))?;
        match &mut *self {
            Self::Plain(stream) => ready!(Pin::new(stream).poll_flush(cx))?,
            Self::Tls(encrypted) => ready!(Pin::new(&mut encrypted.tls).poll_flush(cx))?,
        }
        self.socket().flushes(true);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            // An aborted connection must not say goodbye: `close_notify` would make a half response a whole one.
            Self::Tls(encrypted) if encrypted.socket.aborts() => Poll::Ready(Ok(())),
            Self::Tls(encrypted) => Pin::new(&mut encrypted.tls).poll_shutdown(cx),
        }
    }
}
