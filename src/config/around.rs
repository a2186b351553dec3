//! The files of a hub while it runs: what is right in them, around what is wrong.
//!
//! `hub.toml` must be right as a whole. Each file of the sources directory stands for itself: one
//! that is wrong is named with its problems, and its source goes on as it runs, or stays away if it
//! never ran. A directory that cannot be read says nothing about its sources: then all of it is
//! refused, and nobody is retired.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::hub;
use super::load::{parse, read_source, shown_below, source_files};
use super::problem::{Problem, Problems};
use super::schema::{HubConfig, HubSource, SourceFile};
use super::source_file::{self, Judged};
use super::text::Text;

/// What of a hub's files can run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Around {
    /// `hub.toml` with every source that can run.
    pub config: HubConfig,
    /// What is wrong in the files of single sources.
    pub problems: Vec<Problem>,
    /// Files that were not read, since somebody is writing them.
    pub unread: Vec<PathBuf>,
}

/// Reads `hub.toml` and its sources. What is `running` stays as it is where its file is wrong, or
/// is in `written`: somebody is in the middle of it. Its directory and ring are those that count:
/// only a restart changes them.
pub fn load_around(
    file: &Path,
    running: Option<&HubConfig>,
    written: &BTreeSet<OsString>,
) -> Result<Around, Problems> {
    let text = Text::read(file)?;
    let own = hub::judge(&text, &parse(&text)?);
    let Some(config) = own.config.filter(|_| own.problems.is_empty()) else {
        return Err(Problems::sorted(own.problems));
    };
    let directory = running.map_or(&own.sources_dir, |running| &running.sources_dir);
    let room = running
        .map_or(own.room, |running| hub::Room::of(running.nvram.size, Some(&running.log_dir)));
    let files = source_files(directory).map_err(|error| {
        let shown = shown_below(&text, directory);
        let met = format!("{} cannot be read: {error}", shown.display());
        let fix = format!("make it: mkdir -p {}", shown.display());
        let problem = Problem::of_file(&text.file, met, fix);
        Problem { key: "sources_dir".into(), ..problem }
    })?;
    let sources = running.into_iter().flat_map(|running| &running.sources);
    let standing: BTreeMap<&str, &HubSource> =
        sources.map(|source| (source.file.name.as_str(), source)).collect();
    let (mut judged, mut problems, mut unread) = (Vec::new(), Vec::new(), Vec::new());
    for path in files {
        let stays = path.file_name().is_some_and(|name| written.contains(name));
        let shown = shown_below(&text, &path);
        unread.extend(stays.then(|| shown.clone()));
        let one = if stays { Err(Vec::new()) } else { judge(&path, shown.clone()) };
        match one {
            Ok(one) => judged.push(one),
            Err(wrong) => {
                problems.extend(wrong);
                let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
                if let Some(source) = standing.get(stem) {
                    let nothing = String::new();
                    let text = Text { file: shown, base: text.base.clone(), text: nothing };
                    judged.push((text, Judged::standing(source.file.clone())));
                }
            }
        }
    }
    // Those that run come first: who is new does not push them out.
    let runs = |one: &Judged| {
        one.file.as_ref().is_some_and(|file| standing.contains_key(file.name.as_str()))
    };
    judged.sort_by_cached_key(|(text, one)| (!runs(one), text.file.clone()));
    // At a start all of them have run, as far as anybody knows.
    let stays = |(_, one): &&(Text, Judged)| running.is_none() || runs(one);
    let stay = judged.iter().filter(stays).count();
    let (fit, wrong) = hub::fit(room, stay, judged);
    problems.extend(wrong);
    let (sources, more) = hub::join(&text, room, fit);
    if !more.is_empty() {
        return Err(Problems::sorted(more));
    }
    let problems = Problems::sorted(problems).0;
    Ok(Around { config: HubConfig { sources, ..config }, problems, unread })
}

