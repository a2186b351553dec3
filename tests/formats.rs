//! `docs/formats.md` and the code say the same: each section is the head of the file it names.
//!
//! The golden bytes that pin the code to its own head lie beside each format.

use std::fs;
use std::path::Path;

use crate::floors::rust_files;

fn head(file: &Path) -> Vec<String> {
    let text =
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let lines = text.lines().map_while(|line| line.strip_prefix("//!"));
    lines.map(|line| line.strip_prefix(' ').unwrap_or(line).to_owned()).collect()
}

/// The sections of the document: the file each names, and its text.
fn sections(document: &str) -> Vec<(String, Vec<String>)> {
    let mut sections: Vec<(String, Vec<String>)> = Vec::new();
    let mut lines = document.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with("## ") {
            lines.next();
            let name = lines.next().unwrap_or_default().trim_matches('`').to_owned();
            lines.next();
            sections.push((name, Vec::new()));
        } else if let Some((_, text)) = sections.last_mut() {
            text.push(line.to_owned());
        }
    }
    for (_, text) in &mut sections {
        while text.last().is_some_and(String::is_empty) {
            text.pop();
        }
    }
    sections
}

#[test]
fn every_section_is_the_head_of_its_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(root.join("docs/formats.md")).unwrap();
    let sections = sections(&document);
    assert!(sections.len() >= 15, "{} sections", sections.len());
    for (file, text) in sections {
        assert_eq!(text, head(&root.join(&file)), "docs/formats.md and {file} differ");
    }
}

fn lays_out_bytes(file: &Path) -> bool {
    let has_test = || fs::read_to_string(file).unwrap().contains("fn golden_bytes");
    head(file).iter().any(|line| line.starts_with("| at |")) || has_test()
}

/// Every file that lays out bytes in a table, or pins bytes in a test, has its section.
#[test]
fn no_format_is_missing_from_the_document() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(root.join("docs/formats.md")).unwrap();
    let mut found = 0;
    for path in rust_files(&root.join("src")).unwrap().iter().filter(|path| lays_out_bytes(path)) {
        let name = path.strip_prefix(root).unwrap().display();
        assert!(document.contains(&format!("`{name}`")), "{name} is not in docs/formats.md");
        found += 1;
    }
    assert!(found >= 15, "only {found} files with a layout were found");
}
