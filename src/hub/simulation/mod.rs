//! The whole of it in one thread of time: one hub and several sources, the real parts of both, over
//! simulated disks, network, clock and threads, under faults drawn from a seed.
//!
//! What runs is the product: [`crate::filer::Filer`] with its committing and checkpoint threads and
//! its forwarder, the hub's actors, connections, drainer, appliers and recovery, the wire's bytes
//! between them. What is simulated is the machine below: `units::machine` chooses which thread
//! goes on, the clock is tokio's paused one, disks are `device::sim` and `sourcelog::sim`, sockets
//! are pipes of `link::simulated`. One seed gives one run, told by the hash of its trace.
//!
//! * `setup`: what a run is made of; * `process`: one life of one end; * `world`: both ends
//! * `client`, `line`: what clients do, and the oracle; * `laws`: what has to hold after each step
//! * `run`: the scheduler; * `faults`; * `disk`: a pool's one device or two; * `rot`: of rings and logs
//! * `rules`: with a rule off, some seed fails; * `sweep`: each call of a short run fails once
//! * `probes`: rare branches that must be met

mod apart;
mod client;
mod copies;
mod disk;
mod faults;
mod hub_end;
mod laws;
mod line;
mod probes;
mod process;
mod rot;
mod rules;
mod run;
mod setup;
mod sweep;
mod tests;
mod world;

pub(super) use world::Nvrams;
