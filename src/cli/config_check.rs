//! `mirrorhub config check`: every problem of a configuration, or what its sizes carry; `config
//! diff`: what a reload of the running process would do.

use std::path::Path;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::ask::{Asked, STATUS_PATIENCE, runtime};
use super::failure::{CONFIGURATION, Failure, print, print_json};
use super::locate::ConfigArgument;
use super::terminal::{Look, Terminal};
use super::{Done, words};
use crate::config::load::{Loaded, load};
use crate::config::quantity::format_size;
use crate::config::schema::ProcessConfig;
use crate::config::sizing::{Sizing, of_hub, of_source};
use crate::control::message::Request;
use crate::status::SCHEMA;
use crate::status::config::{ConfigChange, ConfigDiffAnswer, ConfigProblem, STILL_WRITTEN};
use crate::units::numbers::ByteCount;

/// How long a check waits for what the running hub knows beyond the files.
const HUB_PATIENCE: Duration = Duration::from_secs(2);

/// Look at a configuration
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration and print what its sizes carry
    Check(CheckArguments),
    /// Ask the running process what a reload (SIGHUP) would do, key by key
    Diff(DiffArguments),
}

/// Arguments of `config diff`.
#[derive(Debug, Args)]
pub struct DiffArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// Print JSON
    #[arg(long)]
    json: bool,
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
    let arguments = match command {
        ConfigCommand::Check(arguments) => arguments,
        ConfigCommand::Diff(arguments) => return diff(arguments, terminal),
    };
    let file = arguments.config.file()?;
    match load(&file) {
        Ok(loaded) if arguments.json => {
            let (kind, sizing) = (kind(&loaded), sizing(&loaded, &arguments.config));
            let file = file.display().to_string();
            let problems: [Value; 0] = [];
            print_json(&json!({
                "schema": SCHEMA, "ok": true, "file": file, "kind": kind,
                "problems": problems, "sizing": sizing,
            }))?;
            Ok(Done::WELL)
        }
        Ok(loaded) => {
            let sizing = sizing(&loaded, &arguments.config);
            print(&view(&file, &loaded, sizing, terminal.out))?;
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

fn diff(arguments: &DiffArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let patience = Some(STATUS_PATIENCE);
    let request = asked.ask(&Request::ConfigDiff {}, "config diff", patience, terminal.error);
    let answer: ConfigDiffAnswer = runtime()?.block_on(request)?;
    if arguments.json {
        print_json(&answer)?
    } else {
        print(&diff_view(&answer))?
    }
    Ok(if answer.problems.is_empty() { Done::WELL } else { Done(CONFIGURATION) })
}

fn diff_view(answer: &ConfigDiffAnswer) -> String {
    let mut text = String::new();
    for ConfigProblem { file, line, key, met, fix } in &answer.problems {
        let line = line.map(|line| format!(":{line}")).unwrap_or_default();
        let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
        text.push_str(&format!("refused  {file}{line}: {key}{met}\n         fix: {fix}\n"));
    }
    let width = answer.changes.iter().map(|change| change.key.len()).max().unwrap_or(0);
    for ConfigChange { key, from, to, when } in &answer.changes {
        let when = match when.as_str() {
            "now" => "with the reload",
            "next-cp" => "behind the next CP",
            "next-session" => "when it connects again",
            _ => "not before a restart",
        };
        let show = |value: &str| if value.is_empty() { "nothing".to_owned() } else { value.into() };
        text.push_str(&format!("{key:<width$}  {} -> {}, {when}\n", show(from), show(to)));
    }
    if text.is_empty() {
        text.push_str("a reload changes nothing\n");
    }
    text
}

fn kind(loaded: &Loaded) -> &'static str {
    match loaded {
        Loaded::Process(ProcessConfig::Hub(_)) => "hub",
        Loaded::Process(ProcessConfig::Source(_)) => "source",
        Loaded::SourceFile(_) => "source-file",
    }
}

fn sizing(loaded: &Loaded, config: &ConfigArgument) -> Option<Sizing> {
    match loaded {
        Loaded::Process(ProcessConfig::Hub(hub)) => {
            let mut sizing = of_hub(hub);
            sizing.notes.extend(still_written(config));
            Some(sizing)
        }
        Loaded::Process(ProcessConfig::Source(source)) => Some(of_source(source)),
        Loaded::SourceFile(_) => None,
    }
}

/// Files of sources that the running hub does not read since they stay open for writing. Only that process
/// knows it, so without one there are none.
fn still_written(config: &ConfigArgument) -> Vec<String> {
    let (Ok(asked), Ok(runtime)) = (Asked::of(config), runtime()) else { return Vec::new() };
    let ask = asked.ask_unless_busy(&Request::ConfigDiff {}, "config check", Some(HUB_PATIENCE));
    let Ok(Some(ConfigDiffAnswer { problems, .. })) = runtime.block_on(ask) else {
        return Vec::new();
    };
    let held = problems.into_iter().filter(|problem| problem.met == STILL_WRITTEN);
    held.map(|ConfigProblem { file, met, .. }| format!("{file}: {met}")).collect()
}

fn view(file: &Path, loaded: &Loaded, sizing: Option<Sizing>, look: Look) -> String {
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
    let Some(sizing) = sizing else { return text };
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
