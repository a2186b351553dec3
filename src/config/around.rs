//! The files of a hub while it runs: what is right in them, around what is wrong.
//!
//! `hub.toml` must be right as a whole. Each file of the sources directory stands for itself: one
//! that is wrong is named with its problems, and its source goes on as it runs, or stays away if it
//! never ran. A directory that cannot be read says nothing about its sources: then all of it is
//! refused, and nobody is retired.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;

use super::hub;
use super::load::{parse, shown_below, source_files};
use super::problem::{Problem, Problems};
use super::schema::{HubConfig, HubSource};
use super::source_file::{self, Judged};
use super::text::Text;

/// What of a hub's files can run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Around {
    /// `hub.toml` with every source that can run.
    pub config: HubConfig,
    /// What is wrong in the files of single sources.
    pub problems: Vec<Problem>,
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
    let ring = running.map_or(own.ring, |running| running.nvram.size);
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
    let (mut judged, mut problems) = (Vec::new(), Vec::new());
    for path in files {
        let stays = path.file_name().is_some_and(|name| written.contains(name));
        let shown = shown_below(&text, &path);
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
    judged.sort_by_key(|(text, one)| {
        let name = one.file.as_ref().map(|file| file.name.clone());
        let runs = name.as_ref().is_some_and(|name| standing.contains_key(name.as_str()));
        (!runs, text.file.clone())
    });
    let (fit, wrong) = hub::fit(ring, judged);
    problems.extend(wrong);
    let (sources, more) = hub::join(&text, ring, fit);
    if !more.is_empty() {
        return Err(Problems::sorted(more));
    }
    let problems = Problems::sorted(problems).0;
    Ok(Around { config: HubConfig { sources, ..config }, problems })
}

/// One file, or everything that is wrong with it.
fn judge(path: &Path, shown: std::path::PathBuf) -> Result<(Text, Judged), Vec<Problem>> {
    let named = |Problems(all): Problems| {
        let rename = |problem| Problem { file: shown.clone(), ..problem };
        all.into_iter().map(rename).collect::<Vec<_>>()
    };
    let text = Text { file: shown.clone(), ..Text::read(path).map_err(named)? };
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
