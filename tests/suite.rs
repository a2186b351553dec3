//! The integration suite: one binary, one module a subject.
//!
//! `cfg(test)` tells clippy that all functions of these modules are test code.

#[cfg(test)]
mod nbd_clients;
