//! The NBD server that both ends share: volumes on a source, images on a hub.
//!
//! Floor 3. Network Block Device, fixed newstyle, after the public protocol text; no kernel
//! module. What it cannot do it says in its flags.
//!
//! * [`protocol`]: bytes, pure
//! * [`export`]: the traits that volumes and images implement
//! * `handshake`: from the greeting to an opened export
//! * [`tls`]: the upgrade before the handshake, where connections are encrypted
//! * `transmission`: requests and replies of one connection; `intake` reads the former,
//!   `execute` asks the export, `outgoing` sends the latter, `budget` bounds both
//! * [`listen`]: TCP and unix sockets
//! * [`serve`]: accepting, caps, deadlines, stopping; [`counters`]: what it counts
//! * [`conformance`]: what every export must do, as a check that implementations run
//! * [`memory`]: an export in memory, for tests and measurements of the server itself
//!
//! One task serves one connection: it reads requests, polls what they became, and writes replies
//! in the order they get ready, so that a slow request holds up no other. Everything a client can
//! make us hold is counted against bounds in [`limits`](crate::limits).

mod budget;
pub mod client;
pub mod conformance;
pub mod counters;
mod end;
mod execute;
pub mod export;
mod handshake;
mod intake;
pub mod listen;
pub mod memory;
mod outgoing;
pub mod protocol;
pub mod serve;
pub mod tls;
mod transmission;

#[cfg(test)]
mod tests;
