//! `mirrorhub forget`: gives up the images of a retired source, after its name was typed once more.

use clap::Args;

use super::ask::{Asked, confirm, runtime};
use super::failure::{Failure, print_answer};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use super::{Done, words};
use crate::control::message::Request;
use crate::status::answers::ForgetAnswer;
use crate::units::names::SourceName;

/// Give up the images, kept CPs and logs of a retired source; their space becomes free
///
/// Its file must be gone from the hub's sources directory. On a terminal its name must be typed once
/// more. Nothing of it can be had back.
#[derive(Debug, Args)]
pub struct ForgetArguments {
    /// The source
    source: SourceName,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &ForgetArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let source = &arguments.source;
    let what = format!("forget {source}");
    if !arguments.yes {
        let warning = format!("All images of {source} are given up for good.");
        confirm(&what, &warning, source.as_str())?;
    }
    let request = Request::Forget { source: source.clone() };
    let answer: ForgetAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    print_answer(arguments.json, &answer, view)?;
    Ok(Done::WELL)
}

fn view(answer: &ForgetAnswer) -> String {
    let ForgetAnswer { source, volumes, kept, freed_bytes, .. } = answer;
    let volumes = words::count(usize::try_from(*volumes).unwrap_or(usize::MAX), "image");
    let freed = words::size(*freed_bytes);
    format!("{source}: forgotten with {volumes} and {kept} kept CPs, {freed} are free again\n")
}
