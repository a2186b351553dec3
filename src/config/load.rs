//! Files in, configurations or problems out.
//!
//! Called by every command that takes `--config`. A file with a syntax error is not judged further:
//! what stands behind the error may not be what was meant.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::common;
use super::problem::{Problem, Problems};
use super::reader::Reader;
use super::schema::{
    HUB_DATA_DIR, HubConfig, ProcessConfig, SOURCE_DATA_DIR, SourceConfig, SourceFile,
};
use super::source_file::Judged;
use super::text::Text;
use super::{hub, source, source_file};

/// What a file configures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `hub.toml`.
    Hub,
    /// `source.toml`.
    Source,
    /// A file of `sources.d`.
    SourceFile,
}

impl Kind {
    /// `data_dir` where the file names none. Each kind has its own, since hub.toml and source.toml
    /// may lie in one directory.
    pub(super) const fn data_dir(self) -> &'static str {
        match self {
            Self::Hub => HUB_DATA_DIR,
            Self::Source | Self::SourceFile => SOURCE_DATA_DIR,
        }
    }
}

/// What was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// Of a process.
    Process(ProcessConfig),
    /// Of one source on a hub.
    SourceFile(Box<SourceFile>),
}

/// Reads `hub.toml` and the files of its `sources_dir`.
pub fn load_hub(file: &Path) -> Result<HubConfig, Problems> {
    judge_hub(&Text::read(file)?)
}

/// Reads `source.toml`.
pub fn load_source(file: &Path) -> Result<SourceConfig, Problems> {
    judge_source(&Text::read(file)?)
}

/// Reads any of the three, by what is in it.
pub fn load(file: &Path) -> Result<Loaded, Problems> {
    let text = Text::read(file)?;
    let kind = kind_of(&text, &parse(&text)?);
    Ok(match kind {
        Kind::Hub => Loaded::Process(ProcessConfig::Hub(Box::new(judge_hub(&text)?))),
        Kind::Source => Loaded::Process(ProcessConfig::Source(Box::new(judge_source(&text)?))),
        Kind::SourceFile => {
            let judged = source_file::judge(&text, &parse(&text)?);
            match judged.file {
                Some(source) => Loaded::SourceFile(Box::new(source)),
                None => return Err(Problems::sorted(judged.problems)),
            }
        }
    })
}

/// Only the kind and `data_dir`: where the admin socket of a running process is. Says nothing about
/// the rest, so that a running process can be asked while its file is being changed.
pub fn load_data_dir(file: &Path) -> Result<(Kind, PathBuf), Problems> {
    let text = Text::read(file)?;
    let table = parse(&text)?;
    let kind = kind_of(&text, &table);
    let (mut reader, root) = Reader::new(kind, &text, &table);
    if kind == Kind::SourceFile {
        let met = "says what a hub knows of a source, no process runs with it";
        let fix = "name hub.toml or source.toml";
        return Err(Problem::of_file(&text.file, met, fix).into());
    }
    let data_dir = common::data_dir(&mut reader, &root);
    match data_dir {
        Some(data_dir) if reader.problems.is_empty() => Ok((kind, data_dir)),
        _ => Err(Problems::sorted(reader.problems)),
    }
}

fn judge_hub(text: &Text) -> Result<HubConfig, Problems> {
    let own = hub::judge(text, &parse(text)?);
    let mut problems = own.problems;
    let (judged, unread) = judge_sources(text, &own.sources_dir);
    problems.extend(unread);
    problems.extend(hub::logs_exceed(text, own.room, &judged));
    let (sources, more) = hub::join(text, own.room, judged);
    problems.extend(more);
    let config = own.config.map(|config| HubConfig { sources, ..config });
    whole(config, problems, text).map_err(Problems::sorted)
}

fn judge_source(text: &Text) -> Result<SourceConfig, Problems> {
    source::judge(text, &parse(text)?).map_err(Problems::sorted)
}

/// The configuration if nothing is wrong. That something is missing and nobody said what would be
/// our own fault; it is refused all the same.
pub(super) fn whole<T>(
    config: Option<T>,
    problems: Vec<Problem>,
    text: &Text,
) -> Result<T, Vec<Problem>> {
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        None if problems.is_empty() => {
            let met = "is not complete, and it is a fault of mirrorhub that it cannot say why";
            Err(vec![Problem::of_file(&text.file, met, "report it with the file")])
        }
        Some(_) | None => Err(problems),
    }
}

/// What to do about a syntax error.
const SYNTAX: &str =
    "write [section], key = \"text\", key = true or key = [..]; see https://toml.io";

/// Every syntax error of the file, or its table.
pub(super) fn parse(text: &Text) -> Result<DeTable<'_>, Problems> {
    let (table, errors) = DeTable::parse_recoverable(&text.text);
    if errors.is_empty() {
        return Ok(table.into_inner());
    }
    let mut problems: Vec<Problem> = errors
        .iter()
        .map(|error| {
            let met = format!("is not TOML: {}", error.message().replace('\n', ", "));
            let mut problem = Problem::of_file(&text.file, met, SYNTAX);
            problem.place = error.span().map(|span| text.place(&span));
            problem
        })
        .collect();
    // One slip often makes several errors in its line: the first is the one to mend.
    problems.dedup_by_key(|problem| problem.place.as_ref().map(|place| place.line));
    Err(Problems::sorted(problems))
}

