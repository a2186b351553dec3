//! The integration suite: one binary, real processes, real foreign clients. See `tests/run`.

mod floors;
mod nbd_clients;
