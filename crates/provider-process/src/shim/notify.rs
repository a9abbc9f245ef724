//! The receiving end of `sd_notify(3)`.
//!
//! The socket has an abstract name with the launch's random number in it: it needs no path, so that neither deep
//! folders nor the permissions of a program under another user stand in its way. Messages are believed only from
//! processes of the tree. `MAINPID=` is ignored (the main process is the one that was started), and descriptors that
//! come along (`FDSTORE=1`, `BARRIER=1`) are closed, which is the answer that a barrier waits for.
//!
//! Protocol: <https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html>.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

use super::tree::Tree;
use crate::sys;

/// Longest message that is read; systemd's own limit is a page as well.
const MAX_MESSAGE: usize = 4096;

/// Something that a program says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    Ready,
    Reloading,
    Stopping,
    Status(String),
    /// The program is alive.
    Watchdog,
    /// The program found itself to be broken.
    WatchdogTrigger,
    /// New watchdog interval, in microseconds.
    WatchdogInterval(u64),
    /// The next sign of life may take so many microseconds.
    Extend(u64),
}

/// The socket of one launch.
#[derive(Debug)]
pub(crate) struct NotifySocket(OwnedFd);

impl NotifySocket {
    /// Its name, as it goes into `NOTIFY_SOCKET`.
    pub(crate) fn name(nonce: &str) -> String {
        format!("@orchestra/{nonce}")
    }

    pub(crate) fn open(nonce: &str) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        bind(&socket, &SocketAddrUnix::new_abstract_name(&Self::name(nonce).as_bytes()[1..])?)?;
        sys::pass_credentials(socket.as_fd())?;
        Ok(Self(socket))
    }

    /// Reads one message. `None` when there is none now; messages of strangers are empty.
    pub(crate) fn receive(&self, tree: &Tree) -> Option<Vec<Notice>> {
        let mut buffer = [0; MAX_MESSAGE];
        let datagram = sys::receive(self.0.as_fd(), &mut buffer).ok()?;
        let known =
            datagram.pid.is_some_and(|pid| tree.contains(pid, datagram.pidfd.as_ref().map(std::os::fd::AsFd::as_fd)));
        Some(if known { parse(&buffer[..datagram.len]) } else { Vec::new() })
    }
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn parse(message: &[u8]) -> Vec<Notice> {
    String::from_utf8_lossy(message)
        .lines()
        .filter_map(|line| {
            let (key, value) = line.split_once('=')?;
            Some(match (key, value) {
                ("READY", "1") => Notice::Ready,
                ("RELOADING", "1") => Notice::Reloading,
                ("STOPPING", "1") => Notice::Stopping,
                ("STATUS", text) => Notice::Status(text.to_owned()),
                ("WATCHDOG", "1") => Notice::Watchdog,
                ("WATCHDOG", "trigger") => Notice::WatchdogTrigger,
                ("WATCHDOG_USEC", micros) => Notice::WatchdogInterval(micros.parse().ok()?),
                ("EXTEND_TIMEOUT_USEC", micros) => Notice::Extend(micros.parse().ok()?),
                _ => return None,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_parsed_line_by_line() {
        assert_eq!(
            parse(b"MAINPID=7\nREADY=1\nSTATUS=half = 50 %\nnonsense\nEXTEND_TIMEOUT_USEC=5\nWATCHDOG=1\n"),
            [Notice::Ready, Notice::Status("half = 50 %".into()), Notice::Extend(5), Notice::Watchdog]
        );
        assert_eq!(parse(b"READY=0\nWATCHDOG_USEC=x"), []);
    }
}
