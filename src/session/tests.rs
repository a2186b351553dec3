//! Both machines against each other, and against absurd peers.
//!
//! * `world`, `laws`: a simulated source, hub and link, and what must always hold
//! * `search`: every short history, and the controls that switch one rule off
//! * `behind`: the log while a pass runs
//! * `credit`: a hub that gives none
//! * `kept_log`: what stays on a hub behind a pass
//! * `together`: the end of being alone
//! * `unasked`: a source that began to serve without having asked
//! * `walk`: long random histories

#![expect(clippy::wildcard_enum_match_arm, reason = "a test names the variants it is about")]

mod absurd_mirror;
mod absurd_primary;
mod behind;
mod credit;
mod fuzz;
mod kept_log;
mod laws;
mod refusals;
mod search;
mod silent;
mod together;
mod unasked;
mod volumes;
mod walk;
mod world;
