//! The handshake as the client speaks it: client flags, option headers, option payloads.
//!
//! Pure. Called by `handshake`, which has bounded the payload's length before it was read. What
//! is malformed is an [`OptionError`] with the text that goes back to the client.

use bytes::Buf;

use super::{FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OPTION_MAGIC};
use crate::limits::NBD_STRING_BYTES_MAX;
use crate::units::convert::u32_to_usize;

/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of the client's flags.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes before an option's payload.
pub const OPTION_HEADER_BYTES: usize = 16;

/// What the server says first: both magics and its handshake flags.
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[0..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..18].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// What the client answered to the greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientFlags {
    /// Options other than EXPORT_NAME may follow.
    pub fixed_newstyle: bool,
    /// No 124 zero bytes after EXPORT_NAME.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Reads the flags; `None` if there is one that we do not know: hang up, says the text.
    pub fn decode(bytes: [u8; CLIENT_FLAGS_BYTES]) -> Option<Self> {
        let (fixed, zeroes) = (u32::from(FLAG_FIXED_NEWSTYLE), u32::from(FLAG_NO_ZEROES));
        let flags = u32::from_be_bytes(bytes);
        (flags & !(fixed | zeroes) == 0)
            .then_some(Self { fixed_newstyle: flags & fixed != 0, no_zeroes: flags & zeroes != 0 })
    }
}

/// Options by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// Open by name, no way to answer an error.
    ExportName,
    /// The client leaves.
    Abort,
    /// List the exports.
    List,
    /// Encrypt from here on.
    StartTls,
    /// Describe an export.
    Info,
    /// Describe and open an export.
    Go,
    /// Use structured replies.
    StructuredReply,
    /// List metadata contexts.
    ListMetaContext,
    /// Choose metadata contexts.
    SetMetaContext,
    /// All others, EXTENDED_HEADERS (11) among them.
    Other,
}

/// An option's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// The number, which goes back in each answer.
    pub code: u32,
    /// Bytes of payload that follow. Not yet bounded.
    pub length: u32,
}

impl OptionHeader {
    /// Reads a header; `None` if the magic is wrong.
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<Self> {
        let mut rest = &bytes[..];
        let magic = rest.get_u64();
        let (code, length) = (rest.get_u32(), rest.get_u32());
        (magic == OPTION_MAGIC).then_some(Self { code, length })
    }

    /// Which option it is.
    pub const fn kind(&self) -> OptionKind {
        match self.code {
            1 => OptionKind::ExportName,
            2 => OptionKind::Abort,
            3 => OptionKind::List,
            5 => OptionKind::StartTls,
            6 => OptionKind::Info,
            7 => OptionKind::Go,
            8 => OptionKind::StructuredReply,
            9 => OptionKind::ListMetaContext,
            10 => OptionKind::SetMetaContext,
            _ => OptionKind::Other,
        }
    }
}

/// Why a payload is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// A length or a count inside names more than there is.
    #[error("option payload ends before its {0}")]
    Truncated(&'static str),
    /// Bytes are left over.
    #[error("option payload has bytes behind its end")]
    Trailing,
    /// Longer than the protocol's bound for strings.
    #[error("{0} is longer than 4096 bytes")]
    TooLong(&'static str),
    /// No UTF-8, or NUL inside.
    #[error("{0} is no text")]
    NoText(&'static str),
    /// A query without namespace.
    #[error("metadata query has no namespace")]
    NoNamespace,
    /// An option that carries nothing came with a payload.
    #[error("option takes no payload")]
    NotEmpty,
}

/// Checks a string of the protocol: UTF-8, no NUL, at most 4096 bytes.
pub fn text<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a str, OptionError> {
    if bytes.len() > NBD_STRING_BYTES_MAX {
        return Err(OptionError::TooLong(what));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        Ok(_) | Err(_) => Err(OptionError::NoText(what)),
    }
}

/// Takes a string with its 32-bit length in front from `rest`.
fn counted_text<'a>(rest: &mut &'a [u8], what: &'static str) -> Result<&'a str, OptionError> {
    let length = rest.try_get_u32().map_err(|_| OptionError::Truncated(what))?;
    let (bytes, behind) =
        rest.split_at_checked(u32_to_usize(length)).ok_or(OptionError::Truncated(what))?;
    *rest = behind;
    text(bytes, what)
}

/// For options without payload.
pub fn empty(payload: &[u8]) -> Result<(), OptionError> {
    if payload.is_empty() { Ok(()) } else { Err(OptionError::NotEmpty) }
}

/// Payload of INFO and GO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export; empty for the default one.
    pub name: &'a str,
    /// NAME was asked for.
    pub wants_name: bool,
    /// DESCRIPTION was asked for.
    pub wants_description: bool,
    /// BLOCK_SIZE was asked for.
    pub wants_block_size: bool,
}

impl<'a> InfoRequest<'a> {
    /// Reads the payload. Unknown information requests are ignored, as the text demands.
    pub fn decode(payload: &'a [u8]) -> Result<Self, OptionError> {
        let mut rest = payload;
        let name = counted_text(&mut rest, "export name")?;
        let mut request =
            Self { name, wants_name: false, wants_description: false, wants_block_size: false };
        let what = OptionError::Truncated("information requests");
        let count = rest.try_get_u16().map_err(|_| what)?;
        for _ in 0..count {
            match rest.try_get_u16().map_err(|_| what)? {
                1 => request.wants_name = true,
                2 => request.wants_description = true,
                3 => request.wants_block_size = true,
                _ => (),
            }
        }
        if rest.is_empty() { Ok(request) } else { Err(OptionError::Trailing) }
    }
}

/// Payload of LIST_META_CONTEXT and SET_META_CONTEXT, boiled down to what this server has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// The export the contexts are for.
    pub name: &'a str,
    /// There was no query: to list, that means all.
    pub no_query: bool,
    /// `base:` was among the queries: a wildcard to list, nothing to select.
    pub base_wildcard: bool,
    /// `base:allocation` was among the queries.
    pub allocation: bool,
}

