//! `mirrorhub status`: the sources, how safe each is, and what to do.

use std::time::Duration;

use clap::Args;
use tokio::time::{MissedTickBehavior, interval};

use super::Done;
use super::ask::{Asked, STATUS_PATIENCE, runtime};
use super::failure::{Failure, UNREACHABLE, print, print_json};
use super::locate::ConfigArgument;
use super::status_view::view;
use super::terminal::Terminal;
use crate::control::message::Request;
use crate::status::document::StatusDocument;
use crate::status::health::Health;
use crate::units::names::SourceName;

/// Show the sources, how safe each is, and what to do
#[derive(Debug, Args)]
pub struct StatusArguments {
    /// Only this source, with its volumes and roots
    source: Option<SourceName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Show it again every two seconds; with --json one line each
    #[arg(long, conflicts_with = "check")]
    watch: bool,
    /// One line and an exit code for monitoring: 0 ok, 1 warning, 2 critical, 3 unknown
    #[arg(long, conflicts_with = "json")]
    check: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

const WATCH_EVERY: Duration = Duration::from_secs(2);

/// Runs it.
pub fn run(arguments: &StatusArguments, terminal: &Terminal) -> Result<Done, Failure> {
    if arguments.check {
        return check(arguments, terminal);
    }
    let asked = Asked::of(&arguments.config)?;
    if arguments.watch {
        return runtime()?.block_on(watch(arguments, &asked, terminal));
    }
    let document = runtime()?.block_on(fetch(arguments, &asked, terminal))?;
    if arguments.json {
        print_json(&document)?;
    } else {
        print(&view(&document, arguments.source.as_ref(), terminal.out))?;
    }
    Ok(Done::WELL)
}

async fn fetch(
    arguments: &StatusArguments,
    asked: &Asked,
    terminal: &Terminal,
) -> Result<StatusDocument, Failure> {
    let request = Request::Status { source: arguments.source.clone() };
    asked.ask(&request, "status", Some(STATUS_PATIENCE), terminal.error).await
}

/// Until interrupted. A process that is not there for a while is waited for.
async fn watch(
    arguments: &StatusArguments,
    asked: &Asked,
    terminal: &Terminal,
) -> Result<Done, Failure> {
    let mut tick = interval(WATCH_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let text = match fetch(arguments, asked, terminal).await {
            Ok(document) if arguments.json => {
                let line = serde_json::to_string(&document);
                line.map_err(|error| Failure::failed(format!("cannot make JSON: {error}"), ""))?
                    + "\n"
            }
            Ok(document) => view(&document, arguments.source.as_ref(), terminal.out),
            Err(failure) if arguments.json => return Err(failure),
            Err(failure) => failure.render(terminal.out.colour),
        };
        if terminal.out.tty && !arguments.json {
            // Home, each line over the old one and cut at its end, then what is left below.
            print(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")))?;
        } else {
            print(&text)?;
        }
    }
}

/// As monitoring plugins do it: one line on stdout, more below, and the exit code says it all.
fn check(arguments: &StatusArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let document = Asked::of(&arguments.config).and_then(|asked| {
        let runtime = runtime()?;
        runtime.block_on(fetch(arguments, &asked, terminal))
    });
    match document {
        Ok(document) => {
            let health = health_of(&document, arguments.source.as_ref());
            print(&check_line(&health, document.sources().len()))?;
            Ok(Done(health.word.level()))
        }
        Err(failure) => {
            let text = failure.render(false);
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            print(&format!("MIRRORHUB UNKNOWN - {text}"))?;
            Ok(Done(UNREACHABLE))
        }
    }
}

fn health_of(document: &StatusDocument, source: Option<&SourceName>) -> Health {
    match source {
        Some(source) => document.health().only(source.as_str(), &document.sources()),
        None => document.health().clone(),
    }
}

fn check_line(health: &Health, sources: usize) -> String {
    let word = health.word.as_str().to_ascii_uppercase();
    let mut reasons = health.reasons.iter().map(|reason| reason.text.clone());
    let first = reasons.next();
    let first = first.unwrap_or_else(|| super::words::count(sources, "source") + " in order");
    let mut text = format!("MIRRORHUB {word} - {first}\n");
    for reason in reasons {
        text.push_str(&format!("{reason}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::health::{HealthReason, HealthWord};

    #[test]
    fn a_check_is_one_line_and_more_below() {
        let reason = |text: &str, word| HealthReason {
            code: "source-behind".into(),
            word,
            object: "filer-b".into(),
            text: text.into(),
            next_step: String::new(),
        };
        let health = Health::from_reasons(vec![
            reason("filer-b is behind: no space", HealthWord::Warning),
            reason("filer-c is offline: away", HealthWord::Critical),
        ]);
        let text = "MIRRORHUB CRITICAL - filer-c is offline: away\nfiler-b is behind: no space\n";
        assert_eq!(check_line(&health, 3), text);
        let well = Health::from_reasons(Vec::new());
        assert_eq!(check_line(&well, 2), "MIRRORHUB OK - 2 sources in order\n");
    }
}
