//! Both machines against each other, and against absurd peers.
//!
//! * `world`, `laws`: a simulated source, hub and link, and what must always hold
//! * `search`: every short history, and the controls that switch one rule off
//! * `kept_log`: what stays on a hub behind a pass
//! * `walk`: long random histories

#![expect(clippy::wildcard_enum_match_arm, reason = "a test names the variants it is about")]

mod absurd_mirror;
mod absurd_primary;
mod fuzz;
mod kept_log;
mod laws;
mod refusals;
mod search;
mod silent;
mod volumes;
mod walk;
mod world;
