//! One problem of a configuration file, and how it is shown to a person and to a program.

use std::cmp::Ordering;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
    /// Characters from there, within the line.
    pub width: usize,
    /// The line.
    pub text: String,
}

/// One problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file as the user named it.
    pub file: PathBuf,
    /// Where; `None` if it is about the file as a whole.
    pub place: Option<Place>,
    /// The key in full, such as `nvram.size`; empty if there is none.
    pub key: String,
    /// What was met, as a sentence.
    pub met: String,
    /// What was wanted; may be empty.
    pub wanted: String,
    /// What to do.
    pub fix: String,
    /// The other place of a contradiction, in the same file.
    pub also: Option<Place>,
}

/// Everything that is wrong, in the order of the files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems(pub Vec<Problem>);

/// A problem in JSON; part of the stable output of `config check --json`.
#[derive(Debug, Serialize)]
struct ProblemJson<'a> {
    file: String,
    line: Option<usize>,
    column: Option<usize>,
    key: &'a str,
    met: &'a str,
    wanted: &'a str,
    fix: &'a str,
}

/// Longest part of a line that is shown.
const EXCERPT_CHARACTERS_MAX: usize = 100;
/// Characters of a long line shown before the place.
const EXCERPT_CHARACTERS_BEFORE: usize = 30;

impl Problem {
    /// A problem of a file as a whole.
    pub fn of_file(file: &Path, met: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            place: None,
            key: String::new(),
            met: met.into(),
            wanted: String::new(),
            fix: fix.into(),
            also: None,
        }
    }

    /// As a person reads it: the annotated excerpt. With `colour` in ANSI colours.
    pub fn render(&self, colour: bool) -> String {
        let paint = Paint(colour);
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _infallible = self.write_to(&mut out, &paint);
        out
    }

    fn write_to(&self, out: &mut String, paint: &Paint) -> fmt::Result {
        let key = if self.key.is_empty() { String::new() } else { format!("{}: ", self.key) };
        writeln!(out, "{}{}", paint.red("error"), paint.bold(&format!(": {key}{}", self.met)))?;
        let digits = [&self.place, &self.also]
            .into_iter()
            .flatten()
            .map(|place| place.line.to_string().len())
            .max()
            .unwrap_or(1);
        let margin = " ".repeat(digits);
        let file = self.file.display();
        match &self.place {
            Some(place) => {
                let (line, column) = (place.line, place.column);
                writeln!(out, "{margin}{} {file}:{line}:{column}", paint.blue("-->"))?;
                writeln!(out, "{margin} {}", paint.blue("|"))?;
                self.write_excerpts(out, paint, place, digits)?;
                writeln!(out, "{margin} {}", paint.blue("|"))?;
            }
            None => writeln!(out, "{margin}{} {file}", paint.blue("-->"))?,
        }
        writeln!(out, "{margin} {} {}", paint.blue("="), paint.green(&format!("fix: {}", self.fix)))
    }

    /// The place and the other place of a contradiction, in the order of their lines.
    fn write_excerpts(
        &self,
        out: &mut String,
        paint: &Paint,
        place: &Place,
        digits: usize,
    ) -> fmt::Result {
        let wanted = match self.wanted.as_str() {
            "" => String::new(),
            wanted => format!(" wanted {wanted}"),
        };
        let main = excerpt(place, '^', &wanted, digits, paint);
        let Some(also) = &self.also else { return out.write_str(&main) };
        let other = excerpt(also, '-', "", digits, paint);
        if (also.line, also.column) < (place.line, place.column) {
            write!(out, "{other}{main}")
        } else {
            write!(out, "{main}{other}")
        }
    }

    /// Orders by file, then place; problems of a whole file come first.
    fn order(&self, other: &Self) -> Ordering {
        let place = |problem: &Self| {
            problem.place.as_ref().map_or((0, 0), |place| (place.line, place.column))
        };
        self.file.cmp(&other.file).then_with(|| place(self).cmp(&place(other)))
    }

    fn json(&self) -> ProblemJson<'_> {
        ProblemJson {
            file: self.file.display().to_string(),
            line: self.place.as_ref().map(|place| place.line),
            column: self.place.as_ref().map(|place| place.column),
            key: &self.key,
            met: &self.met,
            wanted: &self.wanted,
            fix: &self.fix,
        }
    }
}

