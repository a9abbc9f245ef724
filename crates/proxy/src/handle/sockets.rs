//! The listening sockets that the server holds, and the choice of sockets for a new table: all or nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
};

use orchestra_model::route::{ApplyError, RouteId, RouteTable};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};

use super::holder;
use crate::wire::{SocketId, SocketInfo, SocketUse};

/// Connections that the kernel holds while nobody accepts (it cuts this to `net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// A listening socket that the server holds.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) info: SocketInfo,
    pub(super) fd: OwnedFd,
}

/// The sockets in force and the ports that the machine chose.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub(super) held: BTreeMap<SocketId, Socket>,
    chosen: BTreeMap<RouteId, SocketAddr>,
    next: u64,
}

/// Sockets for a table that is not in force yet. Dropping it closes the new ones and changes nothing.
#[derive(Debug, Default)]
pub(super) struct Proposal {
    /// All that the table needs, with the route that each now serves.
    pub(super) infos: Vec<SocketInfo>,
    /// Those that did not exist before.
    fresh: BTreeMap<SocketId, OwnedFd>,
}

impl Proposal {
    /// The new sockets: ids and duplicates for the proxy, in the same order.
    pub(super) fn attachments(&self) -> io::Result<(Vec<SocketId>, Vec<OwnedFd>)> {
        let fds: io::Result<Vec<OwnedFd>> = self.fresh.values().map(OwnedFd::try_clone).collect();
        Ok((self.fresh.keys().copied().collect(), fds?))
    }
}

impl Sockets {
    /// What a proxy gave back.
    pub(super) fn adopt(infos: Vec<SocketInfo>, fds: Vec<OwnedFd>, chosen: Vec<(RouteId, SocketAddr)>) -> Self {
        let next = infos.iter().map(|info| info.id.0 + 1).max().unwrap_or(0);
        // The choices of the last snapshot itself are only in its sockets.
        let route = |info: &SocketInfo| match &info.purpose {
            SocketUse::Route(id) if info.requested.port() == 0 => Some((id.clone(), info.address)),
            _ => None,
        };
        let latest: Vec<_> = infos.iter().filter_map(route).collect();
        let held = infos.into_iter().zip(fds).map(|(info, fd)| (info.id, Socket { info, fd })).collect();
        Self { held, chosen: chosen.into_iter().chain(latest).collect(), next }
    }

    /// Ports that the machine chose.
    pub(super) fn chosen(&self) -> Vec<(RouteId, SocketAddr)> {
        self.chosen.iter().map(|(route, address)| (route.clone(), *address)).collect()
    }

    /// Binds the admin socket if it is not there yet.
    pub(super) fn ensure_admin(&mut self, address: Option<SocketAddr>) -> Result<Option<SocketAddr>, String> {
        let Some(wanted) = address else { return Ok(None) };
        // A living proxy keeps its admin address, unless another one is asked for by number.
        let existing = self.held.values().find(|s| s.info.purpose == SocketUse::Admin);
        if let Some(socket) = existing
            && (wanted.port() == 0 || wanted == socket.info.requested || wanted == socket.info.address)
        {
            return Ok(Some(socket.info.address));
        }
        let (fd, address) = bind(wanted).map_err(|error| explain(wanted, &error))?;
        self.held.retain(|_, s| s.info.purpose != SocketUse::Admin);
        let id = self.fresh_id();
        let info = SocketInfo { id, requested: wanted, address, purpose: SocketUse::Admin };
        self.held.insert(id, Socket { info, fd });
        Ok(Some(address))
    }

    fn fresh_id(&mut self) -> SocketId {
        self.next += 1;
        SocketId(self.next - 1)
    }

    /// Finds or binds a socket for every route. Nothing that is in force changes.
    pub(super) fn propose(&mut self, table: &RouteTable) -> Result<Proposal, ApplyError> {
        let mut failures = Vec::new();
        let mut proposal = Proposal::default();
        let mut used = BTreeSet::new();
        let mut asked = BTreeMap::new();
        let mut missing = Vec::new();
        for socket in self.held.values().filter(|s| s.info.purpose == SocketUse::Admin) {
            used.insert(socket.info.id);
            proposal.infos.push(socket.info.clone());
        }
        for route in &table.routes {
            if route.listen.port() != 0
                && let Some(other) = asked.insert(route.listen, &route.id)
            {
                failures.push((route.listen, format!("asked for by both {other} and {}", route.id)));
                continue;
            }
            let purpose = SocketUse::Route(route.id.clone());
            // A route keeps its socket; a fixed address keeps its socket whatever route it serves, so that a renamed
            // route or two that swap addresses lose no connection.
            let kept = |s: &&Socket| s.info.purpose == purpose && s.info.requested == route.listen;
            let taken = |s: &&Socket| {
                matches!(s.info.purpose, SocketUse::Route(_))
                    && (s.info.requested == route.listen || s.info.address == route.listen)
                    && route.listen.port() != 0
            };
            let found = self.held.values().find(kept).or_else(|| self.held.values().find(taken));
            match found.filter(|s| used.insert(s.info.id)) {
                Some(socket) => {
                    proposal.infos.push(SocketInfo { requested: route.listen, purpose, ..socket.info.clone() });
                }
                None => missing.push(route),
            }
        }
        for route in missing {
            let purpose = SocketUse::Route(route.id.clone());
            let remembered = self.chosen.get(&route.id).filter(|a| a.ip() == route.listen.ip()).copied();
            let bound = match (route.listen.port(), remembered) {
                (0, Some(address)) => bind(address).or_else(|_| bind(route.listen)),
                _ => bind(route.listen).or_else(|error| self.bind_beside(route.listen, &used, error)),
            };
            match bound {
                Ok((fd, address)) => {
                    let id = self.fresh_id();
                    proposal.fresh.insert(id, fd);
                    proposal.infos.push(SocketInfo { id, requested: route.listen, address, purpose });
                }
                Err(error) => failures.push((route.listen, explain(route.listen, &error))),
            }
        }
        if failures.is_empty() { Ok(proposal) } else { Err(ApplyError::Bind { addresses: failures }) }
    }