impl<'a> ContextRequest<'a> {
    /// Reads the payload. Each query is checked; those of unknown namespaces or leaves are
    /// ignored, as the text demands.
    pub fn decode(payload: &'a [u8]) -> Result<Self, OptionError> {
        let mut rest = payload;
        let name = counted_text(&mut rest, "export name")?;
        let count =
            rest.try_get_u32().map_err(|_| OptionError::Truncated("number of metadata queries"))?;
        let mut request =
            Self { name, no_query: count == 0, base_wildcard: false, allocation: false };
        for _ in 0..count {
            // The loop ends with the payload, whatever `count` says: each query takes 4 bytes.
            match counted_text(&mut rest, "metadata query")? {
                "base:" => request.base_wildcard = true,
                super::CONTEXT_ALLOCATION => request.allocation = true,
                other if other.contains(':') => (),
                _ => return Err(OptionError::NoNamespace),
            }
        }
        if rest.is_empty() { Ok(request) } else { Err(OptionError::Trailing) }
    }

    /// Whether `base:allocation` belongs in the answer to LIST_META_CONTEXT.
    pub const fn lists_allocation(&self) -> bool {
        self.no_query || self.base_wildcard || self.allocation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_greeting() {
        assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn client_flags_beyond_the_two_are_refused() {
        let both = ClientFlags { fixed_newstyle: true, no_zeroes: true };
        assert_eq!(ClientFlags::decode([0, 0, 0, 3]), Some(both));
        assert!(!ClientFlags::decode([0, 0, 0, 0]).unwrap().fixed_newstyle);
        for bit in 2..32 {
            assert_eq!(ClientFlags::decode((3 | 1u32 << bit).to_be_bytes()), None, "bit {bit}");
        }
    }

    #[test]
    fn golden_option_header() {
        let header = OptionHeader::decode(b"IHAVEOPT\x00\x00\x00\x07\x00\x01\x02\x03").unwrap();
        assert_eq!(header, OptionHeader { code: 7, length: 0x1_0203 });
        assert_eq!(header.kind(), OptionKind::Go);
        assert_eq!(OptionHeader::decode(b"IHAVEOPt\x00\x00\x00\x07\x00\x01\x02\x03"), None);
        for code in [0, 4, 11, u32::MAX] {
            assert_eq!(OptionHeader { code, length: 0 }.kind(), OptionKind::Other);
        }
    }

    #[test]
    fn golden_info_request() {
        let payload = b"\x00\x00\x00\x04vol0\x00\x03\x00\x03\x00\x00\x00\x63";
        let request = InfoRequest::decode(payload).unwrap();
        assert_eq!(request.name, "vol0");
        assert!(request.wants_block_size && !request.wants_name && !request.wants_description);
    }

    #[test]
    fn golden_context_request() {
        let payload = b"\x00\x00\x00\x01v\x00\x00\x00\x02\x00\x00\x00\x0fbase:allocation\
                        \x00\x00\x00\x07qemu:xy";
        let request = ContextRequest::decode(payload).unwrap();
        let expected =
            ContextRequest { name: "v", no_query: false, base_wildcard: false, allocation: true };
        assert_eq!(request, expected);
    }

    /// Each shorter payload and each with a byte more is refused, for both formats.
    #[test]
    fn no_other_length_is_taken() {
        let info = b"\x00\x00\x00\x04vol0\x00\x02\x00\x03\x00\x01".to_vec();
        let context = b"\x00\x00\x00\x01v\x00\x00\x00\x01\x00\x00\x00\x05base:".to_vec();
        for length in 0..info.len() {
            assert!(InfoRequest::decode(&info[..length]).is_err(), "{length}");
        }
        for length in 0..context.len() {
            assert!(ContextRequest::decode(&context[..length]).is_err(), "{length}");
        }
        let longer = |bytes: &[u8]| [bytes, b"x"].concat();
        assert_eq!(InfoRequest::decode(&longer(&info)), Err(OptionError::Trailing));
        assert_eq!(ContextRequest::decode(&longer(&context)), Err(OptionError::Trailing));
    }

    #[test]
    fn lengths_and_counts_that_lie_are_named() {
        let huge = b"\xff\xff\xff\xffvol0\x00\x00";
        assert_eq!(InfoRequest::decode(huge), Err(OptionError::Truncated("export name")));
        let many = b"\x00\x00\x00\x00\xff\xff\xff\xff";
        assert_eq!(ContextRequest::decode(many), Err(OptionError::Truncated("metadata query")));
        let bare = b"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x04base";
        assert_eq!(ContextRequest::decode(bare), Err(OptionError::NoNamespace));
        assert_eq!(text(&[b'a'; 4097], "name"), Err(OptionError::TooLong("name")));
        assert_eq!(text(b"a\0b", "name"), Err(OptionError::NoText("name")));
        assert_eq!(text(b"a\xff", "name"), Err(OptionError::NoText("name")));
        assert!(text(&[b'a'; 4096], "name").is_ok());
    }

    #[test]
    fn wildcards_list_and_do_not_select() {
        let none = ContextRequest::decode(&[0; 8]).unwrap();
        assert!(none.lists_allocation() && !none.allocation);
        let wildcard =
            ContextRequest::decode(b"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x05base:");
        assert!(wildcard.unwrap().lists_allocation() && !wildcard.unwrap().allocation);
    }
}
