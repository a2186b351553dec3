//! Typed access to a parsed table that gathers problems instead of stopping at the first.
//!
//! A reader is asked for each key by name and type. What it was asked for is what is known: when
//! all was read, [`Reader::finish`] refuses every other key, with the nearest known one.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::path::{Component, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::load::Kind;
use super::problem::Problem;
use super::quantity::{
    DURATION_WANTED, SIZE_WANTED, Unfit, format_duration, format_size, parse_duration, parse_size,
};
use super::text::Text;
use crate::units::numbers::ByteCount;

/// A table of the file: the top, a `[section]`, or one of a list.
#[derive(Debug, Clone)]
pub(super) struct Section<'d> {
    /// Its name, empty for the top. Members of a list share the name of the list.
    pub(super) path: String,
    /// `None` if it is not in the file: every key of it is missing.
    pub(super) table: Option<&'d DeTable<'d>>,
    /// Where it begins.
    pub(super) span: Range<usize>,
}

impl Section<'_> {
    /// Whether the file has that key here, right or wrong.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| entry(table, key).is_some())
    }

    fn full(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// Reads one file.
#[derive(Debug)]
pub(super) struct Reader<'d> {
    /// What file it is.
    pub(super) kind: Kind,
    /// Its text.
    pub(super) text: &'d Text,
    /// What was found so far.
    pub(super) problems: Vec<Problem>,
    known: BTreeMap<String, Vec<&'static str>>,
    visited: Vec<Section<'d>>,
}

impl<'d> Reader<'d> {
    /// A reader and the top of the file.
    pub(super) fn new(kind: Kind, text: &'d Text, root: &'d DeTable<'d>) -> (Self, Section<'d>) {
        let top = Section { path: String::new(), table: Some(root), span: 0..0 };
        let visited = vec![top.clone()];
        (Self { kind, text, problems: Vec::new(), known: BTreeMap::new(), visited }, top)
    }

    /// Notes a problem at a place of the file.
    pub(super) fn problem(
        &mut self,
        span: Range<usize>,
        key: impl Into<String>,
        met: impl Into<String>,
        wanted: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.problems.push(Problem {
            file: self.text.file.clone(),
            place: Some(self.text.place(&span)),
            key: key.into(),
            met: met.into(),
            wanted: wanted.into(),
            fix: fix.into(),
            also: None,
        });
    }

    /// Notes that two values cannot stand together; `keys` are both their names.
    pub(super) fn contradiction(
        &mut self,
        keys: (&str, &str),
        spans: (Range<usize>, Range<usize>),
        met: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let key =
            if keys.0 == keys.1 { keys.0.into() } else { format!("{} and {}", keys.0, keys.1) };
        self.problem(spans.0, key, met, "", fix);
        let also = self.text.place(&spans.1);
        if let Some(problem) = self.problems.last_mut() {
            problem.also = Some(also);
        }
    }

    /// Notes that a key is missing.
    pub(super) fn missing(&mut self, section: &Section<'d>, key: &str, fix: &str) {
        let name = section.full(key);
        let met = if section.has(key) { "is empty" } else { "missing" };
        if section.table.is_some() && !section.path.is_empty() {
            self.problem(section.span.clone(), name, met, "", fix);
        } else {
            let mut problem = Problem::of_file(&self.text.file, met, fix);
            problem.key = name;
            self.problems.push(problem);
        }
    }

    /// The value of a key, which is known from now on.
    fn value(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
    ) -> Option<&'d Spanned<DeValue<'d>>> {
        self.known.entry(section.path.clone()).or_default().push(key);
        section.table.and_then(|table| entry(table, key)).map(|(_, value)| value)
    }

