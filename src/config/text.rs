//! The text of one configuration file, and places in it.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::problem::{Place, Problem, Problems};
use crate::limits::CONFIG_FILE_BYTES_MAX;
use crate::units::convert::to_u64;

/// One file as it was read.
#[derive(Debug)]
pub(super) struct Text {
    /// The file as the user names it, for messages.
    pub(super) file: PathBuf,
    /// The directory that relative paths in it start from; absolute.
    pub(super) base: PathBuf,
    /// What it says.
    pub(super) text: String,
}

impl Text {
    /// Reads `file`, which must be a text of bounded length.
    pub(super) fn read(file: &Path) -> Result<Self, Problems> {
        let whole = |met: String, fix: &str| Problems::from(Problem::of_file(file, met, fix));
        let mut bytes = Vec::new();
        File::open(file)
            .and_then(|opened| opened.take(CONFIG_FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(|error| whole(format!("cannot be read: {error}"), "look at path and mode"))?;
        if to_u64(bytes.len()) > CONFIG_FILE_BYTES_MAX {
            let met = format!("is longer than {CONFIG_FILE_BYTES_MAX} bytes");
            return Err(whole(met, "is this the file you meant?"));
        }
        let absolute = std::path::absolute(file)
            .map_err(|error| whole(format!("has no absolute path: {error}"), "name it in full"))?;
        let base = absolute.parent().unwrap_or(Path::new("/")).to_owned();
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = error.utf8_error().valid_up_to();
            let before = error.as_bytes().iter().take(good).filter(|b| **b == b'\n').count();
            let met = format!("line {} is no UTF-8 text", before + 1);
            whole(met, "save the file as UTF-8")
        })?;
        Ok(Self { file: file.to_owned(), base, text })
    }

    /// Line, column and excerpt of a span of bytes.
    pub(super) fn place(&self, span: &Range<usize>) -> Place {
        let start = self.floor(span.start);
        let line_start = self.text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let rest = &self.text[line_start..];
        let line_text = rest[..rest.find('\n').unwrap_or(rest.len())].trim_end_matches('\r');
        let line_end = line_start + line_text.len();
        let end = self.floor(span.end).clamp(start, line_end.max(start));
        Place {
            line: self.text[..line_start].matches('\n').count() + 1,
            column: self.text[line_start..start].chars().count() + 1,
            width: self.text[start..end].chars().count().max(1),
            text: line_text.to_owned(),
        }
    }

    /// What the span says, as written.
    pub(super) fn slice(&self, span: &Range<usize>) -> &str {
        let (start, end) = (self.floor(span.start), self.floor(span.end));
        self.text.get(start..end).unwrap_or_default()
    }

    /// The start of the character at or before `at`.
    fn floor(&self, at: usize) -> usize {
        self.text.floor_char_boundary(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Text {
        Text { file: "x.toml".into(), base: "/".into(), text: text.into() }
    }

    #[test]
    fn places_count_characters_from_one() {
        let text = text("a = 1\r\n\u{e4}\u{f6} = \"x\"\n");
        let at = text.text.find("\"x\"").unwrap();
        let place = text.place(&(at..at + 3));
        assert_eq!((place.line, place.column, place.width), (2, 6, 3));
        assert_eq!(place.text, "\u{e4}\u{f6} = \"x\"");
        assert_eq!(text.place(&(0..1)).text, "a = 1");
    }

    #[test]
    fn spans_past_the_end_or_over_lines_stay_in_one_line() {
        let text = text("a = [\n1,\n]");
        let place = text.place(&(4..10));
        assert_eq!((place.line, place.column, place.width), (1, 5, 1));
        let end = text.place(&(100..200));
        assert_eq!((end.line, end.column), (3, 2));
        assert_eq!(text.slice(&(100..200)), "");
    }
}
