//! Answers to options, and the end of the handshake.
//!
//! Pure. Each function appends one whole message to a buffer, so that an answer of several goes
//! out in one write. Called by `handshake`.

use bytes::{BufMut, BytesMut};

use super::{CONTEXT_ALLOCATION, CONTEXT_ALLOCATION_ID, OPTION_REPLY_MAGIC};
use crate::limits::{NBD_REQUEST_BYTES_MAX, NBD_STRING_BYTES_MAX};
use crate::nbd::export::{ExportInfo, Listed};
use crate::units::convert::{low_u32, to_u64};

const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;
/// Zero bytes that end the answer to EXPORT_NAME for clients that did not decline them.
const RESERVED_BYTES: usize = 124;

/// Errors that an option can get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionRefusal {
    /// The option is unknown here.
    Unsupported,
    /// Known and well-formed, and not allowed now.
    Policy,
    /// Malformed.
    Invalid,
    /// Nothing is taken before TLS.
    TlsRequired,
    /// No such export.
    Unknown,
    /// The server is being stopped.
    Shutdown,
    /// The payload is too long.
    TooBig,
}

impl OptionRefusal {
    const fn wire(self) -> u32 {
        let number = match self {
            Self::Unsupported => 1,
            Self::Policy => 2,
            Self::Invalid => 3,
            Self::TlsRequired => 5,
            Self::Unknown => 6,
            Self::Shutdown => 7,
            Self::TooBig => 9,
        };
        (1 << 31) + number
    }
}

