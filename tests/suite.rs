//! The integration suite: one binary, real processes, real foreign clients. See `tests/run`.

#![cfg(test)]

mod broken_hub;
mod clients;
mod commands;
mod counted;
mod crashes;
mod cuts;
mod dashboards;
mod databases;
mod examples;
mod failover;
mod filesystems;
mod flips;
mod floors;
mod formats;
mod full_pool;
mod grown;
mod harness;
mod homes;
mod hostile;
mod imported;
mod inject;
mod ladder;
mod log_faults;
mod loops;
mod mutated;
mod nbd_clients;
mod onboarding;
mod outage;
mod page;
mod policies;
mod power;
mod pulled;
mod raid;
mod reloads;
mod resync;
mod rot;
mod service;
mod starts;
mod tls;
mod top;
mod truth;
mod volumes;
mod walkthrough;
mod web;
