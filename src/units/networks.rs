//! Networks in CIDR form, and whether an address is in one of them.
//!
//! Read from `plain_networks` by `config`, asked by `link::plain` for each connection. An IPv4 address that
//! comes as an IPv6 one (`::ffff:10.1.2.3`, as a socket shows it that listens on `[::]`) counts as IPv4 on
//! both sides of the question; so no IPv6 network, not even `::/0`, has an IPv4 address in it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Bits of the prefix of all IPv4 addresses among the IPv6 ones.
const MAPPED_BITS: u8 = 96;

/// Why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// What stands before the slash, or all of it.
    #[error("{0:?} is no address")]
    Address(String),
    /// What stands behind the slash.
    #[error("{0:?} is no number of bits")]
    Prefix(String),
    /// More bits than the address has.
    #[error("a prefix of {met} bits is longer than an address of {bits}")]
    TooLong {
        /// As written.
        met: u32,
        /// 32 or 128.
        bits: u8,
    },
    /// Bits of the address that the prefix leaves out.
    #[error("{address} has bits beyond its prefix of {}", network.prefix)]
    HostBits {
        /// As written.
        address: IpAddr,
        /// What was meant, most likely.
        network: Network,
    },
}

/// A network: an address and how many of its bits count. The others are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Whether that address is in it.
    pub fn has(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                masked(address.to_canonical(), self.prefix) == self.address
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr =
            address.parse().map_err(|_| NetworkError::Address(address.to_owned()))?;
        let bits = bits_of(address);
        let prefix = match prefix {
            None => bits,
            Some(text) => number(text)
                .ok_or_else(|| NetworkError::Prefix(text.to_owned()))
                .and_then(|met| {
                    let fits = u8::try_from(met).ok().filter(|prefix| *prefix <= bits);
                    fits.ok_or(NetworkError::TooLong { met, bits })
                })?,
        };
        let network = Self { address: masked(address, prefix), prefix };
        if network.address != address {
            return Err(NetworkError::HostBits { address, network });
        }
        // One of IPv4 addresses in the words of IPv6.
        match address.to_canonical() {
            IpAddr::V4(mapped) if address.is_ipv6() => {
                let prefix = prefix.saturating_sub(MAPPED_BITS);
                Ok(Self { address: IpAddr::V4(mapped), prefix })
            }
            IpAddr::V4(_) | IpAddr::V6(_) => Ok(network),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Some of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Networks(pub Vec<Network>);

impl Networks {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them has that address.
    pub fn have(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.has(address))
    }
}

impl fmt::Display for Networks {
    /// `none` without any.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, others)) = self.0.split_first() else { return f.write_str("none") };
        write!(f, "{first}")?;
        others.iter().try_for_each(|network| write!(f, ", {network}"))
    }
}

