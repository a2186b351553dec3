//! Requests of the transmission phase, and the verdict on each before an export is asked.
//!
//! Pure. `intake` reads 28 bytes, decodes them here, and asks [`RequestHeader::judge`] what to do.
//! A header without the magic ends the connection: the stream is out of step. Everything else is
//! answered, with the error that the protocol text names.

use bytes::Buf;

use super::REQUEST_MAGIC;
use crate::limits::NBD_REQUEST_BYTES_MAX;
use crate::nbd::export::ErrorCode;

/// Bytes of a request without its payload.
pub const REQUEST_BYTES: usize = 28;

/// Flags of a command.
pub mod command_flag {
    /// Answer when durable. Taken on every command.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: with space behind it.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fast or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// The commands with an answer, for counters and messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// READ
    Read,
    /// WRITE
    Write,
    /// FLUSH
    Flush,
    /// TRIM
    Trim,
    /// CACHE
    Cache,
    /// WRITE_ZEROES
    WriteZeroes,
    /// BLOCK_STATUS
    BlockStatus,
    /// A number that we do not know.
    Unknown,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::Cache,
        Self::WriteZeroes,
        Self::BlockStatus,
        Self::Unknown,
    ];

    /// Name as a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Unknown => "unknown",
        }
    }

    /// Flags it takes beside FUA.
    const fn flags(self, structured: bool) -> u16 {
        match self {
            Self::Read if structured => command_flag::DF,
            Self::WriteZeroes => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            Self::BlockStatus => command_flag::REQ_ONE,
            Self::Read | Self::Write | Self::Flush | Self::Trim | Self::Cache | Self::Unknown => 0,
        }
    }

    const fn writes(self) -> bool {
        match self {
            Self::Write | Self::Trim | Self::WriteZeroes => true,
            Self::Read | Self::Flush | Self::Cache | Self::BlockStatus | Self::Unknown => false,
        }
    }
}

/// A request as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Number of the command.
    pub kind: u16,
    /// Goes back in each answer.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; of a WRITE, also those that follow.
    pub length: u32,
}

/// What was agreed on at the handshake and decides about requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Bytes of the export.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// `base:allocation` was selected.
    pub allocation: bool,
}

/// A request that may go to the export: inside the export and its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read 1 to 32 MiB; with `single_chunk` answer in one chunk.
    Read { offset: u64, length: u32, single_chunk: bool },
    /// Write the 1 to 32 MiB that follow.
    Write { offset: u64, length: u32, fua: bool },
    /// Flush.
    Flush,
    /// Trim.
    Trim { offset: u64, length: u32, fua: bool },
    /// Cache.
    Cache { offset: u64, length: u32 },
    /// Write zeroes.
    WriteZeroes { offset: u64, length: u32, no_hole: bool, fua: bool },
    /// Tell the extents; with `one` the first.
    BlockStatus { offset: u64, length: u32, one: bool },
    /// Of no byte, and right otherwise: succeeds without asking anybody.
    Nothing,
}

/// A request that is answered with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The error.
    pub code: ErrorCode,
    /// Its text, for structured replies.
    pub message: &'static str,
}

const fn refuse<T>(code: ErrorCode, message: &'static str) -> Result<T, Refusal> {
    Err(Refusal { code, message })
}