    /// Binds an address that only overlaps with sockets which the same table gives up, as when a route moves from
    /// `127.0.0.1:80` to `0.0.0.0:80`. Both may be bound at once while `SO_REUSEPORT` is set on all of them, which it
    /// is only here: otherwise a second program of the same user could share an address unnoticed.
    fn bind_beside(
        &self,
        address: SocketAddr,
        used: &BTreeSet<SocketId>,
        error: io::Error,
    ) -> io::Result<(OwnedFd, SocketAddr)> {
        let same_port = || self.held.values().filter(|s| s.info.address.port() == address.port());
        if error.kind() != io::ErrorKind::AddrInUse
            || same_port().next().is_none()
            || same_port().any(|s| used.contains(&s.info.id))
        {
            return Err(error);
        }
        for socket in same_port() {
            sockopt::set_socket_reuseport(&socket.fd, true)?;
        }
        let bound = bind_with(address, true);
        for socket in same_port() {
            sockopt::set_socket_reuseport(&socket.fd, false)?;
        }
        bound
    }

    /// Puts a proposal into force and closes what it does not name.
    pub(super) fn accept(&mut self, mut proposal: Proposal) {
        let mut before = std::mem::take(&mut self.held);
        for info in proposal.infos {
            let fd = before.remove(&info.id).map(|s| s.fd).or_else(|| proposal.fresh.remove(&info.id));
            let fd = fd.expect("a proposal names sockets that are held or fresh");
            if let (SocketUse::Route(route), 0) = (&info.purpose, info.requested.port()) {
                self.chosen.insert(route.clone(), info.address);
            }
            self.held.insert(info.id, Socket { info, fd });
        }
        for socket in before.into_values() {
            // Closing alone would not do while a process that is just being started still has a duplicate (between
            // fork and exec): the address could not be bound anew for that moment.
            let _ = rustix::net::shutdown(&socket.fd, Shutdown::Both);
        }
    }

    /// Duplicates of all sockets, with their descriptions, in the same order.
    pub(super) fn duplicates(&self) -> io::Result<(Vec<SocketInfo>, Vec<OwnedFd>)> {
        let fds: io::Result<Vec<OwnedFd>> = self.held.values().map(|s| s.fd.try_clone()).collect();
        Ok((self.held.values().map(|s| s.info.clone()).collect(), fds?))
    }

    /// Where each route listens.
    pub(super) fn addresses(&self) -> BTreeMap<String, SocketAddr> {
        let route = |s: &Socket| match &s.info.purpose {
            SocketUse::Route(id) => Some((id.to_string(), s.info.address)),
            SocketUse::Admin => None,
        };
        self.held.values().filter_map(route).collect()
    }
}

fn explain(address: SocketAddr, error: &io::Error) -> String {
    match (error.kind(), holder::of(address)) {
        (io::ErrorKind::AddrInUse, Some(holder)) => format!("in use by {holder}"),
        (io::ErrorKind::AddrInUse, None) => "in use by another process".to_owned(),
        (io::ErrorKind::AddrNotAvailable, _) => "no such address on this machine".to_owned(),
        (io::ErrorKind::PermissionDenied, _) => {
            "not permitted: ports below 1024 need root or CAP_NET_BIND_SERVICE".to_owned()
        }
        _ => error.to_string(),
    }
}

fn bind(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    bind_with(address, false)
}

/// A listening socket: close-on-exec, non-blocking, `SO_REUSEADDR`; `[::]` takes IPv4 as well.
fn bind_with(address: SocketAddr, beside: bool) -> io::Result<(OwnedFd, SocketAddr)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, false)?;
    }
    if beside {
        sockopt::set_socket_reuseport(&fd, true)?;
    }
    rustix::net::bind(&fd, &address)?;
    rustix::net::listen(&fd, BACKLOG)?;
    if beside {
        sockopt::set_socket_reuseport(&fd, false)?;
    }
    let actual = rustix::net::getsockname(fd.as_fd())?;
    Ok((fd, SocketAddr::try_from(actual)?))
}
