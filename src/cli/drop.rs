//! `mirrorhub drop`: gives up a kept CP, after its name was typed once more.

use clap::Args;

use super::ask::{Asked, confirm, runtime};
use super::failure::{Failure, print_answer};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use super::{Done, words};
use crate::control::message::{KeptTarget, Request};
use crate::status::answers::DropAnswer;

/// Give up a CP that is kept by name; its space becomes free
///
/// On a terminal its name must be typed once more. It cannot be had back.
#[derive(Debug, Args)]
pub struct DropArguments {
    /// The kept CP
    #[arg(value_name = "SOURCE@NAME")]
    target: KeptTarget,
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
pub fn run(arguments: &DropArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let target = &arguments.target;
    let what = format!("drop of {target}");
    if !arguments.yes {
        confirm(&what, &format!("{target} is given up for good."), &target.to_string())?;
    }
    let request = Request::Drop { target: target.clone() };
    let answer: DropAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    print_answer(arguments.json, &answer, view)?;
    Ok(Done::WELL)
}

fn view(answer: &DropAnswer) -> String {
    let DropAnswer { source, name, cp, freed_bytes, .. } = answer;
    let freed = words::size(*freed_bytes);
    format!("{source}@{name}: CP {cp} is no longer kept, {freed} are free again\n")
}
