//! What the authority can vouch for.
//!
//! A certificate authority in a trust store is a master key: whoever copies it can be any site to that machine. This one
//! carries its bounds in its certificate, as critical name constraints (RFC 5280 4.2.1.10), which OpenSSL, rustls, Go,
//! NSS, Chrome and macOS check for roots as well: names that no public site has, and addresses that no public route
//! leads to.

use std::net::IpAddr;

use orchestra_model::traffic::DEVELOPMENT_DOMAINS;
use rcgen::{CidrSubnet, GeneralSubtree, NameConstraints};

/// Loopback (RFC 1122, RFC 4291), private (RFC 1918, RFC 4193) and link-local addresses (RFC 3927, RFC 4291).
const NETWORKS: [(IpAddr, u8); 8] = [
    (v4(127, 0, 0, 0), 8),
    (v4(10, 0, 0, 0), 8),
    (v4(172, 16, 0, 0), 12),
    (v4(192, 168, 0, 0), 16),
    (v4(169, 254, 0, 0), 16),
    (v6([0, 0, 0, 0, 0, 0, 0, 1]), 128),
    (v6([0xfc00, 0, 0, 0, 0, 0, 0, 0]), 7),
    (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0]), 10),
];

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::new(a, b, c, d))
}

const fn v6(s: [u16; 8]) -> IpAddr {
    IpAddr::V6(std::net::Ipv6Addr::new(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]))
}

/// Whether the authority can vouch for an address.
pub(crate) fn permitted_address(ip: IpAddr) -> bool {
    NETWORKS.iter().any(|(network, length)| match (network, ip) {
        (IpAddr::V4(network), IpAddr::V4(ip)) => (u32::from(*network) ^ u32::from(ip)) >> (32 - length) == 0,
        (IpAddr::V6(network), IpAddr::V6(ip)) => {
            (u128::from(*network) ^ u128::from(ip)).checked_shr(128 - u32::from(*length)).unwrap_or(0) == 0
        }
        _ => false,
    })
}

/// As they stand in the authority's certificate.
pub(crate) fn constraints() -> NameConstraints {
    let names = DEVELOPMENT_DOMAINS.iter().map(|domain| GeneralSubtree::DnsName((*domain).to_owned()));
    let networks = NETWORKS
        .iter()
        .map(|(network, length)| GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(*network, *length)));
    NameConstraints { permitted_subtrees: names.chain(networks).collect(), excluded_subtrees: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_private_networks_and_nobody_elses() {
        for ip in ["127.0.0.1", "127.9.9.9", "::1", "10.1.2.3", "172.31.0.1", "192.168.7.7", "fd00::1", "fe80::1"] {
            assert!(permitted_address(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["8.8.8.8", "172.32.0.1", "192.169.0.1", "::2", "2001:db8::1", "128.0.0.1"] {
            assert!(!permitted_address(ip.parse().unwrap()), "{ip}");
        }
    }
}
