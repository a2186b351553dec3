//! `mirrorhub config check`: every problem of a configuration, or what its sizes carry.

use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::failure::{CONFIGURATION, Failure, print, print_json};
use super::locate::ConfigArgument;
use super::terminal::{Look, Terminal};
use super::{Done, words};
use crate::config::load::{Loaded, load};
use crate::config::quantity::format_size;
use crate::config::schema::ProcessConfig;
use crate::config::sizing::{Sizing, of_hub, of_source};
use crate::status::SCHEMA;
use crate::units::numbers::ByteCount;

/// Look at a configuration
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration and print what its sizes carry
    Check(CheckArguments),
}

/// Arguments of `config check`.
#[derive(Debug, Args)]
pub struct CheckArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(command: &ConfigCommand, terminal: &Terminal) -> Result<Done, Failure> {
    let ConfigCommand::Check(arguments) = command;
    let file = arguments.config.file()?;
    match load(&file) {
        Ok(loaded) if arguments.json => {
            let (kind, sizing) = (kind(&loaded), sizing(&loaded));
            let file = file.display().to_string();
            let problems: [Value; 0] = [];
            print_json(&json!({
                "schema": SCHEMA, "ok": true, "file": file, "kind": kind,
                "problems": problems, "sizing": sizing,
            }))?;
            Ok(Done::WELL)
        }
        Ok(loaded) => {
            print(&view(&file, &loaded, terminal.out))?;
            Ok(Done::WELL)
        }
        Err(problems) if arguments.json => {
            let file = file.display().to_string();
            let problems = problems.to_json();
            print_json(&json!({
                "schema": SCHEMA, "ok": false, "file": file, "kind": null,
                "problems": problems, "sizing": null,
            }))?;
            Ok(Done(CONFIGURATION))
        }
        Err(problems) => Err(problems.into()),
    }
}

fn kind(loaded: &Loaded) -> &'static str {
    match loaded {
        Loaded::Process(ProcessConfig::Hub(_)) => "hub",
        Loaded::Process(ProcessConfig::Source(_)) => "source",
        Loaded::SourceFile(_) => "source-file",
    }
}

fn sizing(loaded: &Loaded) -> Option<Sizing> {
    match loaded {
        Loaded::Process(ProcessConfig::Hub(hub)) => Some(of_hub(hub)),
        Loaded::Process(ProcessConfig::Source(source)) => Some(of_source(source)),
        Loaded::SourceFile(_) => None,
    }
}

fn view(file: &Path, loaded: &Loaded, look: Look) -> String {
    let what = match loaded {
        Loaded::Process(ProcessConfig::Hub(hub)) => {
            format!("a hub with {}", words::count(hub.sources.len(), "source"))
        }
        Loaded::Process(ProcessConfig::Source(source)) => {
            let volumes = words::count(source.volumes.len(), "volume");
            format!("the source {} with {volumes}", source.name)
        }
        Loaded::SourceFile(source) => format!("the source {} on its hub", source.name),
    };
    let (green, plain) = if look.colour { ("\x1b[1;32m", "\x1b[0m") } else { ("", "") };
    let mut text = format!("{}: {green}ok{plain}, {what}\n", file.display());
    let Some(sizing) = sizing(loaded) else { return text };
    text.push('\n');
    for line in &sizing.lines {
        // Bytes in the unit of the file where they fit one, as they were written there.
        let written = format_size(ByteCount(line.bytes));
        let size = if written.len() > 8 { words::size(line.bytes) } else { written };
        text.push_str(&format!("  {:<15} {:>9}  {}\n", line.what, size, line.carries));
    }
    for note in &sizing.notes {
        text.push_str(&format!("\n  note: {note}\n"));
    }
    text
}
