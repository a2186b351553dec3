//! The integration suite: one binary, real processes, real foreign clients. See `tests/run`.

#![cfg(test)]

mod clients;
mod commands;
mod counted;
mod crashes;
mod examples;
mod filesystems;
mod floors;
mod formats;
mod harness;
mod hostile;
mod inject;
mod ladder;
mod nbd_clients;
mod power;
mod walkthrough;
mod web;