impl RequestHeader {
    /// Reads a header; `None` if the magic is wrong.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut rest = &bytes[..];
        let magic = rest.get_u32();
        let (flags, kind) = (rest.get_u16(), rest.get_u16());
        let (cookie, offset, length) = (rest.get_u64(), rest.get_u64(), rest.get_u32());
        (magic == REQUEST_MAGIC).then_some(Self { flags, kind, cookie, offset, length })
    }

    /// Whether the client leaves.
    pub const fn disconnects(&self) -> bool {
        self.kind == 2
    }

    /// Which command it is, DISC apart.
    pub const fn operation(&self) -> Operation {
        match self.kind {
            0 => Operation::Read,
            1 => Operation::Write,
            3 => Operation::Flush,
            4 => Operation::Trim,
            5 => Operation::Cache,
            6 => Operation::WriteZeroes,
            7 => Operation::BlockStatus,
            _ => Operation::Unknown,
        }
    }

    /// Bytes that follow the header, whatever the verdict is.
    pub const fn payload(&self) -> u32 {
        match self.operation() {
            Operation::Write => self.length,
            Operation::Read
            | Operation::Flush
            | Operation::Trim
            | Operation::Cache
            | Operation::WriteZeroes
            | Operation::BlockStatus
            | Operation::Unknown => 0,
        }
    }

    /// Checks flags, permission, range and length, in this order, as the protocol text has it.
    pub fn judge(&self, terms: &Terms) -> Result<Command, Refusal> {
        let operation = self.operation();
        if operation == Operation::Unknown {
            return refuse(ErrorCode::Inval, "unknown command");
        }
        if self.flags & !(command_flag::FUA | operation.flags(terms.structured)) != 0 {
            return refuse(ErrorCode::Inval, "flag that this command does not take");
        }
        if terms.read_only && operation.writes() {
            return refuse(ErrorCode::Perm, "the export is read-only");
        }
        self.check_range(operation, terms)?;
        self.check_length(operation, terms)?;
        Ok(self.command(operation))
    }

    fn check_range(&self, operation: Operation, terms: &Terms) -> Result<(), Refusal> {
        let inside = match self.offset.checked_add(u64::from(self.length)) {
            Some(end) => end <= terms.size,
            None => false,
        };
        match operation {
            Operation::Flush if self.offset != 0 || self.length != 0 => {
                refuse(ErrorCode::Inval, "flush takes neither offset nor length")
            }
            Operation::Write | Operation::WriteZeroes if !inside => {
                refuse(ErrorCode::NoSpc, "write past the end of the export")
            }
            Operation::Read | Operation::Trim | Operation::Cache | Operation::BlockStatus
                if !inside =>
            {
                refuse(ErrorCode::Inval, "request past the end of the export")
            }
            Operation::Read
            | Operation::Write
            | Operation::Flush
            | Operation::Trim
            | Operation::Cache
            | Operation::WriteZeroes
            | Operation::BlockStatus
            | Operation::Unknown => Ok(()),
        }
    }

    fn check_length(&self, operation: Operation, terms: &Terms) -> Result<(), Refusal> {
        let long = u64::from(self.length) > NBD_REQUEST_BYTES_MAX;
        match operation {
            Operation::Read if long && terms.structured => {
                refuse(ErrorCode::Overflow, "read of more than 32 MiB")
            }
            Operation::Read if long => refuse(ErrorCode::Inval, "read of more than 32 MiB"),
            Operation::Write if long => refuse(ErrorCode::Inval, "write of more than 32 MiB"),
            Operation::BlockStatus if !terms.allocation => {
                refuse(ErrorCode::Inval, "no metadata context was selected")
            }
            Operation::BlockStatus if self.length == 0 => {
                refuse(ErrorCode::Inval, "block status of no byte")
            }
            Operation::Read
            | Operation::Write
            | Operation::Flush
            | Operation::Trim
            | Operation::Cache
            | Operation::WriteZeroes
            | Operation::BlockStatus
            | Operation::Unknown => Ok(()),
        }
    }

    fn command(&self, operation: Operation) -> Command {
        let Self { offset, length, .. } = *self;
        let has = |flag: u16| self.flags & flag != 0;
        let fua = has(command_flag::FUA);
        match operation {
            Operation::Flush => Command::Flush,
            _ if length == 0 => Command::Nothing,
            Operation::Read => {
                Command::Read { offset, length, single_chunk: has(command_flag::DF) }
            }
            Operation::Write => Command::Write { offset, length, fua },
            Operation::Trim => Command::Trim { offset, length, fua },
            Operation::Cache => Command::Cache { offset, length },
            Operation::WriteZeroes => {
                Command::WriteZeroes { offset, length, no_hole: has(command_flag::NO_HOLE), fua }
            }
            Operation::BlockStatus => {
                Command::BlockStatus { offset, length, one: has(command_flag::REQ_ONE) }
            }
            Operation::Unknown => Command::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms =
        Terms { size: 1 << 40, read_only: false, structured: true, allocation: true };

    fn header(kind: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
        RequestHeader { flags, kind, cookie: 7, offset, length }
    }

    fn code(kind: u16, flags: u16, offset: u64, length: u32, terms: Terms) -> Option<u32> {
        header(kind, flags, offset, length).judge(&terms).err().map(|refusal| refusal.code.wire())
    }

    #[test]
    fn golden_request() {
        let bytes = b"\x25\x60\x95\x13\x00\x01\x00\x06\x01\x02\x03\x04\x05\x06\x07\x08\
                      \x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x10\x00";
        let expected = RequestHeader {
            flags: 1,
            kind: 6,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1_0000_0002,
            length: 4096,
        };
        assert_eq!(RequestHeader::decode(bytes), Some(expected));
        let mut wrong = *bytes;
        wrong[3] ^= 1;
        assert_eq!(RequestHeader::decode(&wrong), None);
    }

    #[test]
    fn each_command_carries_what_it_was_asked() {
        let judge = |kind, flags| header(kind, flags, 512, 3).judge(&TERMS).unwrap();
        let (offset, length) = (512, 3);
        assert_eq!(judge(0, 0), Command::Read { offset, length, single_chunk: false });
        assert_eq!(judge(0, 4), Command::Read { offset, length, single_chunk: true });
        assert_eq!(judge(1, 1), Command::Write { offset, length, fua: true });
        assert_eq!(judge(4, 1), Command::Trim { offset, length, fua: true });
        assert_eq!(judge(5, 0), Command::Cache { offset, length });
        let zeroes = |no_hole, fua| Command::WriteZeroes { offset, length, no_hole, fua };
        assert_eq!(judge(6, 0), zeroes(false, false));
        assert_eq!(judge(6, 0b1_0011), zeroes(true, true));
        assert_eq!(judge(7, 8), Command::BlockStatus { offset, length, one: true });
        assert_eq!(header(3, 0, 0, 0).judge(&TERMS), Ok(Command::Flush));
    }

    /// Goal: every flag on every command is taken or refused as the text says.
    #[test]
    fn every_flag_on_every_command() {
        for kind in [0, 1, 3, 4, 5, 6, 7] {
            for bit in 0..16 {
                let taken = bit == 0 || matches!((kind, bit), (0, 2) | (6, 1) | (6, 4) | (7, 3));
                let expected = if taken { None } else { Some(22) };
                let length = if kind == 3 { 0 } else { 8 };
                assert_eq!(code(kind, 1 << bit, 0, length, TERMS), expected, "{kind} {bit}");
            }
        }
        let simple = Terms { structured: false, ..TERMS };
        assert_eq!(code(0, command_flag::DF, 0, 8, simple), Some(22));
    }

    #[test]
    fn past_the_end_and_around_the_end_of_64_bits() {
        for terms in [TERMS, Terms { size: u64::MAX, ..TERMS }] {
            for (kind, error) in [(0, 22), (1, 28), (4, 22), (5, 22), (6, 28), (7, 22)] {
                assert_eq!(code(kind, 0, terms.size - 8, 8, terms), None);
                assert_eq!(code(kind, 0, terms.size - 8, 9, terms), Some(error));
                assert_eq!(code(kind, 0, u64::MAX, u32::MAX, terms), Some(error));
            }
        }
    }

    #[test]
    fn read_only_refuses_what_writes_and_nothing_else() {
        let terms = Terms { read_only: true, ..TERMS };
        for kind in [1, 4, 6] {
            assert_eq!(code(kind, 0, 0, 8, terms), Some(1));
        }
        for kind in [0, 5, 7] {
            assert_eq!(code(kind, 0, 0, 8, terms), None);
        }
        assert_eq!(code(3, 0, 0, 0, terms), None);
    }

    #[test]
    fn lengths_at_their_bounds() {
        let limit = 32 << 20;
        assert_eq!(code(0, 0, 0, limit, TERMS), None);
        assert_eq!(code(0, 0, 0, limit + 1, TERMS), Some(75));
        assert_eq!(code(0, 0, 0, limit + 1, Terms { structured: false, ..TERMS }), Some(22));
        assert_eq!(code(1, 0, 0, limit, TERMS), None);
        assert_eq!(code(1, 0, 0, u32::MAX, TERMS), Some(22));
        for kind in [4, 5, 6, 7] {
            assert_eq!(code(kind, 0, 0, u32::MAX, TERMS), None, "effect lengths have no bound");
        }
        for kind in [0, 1, 4, 5, 6] {
            assert_eq!(header(kind, 0, TERMS.size, 0).judge(&TERMS), Ok(Command::Nothing));
        }
        assert_eq!(code(7, 0, 0, 0, TERMS), Some(22));
        assert_eq!(code(7, 0, 0, 8, Terms { allocation: false, ..TERMS }), Some(22));
    }

    #[test]
    fn flush_takes_no_range_and_unknown_commands_are_refused() {
        assert_eq!(code(3, 0, 1, 0, TERMS), Some(22));
        assert_eq!(code(3, 0, 0, 1, TERMS), Some(22));
        for kind in [8, 9, u16::MAX] {
            assert_eq!(code(kind, 0, 0, 0, TERMS), Some(22));
        }
        assert!(header(2, 0, 0, 0).disconnects());
    }

    #[test]
    fn only_writes_have_a_payload() {
        for kind in 0..10 {
            let expected = if kind == 1 { 99 } else { 0 };
            assert_eq!(header(kind, 0, 0, 99).payload(), expected);
        }
    }
}
