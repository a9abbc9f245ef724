//! The control protocol between the server and the proxy process: what is said, and how it is framed.
//!
//! A frame is a big-endian `u32` length and that many bytes of JSON, on a Unix stream socket; listening sockets travel
//! beside the bytes of the frame that speaks of them (`SCM_RIGHTS`). The kernel keeps descriptors in the order of the
//! bytes they were attached to, so a frame that says how many it brings finds exactly its own in the queue.
//!
//! Frames of the server carry a number that the answer repeats; frames that the proxy sends by itself carry 0.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use orchestra_model::route::{ApplyError, EndpointKey, ProxyEvent, RouteId, RouteTable, Standing};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{io::Interest, net::UnixStream};

/// Version of this protocol. Both sides refuse another one.
pub(crate) const PROTOCOL: u32 = 1;

/// Longest frame: a table of 100,000 endpoints is about 30 MB.
const MAX_FRAME: usize = 64 << 20;

/// Descriptors per message; the kernel takes at most 253 (`SCM_MAX_FD`).
const FDS_PER_MESSAGE: usize = 200;

/// Name of a listening socket between the two processes. Never used twice by one server; a new server counts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct SocketId(pub(crate) u64);

/// What a listening socket is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SocketUse {
    /// Metrics and health of the proxy itself.
    Admin,
    /// Traffic of a route.
    Route(RouteId),
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SocketInfo {
    pub(crate) id: SocketId,
    /// The address that was asked for; its port may be 0.
    pub(crate) requested: SocketAddr,
    /// The address it has.
    pub(crate) address: SocketAddr,
    pub(crate) purpose: SocketUse,
}

/// Everything that a proxy needs to serve.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    /// `None` until the engine applied its first table.
    pub(crate) table: Option<RouteTable>,
    /// All listening sockets. What is not in here any more is closed.
    pub(crate) sockets: Vec<SocketInfo>,
    /// Ports that the machine chose, also of routes that are gone, so that they get the same again.
    pub(crate) chosen: Vec<(RouteId, SocketAddr)>,
}

/// What the server says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// The first frame of a connection.
    Hello { protocol: u32 },
    /// Puts a snapshot into force; sockets named in `attached` come along, in this order.
    Apply { snapshot: Snapshot, attached: Vec<SocketId> },
    /// To a proxy that is leaving: answered once nothing is in flight to the endpoint.
    AwaitDrained { endpoint: EndpointKey },
    /// Ends what is in flight to an endpoint.
    Cut { endpoint: EndpointKey },
    /// Asks for the metrics.
    Metrics,
    /// Asks for what is asked often: who waits, and who is left out. Only of a proxy that said that it knows this.
    Standing,
    /// Asks the proxy to leave: stop accepting, finish, exit.
    Leave,
}

/// What the proxy says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Response {
    /// Answer to `Hello`; brings all sockets of the snapshot, in its order.
    Welcome {
        protocol: u32,
        pid: u32,
        snapshot: Snapshot,
        /// Whether it answers `Standing`; proxies of earlier versions say it with their metrics alone.
        #[serde(default)]
        knows_standing: bool,
    },
    /// Answer to `Hello` while another server steers this proxy, or in another protocol.
    Busy { protocol: u32 },
    /// Done.
    Done,
    /// Answer to `Apply`: nothing was changed.
    Refused(ApplyError),
    /// Answer to `Metrics`.
    Metrics {
        text: String,
        /// Not whole, or missing, from proxies of earlier versions.
        #[serde(default, flatten)]
        standing: Standing,
    },
    /// Answer to `Standing`.
    Standing(Standing),
    /// The request could not be understood or done.
    Failed { message: String },
    /// By itself: a report about an endpoint, true for this version of the table.
    Event { version: u64, event: ProxyEvent },
    /// By itself: it was told to end, takes no new connections, and finishes what it has.
    Leaving,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    id: u64,
    #[serde(default)]
    fds: usize,
    body: T,
}

