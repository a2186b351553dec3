//! The integration suite: one binary, real processes, real foreign clients. See `tests/run`.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that fails panics")]

mod commands;
mod examples;
mod floors;
mod nbd_clients;
