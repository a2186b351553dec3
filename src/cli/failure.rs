//! Why a command failed, and its exit code.

use std::io;

use crate::config::problem::Problems;

/// It was tried and failed.
pub const FAILED: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// No process answers.
pub const UNREACHABLE: u8 = 3;
/// The configuration is wrong (`EX_CONFIG` of sysexits.h), so that a service manager does not try
/// again.
pub const CONFIGURATION: u8 = 78;

/// A command that failed.
#[derive(Debug)]
pub enum Failure {
    /// In words.
    Message {
        /// Exit code.
        code: u8,
        /// What failed, with which object, and why: lower case, no full stop.
        what: String,
        /// The next thing to do; may be empty.
        next: String,
    },
    /// The configuration has problems.
    Problems(Problems),
    /// Nobody reads what is printed any more: not an error, as in `mirrorhub status | head`.
    NobodyReads,
}

impl Failure {
    /// It was tried and failed.
    pub fn failed(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self::Message { code: FAILED, what: what.into(), next: next.into() }
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Message { code, .. } => *code,
            Self::Problems(_) => CONFIGURATION,
            Self::NobodyReads => 0,
        }
    }

    /// What a person reads on stderr.
    pub fn render(&self, colour: bool) -> String {
        let (red, bold, plain) =
            if colour { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        match self {
            Self::Message { what, next, .. } => {
                let mut text = format!("{red}error{plain}{bold}: {what}{plain}\n");
                if !next.is_empty() {
                    text.push_str(&format!("  next: {next}\n"));
                }
                text
            }
            Self::Problems(problems) => problems.render(colour),
            Self::NobodyReads => String::new(),
        }
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self::Problems(problems)
    }
}

/// Writes to stdout all at once.
pub fn print(text: &str) -> Result<(), Failure> {
    use io::Write;
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::NobodyReads),
        Err(error) => Err(Failure::failed(format!("cannot write to stdout: {error}"), "")),
    }
}

/// Writes a JSON document to stdout, readable.
pub fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::failed(format!("cannot make JSON: {error}"), ""))?;
    print(&(text + "\n"))
}

/// Writes an answer: as JSON if that was asked for, else as `view` shows it.
pub fn print_answer<T: serde::Serialize>(
    json: bool,
    answer: &T,
    view: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    if json { print_json(answer) } else { print(&view(answer)) }
}

/// Each sentence on a line of its own behind what it is about, then what to do next.
pub fn sentences(about: impl std::fmt::Display, said: &[String], next_step: &str) -> String {
    let mut text = String::new();
    for sentence in said {
        text.push_str(&format!("{about}: {sentence}\n"));
    }
    if !next_step.is_empty() {
        text.push_str(&format!("  next: {next_step}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_and_what_next() {
        let failure = Failure::failed("checkpoint of filer-a: the hub is lost", "bring it back");
        let text = "error: checkpoint of filer-a: the hub is lost\n  next: bring it back\n";
        assert_eq!(failure.render(false), text);
        assert_eq!(failure.code(), FAILED);
        assert!(failure.render(true).starts_with("\x1b[1;31merror"));
        assert_eq!(Failure::Problems(Problems::default()).code(), CONFIGURATION);
        assert_eq!(
            (Failure::NobodyReads.code(), Failure::NobodyReads.render(true)),
            (0, "".into())
        );
    }
}
