//! A door for clients in the clear: whose connections it takes, by their address.
//!
//! Made by the commands where `plain_networks` is written and the door is not behind TLS; asked by `nbd` and
//! `observe` for each connection, before a byte is read or written. This machine's own addresses that are
//! loopback are always taken. Who is refused is counted, and told of once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::refusals::Refusals;
use crate::nbd::serve::Guard;
use crate::units::networks::Networks;

/// Why; the address is told beside it.
const REASON: &str = "it comes in the clear, and its address is in none of plain_networks";

/// The door.
#[derive(Debug)]
pub struct PlainDoor {
    what: &'static str,
    networks: Networks,
    refused: AtomicU64,
    said: Arc<Refusals>,
}

impl PlainDoor {
    /// A door for clients of these networks; `what` is how its log says that somebody is refused.
    pub fn new(what: &'static str, networks: Networks) -> Self {
        Self { what, networks, refused: AtomicU64::new(0), said: Arc::default() }
    }

    /// How many were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Guard for PlainDoor {
    fn admits(&self, peer: SocketAddr) -> bool {
        let address = peer.ip().to_canonical();
        if address.is_loopback() || self.networks.have(address) {
            return true;
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        let peer = SocketAddr::new(address, peer.port());
        self.said.say(self.what, &peer.to_string(), REASON, REASON);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loopback, in either family and as IPv4 in IPv6, and the networks; nobody else, and each of these is
    /// counted.
    #[tokio::test]
    async fn loopback_and_the_networks_are_taken_and_nobody_else() {
        let networks = ["10.1.0.0/16", "fd00:1::/32"].map(|text| text.parse().unwrap());
        let door = PlainDoor::new("refused", Networks(networks.into()));
        let admits = |ip: &str| door.admits(SocketAddr::new(ip.parse().unwrap(), 7));
        for ip in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(admits(ip), "{ip} is this machine");
        }
        for ip in ["10.1.2.3", "::ffff:10.1.2.3", "fd00:1::9"] {
            assert!(admits(ip), "{ip} is in a network");
        }
        assert_eq!(door.refused(), 0);
        let others = ["10.2.0.1", "::ffff:10.2.0.1", "fd00:2::9", "192.168.1.1", "::"];
        for ip in others {
            assert!(!admits(ip), "{ip} is in none");
        }
        assert_eq!(door.refused(), u64::try_from(others.len()).unwrap());
    }
}
