//! The integration suite: one binary, one module a subject.
//!
//! `cfg(test)` tells clippy that helpers in these modules are tests too.

#[cfg(test)]
mod nbd_clients;
