//! `mirrorhub forget`: gives up the images of a retired source, after its name was typed once more.

use std::io::{IsTerminal, Write};

use clap::Args;

use super::ask::{Asked, runtime};
use super::failure::{Failure, USAGE, print, print_json};
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
    if !arguments.yes {
        confirm(source)?;
    }
    let request = Request::Forget { source: source.clone() };
    let what = format!("forget {source}");
    let answer: ForgetAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    if arguments.json {
        print_json(&answer)?
    } else {
        print(&view(&answer))?
    }
    Ok(Done::WELL)
}

/// Has the name typed once more. Without somebody at a terminal nothing is forgotten.
fn confirm(source: &SourceName) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        let what = format!("forget {source}: nobody is there to confirm it");
        let next = "run it in a terminal, or add --yes".into();
        return Err(Failure::Message { code: USAGE, what, next });
    }
    let unread = |error: std::io::Error| {
        Failure::failed(format!("forget {source}: no confirmation can be read: {error}"), "")
    };
    let mut out = std::io::stderr();
    write!(out, "All images of {source} are given up for good. Type its name to confirm: ")
        .map_err(unread)?;
    out.flush().map_err(unread)?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(unread)?;
    is_confirmed(source, &line)
}

fn is_confirmed(source: &SourceName, line: &str) -> Result<(), Failure> {
    if line.trim() == source.as_str() {
        return Ok(());
    }
    Err(Failure::failed(format!("forget {source}: not confirmed, nothing is forgotten"), ""))
}

fn view(answer: &ForgetAnswer) -> String {
    let ForgetAnswer { source, volumes, kept, freed_bytes, .. } = answer;
    let volumes = words::count(usize::try_from(*volumes).unwrap_or(usize::MAX), "image");
    let freed = words::size(*freed_bytes);
    format!("{source}: forgotten with {volumes} and {kept} kept CPs, {freed} are free again\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_name_confirms() {
        let source: SourceName = "filer-a".parse().unwrap();
        assert!(is_confirmed(&source, "filer-a\n").is_ok());
        for other in ["", "\n", "y\n", "yes\n", "filer\n", "filer-a x\n"] {
            assert!(is_confirmed(&source, other).is_err(), "{other:?}");
        }
    }
}