/// Reads every `*.toml` of the directory, in order of their names.
fn judge_sources(hub: &Text, directory: &Path) -> (Vec<(Text, Judged)>, Vec<Problem>) {
    let (mut judged, mut problems) = (Vec::new(), Vec::new());
    let files = match source_files(directory) {
        Ok(files) => files,
        Err(error) => {
            let shown = shown_below(hub, directory);
            let met = format!("{} cannot be read: {error}", shown.display());
            let fix = format!("make it: mkdir -p {}", shown.display());
            let mut problem = Problem::of_file(&hub.file, met, fix);
            problem.key = "sources_dir".into();
            return (judged, vec![problem]);
        }
    };
    for file in files {
        let shown = shown_below(hub, &file);
        let text = match read_source(&file) {
            Ok(text) => Text { file: shown, ..text },
            Err(unread) => {
                let named = |problem| Problem { file: shown.clone(), ..problem };
                problems.extend(unread.0.into_iter().map(named));
                continue;
            }
        };
        match parse(&text).map(|table| source_file::judge(&text, &table)) {
            Ok(one) => judged.push((text, one)),
            Err(errors) => problems.extend(errors.0),
        }
    }
    (judged, problems)
}

/// The path as the user would write it: below the hub's file as that was named, if it is there.
pub(super) fn shown_below(hub: &Text, path: &Path) -> PathBuf {
    match (path.strip_prefix(&hub.base), hub.file.parent()) {
        (Ok(inside), Some(directory)) => directory.join(inside),
        _ => path.to_owned(),
    }
}

/// Files that count: `NAME.toml`, but nothing hidden, as editors and configuration tools leave
/// hidden files beside the one they write.
pub(super) fn source_files(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.file_name().is_some_and(counts) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Whether a file of that name counts as one of a source.
pub fn counts(name: &OsStr) -> bool {
    let hidden = name.as_encoded_bytes().starts_with(b".");
    !hidden && Path::new(name).extension().is_some_and(|ending| ending == "toml")
}

/// Reads a file of the sources directory. A pipe or a device there would be waited for without end, and nobody
/// could be told of any other file.
pub(super) fn read_source(file: &Path) -> Result<Text, Problems> {
    let waits = |kind: std::fs::FileType| !kind.is_file() && !kind.is_dir();
    if std::fs::metadata(file).is_ok_and(|found| waits(found.file_type())) {
        let met = "is a pipe, a socket or a device, and no file";
        return Err(Problem::of_file(file, met, "write a regular file, or remove it").into());
    }
    Text::read(file)
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hub => "hub.toml",
            Self::Source => "source.toml",
            Self::SourceFile => "a file of sources.d",
        })
    }
}

impl Kind {
    /// The one kind of file that has `key` at its top, if it is one that others have not.
    pub(super) fn owner_of(self, key: &str) -> Option<Self> {
        let found = TELLING.iter().find(|(_, keys)| keys.contains(&key));
        found.map(|(kind, _)| *kind).filter(|kind| *kind != self)
    }
}

/// Keys that only one kind of file has.
const TELLING: &[(Kind, &[&str])] = &[
    (Kind::Hub, &["listen", "sources_dir", "log", "image_pin", "hooks"]),
    (Kind::Source, &["hub", "checkpoint", "replication", "nbd", "home"]),
    (
        Kind::SourceFile,
        &[
            "enabled",
            "nvram_share",
            "log_limit",
            "space_limit",
            "bandwidth_limit",
            "join_by",
            "certificates",
            "keep",
        ],
    ),
];

/// What a file is: by the keys that only one kind has, then by where it lies and what it is called,
/// then by what every source has.
fn kind_of(text: &Text, table: &DeTable<'_>) -> Kind {
    let has = |key: &str| table.iter().any(|(name, _)| name.get_ref() == key);
    let count = |keys: &[&str]| keys.iter().filter(|key| has(key)).count();
    let counts: Vec<(usize, Kind)> =
        TELLING.iter().map(|(kind, keys)| (count(keys), *kind)).collect();
    let most = counts.iter().map(|(count, _)| *count).max().unwrap_or(0);
    let mut best = counts.iter().filter(|(count, _)| *count == most && most > 0);
    if let (Some((_, kind)), None) = (best.next(), best.next()) {
        return *kind;
    }
    let stem = text.file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let stem = stem.unwrap_or_default();
    if text.base.file_name().is_some_and(|name| name == "sources.d") {
        Kind::SourceFile
    } else if has("name") {
        if has("pool") || has("data_dir") { Kind::Source } else { Kind::SourceFile }
    } else if stem.contains("source") {
        Kind::Source
    } else {
        Kind::Hub
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(file: &str, text: &str) -> Kind {
        let file = PathBuf::from(file);
        let base = file.parent().unwrap().to_owned();
        let text = Text { file, base, text: text.into() };
        kind_of(&text, &parse(&text).unwrap())
    }

    #[test]
    fn a_file_is_known_by_its_keys_then_by_its_place_and_name() {
        assert_eq!(kind("/x/a.toml", "listen = 1"), Kind::Hub);
        assert_eq!(kind("/x/hub.toml", "hub = 1\nname = 1"), Kind::Source);
        assert_eq!(kind("/x/a.toml", "name = 1\nenabled = true"), Kind::SourceFile);
        assert_eq!(kind("/etc/sources.d/hub.toml", "name = 1"), Kind::SourceFile);
        assert_eq!(kind("/x/my-hub.toml", ""), Kind::Hub);
        assert_eq!(kind("/x/source.toml", ""), Kind::Source);
        assert_eq!(kind("/x/a.toml", "name = 1\n[pool]"), Kind::Source);
        assert_eq!(kind("/x/a.toml", "name = 1"), Kind::SourceFile);
        assert_eq!(kind("/x/a.toml", "[pool]"), Kind::Hub);
    }
}
