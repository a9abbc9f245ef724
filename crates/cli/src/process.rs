//! The process behind a socket, held so that its end can be waited for.
//!
//! A server takes its socket away before it has finished, and its lock ends with its process: only the end of the
//! process says that the state directory is free.

use std::{io, os::fd::OwnedFd, path::Path};

use orchestra_api::ShortPath;
use rustix::process::{Pid, PidfdFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
};

/// A process of this machine. Its descriptor never comes to mean another process, as a number could.
#[derive(Debug)]
pub(crate) struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// The process that listens on a socket and calls itself `pid`. `None` if it cannot be seen from here: the socket of
    /// a server in another container has another number for it.
    pub(crate) async fn listening(socket: &Path, pid: u32) -> io::Result<Option<Self>> {
        let stream = UnixStream::connect(ShortPath::of(socket)?).await?;
        let (Some(listener), Ok(claimed)) = (stream.peer_cred()?.pid(), i32::try_from(pid)) else { return Ok(None) };
        let Some(pid) = Pid::from_raw(claimed).filter(|_| listener == claimed) else { return Ok(None) };
        match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            // pidfd_open(2): readable once the process has terminated, also if nobody has collected it.
            Ok(descriptor) => {
                #[expect(unsafe_code, reason = "a descriptor is registered with the reactor")]
                // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, which `AsyncFd` does after
                // it has deregistered it.
                let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
                Ok(Some(Self(registered?)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Completes once it has ended. Cancel-safe.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }
}
