//! Reads and judges one file of `sources.d`.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::common::{name, volumes};
use super::load::Kind;
use super::problem::Problem;
use super::quantity::Unfit;
use super::reader::{Reader, Section};
use super::schema::SourceFile;
use super::text::Text;
use crate::limits::{
    CERTIFICATES_MAX, MIB, NVRAM_SHARE_BYTES_MIN, POOL_DEVICE_BYTES_MAX, RING_BYTES_MAX,
    SOURCE_LOG_STEP_BYTES,
};
use crate::link::shown::{Fingerprint, NoFingerprint};
use crate::units::names::SourceName;
use crate::units::retention::Retention;
use crate::units::times::parse_timestamp;

/// With less a heartbeat would be stuck behind what may be under way for as long as makes a hub lost.
const BANDWIDTH_MIN: u64 = 4 * MIB;
/// More is no limit on any network.
const BANDWIDTH_MAX: u64 = 1 << 40;
/// What `join_by` looks like, for messages.
const JOIN_BY_WANTED: &str = "a time in UTC or with its zone";
/// What `certificates` looks like, for messages.
const CERTIFICATES_WANTED: &str = "a list of SHA-256 fingerprints";
/// Most that `keep` takes of each kind: all together leave room for names given by hand.
const KEEP_LAST_MAX: u32 = 64;
const KEEP_HOURLY_MAX: u32 = 72;
const KEEP_DAILY_MAX: u32 = 60;

/// What a file says, with the places that the hub's own judgement may have to name.
#[derive(Debug)]
pub(super) struct Judged {
    /// The file, if all of it is right.
    pub(super) file: Option<SourceFile>,
    /// `name`, also if something else is wrong.
    pub(super) name: Option<Spanned<SourceName>>,
    /// Where `nvram_share` stands.
    pub(super) share: Option<Range<usize>>,
    /// Everything wrong.
    pub(super) problems: Vec<Problem>,
}

impl Judged {
    /// Of a file that is not read now: what it said when it was.
    pub(super) fn standing(file: SourceFile) -> Self {
        Self { file: Some(file), name: None, share: None, problems: Vec::new() }
    }
}

/// Reads a parsed file.
pub(super) fn judge(text: &Text, table: &DeTable<'_>) -> Judged {
    let (mut reader, root) = Reader::new(Kind::SourceFile, text, table);
    let name = name::<SourceName>(&mut reader, &root);
    match &name {
        Some(name) => stem_is_name(&mut reader, name),
        None if !root.has("name") => {
            reader.missing(&root, "name", "write name = \"..\", the stem of the file's name");
        }
        None => {}
    }
    let enabled = reader.boolean(&root, "enabled").unwrap_or(true);
    let share = reader.size(&root, "nvram_share", NVRAM_SHARE_BYTES_MIN..=RING_BYTES_MAX);
    let limit = reader.size(&root, "log_limit", SOURCE_LOG_STEP_BYTES..=POOL_DEVICE_BYTES_MAX);
    let space = reader.size(&root, "space_limit", MIB..=POOL_DEVICE_BYTES_MAX);
    let bandwidth = reader.size(&root, "bandwidth_limit", BANDWIDTH_MIN..=BANDWIDTH_MAX);
    let join_by = reader.parsed(&root, "join_by", JOIN_BY_WANTED, |text| {
        let unfit = || Unfit {
            met: format!("{text} is no time"),
            fix: "write one such as \"2026-11-29T12:00:00Z\"".to_owned(),
        };
        parse_timestamp(text).ok_or_else(unfit)
    });
    let certificates = reader.value_of(&root, "certificates", CERTIFICATES_WANTED, certificates);
    let volumes = volumes(&mut reader, &root);
    let keep = keep(&mut reader, &root);
    let problems = reader.finish();
    let file = name.as_ref().filter(|_| problems.is_empty()).map(|name| SourceFile {
        file: text.file.clone(),
        name: name.get_ref().clone(),
        enabled,
        nvram_share: share.as_ref().map(|share| *share.get_ref()),
        log_limit: limit.map(Spanned::into_inner),
        space_limit: space.map(Spanned::into_inner),
        bandwidth_limit: bandwidth.map(Spanned::into_inner),
        join_by: join_by.map(Spanned::into_inner),
        certificates: certificates.unwrap_or_default(),
        volumes,
        keep,
    });
    Judged { file, name, share: share.map(|share| share.span()), problems }
}

fn certificates(value: &DeValue<'_>) -> Result<Vec<Fingerprint>, Unfit> {
    let unfit = |met: String| Unfit {
        met,
        fix: format!(
            "write [\"..\"] with 1 to {CERTIFICATES_MAX} of them, as `openssl x509 -noout -fingerprint -sha256 \
             -in FILE` shows them, or leave it out"
        ),
    };
    let DeValue::Array(members) = value else { return Err(unfit("is no list".to_owned())) };
    if members.is_empty() || members.len() > CERTIFICATES_MAX {
        return Err(unfit(format!("has {} entries", members.len())));
    }
    let one = |member: &Spanned<DeValue<'_>>| {
        let DeValue::String(text) = member.get_ref() else {
            return Err(unfit("has an entry that is no text".to_owned()));
        };
        text.parse().map_err(|error: NoFingerprint| unfit(format!("{text:?} is {error}")))
    };
    members.iter().map(one).collect()
}

fn keep<'d>(reader: &mut Reader<'d>, root: &Section<'d>) -> Option<Retention> {
    let section = reader.section(root, "keep");
    section.table?;
    let mut count = |key, most| reader.count(&section, key, most).unwrap_or(0);
    let (last, hourly, daily) = (
        count("last", KEEP_LAST_MAX),
        count("hourly", KEEP_HOURLY_MAX),
        count("daily", KEEP_DAILY_MAX),
    );
    let drop_when_full = reader.boolean(&section, "drop_when_full").unwrap_or(false);
    Some(Retention { last, hourly, daily, drop_when_full })
}

fn stem_is_name(reader: &mut Reader<'_>, name: &Spanned<SourceName>) {
    let stem = reader.text.file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let stem = stem.unwrap_or_default();
    if stem != name.get_ref().as_str() {
        let met = format!("the name is {}, the file is called {stem}.toml", name.get_ref());
        let fix = format!("rename the file to {}.toml, or write \"{stem}\"", name.get_ref());
        reader.problem(name.span(), "name", met, "the stem of the file's name", fix);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_given_by_hand_have_room_beside_all_that_may_be_kept_by_themselves() {
        let most =
            crate::units::convert::u32_to_usize(KEEP_LAST_MAX + KEEP_HOURLY_MAX + KEEP_DAILY_MAX);
        assert!(most + 32 < crate::limits::KEPT_PER_SOURCE_MAX);
    }
}
