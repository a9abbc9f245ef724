//! Whether a chosen port is free: a last look before a launch, and a promise to launches that come at the same time.
//!
//! The machine of an environment chooses ports at random in a range that the kernel does not use for outgoing
//! connections. Two environments may choose the same one, and a program of somebody else may listen there; both are
//! noticed here, and the machine chooses again. What remains is the instant between this look and the program's own
//! `bind`: a program that loses that race exits, and its restart gets other ports.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    sync::{Mutex, PoisonError},
};

use orchestra_model::launch::LaunchKey;

/// Ports promised to launches.
#[derive(Debug, Default)]
pub(crate) struct PortPool {
    promised: Mutex<BTreeMap<LaunchKey, BTreeSet<u16>>>,
}

impl PortPool {
    /// Promises `ports` to `key` if all of them are free.
    pub(crate) fn promise(&self, key: &LaunchKey, ports: impl IntoIterator<Item = u16>) -> bool {
        let ports: BTreeSet<u16> = ports.into_iter().collect();
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = promised.iter().any(|(other, theirs)| other != key && !theirs.is_disjoint(&ports));
        // Binding without listening and closing at once leaves no trace (no TIME_WAIT).
        let free = |port: &u16| TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, *port)).is_ok();
        if taken || !ports.iter().all(free) {
            return false;
        }
        promised.insert(key.clone(), ports);
        true
    }

    /// Ports of a launch that is known to run (after a recovery).
    pub(crate) fn assume(&self, key: LaunchKey, ports: impl IntoIterator<Item = u16>) {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner).insert(key, ports.into_iter().collect());
    }

    /// Frees the ports of a launch of which nothing is left.
    pub(crate) fn release(&self, key: &LaunchKey) {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}
