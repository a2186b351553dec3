//! `docs/invariants.md` names tests that exist, for each of the invariants; and the one invariant that
//! the source text itself shows.

use std::fs;
use std::path::{Path, PathBuf};

use crate::floors::rust_files;

const INVARIANTS: usize = 13;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rows of the document: number, and the tests that it names as `file::test`.
fn rows(document: &str) -> Vec<(usize, Vec<&str>)> {
    let rows = document.lines().filter_map(|line| line.strip_prefix("| "));
    let cells = rows.map(|row| row.splitn(3, " | ").collect::<Vec<_>>());
    let rows = cells.filter_map(|cells| {
        let number = cells[0].parse().ok()?;
        // Only a test has a file and a name; what else stands in backticks is none.
        let named = cells.get(2)?.split('`').filter(|word| word.contains("::")).collect();
        Some((number, named))
    });
    rows.collect()
}

/// Why there is no such test, if there is none.
fn missing(named: &str) -> Option<String> {
    let (file, test) = named.split_once("::").expect("file and test");
    let Ok(text) = fs::read_to_string(root().join(file)) else {
        return Some(format!("there is no {file}"));
    };
    let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
    let begins = format!("fn {test}(");
    let Some(at) = lines.iter().position(|line| line.starts_with(&begins)) else {
        return Some(format!("{file} has no {test}"));
    };
    let is_test = lines[at.saturating_sub(4)..at].iter().rev();
    let is_test = is_test.take_while(|line| line.starts_with('#')).any(|line| *line == "#[test]");
    (!is_test).then(|| format!("{test} of {file} is no test"))
}

#[test]
fn every_invariant_has_tests_and_they_exist() {
    let document = fs::read_to_string(root().join("docs/invariants.md")).expect("the document");
    let rows = rows(&document);
    let numbers: Vec<usize> = rows.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (1..=INVARIANTS).collect::<Vec<_>>());
    for (number, named) in rows {
        assert!(!named.is_empty(), "invariant {number} has no test");
        let missing: Vec<String> = named.into_iter().filter_map(missing).collect();
        assert!(missing.is_empty(), "invariant {number}: {missing:?}");
    }
}

/// The control: what is not there, and what is no test, is found.
#[test]
fn a_test_that_is_not_there_is_noticed() {
    let met =
        rows("| 1 | words `a <= b` | `tests/invariants.rs::gone`, `no/file.rs::x` |\n| | b | c |");
    assert_eq!(met, [(1, vec!["tests/invariants.rs::gone", "no/file.rs::x"])]);
    for named in ["tests/invariants.rs::gone", "no/file.rs::x", "tests/invariants.rs::rows"] {
        assert!(missing(named).is_some(), "{named}");
    }
    let own = "tests/invariants.rs::a_test_that_is_not_there_is_noticed";
    assert_eq!(missing(own), None);
}

/// Files below `src` whose text has `what`.
fn with(what: &str) -> Vec<String> {
    let mut files = rust_files(&root().join("src")).expect("the source");
    files.retain(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(what)));
    let name = |path: PathBuf| path.strip_prefix(root()).expect("below it").display().to_string();
    files.into_iter().map(name).collect()
}

/// Invariant 13: hours and days of the calendar go by it; what is decided by a time goes by another.
#[test]
fn the_time_of_day_is_read_in_one_place() {
    for call in ["SystemTime::now", "SystemTime"] {
        assert_eq!(with(call), ["src/units/machine.rs"], "{call}");
    }
    assert!(with("Instant::now").len() > 1, "the control: the search finds what is there");
    let clippy = fs::read_to_string(root().join("clippy.toml")).expect("clippy.toml");
    assert!(clippy.contains("\"std::time::SystemTime::now\""), "nothing forbids it");
}
