//! What is asked, how often, and what came of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use orchestra_model::launch::Exec;

/// Names a target. The caller chooses it; a number may be used again after the target was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbeId(pub u64);

/// A question that is asked again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub id: ProbeId,
    /// What is asked.
    pub leaf: Leaf,
    /// Interval between the starts of two checks; at least one millisecond.
    pub every: Duration,
    /// Longest wait for one answer, from the start of the check (not from when it was due).
    pub timeout: Duration,
}

/// One question, complete with the place where to ask it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// An HTTP/1.1 request.
    Http(HttpCheck),
    /// A TCP connection is accepted.
    Tcp {
        /// Where.
        address: SocketAddr,
    },
    /// The gRPC health protocol answers SERVING.
    Grpc {
        /// Where.
        address: SocketAddr,
        /// Service to ask about; empty is the whole server.
        service: String,
    },
    /// A command beside an instance exits with 0. [`Target::timeout`] replaces the timeout in it.
    Exec(Exec),
}

/// An HTTP/1.1 request and what its answer must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCheck {
    /// Where.
    pub address: SocketAddr,
    /// `GET`, `HEAD` or `POST`.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Header fields; `Host`, `User-Agent` and `Accept` in it replace the ones that are sent otherwise.
    pub headers: BTreeMap<String, String>,
    /// Body to send.
    pub body: Option<String>,
    /// Accepted status codes; empty means 200 to 399.
    pub status: BTreeSet<u16>,
    /// Text that the first 64 KiB of the answer's body must contain.
    pub contains: Option<String>,
}

/// What came of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Of which target.
    pub id: ProbeId,
    /// Whether the answer was as wanted.
    pub passed: bool,
    /// The answer in a few words: `HTTP 503`, `connection refused`, `timeout after 3s while connecting`. One line of
    /// printable characters, at most 200 of them, whatever the peer sent.
    pub detail: String,
    /// From the start of the check to its end.
    pub took: Duration,
}
