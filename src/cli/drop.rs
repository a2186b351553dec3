//! `mirrorhub drop`: gives up a kept CP, after its name was typed once more.

use std::io::{IsTerminal, Write};

use clap::Args;

use super::ask::{Asked, runtime};
use super::failure::{Failure, USAGE, print_answer};
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
    if !arguments.yes {
        confirm(&arguments.target)?;
    }
    let request = Request::Drop { target: arguments.target.clone() };
    let what = format!("drop of {}", arguments.target);
    let answer: DropAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    print_answer(arguments.json, &answer, view)?;
    Ok(Done::WELL)
}

/// Has the name typed once more. Without somebody at a terminal nothing is dropped.
fn confirm(target: &KeptTarget) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        let what = format!("drop of {target}: nobody is there to confirm it");
        let next = "run it in a terminal, or add --yes".into();
        return Err(Failure::Message { code: USAGE, what, next });
    }
    let unread = |error: std::io::Error| {
        Failure::failed(format!("drop of {target}: no confirmation can be read: {error}"), "")
    };
    let mut out = std::io::stderr();
    write!(out, "{target} is given up for good. Type its name to confirm: ").map_err(unread)?;
    out.flush().map_err(unread)?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(unread)?;
    is_confirmed(target, &line)
}

fn is_confirmed(target: &KeptTarget, line: &str) -> Result<(), Failure> {
    if line.trim() == target.to_string() {
        return Ok(());
    }
    Err(Failure::failed(format!("drop of {target}: not confirmed, nothing is dropped"), ""))
}

fn view(answer: &DropAnswer) -> String {
    let DropAnswer { source, name, cp, freed_bytes, .. } = answer;
    let freed = words::size(*freed_bytes);
    format!("{source}@{name}: CP {cp} is no longer kept, {freed} are free again\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_name_confirms() {
        let target: KeptTarget = "filer-a@mon".parse().unwrap();
        assert!(is_confirmed(&target, "filer-a@mon\n").is_ok());
        for other in ["", "\n", "y\n", "yes\n", "mon\n", "filer-a@mo\n", "filer-a@mon x\n"] {
            assert!(is_confirmed(&target, other).is_err(), "{other:?}");
        }
    }
}