    /// A `[section]`; if it is not there, one without keys.
    pub(super) fn section(&mut self, parent: &Section<'d>, key: &'static str) -> Section<'d> {
        let path = parent.full(key);
        let found = self.value(parent, key);
        let span = found.map_or(0..0, Spanned::span);
        let mut section = Section { path, table: None, span };
        match found.map(Spanned::get_ref) {
            None => {}
            Some(DeValue::Table(table)) => {
                section.table = Some(table);
                self.visited.push(section.clone());
            }
            Some(other) => {
                let met = format!("is {}", kind_of(other));
                let fix =
                    format!("write [{}] on a line of its own and its keys below", section.path);
                self.problem(section.span.clone(), section.path.clone(), met, "a section", fix);
            }
        }
        section
    }

    /// The members of a list of tables, as `[[key]]` or `key = [{ .. }]`.
    pub(super) fn list(&mut self, parent: &Section<'d>, key: &'static str) -> Vec<Section<'d>> {
        let path = parent.full(key);
        let Some(value) = self.value(parent, key) else { return Vec::new() };
        let DeValue::Array(members) = value.get_ref() else {
            let met = format!("is {}", kind_of(value.get_ref()));
            let fix = if parent.path.is_empty() {
                format!("write [[{key}]], once for each")
            } else {
                format!("write {key} = [{{ .. }}]")
            };
            self.problem(value.span(), path, met, "a list", fix);
            return Vec::new();
        };
        let mut sections = Vec::new();
        for member in members.iter() {
            if let DeValue::Table(table) = member.get_ref() {
                let section =
                    Section { path: path.clone(), table: Some(table), span: member.span() };
                self.visited.push(section.clone());
                sections.push(section);
            } else {
                let met = format!("a member of it is {}", kind_of(member.get_ref()));
                let fix = "write { path = \"..\", size = \"..\" }";
                self.problem(member.span(), path.clone(), met, "a table", fix);
            }
        }
        sections
    }

    /// A string that `parse` understands.
    pub(super) fn parsed<T>(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        wanted: &str,
        parse: impl FnOnce(&str) -> Result<T, Unfit>,
    ) -> Option<Spanned<T>> {
        let value = self.value(section, key)?;
        let result = match value.get_ref().as_str() {
            Some(text) => parse(text),
            None => Err(self.unquoted(key, value.get_ref(), &value.span())),
        };
        self.keep(section, key, value.span(), wanted, result)
    }

    /// A value of any kind that `parse` understands.
    pub(super) fn value_of<T>(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        wanted: &str,
        parse: impl FnOnce(&DeValue<'d>) -> Result<T, Unfit>,
    ) -> Option<T> {
        let value = self.value(section, key)?;
        let result = parse(value.get_ref());
        self.keep(section, key, value.span(), wanted, result).map(Spanned::into_inner)
    }

    /// A size within bounds.
    pub(super) fn size(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        bounds: RangeInclusive<u64>,
    ) -> Option<Spanned<ByteCount>> {
        let value = self.quantity(section, key, SIZE_WANTED, parse_size)?;
        let bytes = value.get_ref().0;
        let print = |bytes: u64| format_size(ByteCount(bytes));
        self.bounded(section, key, value.span(), bytes, bounds, print).then_some(value)
    }

    /// A duration within bounds, which are in milliseconds.
    pub(super) fn duration(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        bounds: (u64, u64),
    ) -> Option<Spanned<Duration>> {
        let value = self.quantity(section, key, DURATION_WANTED, parse_duration)?;
        let ms = u64::try_from(value.get_ref().as_millis()).unwrap_or(u64::MAX);
        let print = |ms: u64| format_duration(Duration::from_millis(ms));
        self.bounded(section, key, value.span(), ms, bounds.0..=bounds.1, print).then_some(value)
    }

    /// A string with a unit; a bare number is read as such a string, to say what it lacks.
    fn quantity<T>(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        wanted: &str,
        parse: impl FnOnce(&str) -> Result<T, Unfit>,
    ) -> Option<Spanned<T>> {
        let value = self.value(section, key)?;
        let met = value.get_ref();
        let result = match met.as_str() {
            Some(text) => parse(text),
            None if met.is_integer() || met.is_float() => parse(self.text.slice(&value.span())),
            None => Err(self.unquoted(key, met, &value.span())),
        };
        self.keep(section, key, value.span(), wanted, result)
    }

    fn bounded(
        &mut self,
        section: &Section<'d>,
        key: &str,
        span: Range<usize>,
        value: u64,
        bounds: RangeInclusive<u64>,
        print: impl Fn(u64) -> String,
    ) -> bool {
        let (least, most) = (*bounds.start(), *bounds.end());
        let (relation, bound) = if value < least {
            ("less", least)
        } else if value > most {
            ("more", most)
        } else {
            return true;
        };
        let met = format!("{} is {relation} than {}", print(value), print(bound));
        let wanted = format!("{} to {}", print(least), print(most));
        let fix = format!("write \"{}\"", print(bound));
        self.problem(span, section.full(key), met, wanted, fix);
        false
    }

    /// A whole number from 0 to `most`.
    pub(super) fn count(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        most: u32,
    ) -> Option<u32> {
        let value = self.value(section, key)?;
        let text = self.text.slice(&value.span());
        let count = value.get_ref().as_integer().and_then(|_| text.parse::<u32>().ok());
        if let Some(count) = count.filter(|count| *count <= most) {
            return Some(count);
        }
        let (met, wanted) = (format!("{text} is no such number"), format!("0 to {most}"));
        self.problem(value.span(), section.full(key), met, &wanted, format!("write {most}"));
        None
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, section: &Section<'d>, key: &'static str) -> Option<bool> {
        let value = self.value(section, key)?;
        if let DeValue::Boolean(yes) = value.get_ref() {
            return Some(*yes);
        }
        let met = format!("is {}", kind_of(value.get_ref()));
        let fix = "write true or false, without quotes";
        self.problem(value.span(), section.full(key), met, "true or false", fix);
        None
    }

    /// One of several words.
    pub(super) fn choice<T: Copy>(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        words: &[(&'static str, T)],
    ) -> Option<Spanned<T>> {
        let wanted = words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>();
        let wanted = wanted.join(", ");
        self.parsed(section, key, &wanted, |text| {
            words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
                let fix = match nearest(text, words.iter().map(|(word, _)| *word)) {
                    Some(word) => format!("did you mean \"{word}\"?"),
                    None => "write one of them".into(),
                };
                Unfit { met: format!("{text:?} is no value of it"), fix }
            })
        })
    }

    /// A path; a relative one starts at the directory of the file.
    pub(super) fn path(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
    ) -> Option<Spanned<PathBuf>> {
        let base = &self.text.base;
        self.parsed(section, key, "a path", |text| resolve(base, text))
    }

    /// A list of 1 to `most` strings that `parse` understands, such as `example`. What is wrong of it has
    /// its own place each.
    pub(super) fn strings<T>(
        &mut self,
        section: &Section<'d>,
        key: &'static str,
        (wanted, example, most): (&str, &str, usize),
        parse: impl Fn(&str) -> Result<T, Unfit>,
    ) -> Option<Vec<T>> {
        let value = self.value(section, key)?;
        let fix =
            format!("write {key} = [\"{example}\"], with 1 to {most} of them, or take it out");
        let DeValue::Array(members) = value.get_ref() else {
            let met = format!("is {}", kind_of(value.get_ref()));
            self.problem(value.span(), section.full(key), met, wanted, fix);
            return None;
        };
        if members.is_empty() || members.len() > most {
            let met = format!("has {} entries", members.len());
            self.problem(value.span(), section.full(key), met, wanted, fix);
            return None;
        }
        let mut all = Vec::new();
        for member in members.iter() {
            let result = match member.get_ref().as_str() {
                Some(text) => parse(text),
                None => Err(Unfit {
                    met: format!("a member of it is {}", kind_of(member.get_ref())),
                    fix: format!("write \"{example}\""),
                }),
            };
            let parsed = self.keep(section, key, member.span(), wanted, result);
            all.extend(parsed.map(Spanned::into_inner));
        }
        (all.len() == members.len()).then_some(all)
    }

    /// A kind of value that is not a string where a string is wanted.
    fn unquoted(&self, key: &str, met: &DeValue<'_>, span: &Range<usize>) -> Unfit {
        let plain = matches!(
            met,
            DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_)
        );
        let fix = if plain {
            format!("put it in quotes: {key} = \"{}\"", self.text.slice(span))
        } else {
            format!("write {key} = \"..\"")
        };
        Unfit { met: format!("is {}", kind_of(met)), fix }
    }

    fn keep<T>(
        &mut self,
        section: &Section<'d>,
        key: &str,
        span: Range<usize>,
        wanted: &str,
        result: Result<T, Unfit>,
    ) -> Option<Spanned<T>> {
        match result {
            Ok(value) => Some(Spanned::new(span, value)),
            Err(Unfit { met, fix }) => {
                self.problem(span, section.full(key), met, wanted, fix);
                None
            }
        }
    }

    /// Refuses every key that nobody asked for.
    pub(super) fn finish(mut self) -> Vec<Problem> {
        let visited = std::mem::take(&mut self.visited);
        for section in &visited {
            for (key, value) in section.table.into_iter().flatten() {
                let name: &str = key.get_ref();
                let known = self.known.get(&section.path).is_some_and(|keys| keys.contains(&name));
                if known {
                    continue;
                }
                let table = matches!(value.get_ref(), DeValue::Table(_) | DeValue::Array(_));
                let what = if table && section.path.is_empty() { "section" } else { "key" };
                let met = format!("unknown {what}");
                let fix = self.where_it_belongs(&section.path, name);
                self.problem(key.span(), section.full(name), met, "", fix);
            }
        }
        self.problems
    }

    fn where_it_belongs(&self, path: &str, name: &str) -> String {
        let here: &[&str] = self.known.get(path).map_or(&[], Vec::as_slice);
        if let Some(near) = nearest(name, here.iter().copied()) {
            return format!("did you mean `{near}`?");
        }
        let homes: Vec<&str> = self
            .known
            .iter()
            .filter(|(_, keys)| keys.contains(&name))
            .map(|(home, _)| home.as_str())
            .collect();
        if homes.contains(&"") {
            return format!("`{name}` stands at the top of the file, before the first [section]");
        }
        if !homes.is_empty() {
            return format!("`{name}` belongs to `{}`", homes.join("` or `"));
        }
        if let (Some(owner), "") = (self.kind.owner_of(name), path) {
            return format!("take it out; it is a key of {owner}, not of {}", self.kind);
        }
        let mut all: Vec<&str> = here.to_vec();
        all.sort_unstable();
        all.dedup();
        format!("take it out; known here: {}", all.join(", "))
    }
}

