//! The wire between a source and its hub: frames, messages, CP updates.
//!
//! Floor 2, pure: bytes and structs, no socket. The shells in `filer` and `hub` read and write
//! the sockets and hand whole frames here.
//!
//! * [`frame`]: two bounded lengths, a MessagePack header, a raw payload
//! * [`message`]: what the headers say
//! * [`updates`]: the run-length coded list of changed blocks of a CP
//! * [`homes`]: a filer is asked to become the home of a source
//! * [`pull`]: questions about nodes and blocks of the other end's tree, and their answers

pub mod frame;
pub mod homes;
pub mod message;
pub mod pull;
pub mod updates;
