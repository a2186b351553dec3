//! mirrorhub: a central hub that keeps a live, proven, readable mirror of the block volumes of
//! many filers.
//!
//! The modules stand on floors (`docs/architecture.md`): a module imports strictly lower floors,
//! never a sibling; `tests/floors.rs` checks it. From the ground: [`units`], [`limits`] and
//! [`metric`], [`device`], [`record`] and [`wire`], [`raid`], [`nvlog`] and [`nbd`],
//! [`pool`] and
//! [`sourcelog`], [`volume`], [`session`], [`filer`], [`hub`], [`observe`] and [`control`],
//! [`config`], [`cli`].

pub mod cli;
pub mod config;
pub mod control;
pub mod device;
pub mod filer;
pub mod hub;
pub mod limits;
pub mod link;
pub mod metric;
pub mod nbd;
pub mod nvlog;
pub mod observe;
pub mod pool;
pub mod raid;
pub mod record;
pub mod session;
pub mod sourcelog;
pub mod status;
pub mod units;
pub mod upkeep;
pub mod volume;
pub mod wire;
