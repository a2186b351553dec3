//! The integration suite: one binary, real processes, real foreign clients. See `tests/run`.

#![cfg(test)]

mod clients;
mod crashes;
mod floors;
mod harness;
mod hostile;
mod nbd_clients;
mod web;
