//! A TCP connection that others can look at while hyper owns it.
//!
//! The pool must know whether an idle connection was closed by the peer *before* it sends a request on it, and whether
//! a failed request left this machine at all; the connection driver must know whether a client has begun a request.
//! hyper tells none of that, so the socket is shared and its traffic metered.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use rustix::net::{RecvFlags, Shutdown, sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

/// The socket and what went through it.
#[derive(Debug)]
pub(crate) struct Socket {
    tcp: TcpStream,
    read: AtomicU64,
    written: AtomicU64,
    abort: AtomicBool,
}

impl Socket {
    /// Bytes that arrived.
    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes that the kernel took.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether an idle connection can carry a request: the peer has neither closed it nor sent anything.
    ///
    /// Asks the kernel and not the runtime, which hears of an end only at its next poll: over loopback the peer's close
    /// is in our socket before its system call returns.
    pub(crate) fn is_quiet(&self) -> bool {
        let mut byte = [0];
        let peek = rustix::net::recv(&self.tcp, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(peek, Err(rustix::io::Errno::WOULDBLOCK))
    }

    /// From now on closing the connection resets it, so that the peer cannot take what it got for the whole.
    pub(crate) fn abort_on_close(&self) {
        self.abort.store(true, Ordering::Relaxed);
    }
}

/// hyper's end of a [`Socket`].
#[derive(Debug)]
pub(crate) struct Stream {
    socket: Arc<Socket>,
    /// Bytes that were read to find out what is spoken.
    prefix: Bytes,
}

impl Stream {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        let (read, written, abort) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self { socket: Arc::new(Socket { tcp, read, written, abort }), prefix: Bytes::new() }
    }

    /// Connects; `TCP_NODELAY` is set, since whole messages are written at once.
    pub(crate) async fn connect(address: SocketAddr) -> io::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        Ok(Self::new(tcp))
    }

    pub(crate) fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// Gives bytes back that were read already.
    pub(crate) fn rewind(&mut self, prefix: Bytes) {
        self.prefix = prefix;
    }

    fn poll_receive(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.tcp.poll_read_ready(cx))?;
            let room = buf.remaining();
            let mut received = 0;
            let result = self.socket.tcp.try_io(Interest::READABLE, || {
                #[expect(unsafe_code, reason = "receiving into memory that need not be cleared before")]
                // SAFETY: nothing is read from or de-initialised in the slice; only received bytes are declared below.
                let unfilled = unsafe { buf.unfilled_mut() };
                let (filled, _) = rustix::net::recv(&self.socket.tcp, unfilled, RecvFlags::empty())?.0;
                received = filled.len();
                // A short read emptied the socket. Saying so spares the next read that would only find nothing;
                // tokio does the same for epoll in `PollEvented::poll_read`.
                if received > 0 && received < room { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match result {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && received == 0 => {}
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
                _ => {
                    #[expect(unsafe_code, reason = "receiving into memory that need not be cleared before")]
                    // SAFETY: the kernel wrote `received` bytes from the start of the unfilled part.
                    unsafe {
                        buf.assume_init(received);
                    }
                    buf.advance(received);
                    return Poll::Ready(Ok(received));
                }
            }
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.socket.abort.load(Ordering::Relaxed) {
            // If it fails the connection ends with FIN instead of RST.
            let _ = sockopt::set_socket_linger(&self.socket.tcp, Some(std::time::Duration::ZERO));
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let count = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..count]);
            self.prefix.advance(count);
            self.socket.read.fetch_add(count as u64, Ordering::Relaxed);
            return Poll::Ready(Ok(()));
        }
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let count = ready!(self.poll_receive(cx, buf))?;
        self.socket.read.fetch_add(count as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.tcp.poll_write_ready(cx))?;
            match self.socket.tcp.try_write_vectored(bufs) {
                Ok(count) => {
                    self.socket.written.fetch_add(count as u64, Ordering::Relaxed);
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // An aborted connection must not say goodbye first.
        if self.socket.abort.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        match rustix::net::shutdown(&self.socket.tcp, Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}