/// The longest beginning of `text` of at most `bytes_max` bytes that is text itself.
pub fn cut_text(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

fn string(text: &str) -> &str {
    cut_text(text, NBD_STRING_BYTES_MAX)
}

/// Strings are cut at 4096 bytes, so lengths fit.
fn length_of(parts: &[&[u8]]) -> u32 {
    parts.iter().map(|part| low_u32(to_u64(part.len()))).sum()
}

fn message(out: &mut BytesMut, option: u32, kind: u32, parts: &[&[u8]]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(length_of(parts));
    for part in parts {
        out.put_slice(part);
    }
}

/// The option is done.
pub fn acknowledge(out: &mut BytesMut, option: u32) {
    message(out, option, ACK, &[]);
}

/// The option is refused; the text is for a person.
pub fn refuse(out: &mut BytesMut, option: u32, refusal: OptionRefusal, text: &str) {
    message(out, option, refusal.wire(), &[string(text).as_bytes()]);
}

/// A line of the list of exports.
pub fn server(out: &mut BytesMut, option: u32, listed: &Listed) {
    let name = string(&listed.name).as_bytes();
    let length = length_of(&[name]).to_be_bytes();
    message(out, option, SERVER, &[&length, name, string(&listed.description).as_bytes()]);
}

/// The information every opened export gets: size and flags.
pub fn info_export(out: &mut BytesMut, option: u32, info: &ExportInfo, flags: u16) {
    let (size, flags) = (info.size.0.to_be_bytes(), flags.to_be_bytes());
    message(out, option, INFO, &[&INFO_EXPORT.to_be_bytes(), &size, &flags]);
}

/// The canonical name.
pub fn info_name(out: &mut BytesMut, option: u32, info: &ExportInfo) {
    let name = string(&info.name).as_bytes();
    message(out, option, INFO, &[&INFO_NAME.to_be_bytes(), name]);
}

/// The description.
pub fn info_description(out: &mut BytesMut, option: u32, info: &ExportInfo) {
    let description = string(&info.description).as_bytes();
    message(out, option, INFO, &[&INFO_DESCRIPTION.to_be_bytes(), description]);
}

/// Sizes of blocks, and of the longest payload.
pub fn info_block_size(out: &mut BytesMut, option: u32, info: &ExportInfo) {
    let parts = [info.minimum_block, info.preferred_block, low_u32(NBD_REQUEST_BYTES_MAX)];
    let [minimum, preferred, payload] = parts.map(u32::to_be_bytes);
    message(out, option, INFO, &[&INFO_BLOCK_SIZE.to_be_bytes(), &minimum, &preferred, &payload]);
}

/// The metadata context `base:allocation`; `id` is 0 in a list.
fn meta_context(out: &mut BytesMut, option: u32, id: u32) {
    message(out, option, META_CONTEXT, &[&id.to_be_bytes(), CONTEXT_ALLOCATION.as_bytes()]);
}

/// `base:allocation` can be selected.
pub fn context_listed(out: &mut BytesMut, option: u32) {
    meta_context(out, option, 0);
}

/// `base:allocation` is selected.
pub fn context_selected(out: &mut BytesMut, option: u32) {
    meta_context(out, option, CONTEXT_ALLOCATION_ID);
}

/// The answer to EXPORT_NAME, which ends the handshake.
pub fn export_name(out: &mut BytesMut, info: &ExportInfo, flags: u16, no_zeroes: bool) {
    out.put_u64(info.size.0);
    out.put_u16(flags);
    if !no_zeroes {
        out.put_bytes(0, RESERVED_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::numbers::ByteCount;

    const MAGIC: &[u8] = b"\x00\x03\xe8\x89\x04\x55\x65\xa9";

    fn bytes(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
        let mut out = BytesMut::new();
        write(&mut out);
        out.to_vec()
    }

    fn info() -> ExportInfo {
        let mut info = ExportInfo::new("v", ByteCount(0x1000));
        info.description = "text".into();
        info
    }

    #[test]
    fn golden_acknowledgement_and_refusals() {
        let expected = [MAGIC, b"\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00"].concat();
        assert_eq!(bytes(|out| acknowledge(out, 2)), expected);
        for (refusal, number) in [
            (OptionRefusal::Unsupported, 1),
            (OptionRefusal::Policy, 2),
            (OptionRefusal::Invalid, 3),
            (OptionRefusal::Unknown, 6),
            (OptionRefusal::Shutdown, 7),
            (OptionRefusal::TooBig, 9),
        ] {
            let tail = [0, 0, 0, 11, 0x80, 0, 0, number, 0, 0, 0, 2, b'n', b'o'];
            assert_eq!(bytes(|out| refuse(out, 11, refusal, "no")), [MAGIC, &tail].concat());
        }
    }

    #[test]
    fn golden_server() {
        let listed = Listed { name: "vol0".into(), description: "hi".into() };
        let tail = b"\x00\x00\x00\x03\x00\x00\x00\x02\x00\x00\x00\x0a\x00\x00\x00\x04vol0hi";
        assert_eq!(bytes(|out| server(out, 3, &listed)), [MAGIC, tail].concat());
    }

    #[test]
    fn golden_information() {
        let tail = b"\x00\x00\x00\x07\x00\x00\x00\x03\x00\x00\x00\x0c\x00\x00\
                     \x00\x00\x00\x00\x00\x00\x10\x00\x04\x6d";
        assert_eq!(bytes(|out| info_export(out, 7, &info(), 0x46d)), [MAGIC, tail].concat());
        let tail = b"\x00\x00\x00\x07\x00\x00\x00\x03\x00\x00\x00\x03\x00\x01v";
        assert_eq!(bytes(|out| info_name(out, 7, &info())), [MAGIC, tail].concat());
        let tail = b"\x00\x00\x00\x07\x00\x00\x00\x03\x00\x00\x00\x06\x00\x02text";
        assert_eq!(bytes(|out| info_description(out, 7, &info())), [MAGIC, tail].concat());
        let tail = b"\x00\x00\x00\x07\x00\x00\x00\x03\x00\x00\x00\x0e\x00\x03\
                     \x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00";
        assert_eq!(bytes(|out| info_block_size(out, 7, &info())), [MAGIC, tail].concat());
    }

    #[test]
    fn golden_contexts() {
        let tail =
            b"\x00\x00\x00\x0a\x00\x00\x00\x04\x00\x00\x00\x13\x00\x00\x00\x01base:allocation";
        assert_eq!(bytes(|out| context_selected(out, 10)), [MAGIC, tail].concat());
        let tail =
            b"\x00\x00\x00\x09\x00\x00\x00\x04\x00\x00\x00\x13\x00\x00\x00\x00base:allocation";
        assert_eq!(bytes(|out| context_listed(out, 9)), [MAGIC, tail].concat());
    }

    #[test]
    fn golden_export_name_with_and_without_zeroes() {
        let short = b"\x00\x00\x00\x00\x00\x00\x10\x00\x04\x6d";
        assert_eq!(bytes(|out| export_name(out, &info(), 0x46d, true)), short);
        let long = [&short[..], &[0; 124]].concat();
        assert_eq!(bytes(|out| export_name(out, &info(), 0x46d, false)), long);
    }

    #[test]
    fn long_texts_are_cut_between_letters() {
        assert_eq!(cut_text("aé", 2), "a");
        let long = "é".repeat(4000);
        let refusal = bytes(|out| refuse(out, 7, OptionRefusal::Policy, &long));
        assert_eq!(refusal.len(), 20 + 4096);
        assert!(std::str::from_utf8(&refusal[20..]).is_ok());
    }
}
