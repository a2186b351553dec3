//! Modules stand on floors: data has one direction, and so have imports.
//!
//! Goal: no file of `src/` names a module of the same or a higher floor, other than its own.
//! Method: comments and strings are blanked out, then every path that begins with `crate::` or
//! climbs out of its module with `super::` is resolved to the top-level module that it names. Paths
//! in code count like `use`, test code like any other. Negative controls on made-up files show
//! that every way of writing an import is seen.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Floor of each top-level module (`docs/architecture.md`).
const FLOORS: &[(&str, u8)] = &[
    ("units", 0),
    ("limits", 1),
    ("metric", 1),
    ("status", 1),
    ("device", 2),
    ("record", 2),
    ("wire", 3),
    ("raid", 3),
    ("nvlog", 3),
    ("nbd", 3),
    ("link", 4),
    ("pool", 4),
    ("sourcelog", 4),
    ("volume", 5),
    ("session", 6),
    ("upkeep", 6),
    ("filer", 7),
    ("hub", 8),
    ("observe", 9),
    ("control", 9),
    ("config", 10),
    ("cli", 11),
];

fn floor_of(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

/// The text with comments, strings and character literals turned into spaces; lines stay.
fn blanked(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        let length = match rest {
            ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => block_comment(rest),
            ['r' | 'b', ..] if !continues_a_word(&chars, at) => raw_or_byte_string(rest),
            ['"', ..] => quoted(rest),
            ['\'', '\\', ..] => {
                3 + rest[3..].iter().position(|c| *c == '\'').unwrap_or(rest.len() - 3)
            }
            ['\'', _, '\'', ..] => 3,
            _ => 0,
        };
        if length == 0 {
            out.push(chars[at]);
            at += 1;
        } else {
            let end = chars.len().min(at + length);
            out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

fn continues_a_word(chars: &[char], at: usize) -> bool {
    at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_')
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        match rest[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

/// Length of a plain string that begins here.
fn quoted(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Length of `r".."`, `r#".."#`, `b".."`, `br#".."#` that begins here, or 0 if none does.
fn raw_or_byte_string(rest: &[char]) -> usize {
    let letters = rest.iter().take(2).take_while(|c| matches!(c, 'r' | 'b')).count();
    let hashes = rest[letters..].iter().take_while(|c| **c == '#').count();
    if rest.get(letters + hashes) != Some(&'"') {
        return 0;
    }
    if !rest[..letters].contains(&'r') {
        return if hashes == 0 { letters + quoted(&rest[letters..]) } else { 0 };
    }
    let closing: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = letters + hashes + 1;
    rest[body..]
        .windows(closing.len())
        .position(|window| window == closing)
        .map_or(rest.len(), |end| body + end + closing.len())
}

/// One name of a top-level module, and the line where it stands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Edge {
    line: usize,
    to: String,
}

/// Every top-level module that the text names. `depth` is how many modules deep the file is: 1 for
/// `src/hub/mod.rs`, 2 for `src/hub/actor.rs`.
fn edges(text: &str, depth: usize) -> BTreeSet<Edge> {
    let text = blanked(text);
    let mut edges = BTreeSet::new();
    let mut at = 0;
    while let Some(found) = text[at..].find("::") {
        let colon = at + found;
        at = colon + 2;
        let before = text[..colon].trim_end();
        let start = before
            .rfind(|c: char| !(c.is_alphanumeric() || c == '_'))
            .map_or(0, |last| last + last_char_len(before, last));
        let word = &before[start..];
        let preceded = before[..start].trim_end().ends_with("::");
        let climbs = match word {
            "crate" => true,
            "super" if !preceded => climbs_out(&text[start..], depth),
            _ => false,
        };
        if !climbs {
            continue;
        }
        let tail_start = if word == "crate" { at } else { start + supers(&text[start..]).1 };
        let line = text[..colon].lines().count().max(1);
        for to in heads(&text[tail_start..]) {
            if word == "crate" || floor_of(&to).is_some() {
                edges.insert(Edge { line, to });
            }
        }
    }
    edges
}

fn last_char_len(text: &str, at: usize) -> usize {
    text[at..].chars().next().map_or(0, char::len_utf8)
}

/// How many `super::` begin this text, and how many bytes they take.
fn supers(text: &str) -> (usize, usize) {
    let (mut count, mut at) = (0, 0);
    loop {
        let rest = text[at..].trim_start();
        let Some(after) = rest.strip_prefix("super").map(str::trim_start) else { break };
        let Some(after) = after.strip_prefix("::") else { break };
        count += 1;
        at = text.len() - after.len();
    }
    (count, at)
}

/// Whether the chain of `super::` may end at the root of the crate. In an inline `mod tests` the
/// same chain ends one module deeper, so the caller takes only names of top-level modules from it.
fn climbs_out(text: &str, depth: usize) -> bool {
    supers(text).0 >= depth.max(2)
}

/// First names after `crate::`: one, or those of a `{..}` group.
fn heads(text: &str) -> Vec<String> {
    let text = text.trim_start();
    let Some(group) = text.strip_prefix('{') else {
        return Vec::from_iter(first_word(text));
    };
    let (mut depth, mut heads, mut expect) = (1, Vec::new(), true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => expect = true,
            c if c.is_whitespace() => {}
            _ if depth == 1 && expect => {
                heads.extend(first_word(&group[at..]));
                expect = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

fn first_word(text: &str) -> Option<String> {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_owned())
}

/// What is wrong with a file of the module `own`.
fn faults(own: &str, depth: usize, text: &str) -> Vec<String> {
    let Some(floor) = floor_of(own) else {
        return vec![format!("the module {own} has no floor: add it to the table")];
    };
    let mut faults = Vec::new();
    for Edge { line, to } in edges(text, depth) {
        match floor_of(&to) {
            _ if to == own => {}
            Some(other) if other < floor => {}
            Some(other) => faults
                .push(format!("line {line}: {own} (floor {floor}) names {to} (floor {other})")),
            None => faults.push(format!("line {line}: {own} names crate::{to}, no module we know")),
        }
    }
    faults
}

/// Every Rust file below `directory`, in order.
pub fn rust_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[test]
fn every_import_goes_to_a_lower_floor() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut all, mut seen) = (Vec::new(), 0);
    for file in rust_files(&root).unwrap() {
        let inside = file.strip_prefix(&root).unwrap();
        let parts: Vec<String> =
            inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if parts == ["lib.rs"] || parts == ["main.rs"] {
            continue;
        }
        let own = parts[0].trim_end_matches(".rs");
        let is_mod = parts.last().is_some_and(|last| last == "mod.rs");
        let depth = parts.len() - usize::from(is_mod && parts.len() > 1);
        let text = fs::read_to_string(&file).unwrap();
        seen += edges(&text, depth).len();
        all.extend(
            faults(own, depth, &text).into_iter().map(|f| format!("src/{}: {f}", inside.display())),
        );
    }
    assert!(all.is_empty(), "imports that go up or sideways:\n{}", all.join("\n"));
    assert!(seen > 20, "only {seen} imports found in the whole crate: is this test still looking?");
}

#[test]
fn every_module_of_the_crate_has_a_floor() {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let modules: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ").or_else(|| line.strip_prefix("mod ")))
        .map(|name| name.trim_end_matches(';'))
        .collect();
    assert!(modules.contains(&"units") && modules.contains(&"control"), "{modules:?}");
    for module in modules {
        assert!(
            floor_of(module).is_some(),
            "the module {module} has no floor: add it to the table"
        );
    }
}

/// Negative control: each made-up file of `device` (floor 2) has exactly the faults said beside it.
#[test]
fn the_check_sees_every_way_to_write_an_import() {
    let cases: &[(&str, &[&str])] = &[
        ("use crate::units::names::SourceName;", &[]),
        ("use crate::device::file;", &[]),
        ("use crate::record::entry::Entry;", &["record"]),
        ("pub use crate::pool::space;", &["pool"]),
        ("use crate :: hub;", &["hub"]),
        ("use crate::{units::hash, limits::MIB};", &[]),
        ("use crate::{\n    units::{hash, names},\n    nvlog::{self, commit},\n};", &["nvlog"]),
        ("use {crate::wire::frame, std::io};", &["wire"]),
        ("fn f() { crate::cli::run(); }", &["cli"]),
        ("type T = Vec<crate::status::State>;", &[]),
        ("macro_rules! m { () => { $crate::hub::x() }; }", &["hub"]),
        ("use super::super::session::step;", &["session"]),
        ("use super::latch;", &[]),
        ("mod tests { use super::super::latch; }", &[]),
        ("// use crate::hub;\n/* crate::hub::x /* nested */ */", &[]),
        ("/// See [`crate::hub`] and crate::hub::Hub.\nfn f() {}", &[]),
        ("const T: &str = \"crate::hub::x\";", &[]),
        ("const T: &str = r#\"a \" crate::hub::x\"#;", &[]),
        ("const C: char = '\"'; use crate::hub::x; const D: char = '\"';", &["hub"]),
        ("const C: char = '\\''; use crate::hub::x;", &["hub"]),
        ("fn f<'a>(x: &'a str) { crate::filer::x(x) }", &["filer"]),
        ("use crate::nowhere::x;", &["nowhere"]),
        ("use std::io; use tokio::sync::mpsc; fn f() { my_crate::hub::x() }", &[]),
    ];
    for (text, wanted) in cases {
        let found = faults("device", 2, text);
        assert_eq!(found.len(), wanted.len(), "{text}\n{found:?}");
        for (fault, module) in found.iter().zip(*wanted) {
            assert!(fault.contains(module), "{text}\n{found:?}");
        }
    }
    assert_eq!(faults("device", 1, "\n\nuse crate::hub::x;")[0].split(':').next(), Some("line 3"));
    assert_eq!(faults("attic", 1, "").len(), 1, "a module without a floor");
}
