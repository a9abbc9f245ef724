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
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, Bytes};
use rustix::net::{RecvFlags, SendFlags, Shutdown, sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

mod interjection;

use interjection::Interjection;

/// Most bytes that are gathered before they are sent.
const GATHERED: usize = 64 << 10;

/// The socket and what went through it.
#[derive(Debug)]
pub(crate) struct Socket {
    tcp: TcpStream,
    read: AtomicU64,
    written: AtomicU64,
    abort: AtomicBool,
    /// Nothing was written since the last flush.
    flushed: AtomicBool,
    /// The peer did not take what was last written.
    blocked: AtomicBool,
    /// What was written and waits for [`Self::poll_push`]; set once gathering began.
    gathered: OnceLock<Mutex<Vec<u8>>>,
    /// HTTP/1.1: what is to be said to a client between two responses.
    pub(crate) interjection: Interjection,
}

impl Socket {
    /// Bytes that arrived.
    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes are read that had arrived before.
    pub(crate) fn reread(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that the kernel took.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether the peer did not take what was last written; not known where writes are gathered.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed)
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

    /// Whether the runtime has heard that something arrived, an end among it. Costs no system call, and may be late.
    pub(crate) fn has_news(&self) -> bool {
        self.tcp.poll_read_ready(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    /// Ready when something arrives, an end among it.
    pub(crate) fn poll_news(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.tcp.poll_read_ready(cx).map(drop)
    }

    /// From now on, what is written is gathered until [`Self::poll_push`] is called, which whoever polls the connection
    /// must do after each poll.
    ///
    /// h2 writes and flushes each frame of data by itself, so that eight small responses on one connection cost eight
    /// system calls where one would do.
    pub(crate) fn gather(&self) {
        self.gathered.get_or_init(Mutex::default);
    }

    /// Sends what was gathered. Until it is ready, the task is woken when more can be sent.
    pub(crate) fn poll_push(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.gathered.get() {
            Some(gathered) => self.push(cx, &mut gathered.lock().unwrap_or_else(PoisonError::into_inner)),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Keeps no memory for what may be gathered: most connections are idle most of the time.
    pub(crate) fn rest(&self) {
        if let Some(gathered) = self.gathered.get() {
            let mut gathered = gathered.lock().unwrap_or_else(PoisonError::into_inner);
            if gathered.is_empty() {
                *gathered = Vec::new();
            }
        }
    }

    fn push(&self, cx: &mut Context<'_>, gathered: &mut Vec<u8>) -> Poll<io::Result<()>> {
        let mut sent = 0;
        let result = loop {
            if sent == gathered.len() {
                gathered.clear();
                return Poll::Ready(Ok(()));
            }
            match self.poll_send(cx, &[io::IoSlice::new(&gathered[sent..])]) {
                Poll::Ready(Ok(count)) => sent += count,
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        gathered.drain(..sent);
        result
    }

    /// Gives bytes to the kernel.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.tcp.poll_write_ready(cx))?;
            let mut parts = bufs.iter().filter(|buf| !buf.is_empty());
            let written = match (parts.next(), parts.next()) {
                // What is in one piece, as most is, takes a shorter way through the kernel.
                (Some(buf), None) => self.tcp.try_io(Interest::WRITABLE, || {
                    rustix::net::send(&self.tcp, buf, SendFlags::NOSIGNAL).map_err(io::Error::from)
                }),
                _ => self.tcp.try_write_vectored(bufs),
            };
            match written {
                Ok(count) => {
                    self.written.fetch_add(count as u64, Ordering::Relaxed);
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Ends both directions, for whoever else has the socket.
    pub(crate) fn shut(&self) {
        // Fails for a connection that is gone already.
        let _ = rustix::net::shutdown(&self.tcp, Shutdown::Both);
    }

    /// Whether [`Self::abort_on_close`] was asked for.
    pub(crate) fn aborts(&self) -> bool {
        self.abort.load(Ordering::Relaxed)
    }

    /// Whether whoever wrote to the connection has nothing left to write.
    pub(crate) fn is_flushed(&self) -> bool {
        self.flushed.load(Ordering::Relaxed)
    }

    /// Says so: before something is written, and after all of it was.
    pub(crate) fn flushes(&self, done: bool) {
        self.flushed.store(done, Ordering::Relaxed);
    }

    /// Ends what the peer may send: whoever reads finds the end.
    pub(crate) fn end(&self) {
        // Fails only for a connection that is gone already.
        let _ = rustix::net::shutdown(&self.tcp, Shutdown::Read);
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
        let (flushed, blocked) = (AtomicBool::new(true), AtomicBool::new(false));
        let (gathered, interjection) = (OnceLock::new(), Interjection::default());
        let socket = Socket { tcp, read, written, abort, flushed, blocked, gathered, interjection };
        Self { socket: Arc::new(socket), prefix: Bytes::new() }
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
            self.socket.reread(count);
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
        let Some(gathered) = self.socket.gathered.get() else {
            let sent = self.socket.poll_send(cx, bufs);
            self.socket.blocked.store(sent.is_pending(), Ordering::Relaxed);
            return sent;
        };
        let mut gathered = gathered.lock().unwrap_or_else(PoisonError::into_inner);
        if gathered.len() >= GATHERED {
            // A client that takes nothing holds up whoever writes to it.
            ready!(self.socket.push(cx, &mut gathered))?;
        }
        if gathered.capacity() == 0 {
            gathered.reserve(GATHERED / 8);
        }
        let mut count = 0;
        for buf in bufs {
            let part = &buf[..buf.len().min(GATHERED - gathered.len())];
            gathered.extend_from_slice(part);
            count += part.len();
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // An aborted connection must not say goodbye first.
        if self.socket.abort.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        ready!(self.socket.poll_push(cx))?;
        match rustix::net::shutdown(&self.socket.tcp, Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    async fn pair() -> (Stream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = Stream::connect(listener.local_addr().unwrap()).await.unwrap();
        (ours, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn what_is_gathered_is_sent_by_a_push_and_in_one_piece() {
        let (mut ours, mut theirs) = pair().await;
        ours.socket().gather();
        for part in [&b"one "[..], b"two ", b"three"] {
            assert_eq!(poll_fn(|cx| Pin::new(&mut ours).poll_write(cx, part)).await.unwrap(), part.len());
            poll_fn(|cx| Pin::new(&mut ours).poll_flush(cx)).await.unwrap();
        }
        assert_eq!(ours.socket().written(), 0);
        poll_fn(|cx| ours.socket().poll_push(cx)).await.unwrap();
        let mut received = [0; 64];
        assert_eq!(theirs.read(&mut received).await.unwrap(), 13);
        assert_eq!(&received[..13], b"one two three");
        ours.socket().rest();
        assert_eq!(ours.socket().gathered.get().unwrap().lock().unwrap().capacity(), 0);
        // The end sends what is left.
        poll_fn(|cx| Pin::new(&mut ours).poll_write(cx, b"end")).await.unwrap();
        poll_fn(|cx| Pin::new(&mut ours).poll_shutdown(cx)).await.unwrap();
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"end");
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_holds_up_the_writer_and_gets_everything_in_order() {
        let (mut ours, mut theirs) = pair().await;
        ours.socket().gather();
        let sent: Vec<u8> = (0..32_u32 << 20).map(|n| (n >> 7).to_le_bytes()[0] ^ n.to_le_bytes()[0]).collect();
        let mut position = 0;
        // As a connection is driven: written to and pushed in each poll. Ends when it is held up, or all is written.
        let mut drive = |ours: &mut Stream, cx: &mut Context<'_>| {
            while position < sent.len() {
                let written = Pin::new(&mut *ours).poll_write(cx, &sent[position..(position + 10_000).min(sent.len())]);
                assert!(ours.socket().gathered.get().unwrap().lock().unwrap().len() <= GATHERED);
                match written {
                    Poll::Ready(count) => position += count.unwrap(),
                    Poll::Pending => break,
                }
            }
            let pushed = ours.socket().poll_push(cx).map(Result::unwrap);
            if position < sent.len() { Poll::Pending } else { pushed }
        };
        let held_up = poll_fn(|cx| Poll::Ready(drive(&mut ours, cx).is_pending())).await;
        assert!(held_up, "32 MiB are more than the kernel keeps for a peer that does not read");
        let mut received = Vec::new();
        let write = async {
            poll_fn(|cx| drive(&mut ours, cx)).await;
            poll_fn(|cx| Pin::new(&mut ours).poll_shutdown(cx)).await.unwrap();
        };
        let ((), read) = tokio::join!(write, theirs.read_to_end(&mut received));
        read.unwrap();
        assert!(received == sent);
    }
}
