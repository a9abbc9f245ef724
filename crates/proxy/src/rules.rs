//! What the stack says of a port, as requests need it: durations instead of quantities, nothing where nothing is said.

use std::{net::IpAddr, time::Duration};

use orchestra_model::{
    network::Network,
    quantity::{ByteSize, Timespan},
    traffic::PortPolicy,
};

use crate::{outlier, wire::SocketId};

/// Rules of a route.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    /// Longest body of a request, in bytes.
    pub(crate) body: Option<u64>,
    /// Requests of one client per second.
    pub(crate) rate: Option<u32>,
    /// From the choice of an instance to the head of its response.
    pub(crate) first_byte: Option<Duration>,
    /// From the choice of an instance to the end of the response, streams apart.
    pub(crate) response: Option<Duration>,
    /// Silence on a stream.
    pub(crate) idle: Option<Duration>,
    /// Longest body that is read before an instance is chosen, in bytes.
    pub(crate) buffer: Option<usize>,
    /// Further tries of a request.
    pub(crate) attempts: u32,
    pub(crate) budget_percent: u32,
    pub(crate) outlier: Option<outlier::Rule>,
    /// Requests in flight to one instance; 0 is no bound.
    pub(crate) per_instance: u32,
    /// Requests in flight; 0 is no bound.
    pub(crate) total: u32,
    /// Where another service of the environment listens, which answers while this one has no instance.
    pub(crate) fallback: Option<SocketId>,
    /// Proxies in front that are not on this machine.
    trusted: Vec<Network>,
}

impl Rules {
    /// Of a port, whose fallback listens on this socket.
    pub(crate) fn new(policy: &PortPolicy, fallback: Option<SocketId>) -> Self {
        let bound = |span: Timespan| Some(span.duration()).filter(|span| !span.is_zero());
        Self {
            body: policy.limits.body.map(ByteSize::as_bytes),
            rate: policy.limits.requests_per_second.filter(|rate| *rate > 0),
            first_byte: bound(policy.timeouts.first_byte),
            response: bound(policy.timeouts.response),
            idle: bound(policy.timeouts.idle),
            buffer: policy
                .buffer
                .map(|size| usize::try_from(size.as_bytes()).unwrap_or(usize::MAX))
                .filter(|size| *size > 0),
            attempts: policy.retry.attempts,
            budget_percent: policy.retry.budget_percent,
            outlier: outlier::Rule::of(&policy.outlier),
            per_instance: policy.breaker.per_instance,
            total: policy.breaker.total,
            fallback,
            trusted: policy.trusted_proxies.clone(),
        }
    }

    /// Whether what somebody says of clients is believed: this machine, and whom the stack names.
    pub(crate) fn trusts(&self, proxy: IpAddr) -> bool {
        proxy.to_canonical().is_loopback() || self.trusted.iter().any(|network| network.contains(proxy))
    }

    /// Whether the number of what is under way is bounded.
    pub(crate) fn is_bounded(&self) -> bool {
        self.per_instance > 0 || self.total > 0
    }
}
