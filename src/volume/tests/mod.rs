//! Tests of pool and volume tree together, on a device in memory.

mod births;
mod faults;
mod grown;
mod kept;
mod mend;
mod model;
mod publish;
mod pull;
mod pull_cost;
mod pull_hostile;
mod pulling;
mod seeds;
mod serve;
mod space;
mod together;
mod work;