/// A key of a table with its place, and its value.
pub(super) fn entry<'t, 'd>(
    table: &'t DeTable<'d>,
    key: &str,
) -> Option<(&'t Spanned<std::borrow::Cow<'d, str>>, &'t Spanned<DeValue<'d>>)> {
    table.iter().find(|(name, _)| name.get_ref() == key)
}

/// The kind of a value with its article.
fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A path in full, without `.` and doubled slashes, so that equal paths compare equal.
pub(super) fn resolve(base: &std::path::Path, text: &str) -> Result<PathBuf, Unfit> {
    if text.is_empty() || text.contains('\0') {
        let met = format!("{text:?} is no path");
        return Err(Unfit { met, fix: "name a file or directory".into() });
    }
    let joined = base.join(text);
    Ok(joined.components().filter(|part| *part != Component::CurDir).collect())
}

/// The nearest word, if it is near enough to be a slip of the pen.
fn nearest<'w>(text: &str, words: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    let reach = if text.chars().count() <= 4 { 1 } else { text.chars().count() / 3 };
    words
        .map(|word| (distance(text, word), word))
        .filter(|(distance, _)| *distance <= reach)
        .min()
        .map(|(_, word)| word)
}

/// Edit distance in which two neighbours in the wrong order count once (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    // Keys are short; whatever is longer is nobody's neighbour.
    const LENGTH_MAX: usize = 64;
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len() > LENGTH_MAX || b.len() > LENGTH_MAX {
        return usize::MAX;
    }
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = change.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_pen_are_near_and_other_words_are_not() {
        let keys = ["data_dir", "listen", "nbd_listen", "raid"];
        let near = |text| nearest(text, keys.into_iter());
        assert_eq!(near("data_dri"), Some("data_dir"));
        assert_eq!(near("datadir"), Some("data_dir"));
        assert_eq!(near("lisen"), Some("listen"));
        assert_eq!(near("riad"), Some("raid"));
        assert_eq!(near("port"), None);
        assert_eq!(near(&"x".repeat(10_000)), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }

    #[test]
    fn equal_paths_compare_equal() {
        let base = std::path::Path::new("/etc/mirrorhub");
        for text in ["state", "./state", "state/", ".//state", "/etc/./mirrorhub/state"] {
            assert_eq!(resolve(base, text).unwrap(), PathBuf::from("/etc/mirrorhub/state"));
        }
        assert!(resolve(base, "").is_err() && resolve(base, "a\0b").is_err());
    }
}
