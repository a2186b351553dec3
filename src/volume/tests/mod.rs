//! Tests of pool and volume tree together, on a device in memory.

mod births;
mod faults;
mod kept;
mod model;
mod publish;
mod space;
mod together;