/// Digits only: a sign is none.
fn number(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn bits_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// The address without what lies beyond so many bits.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    let beyond = u32::from(bits_of(address).saturating_sub(prefix));
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(beyond).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & mask))
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(beyond).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// The first and the last address are in it, their neighbours are not, whatever the prefix.
    #[test]
    fn a_network_has_its_addresses_and_no_other() {
        for (text, inside, outside) in [
            ("10.1.0.0/16", ["10.1.0.0", "10.1.255.255"], ["10.0.255.255", "10.2.0.0"]),
            ("10.1.2.0/23", ["10.1.2.0", "10.1.3.255"], ["10.1.1.255", "10.1.4.0"]),
            ("192.0.2.7", ["192.0.2.7", "::ffff:192.0.2.7"], ["192.0.2.6", "192.0.2.8"]),
            ("192.0.2.7/32", ["192.0.2.7", "192.0.2.7"], ["192.0.2.6", "::ffff:192.0.2.8"]),
            ("0.0.0.0/0", ["0.0.0.0", "255.255.255.255"], ["::", "2001:db8::1"]),
            ("0.0.0.0/1", ["0.0.0.0", "127.255.255.255"], ["128.0.0.0", "255.255.255.255"]),
            (
                "2001:db8::/32",
                ["2001:db8::", "2001:db8:ffff:ffff::1"],
                ["2001:db7::1", "2001:db9::"],
            ),
            ("2001:db8::7", ["2001:db8::7", "2001:db8::7"], ["2001:db8::6", "2001:db8::8"]),
            ("::/0", ["::1", "2001:db8::1"], ["10.1.2.3", "::ffff:10.1.2.3"]),
            (
                "::ffff:10.1.0.0/112",
                ["10.1.0.0", "::ffff:10.1.255.255"],
                ["10.2.0.0", "::10.1.0.0"],
            ),
            ("10.1.0.0/16", ["::ffff:10.1.2.3", "10.1.2.3"], ["::ffff:10.2.2.3", "::10.1.2.3"]),
        ] {
            let met = network(text);
            for one in inside {
                assert!(met.has(address(one)), "{one} is not in {text}");
            }
            for one in outside {
                assert!(!met.has(address(one)), "{one} is in {text}");
            }
        }
    }

    /// Every prefix of both kinds: the address differs in its last bit that counts, and is not in it; in the
    /// first that does not, and is.
    #[test]
    fn exactly_the_bits_of_the_prefix_count() {
        let (four, six) = (0xc0a8_1234_u32, 0x2001_0db8_1234_5678_9abc_def0_1234_5678_u128);
        for prefix in 0..=32_u8 {
            let base = IpAddr::V4(Ipv4Addr::from_bits(four));
            let met = Network { address: masked(base, prefix), prefix };
            for bit in 0..32_u8 {
                let other = IpAddr::V4(Ipv4Addr::from_bits(four ^ (1 << (31 - bit))));
                assert_eq!(met.has(other), bit >= prefix, "{met}, bit {bit}");
            }
        }
        for prefix in 0..=128_u8 {
            let base = IpAddr::V6(Ipv6Addr::from_bits(six));
            let met = Network { address: masked(base, prefix), prefix };
            for bit in 0..128_u8 {
                let other = IpAddr::V6(Ipv6Addr::from_bits(six ^ (1 << (127 - bit))));
                assert_eq!(met.has(other), bit >= prefix, "{met}, bit {bit}");
            }
        }
    }

    #[test]
    fn what_is_no_network_is_refused_by_name() {
        for (text, said) in [
            ("", "\"\" is no address"),
            ("office", "\"office\" is no address"),
            ("10.1/16", "\"10.1\" is no address"),
            ("10.1.0.0:80", "\"10.1.0.0:80\" is no address"),
            ("/16", "\"\" is no address"),
            ("10.1.0.0/", "\"\" is no number of bits"),
            ("10.1.0.0/+8", "\"+8\" is no number of bits"),
            ("10.1.0.0/-1", "\"-1\" is no number of bits"),
            ("10.1.0.0/255.255.0.0", "\"255.255.0.0\" is no number of bits"),
            ("10.1.0.0/33", "a prefix of 33 bits is longer than an address of 32"),
            ("10.1.0.0/256", "a prefix of 256 bits is longer than an address of 32"),
            ("2001:db8::/129", "a prefix of 129 bits is longer than an address of 128"),
            ("10.1.2.3/16", "10.1.2.3 has bits beyond its prefix of 16"),
            ("10.1.0.1/0", "10.1.0.1 has bits beyond its prefix of 0"),
            ("2001:db8::1/32", "2001:db8::1 has bits beyond its prefix of 32"),
            ("::ffff:10.1.0.0/95", "::ffff:10.1.0.0 has bits beyond its prefix of 95"),
        ] {
            let met = text.parse::<Network>().expect_err(text).to_string();
            assert_eq!(met, said, "{text}");
        }
        // The control: what stands beside each of them is one.
        for text in ["10.1.0.0/16", "10.1.0.0/32", "10.1.0.0", "0.0.0.0/0", "2001:db8::/32", "::/0"]
        {
            let met = network(text);
            assert_eq!(met.to_string().parse(), Ok(met), "{text}");
        }
        let Err(NetworkError::HostBits { network, .. }) = "10.1.2.3/16".parse::<Network>() else {
            panic!("no proposal");
        };
        assert_eq!(network.to_string(), "10.1.0.0/16");
    }

    #[test]
    fn one_of_several_is_enough_and_none_has_nobody() {
        let some = Networks(vec![network("10.1.0.0/16"), network("2001:db8::/32")]);
        assert!(some.have(address("10.1.9.9")) && some.have(address("2001:db8::9")));
        assert!(!some.have(address("10.9.9.9")) && !some.have(address("127.0.0.1")));
        assert_eq!(some.to_string(), "10.1.0.0/16, 2001:db8::/32");
        let none = Networks::default();
        assert!(none.is_empty() && !none.have(address("10.1.9.9")));
        assert_eq!(none.to_string(), "none");
    }
}
