//! What the contract names and this version does not do yet: refused at load, by name.
//!
//! The one table of such keys and values. Whoever builds one of them deletes its rows, and nothing
//! else has to change: the readers know all values already, and a key that is only named here is
//! read by whoever builds it. A configuration is never accepted with a promise that is not kept.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::load::Kind;
use super::reader::Reader;

/// One row.
#[derive(Debug, Clone, Copy)]
pub struct Unavailable {
    /// In which files.
    pub kinds: &'static [Kind],
    /// Key at the top of the file, or name of a section.
    pub key: &'static str,
    /// What to do instead.
    pub fix: &'static str,
}

const BOTH: &[Kind] = &[Kind::Hub, Kind::Source];

const fn row(kinds: &'static [Kind], key: &'static str, fix: &'static str) -> Unavailable {
    Unavailable { kinds, key, fix }
}

/// All of them.
pub const UNAVAILABLE: &[Unavailable] =
    &[row(BOTH, "plain_networks", "take it out and listen on loopback")];

/// Whether `key` in `section` is refused by name, whatever its value.
pub(super) fn is_named(kind: Kind, section: &str, key: &str) -> bool {
    section.is_empty() && UNAVAILABLE.iter().any(|row| row.kinds.contains(&kind) && row.key == key)
}

/// Refuses what of the table stands in the file.
pub(super) fn check(reader: &mut Reader<'_>, root: &DeTable<'_>) {
    let kind = reader.kind;
    for row in UNAVAILABLE.iter().filter(|row| row.kinds.contains(&kind)) {
        if let Some((key, value)) = entry(root, row.key) {
            let is_section = value.get_ref().as_table().is_some();
            let what = if is_section { format!("[{}]", row.key) } else { row.key.to_owned() };
            let met = format!("{what} is not available in this version");
            reader.problem(key.span(), row.key.to_owned(), met, "", row.fix);
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
