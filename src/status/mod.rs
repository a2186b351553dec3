//! Status: the stable JSON of section 13, as plain structs.
//!
//! Floor 1. Filled by `filer` and `hub` from what they publish, carried by `control` and
//! `observe`, shown by `cli`. Reading status never takes a lock of the data path: whoever fills
//! these structs reads published copies.
//!
//! The shape is a contract: names and types of fields stay within schema 1, new fields are added
//! at the end; golden tests in [`document`] hold it. A field that cannot be known is `null`, never a
//! made-up number.
//!
//! * [`document`]: `{"schema":1,"sources":[..]}` and its parts
//! * [`health`]: one word with its reasons, derived from the parts
//! * [`seed`]: images that begin with a disk sent by truck
//! * [`upkeep`]: scrub and rebuild of a pool
//! * [`answers`]: what `checkpoint`, `verify` and `pool-check` answer

pub mod answers;
pub mod config;
pub mod document;
pub mod health;
pub mod seed;
pub mod upkeep;

/// Version of every JSON document that the program prints.
pub const SCHEMA: u32 = 1;
