//! `mirrorhub failover`: fences a source and makes its log the image that the hub serves.

use clap::Args;

use super::Done;
use super::ask::{Asked, runtime};
use super::failure::{Failure, print_answer, sentences};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use crate::control::message::Request;
use crate::status::answers::FailoverAnswer;
use crate::units::names::SourceName;

/// Fence a source that is lost, and bring its image up to its last write on the hub
///
/// From the moment it is fenced the source is refused until `failback`. Reads the whole log first
/// and refuses, with nothing changed, if that has a gap.
#[derive(Debug, Args)]
pub struct FailoverArguments {
    /// The source
    source: SourceName,
    /// Only say at which write the image would end, and what may be lost
    #[arg(long)]
    dry_run: bool,
    /// Do not wait until a source that is cut off holds its reads: stale reads are possible
    #[arg(long)]
    now: bool,
    /// Give up what lies behind a gap in the log
    #[arg(long)]
    accept_gap: bool,
    /// Serve the published image of a source that was failed over, without what its lost NVRAM held
    #[arg(long)]
    accept_lost_nvram: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &FailoverArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let FailoverArguments { source, dry_run, now, accept_gap, accept_lost_nvram, json, config } =
        arguments;
    let asked = Asked::of(config)?;
    let request = Request::Failover {
        source: source.clone(),
        dry_run: *dry_run,
        now: *now,
        accept_gap: *accept_gap,
        accept_lost_nvram: *accept_lost_nvram,
    };
    let what = format!("failover of {source}");
    let answer: FailoverAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    print_answer(*json, &answer, view)?;
    Ok(Done::WELL)
}

fn view(answer: &FailoverAnswer) -> String {
    sentences(&answer.source, &answer.sentences, &answer.next_step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sentence_and_the_next_step_are_shown() {
        let answer = FailoverAnswer {
            schema: 1,
            source: "filer-a".parse().unwrap(),
            dry_run: false,
            outcome: "complete".into(),
            epoch: 2,
            cp: 7,
            sequence: 40,
            entries: 3,
            bytes: 12288,
            may_be_lost: false,
            applied: true,
            sentences: vec!["failed over".into(), "no acknowledged write is lost".into()],
            next_step: "give it back".into(),
        };
        let wanted = "filer-a: failed over\nfiler-a: no acknowledged write is lost\n  \
                      next: give it back\n";
        assert_eq!(view(&answer), wanted);
    }
}
