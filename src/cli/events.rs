//! `mirrorhub events`: who did what, when, and what came of it.
//!
//! With `--follow` it goes on, over restarts of the process, and says so: what a process knew of
//! before is gone with it.

use std::io::Write;
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;

use super::Done;
use super::ask::{Asked, STATUS_PATIENCE, runtime};
use super::failure::{Failure, UNREACHABLE};
use super::locate::ConfigArgument;
use super::terminal::{Look, Terminal};
use crate::control::message::Request;
use crate::status::answers::{Event, EventsAnswer};

/// Time between two tries to reach a process that is away.
const AGAIN: Duration = Duration::from_millis(500);

/// Why nothing comes: its word, and the sentence.
type Why = (&'static str, &'static str);

const AWAY: Why = ("not-reachable", "the process does not answer, waiting");
const BUSY: Why = ("busy", "too many others follow or ask, waiting");

/// Show who did what, when, and what came of it
///
/// Commands that were given, changes of state, files that were read: the newest 1024 since the process
/// was started.
#[derive(Debug, Args)]
pub struct EventsArguments {
    /// Go on, also over a restart of the process, which is told
    #[arg(long, short)]
    follow: bool,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// What was read so far.
#[derive(Debug, Default)]
struct Reader {
    boot: Option<String>,
    next: u64,
    away: bool,
    /// It has waited for events once: it has begun to follow.
    follows: bool,
}

impl Reader {
    fn request(&self, wait: bool) -> Request {
        Request::Events { boot: self.boot.clone(), since: self.next, wait }
    }

    /// The lines of an answer.
    fn lines(&mut self, answer: &EventsAnswer, json: bool) -> Vec<String> {
        let mut lines = Vec::new();
        let restarted = self.boot.as_ref().is_some_and(|boot| *boot != answer.boot);
        if restarted {
            lines.push(remark("restarted", "the process was started anew", json));
        }
        if answer.passed_over > 0 && (self.boot.is_some() || restarted) {
            let what = format!("{} events are not kept any more", answer.passed_over);
            lines.push(remark("passed-over", &what, json));
        }
        lines.extend(answer.events.iter().map(|event| line(event, json)));
        (self.boot, self.next, self.away) = (Some(answer.boot.clone()), answer.next, false);
        lines
    }

    /// The line that says why nothing comes, once.
    fn is_away(&mut self, (word, what): Why, json: bool) -> Option<String> {
        let first = !std::mem::replace(&mut self.away, true);
        first.then(|| remark(word, what, json))
    }

    /// Asks; or why nothing comes at this moment to somebody who follows.
    async fn ask(
        &mut self,
        asked: &Asked,
        follow: bool,
        look: Look,
    ) -> Result<Result<EventsAnswer, Why>, Failure> {
        let waits = follow && self.boot.is_some();
        let (request, patience) = (self.request(waits), Some(STATUS_PATIENCE));
        let answer = if self.follows {
            asked.ask_unless_busy(&request, "events", patience).await
        } else {
            asked.ask(&request, "events", patience, look).await.map(Some)
        };
        match answer {
            Ok(answer) => {
                self.follows |= waits;
                Ok(answer.ok_or(BUSY))
            }
            Err(Failure::Message { code: UNREACHABLE, .. }) if waits => Ok(Err(AWAY)),
            Err(failure) => Err(failure),
        }
    }
}

fn remark(word: &str, what: &str, json: bool) -> String {
    if json { serde_json::json!({ "remark": word }).to_string() } else { format!("-- {what}") }
}

fn line(event: &Event, json: bool) -> String {
    if json {
        return serde_json::to_string(event).unwrap_or_default();
    }
    let Event { at_seconds, who, what, result, .. } = event;
    let at =
        Timestamp::from_second(*at_seconds).map_or_else(|_| "-".to_owned(), |at| at.to_string());
    format!("{at}  {who}  {what}: {result}")
}

/// Runs it.
pub fn run(arguments: &EventsArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let mut reader = Reader::default();
    let mut out = std::io::stdout();
    runtime()?.block_on(async {
        loop {
            let lines = match reader.ask(&asked, arguments.follow, terminal.error).await? {
                Ok(answer) => reader.lines(&answer, arguments.json),
                Err(why) => {
                    tokio::time::sleep(AGAIN).await;
                    reader.is_away(why, arguments.json).into_iter().collect()
                }
            };
            let written = lines.iter().try_for_each(|line| writeln!(out, "{line}"));
            if written.and_then(|()| out.flush()).is_err() {
                // Nobody reads any more.
                return Ok(Done::WELL);
            }
            if !arguments.follow {
                return Ok(Done::WELL);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_and_a_gap_are_told() {
        let event = |number| Event {
            number,
            at_seconds: 0,
            who: "uid 0".to_owned(),
            what: "checkpoint".to_owned(),
            result: "done".to_owned(),
        };
        let answer = |boot: &str, next, passed_over, events| EventsAnswer {
            schema: 1,
            boot: boot.to_owned(),
            next,
            passed_over,
            events,
        };
        let mut reader = Reader::default();
        let first = reader.lines(&answer("a", 7, 5, vec![event(5), event(6)]), false);
        let shown = "1970-01-01T00:00:00Z  uid 0  checkpoint: done";
        assert_eq!(first, [shown, shown], "what went before was never asked for");
        assert!(matches!(reader.request(true), Request::Events { since: 7, wait: true, .. }));
        let gap = reader.lines(&answer("a", 20, 3, vec![event(19)]), false);
        assert_eq!(gap, ["-- 3 events are not kept any more", shown]);
        assert!(reader.is_away(AWAY, false).is_some() && reader.is_away(BUSY, false).is_none());
        let again = reader.lines(&answer("b", 1, 0, vec![event(0)]), false);
        assert_eq!(again, ["-- the process was started anew", shown]);
        assert!(reader.is_away(AWAY, true).is_some_and(|line| line.contains("not-reachable")));
    }
}
