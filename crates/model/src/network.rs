//! Addresses that belong together: one, or all that begin with the same bits (RFC 4632, RFC 4291 2.3).

use std::{fmt, net::IpAddr, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// An address, or a network such as `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Network {
    /// Its first address.
    address: IpAddr,
    /// Bits that all its addresses share.
    bits: u8,
}

/// Why a text is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseNetworkError {
    /// No address, or no number of bits that it could have.
    #[error("`{0}` is no IP address and no network; write one as `10.0.0.7`, `10.0.0.0/8` or `2001:db8::/32`")]
    Malformed(String),
    /// An address within a network: one of the two was meant.
    #[error(
        "`{text}` is an address within a network; write `{network}` for the network, or `{address}` for the address"
    )]
    Inside {
        /// What was written.
        text: String,
        /// The network.
        network: Network,
        /// The address.
        address: IpAddr,
    },
}

impl Network {
    /// Whether an address belongs to it. One of IPv4 is the same however it is written (`::ffff:10.0.0.7`).
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && first(address, self.bits) == self.address
    }
}

/// The first address of the network of an address.
fn first(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0)).into()),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0)).into()),
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl FromStr for Network {
    type Err = ParseNetworkError;

    fn from_str(text: &str) -> Result<Self, ParseNetworkError> {
        let malformed = || ParseNetworkError::Malformed(text.chars().take(60).collect());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address = address.parse::<IpAddr>().map_err(|_| malformed())?;
        let bits = match bits {
            None => width(address),
            Some(bits) if bits.bytes().all(|byte| byte.is_ascii_digit()) => bits.parse().map_err(|_| malformed())?,
            Some(_) => return Err(malformed()),
        };
        if bits > width(address) {
            return Err(malformed());
        }
        let network = Self { address: first(address, bits), bits };
        if network.address != address {
            return Err(ParseNetworkError::Inside { text: text.to_owned(), network, address });
        }
        // Nobody can be told apart by how its address is written.
        match address.to_canonical() {
            canonical if canonical == address => Ok(network),
            canonical if bits >= 96 => Ok(Self { address: canonical, bits: bits - 96 }),
            _ => Err(malformed()),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bits == width(self.address) {
            return write!(f, "{}", self.address);
        }
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for Network {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Network".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$",
            "description": "An IP address, or a network such as `10.0.0.0/8`.",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_contains_what_begins_as_it_does() {
        let inside = |of: &str, address: &str| network(of).contains(address.parse().unwrap());
        assert!(inside("10.0.0.0/8", "10.255.0.1") && !inside("10.0.0.0/8", "11.0.0.0"));
        assert!(inside("192.0.2.128/25", "192.0.2.200") && !inside("192.0.2.128/25", "192.0.2.127"));
        assert!(inside("192.0.2.7", "192.0.2.7") && !inside("192.0.2.7", "192.0.2.8"));
        assert!(inside("0.0.0.0/0", "203.0.113.9") && !inside("0.0.0.0/0", "2001:db8::1"));
        assert!(inside("2001:db8::/32", "2001:db8:ffff::1") && !inside("2001:db8::/32", "2001:db9::"));
        assert!(inside("::/0", "2001:db8::1") && !inside("::/0", "10.0.0.1"));
        assert!(inside("10.0.0.0/8", "::ffff:10.1.2.3"), "an address of IPv4 on a socket of IPv6");
        assert!(inside("::ffff:10.0.0.0/104", "10.1.2.3"), "a network that is written so");
    }

    #[test]
    fn a_network_is_written_as_it_is_read() {
        for text in ["10.0.0.0/8", "192.0.2.7", "0.0.0.0/0", "2001:db8::/32", "2001:db8::1", "::/0"] {
            assert_eq!(network(text).to_string(), text);
            assert_eq!(serde_json::from_value::<Network>(serde_json::json!(text)).unwrap(), network(text));
        }
        assert_eq!(network("192.0.2.7/32").to_string(), "192.0.2.7");
        assert_eq!(network("::ffff:10.0.0.0/104").to_string(), "10.0.0.0/8");
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in ["", "10", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0.0/8/8", "::/129", "10.0.0/8", "a.b"] {
            let error = text.parse::<Network>().unwrap_err();
            assert!(matches!(error, ParseNetworkError::Malformed(_)), "{text}: {error}");
        }
        let error = "10.1.2.3/8".parse::<Network>().unwrap_err().to_string();
        assert!(error.ends_with("write `10.0.0.0/8` for the network, or `10.1.2.3` for the address"), "{error}");
    }
}
