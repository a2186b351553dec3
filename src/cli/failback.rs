//! `mirrorhub failback`: gives a source that was failed over back to its filer.

use clap::{Args, ValueEnum};

use super::Done;
use super::ask::{Asked, runtime};
use super::failure::{Failure, print_answer, sentences};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use crate::control::message::{Request, Side};
use crate::status::answers::FailbackAnswer;
use crate::units::names::SourceName;

/// Give a source that was failed over back to its filer
///
/// The filer must be connected: started with the state it had, or as a new one with an empty
/// data_dir, it follows by itself. It is brought up while the hub serves; clients are held for the
/// last moment only.
#[derive(Debug, Args)]
pub struct FailbackArguments {
    /// The source
    source: SourceName,
    /// Whose writes stay, if both sides have written: the other side's state is kept as a CP by name,
    /// the filer's on the filer, the hub's on the hub
    #[arg(long, value_name = "SIDE")]
    keep: Option<Keep>,
    /// Give the volumes to another filer, which serves them beside its own
    #[arg(long, value_name = "FILER")]
    to: Option<SourceName>,
    /// Do nothing, say what would be: whose writes stay, what is kept under which name
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// A side, as it is typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Keep {
    Hub,
    Source,
}

/// Runs it.
pub fn run(arguments: &FailbackArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let FailbackArguments { source, keep, to, dry_run, json, config } = arguments;
    let asked = Asked::of(config)?;
    let keep = keep.map(|keep| match keep {
        Keep::Hub => Side::Hub,
        Keep::Source => Side::Source,
    });
    let (source, to, dry_run) = (source.clone(), to.clone(), *dry_run);
    let request = Request::Failback { source: source.clone(), keep, to, dry_run };
    let what = format!("failback of {source}");
    let answer: FailbackAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    print_answer(*json, &answer, view)?;
    Ok(Done::WELL)
}

fn view(answer: &FailbackAnswer) -> String {
    sentences(&answer.source, &answer.sentences, &answer.next_step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sentence_and_the_next_step_are_shown() {
        let answer = FailbackAnswer {
            schema: 1,
            source: "filer-a".parse().unwrap(),
            epoch: 3,
            cp: 9,
            rounds: 2,
            pause_ms: 80,
            serves: true,
            kept: None,
            kept_on_hub: None,
            dry_run: false,
            sentences: vec!["given back".into(), "clients were held".into()],
            next_step: String::new(),
        };
        assert_eq!(view(&answer), "filer-a: given back\nfiler-a: clients were held\n");
        let waiting = FailbackAnswer { next_step: "start it".into(), ..answer };
        assert!(view(&waiting).ends_with("  next: start it\n"));
    }
}
