//! The NBD protocol as bytes: pure functions between structs and bytes, no socket, no clock.
//!
//! After the public text, `doc/proto.md` of <https://github.com/NetworkBlockDevice/nbd>. All
//! numbers are big-endian. Every length is checked against what is there and against its bound
//! before it is used; what is not well-formed is an error that names the rule it breaks.
//!
//! * [`option`]: greeting, client flags, options and what they carry
//! * [`option_reply`]: answers to options
//! * [`request`]: requests, and the verdict on them before an export is asked
//! * [`reply`]: simple replies and structured chunks

pub mod option;
pub mod option_reply;
pub mod reply;
pub mod request;

/// `NBDMAGIC`, the first bytes of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, said by the server once and by the client before each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags of the server and the client flags that answer them: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// The same: no 124 zero bytes after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags: what an export can do.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and NO_HOLE are known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is known; only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// Flush and FUA cover all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// The only metadata context of this server.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// Its id in replies. The choice is free; 1 is easy to see in a trace.
pub const CONTEXT_ALLOCATION_ID: u32 = 1;

/// What the server tells about an export of these properties: its transmission flags.
pub const fn transmission_flags(read_only: bool, multi_conn: bool, structured: bool) -> u16 {
    use transmission_flag as flag;
    let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
    if read_only {
        flags |= flag::READ_ONLY;
    } else {
        flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
    }
    if multi_conn {
        flags |= flag::CAN_MULTI_CONN;
    }
    if structured {
        flags |= flag::SEND_DF;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_are_the_letters_of_the_text() {
        assert_eq!(&INIT_MAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&OPTION_MAGIC.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn flags_tell_the_truth() {
        assert_eq!(transmission_flags(false, true, true), 0b1101_1110_1101);
        assert_eq!(transmission_flags(false, false, false), 0b1100_0110_1101);
        assert_eq!(transmission_flags(true, false, true), 0b0100_1000_1111);
    }
}
