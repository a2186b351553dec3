//! What the contract names and this version does not do yet: refused at load, by name.
//!
//! The one table of such keys and values. Whoever builds one of them deletes its rows, and nothing
//! else has to change: the readers know all values already, and a key that is only named here is
//! read by whoever builds it. A configuration is never accepted with a promise that is not kept.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::load::Kind;
use super::reader::Reader;

/// When a row applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The key or section is there at all.
    Present,
    /// The key has this value.
    Is(&'static str),
}

/// One row.
#[derive(Debug, Clone, Copy)]
pub struct Unavailable {
    /// In which files.
    pub kinds: &'static [Kind],
    /// Section, empty for the top of the file.
    pub section: &'static str,
    /// Key, or name of a section.
    pub key: &'static str,
    /// When it applies.
    pub when: When,
    /// What to do instead.
    pub fix: &'static str,
}

const BOTH: &[Kind] = &[Kind::Hub, Kind::Source];
const SOURCE: &[Kind] = &[Kind::Source];
const SOURCE_FILE: &[Kind] = &[Kind::SourceFile];

const fn row(
    kinds: &'static [Kind],
    section: &'static str,
    key: &'static str,
    when: When,
    fix: &'static str,
) -> Unavailable {
    Unavailable { kinds, section, key, when, fix }
}

/// All of them.
pub const UNAVAILABLE: &[Unavailable] = &[
    row(SOURCE, "pool", "on_full", When::Is("enospc"), "write \"wait\""),
    row(BOTH, "", "tls", When::Present, "take it out and listen on loopback or unix sockets"),
    row(BOTH, "", "plain_networks", When::Present, "take it out and listen on loopback"),
    row(SOURCE_FILE, "", "space_limit", When::Present, "take it out"),
    row(SOURCE_FILE, "", "bandwidth_limit", When::Present, "take it out"),
];

/// Whether `key` in `section` is refused by name, whatever its value.
pub(super) fn is_named(kind: Kind, section: &str, key: &str) -> bool {
    UNAVAILABLE.iter().any(|row| {
        row.when == When::Present
            && row.kinds.contains(&kind)
            && row.section == section
            && row.key == key
    })
}

/// Refuses what of the table stands in the file.
pub(super) fn check(reader: &mut Reader<'_>, root: &DeTable<'_>) {
    let kind = reader.kind;
    for row in UNAVAILABLE.iter().filter(|row| row.kinds.contains(&kind)) {
        let table = match row.section {
            "" => Some(root),
            // A section that is no table is reported by the reader.
            section => entry(root, section).and_then(|(_, value)| value.get_ref().as_table()),
        };
        if let Some((key, value)) = table.and_then(|table| entry(table, row.key)) {
            refuse(reader, row, key, value);
        }
    }
}

/// A key of a table with its place, and its value.
pub(super) fn entry<'t, 'd>(
    table: &'t DeTable<'d>,
    key: &str,
) -> Option<(&'t Spanned<std::borrow::Cow<'d, str>>, &'t Spanned<DeValue<'d>>)> {
    table.iter().find(|(name, _)| name.get_ref() == key)
}

fn refuse(
    reader: &mut Reader<'_>,
    row: &Unavailable,
    key: &Spanned<std::borrow::Cow<'_, str>>,
    value: &Spanned<DeValue<'_>>,
) {
    let name = match row.section {
        "" => row.key.to_owned(),
        section => format!("{section}.{}", row.key),
    };
    let (what, span) = match (row.when, value.get_ref()) {
        (When::Present, DeValue::Table(_)) if row.section.is_empty() => {
            (format!("[{name}]"), key.span())
        }
        (When::Present, _) => (name.clone(), key.span()),
        (When::Is(word), DeValue::String(text)) if text == word => {
            (format!("{} = \"{word}\"", row.key), value.span())
        }
        (When::Is(_), _) => return,
    };
    let met = format!("{what} is not available in this version");
    reader.problem(span, name, met, "", row.fix);
}
