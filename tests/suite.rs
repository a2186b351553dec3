//! The integration suite: one binary, real processes, real foreign clients. See `tests/run`.

#![cfg(test)]

mod clients;
mod counted;
mod crashes;
mod filesystems;
mod floors;
mod harness;
mod nbd_clients;
mod web;
