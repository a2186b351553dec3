//! The example files are right, and every wrong file gets the message a person needs.
//!
//! `tests/invalid/NAME.toml` (`hub-*`, `source-*`, `sourcefile-*`) and `tests/invalid/NAME/hub.toml`
//! are refused with exactly the text of `NAME.expected`. After a change of messages,
//! `UPDATE_EXPECTED=1 cargo test --test suite examples::` writes the texts anew; read the
//! difference. These tests stand here and not beside the code because bounds are smaller there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mirrorhub::config::load::{Kind, Loaded, load, load_hub, load_source};
use mirrorhub::config::problem::Problems;
use mirrorhub::config::schema::{Listen, ProcessConfig};
use mirrorhub::config::sizing;
use mirrorhub::units::numbers::ByteCount;
use mirrorhub::units::policy::{Apply, OnHubLoss};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn name_of(path: &Path) -> String {
    path.file_stem().unwrap().to_string_lossy().into_owned()
}

/// Loads one case by the kind that its name says.
fn refusal(path: &Path) -> Result<String, String> {
    let name = name_of(path);
    let result: Result<(), Problems> = if path.is_dir() {
        load_hub(&path.join("hub.toml")).map(drop)
    } else if name.starts_with("hub-") {
        load_hub(path).map(drop)
    } else if name.starts_with("sourcefile-") {
        load(path).map(drop)
    } else if name.starts_with("source-") {
        load_source(path).map(drop)
    } else {
        return Err(format!("{name}: a case begins with hub-, source- or sourcefile-"));
    };
    let problems = result.err().ok_or_else(|| format!("{name} is accepted"))?;
    let directory = format!("{}/", path.parent().unwrap().display());
    Ok(problems.render(false).replace(&directory, ""))
}

#[test]
fn every_wrong_file_gets_its_message() {
    let directory = project("tests/invalid");
    let update = std::env::var_os("UPDATE_EXPECTED").is_some();
    let (mut cases, mut expected, mut wrong) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for path in entries(&directory) {
        if path.extension().is_some_and(|ending| ending == "expected") {
            expected.insert(name_of(&path));
            continue;
        }
        if path.file_name().is_some_and(|name| name == "sources.d") {
            continue;
        }
        cases.insert(name_of(&path));
        match refusal(&path) {
            Err(fault) => wrong.push(fault),
            Ok(text) => {
                let file = directory.join(name_of(&path)).with_extension("expected");
                if update {
                    std::fs::write(&file, &text).unwrap();
                }
                let wanted = std::fs::read_to_string(&file).unwrap_or_default();
                if text != wanted {
                    wrong.push(format!("{}: wanted\n{wanted}\nmet\n{text}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    let orphans: Vec<&String> = cases.symmetric_difference(&expected).collect();
    assert!(update || orphans.is_empty(), "without a file or without an expectation: {orphans:?}");
    assert!(cases.len() >= 30, "only {} cases", cases.len());
}

#[test]
fn the_examples_are_right() {
    let mut seen = Vec::new();
    let mut directories = vec![project("config")];
    while let Some(directory) = directories.pop() {
        for path in entries(&directory) {
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|ending| ending == "toml") {
                let loaded = load(&path).unwrap_or_else(|problems| panic!("{problems}"));
                seen.push(match loaded {
                    Loaded::Process(ProcessConfig::Hub(_)) => Kind::Hub,
                    Loaded::Process(ProcessConfig::Source(_)) => Kind::Source,
                    Loaded::SourceFile(_) => Kind::SourceFile,
                });
            }
        }
    }
    for kind in [Kind::Hub, Kind::Source, Kind::SourceFile] {
        assert!(seen.contains(&kind), "no example of {kind:?}");
    }
}

/// The comments of the examples say that they show the defaults: they do.
#[test]
fn the_examples_show_the_defaults() {
    let directory = tempfile::tempdir().unwrap();
    let least = |file: &str, text: &str| {
        let path = directory.path().join(file);
        std::fs::write(&path, text).unwrap();
        path
    };
    std::fs::create_dir(directory.path().join("sources.d")).unwrap();
    let pool = |dir| format!("[pool]\ndevices = [{{ path = \"{dir}/disk0\", size = \"8GiB\" }}]\n");
    let mut hub = load_hub(&least("hub.toml", &pool("hub-state"))).unwrap();
    let shown = load_hub(&project("config/hub.toml")).unwrap();
    let base = directory.path();
    assert_eq!(hub.data_dir, base.join("hub-state"));
    assert_eq!(hub.nvram.path, base.join("hub-state/nvram"));
    assert_eq!(hub.log_dir, base.join("hub-state/logs"));
    hub.sources.clone_from(&shown.sources);
    for (path, shown) in [
        (&mut hub.file, &shown.file),
        (&mut hub.data_dir, &shown.data_dir),
        (&mut hub.nvram.path, &shown.nvram.path),
        (&mut hub.log_dir, &shown.log_dir),
        (&mut hub.sources_dir, &shown.sources_dir),
        (&mut hub.pool.devices[0].path, &shown.pool.devices[0].path),
    ] {
        path.clone_from(shown);
    }
    assert_eq!(hub, shown);

    let text = "name = \"filer-a\"\nhub = \"127.0.0.1:7420\"\n".to_owned()
        + &pool("source-state")
        + "[[volume]]\nname = \"vol0\"\nsize = \"1GiB\"\n";
    let mut source = load_source(&least("source.toml", &text)).unwrap();
    let shown = load_source(&project("config/source.toml")).unwrap();
    assert_eq!(source.data_dir, base.join("source-state"));
    for (path, shown) in [
        (&mut source.file, &shown.file),
        (&mut source.data_dir, &shown.data_dir),
        (&mut source.nvram.path, &shown.nvram.path),
        (&mut source.pool.devices[0].path, &shown.pool.devices[0].path),
    ] {
        path.clone_from(shown);
    }
    assert_eq!(source, shown);
}

#[test]
fn every_key_reaches_its_field() {
    let source = load_source(&project("config/source-unix.toml")).unwrap();
    assert_eq!(source.name.as_str(), "filer-b");
    assert_eq!(source.hub, "[::1]:7420".parse().unwrap());
    assert_eq!(source.nbd_listen, Listen::Unix("/run/mirrorhub/nbd.sock".into()));
    assert_eq!(source.nvram.size, ByteCount(4 << 30));
    assert_eq!(source.checkpoint_interval, Duration::from_secs(30));
    assert_eq!(source.replication.apply, Apply::Inline);
    assert_eq!(source.replication.on_hub_loss, OnHubLoss::Stop);
    assert_eq!(source.replication.hub_timeout, Duration::from_secs(10));
    assert_eq!(source.pool.size(), ByteCount(1 << 40));
    assert_eq!(source.volumes.len(), 2);
    let sizing = sizing::of_source(&source);
    assert_eq!(
        sizing.lines[0].carries,
        "a peak of 1024 MiB/s if a CP takes 1 s, half of that at 2 s"
    );
}
