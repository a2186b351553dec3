//! Configuration: what an administrator writes, read whole and judged whole.
//!
//! Floor 10. Called by `cli`. A file is parsed whole and validated whole: either the plain structs
//! of [`schema`] come out, or every problem that was found, each with file, line, key, what was
//! met, what was wanted and what to write instead. Nothing is ever half applied, and nothing that is
//! written in a file is passed over: unknown keys are refused.
//!
//! * [`schema`]: the structs; each key with meaning, unit, default, bounds, live or restart
//! * [`around`]: the files of a running hub, around what is wrong in them
//! * [`load`]: files in, structs or problems out
//! * [`problem`]: one problem, and how it is shown
//! * [`quantity`]: sizes and durations
//! * [`reload`]: what a reload would change, and when
//! * [`shrink`]: a volume that the file makes smaller
//! * [`sizing`]: what `config check` prints
//! * `text`, `reader`: places in a text; typed access to a parsed table that gathers problems
//! * `common`, `hub`, `hooks`, `source`, `source_file`: the reading and judging of each file
//!
//! No other module knows TOML: `cli` fills the `Options` of each module from these structs.

pub mod around;
mod common;
mod hooks;
mod hub;
pub mod load;
pub mod problem;
pub mod quantity;
mod reader;
pub mod reload;
pub mod schema;
pub mod shrink;
pub mod sizing;
mod source;
mod source_file;
#[cfg(test)]
mod tests;
mod text;