/// A frame that arrived.
#[derive(Debug)]
pub(crate) struct Received<T> {
    pub(crate) id: u64,
    pub(crate) body: T,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Receives frames.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: Arc<UnixStream>,
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

/// Sends frames.
#[derive(Debug)]
pub(crate) struct Writer {
    stream: Arc<UnixStream>,
}

/// Splits a control connection.
pub(crate) fn split(stream: UnixStream) -> (Reader, Writer) {
    let stream = Arc::new(stream);
    (Reader { stream: Arc::clone(&stream), bytes: Vec::new(), fds: VecDeque::new() }, Writer { stream })
}

fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

impl Reader {
    /// The next frame; `None` once the peer closed the connection between two frames.
    ///
    /// Cancel safe: bytes and descriptors that arrived are kept in `self`.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<Received<T>>> {
        loop {
            if let Some(length) = self.bytes.first_chunk::<4>().map(|b| u32::from_be_bytes(*b) as usize) {
                if length > MAX_FRAME {
                    return Err(invalid(format!("a control frame of {length} bytes")));
                }
                if self.bytes.len() >= 4 + length {
                    let frame: Envelope<T> = serde_json::from_slice(&self.bytes[4..4 + length])?;
                    self.bytes.drain(..4 + length);
                    if self.bytes.is_empty() && self.bytes.capacity() > 1 << 16 {
                        self.bytes = Vec::new();
                    }
                    if frame.fds > self.fds.len() {
                        return Err(invalid("a control frame without the descriptors that it speaks of"));
                    }
                    let fds = self.fds.drain(..frame.fds).collect();
                    return Ok(Some(Received { id: frame.id, body: frame.body, fds }));
                }
            }
            let mut part = vec![0; 16 << 10];
            let (count, fds) =
                self.stream.async_io(Interest::READABLE, || receive(self.stream.as_fd(), &mut part)).await?;
            self.fds.extend(fds);
            if count == 0 {
                return if self.bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the control connection ended within a frame"))
                };
            }
            self.bytes.extend_from_slice(&part[..count]);
        }
    }
}

fn receive(socket: BorrowedFd<'_>, part: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(part)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((message.bytes, fds))
}

impl Writer {
    /// Sends a frame with descriptors beside it. Not cancel safe: a frame that was begun must be finished.
    pub(crate) async fn send<T: Serialize>(&self, id: u64, body: T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = vec![0; 4];
        serde_json::to_writer(&mut bytes, &Envelope { id, fds: fds.len(), body })?;
        let length = bytes.len() - 4;
        if length > MAX_FRAME {
            return Err(invalid(format!("a control frame of {length} bytes")));
        }
        bytes[..4].copy_from_slice(&u32::try_from(length).expect("checked against MAX_FRAME").to_be_bytes());
        let mut rest = &bytes[..];
        // Every frame is longer than its number of descriptors, so each group finds a byte to travel with.
        let mut groups = fds.chunks(FDS_PER_MESSAGE).peekable();
        while !rest.is_empty() {
            let group = groups.peek().copied().unwrap_or_default();
            let part = if groups.len() > 1 { &rest[..1] } else { rest };
            let sent = self.stream.async_io(Interest::WRITABLE, || transmit(self.stream.as_fd(), part, group)).await?;
            // The kernel takes the descriptors with the first byte, also when it does not take all bytes.
            groups.next();
            rest = &rest[sent..];
        }
        Ok(())
    }
}

fn transmit(socket: BorrowedFd<'_>, part: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "the space holds FDS_PER_MESSAGE descriptors");
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(part)], &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_keep_their_descriptors_in_order() {
        let (left, right) = UnixStream::pair().unwrap();
        let ((_, writer), (mut reader, _)) = (split(left), split(right));
        // More than one message's worth, then none, then one: the queue must stay in step.
        let files: Vec<std::fs::File> = (0..450).map(|_| tempfile::tempfile().unwrap()).collect();
        for (index, file) in files.iter().enumerate() {
            file.set_len(index as u64).unwrap();
        }
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let send = async {
            writer
                .send(1, Response::Metrics { text: "x".repeat(300_000), standing: Standing::default() }, &borrowed)
                .await
                .unwrap();
            writer.send(2, Response::Done, &[]).await.unwrap();
            writer.send(3, Response::Leaving, &borrowed[7..8]).await.unwrap();
            drop(writer);
        };
        let receive = async {
            let first = reader.next::<Response>().await.unwrap().unwrap();
            assert!(matches!(first.body, Response::Metrics { text, .. } if text.len() == 300_000));
            let sizes: Vec<u64> =
                first.fds.into_iter().map(|fd| std::fs::File::from(fd).metadata().unwrap().len()).collect();
            assert_eq!(sizes, (0..450).collect::<Vec<u64>>());
            let second = reader.next::<Response>().await.unwrap().unwrap();
            assert_eq!((second.id, second.fds.len()), (2, 0));
            let third = reader.next::<Response>().await.unwrap().unwrap();
            assert_eq!(std::fs::File::from(third.fds.into_iter().next().unwrap()).metadata().unwrap().len(), 7);
        };
        tokio::join!(send, receive);
    }

    #[tokio::test]
    async fn a_torn_frame_is_an_error_and_a_clean_end_is_not() {
        use tokio::io::AsyncWriteExt as _;
        let (mut left, right) = UnixStream::pair().unwrap();
        let (mut reader, _) = split(right);
        left.write_all(&[0, 0, 0, 9, b'{']).await.unwrap();
        drop(left);
        assert_eq!(reader.next::<Response>().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let (left, right) = UnixStream::pair().unwrap();
        drop(left);
        assert!(split(right).0.next::<Response>().await.unwrap().is_none());
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&[255; 8]).await.unwrap();
        assert_eq!(split(right).0.next::<Response>().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