/// One line of the file and the mark below it.
fn excerpt(place: &Place, mark: char, label: &str, digits: usize, paint: &Paint) -> String {
    let before = place.column - 1;
    let cut = if place.text.chars().count() > EXCERPT_CHARACTERS_MAX {
        before.saturating_sub(EXCERPT_CHARACTERS_BEFORE)
    } else {
        0
    };
    // Tabs and control characters would move the mark, or the terminal.
    let shown: String = place
        .text
        .chars()
        .skip(cut)
        .take(EXCERPT_CHARACTERS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let width = place.width.min(EXCERPT_CHARACTERS_MAX.saturating_sub(before - cut)).max(1);
    let marks = paint.red(&format!("{}{label}", mark.to_string().repeat(width)));
    let shown = shown.trim_end();
    format!(
        "{} {shown}\n{:digits$} {} {}{marks}\n",
        paint.blue(&format!("{:>digits$} |", place.line)),
        "",
        paint.blue("|"),
        " ".repeat(before - cut),
    )
}

/// ANSI colours, or none.
struct Paint(bool);

impl Paint {
    fn with(&self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn red(&self, text: &str) -> String {
        self.with("1;31", text)
    }

    fn blue(&self, text: &str) -> String {
        self.with("1;34", text)
    }

    fn green(&self, text: &str) -> String {
        self.with("32", text)
    }

    fn bold(&self, text: &str) -> String {
        self.with("1", text)
    }
}

impl Problems {
    /// In the order in which they are shown, each once.
    pub fn sorted(mut problems: Vec<Problem>) -> Self {
        problems.sort_by(Problem::order);
        problems.dedup();
        Self(problems)
    }

    /// All of them as a person reads them, with the count at the end.
    pub fn render(&self, colour: bool) -> String {
        let mut out: String = self.0.iter().map(|problem| problem.render(colour) + "\n").collect();
        let count = self.0.len();
        let noun = if count == 1 { "problem" } else { "problems" };
        out.push_str(&format!("{count} {noun}; nothing was applied\n"));
        out
    }

    /// For programs.
    pub fn to_json(&self) -> serde_json::Value {
        let problems: Vec<ProblemJson<'_>> = self.0.iter().map(Problem::json).collect();
        serde_json::json!(problems)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Problems {}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(line: usize, column: usize, width: usize, text: &str) -> Problem {
        Problem {
            file: "hub.toml".into(),
            place: Some(Place { line, column, width, text: text.into() }),
            key: "nvram.size".into(),
            met: "1024 is no size".into(),
            wanted: "a size".into(),
            fix: "write \"1KiB\"".into(),
            also: None,
        }
    }

    #[test]
    fn a_problem_is_shown_with_its_line_and_a_caret_under_it() {
        let wanted = "\
error: nvram.size: 1024 is no size
  --> hub.toml:12:8
   |
12 | size = 1024
   |        ^^^^ wanted a size
   |
   = fix: write \"1KiB\"
";
        assert_eq!(problem(12, 8, 4, "size = 1024").render(false), wanted);
    }

    #[test]
    fn a_contradiction_shows_both_lines_in_their_order() {
        let mut contradiction = problem(12, 1, 4, "mode = 1");
        contradiction.also = Some(Place { line: 9, column: 1, width: 3, text: "ack = 2".into() });
        let text = contradiction.render(false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "  --> hub.toml:12:1");
        assert_eq!(
            lines[3..7],
            [" 9 | ack = 2", "   | ---", "12 | mode = 1", "   | ^^^^ wanted a size"]
        );
    }

    #[test]
    fn long_lines_are_cut_around_the_place_and_controls_do_not_reach_the_terminal() {
        let long = format!("{}\x1b[31m{}", "a".repeat(500), "b".repeat(500));
        let text = problem(1, 501, 3, &long).render(false);
        assert!(!text.contains('\x1b'));
        assert!(text.lines().all(|line| line.chars().count() < 130), "{text}");
        let mark = text.lines().find(|line| line.contains('^')).unwrap();
        let shown = text.lines().find(|line| line.starts_with("1 | ")).unwrap();
        let at = mark.find('^').unwrap();
        assert_eq!(shown.chars().nth(at), Some(' '), "the mark stands under the control character");
    }

    #[test]
    fn colours_only_when_asked_for() {
        assert!(problem(1, 1, 1, "x").render(true).contains("\x1b[1;31m"));
        assert!(!problem(1, 1, 1, "x").render(false).contains('\x1b'));
    }

    #[test]
    fn problems_come_in_order_and_once() {
        let problems = Problems::sorted(vec![
            problem(3, 1, 1, "x"),
            problem(1, 2, 1, "x"),
            problem(3, 1, 1, "x"),
            Problem::of_file(Path::new("hub.toml"), "met", "fix"),
        ]);
        let lines: Vec<Option<usize>> =
            problems.0.iter().map(|p| p.place.as_ref().map(|place| place.line)).collect();
        assert_eq!(lines, [None, Some(1), Some(3)]);
        assert_eq!(problems.to_json()[1]["line"], 1);
        assert!(problems.render(false).ends_with("3 problems; nothing was applied\n"));
    }
}
