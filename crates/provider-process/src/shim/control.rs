//! The control socket: whoever connects gets the state, then events, and may ask.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, recv,
        send, socket_with,
    },
};

use crate::{
    folder::CONTROL,
    sys,
    wire::{FromShim, ToShim, decode, encode},
};

/// A reader that leaves more than this lying is cut off; it gets the state when it comes back.
const MAX_OUTGOING: usize = 1 << 20;
/// Connections at a time: a server, and a few who look.
const MAX_CONNECTIONS: usize = 16;

/// All connections and the socket that they come through.
#[derive(Debug, Default)]
pub(crate) struct Control {
    listener: Option<OwnedFd>,
    connections: Vec<Connection>,
    next: u64,
}

#[derive(Debug)]
struct Connection {
    id: u64,
    fd: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    broken: bool,
}

impl Control {
    /// Listens in the current directory: a relative name has no problem with long paths.
    pub(crate) fn listen(&mut self) -> io::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(CONTROL)?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                // Left by a killed shim; we hold the lock.
                std::fs::remove_file(CONTROL)?;
                bind(&socket, &address)?;
            }
            bound => bound?,
        }
        listen(&socket, 16)?;
        self.listener = Some(socket);
        Ok(())
    }

    /// Adds a connection that was inherited. It gets no state by itself.
    pub(crate) fn add(&mut self, fd: OwnedFd) -> u64 {
        let id = self.next;
        self.next += 1;
        self.connections.push(Connection { id, fd, incoming: Vec::new(), outgoing: Vec::new(), broken: false });
        id
    }

    pub(crate) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(|fd| fd.as_fd())
    }

    /// Descriptors to wait for, and whether they have something to write.
    pub(crate) fn connections(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, bool)> {
        self.connections.iter().map(|c| (c.id, c.fd.as_fd(), !c.outgoing.is_empty()))
    }

    /// Takes one new connection of our own user.
    pub(crate) fn accept(&mut self) -> Option<u64> {
        let listener = self.listener.as_ref()?;
        let fd = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()?;
        let uid = sys::peer_uid(fd.as_fd()).ok()?;
        if (uid != 0 && uid != sys::effective_uid()) || self.connections.len() >= MAX_CONNECTIONS {
            return None;
        }
        Some(self.add(fd))
    }

    /// Reads what a connection asks. Broken ones are removed by [`Self::sweep`].
    pub(crate) fn read(&mut self, id: u64) -> Vec<ToShim> {
        let Some(connection) = self.connections.iter_mut().find(|c| c.id == id) else { return Vec::new() };
        let mut buffer = [0; 4096];
        loop {
            match recv(&connection.fd, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    connection.broken = true;
                    break;
                }
                Ok((_, read)) => connection.incoming.extend_from_slice(&buffer[..read]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    connection.broken = true;
                    break;
                }
            }
            if connection.incoming.len() > crate::wire::MAX_LINE {
                break;
            }
        }
        let mut requests = Vec::new();
        loop {
            match decode(&mut connection.incoming) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => return requests,
                Err(_) => {
                    connection.broken = true;
                    return requests;
                }
            }
        }
    }

    /// Says something to one connection.
    pub(crate) fn send(&mut self, id: u64, message: &FromShim) {
        if let Some(connection) = self.connections.iter_mut().find(|c| c.id == id) {
            encode(message, &mut connection.outgoing);
            connection.flush();
        }
    }

    /// Says something to all.
    pub(crate) fn broadcast(&mut self, message: &FromShim) {
        for connection in &mut self.connections {
            encode(message, &mut connection.outgoing);
            connection.flush();
        }
    }

    /// Writes what can be written now.
    pub(crate) fn flush(&mut self, id: u64) {
        if let Some(connection) = self.connections.iter_mut().find(|c| c.id == id) {
            connection.flush();
        }
    }

    /// Whether something is still to be written.
    pub(crate) fn is_flushed(&self) -> bool {
        self.connections.iter().all(|connection| connection.outgoing.is_empty())
    }

    /// Removes broken connections and says which.
    pub(crate) fn sweep(&mut self) -> Vec<u64> {
        let broken = self.connections.iter().filter(|c| c.broken).map(|c| c.id).collect();
        self.connections.retain(|connection| !connection.broken);
        broken
    }
}

impl Connection {
    fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match send(&self.fd, &self.outgoing, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.outgoing.drain(..sent);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.broken = true;
                    self.outgoing.clear();
                }
            }
        }
        if self.outgoing.len() > MAX_OUTGOING {
            self.broken = true;
            self.outgoing.clear();
        }
    }
}