/// A file of the sources directory that is not written yet, by itself: what it would say, or everything
/// that is wrong with it.
pub fn judge_new(file: &Path, text: String) -> Result<SourceFile, Problems> {
    let base = file.parent().unwrap_or(Path::new("/")).to_owned();
    let text = Text { file: file.to_owned(), base, text };
    match source_file::judge(&text, &parse(&text)?) {
        Judged { file: Some(file), problems, .. } if problems.is_empty() => Ok(file),
        Judged { problems, .. } => Err(Problems::sorted(problems)),
    }
}

/// One file, or everything that is wrong with it.
fn judge(path: &Path, shown: PathBuf) -> Result<(Text, Judged), Vec<Problem>> {
    let named = |Problems(all): Problems| {
        let rename = |problem| Problem { file: shown.clone(), ..problem };
        all.into_iter().map(rename).collect::<Vec<_>>()
    };
    let text = Text { file: shown.clone(), ..read_source(path).map_err(named)? };
    let one = source_file::judge(&text, &parse(&text).map_err(named)?);
    match one {
        Judged { file: Some(_), ref problems, .. } if problems.is_empty() => Ok((text, one)),
        Judged { problems, .. } => Err(problems),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::numbers::ByteCount;

    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            let files = Self(tempfile::tempdir().unwrap());
            std::fs::create_dir(files.0.path().join("sources.d")).unwrap();
            files.write(
                "hub.toml",
                "[nvram]\nsize = \"32MiB\"\n[pool]\ndevices = [{ path = \"d\", size = \"1GiB\" }]",
            );
            files
        }

        fn write(&self, file: &str, text: &str) {
            std::fs::write(self.0.path().join(file), text).unwrap();
        }

        fn load(&self, running: Option<&Around>, written: &[&str]) -> Result<Around, Problems> {
            let written = written.iter().map(OsString::from).collect();
            let running = running.map(|around| &around.config);
            load_around(&self.0.path().join("hub.toml"), running, &written)
        }
    }

    fn names(around: &Around) -> Vec<&str> {
        around.config.sources.iter().map(|source| source.file.name.as_str()).collect()
    }

    #[test]
    fn what_is_wrong_in_one_file_is_its_own() {
        let files = Files::new();
        files.write("sources.d/a.toml", "name = \"a\"");
        files.write("sources.d/b.toml", "name = \"b\"\nnvram_share = \"5\"");
        files.write("sources.d/c.toml", "name = \"c");
        files.write("sources.d/d.toml", "name = \"other\"");
        files.write("sources.d/e.toml", "name = \"e\"");
        let first = files.load(None, &[]).unwrap();
        assert_eq!(names(&first), ["a", "e"]);
        let place = |problem: &Problem| {
            let file = problem.file.file_name().unwrap().to_str().unwrap().to_owned();
            (file, problem.place.as_ref().map(|place| place.line), problem.key.clone())
        };
        let places: Vec<_> = first.problems.iter().map(place).collect();
        assert_eq!(
            places,
            [
                ("b.toml".into(), Some(2), "nvram_share".into()),
                ("c.toml".into(), Some(1), String::new()),
                ("d.toml".into(), Some(1), "name".into()),
            ]
        );
        // Who runs goes on as it was, whatever its file says now.
        files.write("sources.d/a.toml", "name = \"a\"\nenabled = 1");
        files.write("sources.d/e.toml", "name = \"e\"\nenabled = false");
        std::fs::remove_file(files.0.path().join("sources.d/c.toml")).unwrap();
        let second = files.load(Some(&first), &[]).unwrap();
        assert_eq!(names(&second), ["a", "e"]);
        assert!(second.config.sources[0].file.enabled && !second.config.sources[1].file.enabled);
        // A file in the middle of being written is neither wrong nor read.
        let third = files.load(Some(&first), &["e.toml", "a.toml"]).unwrap();
        assert!(third.config.sources[1].file.enabled);
        assert_eq!(third.problems.len(), 2);
        let unread = |around: &Around| {
            around
                .unread
                .iter()
                .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            (unread(&second), unread(&third)),
            (vec![], vec!["a.toml".to_owned(), "e.toml".to_owned()])
        );
    }

    /// Nothing is waited for that never comes, and the others are read.
    #[test]
    fn a_pipe_is_no_file_of_a_source() {
        let files = Files::new();
        files.write("sources.d/a.toml", "name = \"a\"");
        let pipe = files.0.path().join("sources.d/p.toml");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        let read = files.load(None, &[]).unwrap();
        assert_eq!(names(&read), ["a"]);
        let [problem] = &read.problems[..] else { panic!("{:?}", read.problems) };
        assert!(problem.file.ends_with("sources.d/p.toml") && problem.met.contains("pipe"));
        let strict = crate::config::load::load_hub(&files.0.path().join("hub.toml")).unwrap_err();
        assert!(strict.0[0].met.contains("pipe"));
    }

    #[test]
    fn who_is_new_does_not_push_out_who_runs() {
        let files = Files::new();
        for name in ["m", "n"] {
            let text = format!("name = \"{name}\"\nnvram_share = \"12MiB\"");
            files.write(&format!("sources.d/{name}.toml"), &text);
        }
        let first = files.load(None, &[]).unwrap();
        assert_eq!(names(&first), ["m", "n"]);
        files.write("sources.d/a.toml", "name = \"a\"\nnvram_share = \"12MiB\"");
        files.write("sources.d/z.toml", "name = \"z\"");
        let second = files.load(Some(&first), &[]).unwrap();
        assert_eq!(names(&second), ["m", "n", "z"], "z finds room, a does not");
        let [problem] = &second.problems[..] else { panic!("{:?}", second.problems) };
        assert!(problem.file.ends_with("sources.d/a.toml"));
        assert_eq!(problem.place.as_ref().map(|place| place.line), Some(2));
        let sum: u64 = second.config.sources.iter().map(|source| source.nvram_share.0).sum();
        assert!(ByteCount(sum) <= second.config.nvram.size);
    }

    /// What is guaranteed of the ring must find room in the logs. Control: with a file system that has it,
    /// and for those that run, nothing is refused.
    #[test]
    fn guarantees_that_no_log_can_take_are_refused() {
        let judged = || {
            let one = |name: &str| {
                let file = Path::new("/sources.d").join(format!("{name}.toml"));
                let text = format!("name = \"{name}\"\nnvram_share = \"12MiB\"");
                let text = Text { file, base: "/sources.d".into(), text };
                let one = source_file::judge(&text, &parse(&text).unwrap());
                (text, one)
            };
            vec![one("a"), one("b")]
        };
        let room =
            |mib: u64| hub::Room { ring: ByteCount(32 << 20), logs: Some(ByteCount(mib << 20)) };
        assert_eq!(hub::fit(room(24), 0, judged()).0.len(), 2);
        assert_eq!(hub::fit(room(23), 2, judged()).0.len(), 2);
        assert_eq!(hub::fit(hub::Room { logs: None, ..room(0) }, 0, judged()).0.len(), 2);
        let (fit, problems) = hub::fit(room(23), 0, judged());
        let [problem] = &problems[..] else { panic!("{problems:?}") };
        assert_eq!((fit.len(), problem.place.as_ref().map(|place| place.line)), (1, Some(2)));
        assert!(problem.file.ends_with("b.toml") && problem.fix.contains("log.dir"));
        // `config check`, which judges all of them, says the same of the hub.
        let hub = Text { file: "/hub.toml".into(), base: "/".into(), text: String::new() };
        let key = |mib| hub::logs_exceed(&hub, room(mib), &judged()).map(|problem| problem.key);
        assert_eq!((key(24), key(23).as_deref()), (None, Some("log.dir")));
    }

    #[test]
    fn hub_toml_and_the_directory_must_be_right() {
        let files = Files::new();
        files.write("sources.d/a.toml", "name = \"a\"");
        std::fs::remove_dir_all(files.0.path().join("sources.d")).unwrap();
        let refused = files.load(None, &[]).unwrap_err();
        assert_eq!(refused.0[0].key, "sources_dir");
        std::fs::create_dir(files.0.path().join("sources.d")).unwrap();
        files.write("hub.toml", "nonsense = 1");
        assert!(files.load(None, &[]).is_err());
    }
}
