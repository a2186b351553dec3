//! Shows how far a command is: a bar on a terminal, a line every ten seconds elsewhere, nothing for
//! what is over within a second. Always on stderr, so that stdout has the result only.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::terminal::Look;
use super::words;
use crate::control::message::{Progress, ProgressUnit};
use crate::units::BLOCK_BYTES_U64;

/// A command that takes less shows nothing.
const QUIET: Duration = Duration::from_secs(1);
/// Time between two lines where no bar can be.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows the progress of one command.
#[derive(Debug)]
pub struct ProgressShow {
    tty: bool,
    unicode: bool,
    began: Instant,
    line_due: Instant,
    bar: Option<ProgressBar>,
}

impl ProgressShow {
    /// For a command that begins now.
    pub fn new(look: Look) -> Self {
        let began = Instant::now();
        let (tty, unicode) = (look.tty, look.unicode);
        Self { tty, unicode, began, line_due: began + LINE_EVERY, bar: None }
    }

    /// The newest report.
    pub fn update(&mut self, progress: &Progress) {
        let now = Instant::now();
        if self.tty && now.duration_since(self.began) >= QUIET {
            let unicode = self.unicode;
            let bar = self.bar.get_or_insert_with(|| new_bar(unicode));
            let (done, total) = amounts(progress);
            bar.set_length(total.unwrap_or(0).max(done));
            bar.set_position(done);
            bar.set_message(format!("{} {}", progress.what, progress.object));
        } else if !self.tty && now >= self.line_due {
            self.line_due = now + LINE_EVERY;
            // A closed stderr is no reason to stop the command.
            let _nobody_reads = std::io::stderr().write_all(line(progress).as_bytes());
        }
    }

    /// The command is over: the bar goes, the result comes.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(unicode: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10));
    let template = "{msg} [{bar:30}] {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left";
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    let cells = if unicode { "\u{2501}\u{2578} " } else { "=> " };
    bar.set_style(style.progress_chars(cells));
    bar
}

/// Bytes, so that one bar fits all; steps are shown as they are.
fn amounts(progress: &Progress) -> (u64, Option<u64>) {
    let factor = match progress.unit {
        ProgressUnit::Blocks => BLOCK_BYTES_U64,
        ProgressUnit::Bytes | ProgressUnit::Steps => 1,
    };
    let bytes = |number: u64| number.saturating_mul(factor);
    (bytes(progress.done), progress.total.map(bytes))
}

fn line(progress: &Progress) -> String {
    let (done, total) = amounts(progress);
    let print = |amount: u64| match progress.unit {
        ProgressUnit::Steps => amount.to_string(),
        ProgressUnit::Bytes | ProgressUnit::Blocks => words::size(amount),
    };
    let of = match total {
        Some(total) => format!(" of {} ({}%)", print(total), words::percent(done, total)),
        None => String::new(),
    };
    format!("{} {}: {}{of}\n", progress.what, progress.object, print(done))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(done: u64, total: Option<u64>, unit: ProgressUnit) -> Progress {
        Progress { what: "reading".into(), object: "filer-a/vol0".into(), done, total, unit }
    }

    #[test]
    fn a_line_says_what_of_what_and_how_far() {
        let blocks = progress(512, Some(1024), ProgressUnit::Blocks);
        assert_eq!(line(&blocks), "reading filer-a/vol0: 2.0 MiB of 4.0 MiB (50%)\n");
        assert_eq!(line(&progress(7, None, ProgressUnit::Steps)), "reading filer-a/vol0: 7\n");
        assert_eq!(line(&progress(0, Some(0), ProgressUnit::Bytes)).matches("0%").count(), 1);
    }

    #[test]
    fn the_template_of_the_bar_is_understood() {
        for unicode in [true, false] {
            let bar = new_bar(unicode);
            bar.set_draw_target(ProgressDrawTarget::hidden());
            bar.set_length(4096);
            bar.set_position(1024);
            assert_eq!(bar.position(), 1024);
        }
        let mut show = ProgressShow::new(Look::PLAIN);
        show.update(&progress(1, Some(2), ProgressUnit::Bytes));
        assert!(show.bar.is_none(), "no bar where nobody looks");
        show.end();
    }
}
