//! The command line: one file a command.
//!
//! Floor 11. [`run`] is all that `main` calls. Data goes to stdout, progress and errors to stderr;
//! every error says what failed, with which object, why, and what to do next. Exit codes are those
//! of section 13 ([`failure`]).
//!
//! * processes: [`serve`] (`hub`, `source`), [`demo`]
//! * commands: [`status`], [`top`], [`events`], [`hash`], [`checkpoint`], [`kept`], [`mod@drop`], [`verify`],
//!   [`failover`], [`failback`], [`onboard`], [`certify`], [`forget`], [`seed`], [`scrub`],
//!   [`device`], [`import`], [`config_check`], [`completions`], [`man`]
//! * [`locate`]: which configuration file, which admin socket
//! * [`ask`]: asks a running process, with progress
//! * [`terminal`], [`words`], [`progress`]: colours and widths, sizes and times in words, bars
//! * [`logging`], [`signals`], [`sockets`], [`service`]: what a long-running command needs around it

pub mod ask;
pub mod authority;
pub mod bundle;
pub mod certify;
pub mod checkpoint;
pub mod completions;
pub mod config_check;
pub mod demo;
pub mod device;
pub mod drop;
pub mod events;
pub mod exchange;
pub mod failback;
pub mod failover;
pub mod failure;
pub mod forget;
pub mod hash;
pub mod import;
pub mod kept;
pub mod locate;
pub mod logging;
pub mod man;
pub mod new_file;
pub mod onboard;
pub mod place;
pub mod progress;
mod renew;
pub mod scrub;
pub mod seed;
pub mod serve;
pub mod service;
pub mod signals;
pub mod sockets;
pub mod status;
pub mod status_view;
pub mod terminal;
pub mod top;
pub mod top_view;
pub mod verify;
pub mod words;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use terminal::Terminal;

/// What was typed.
#[derive(Debug, Parser)]
#[command(
    name = "mirrorhub",
    version,
    about = "A central hub that keeps a live, proven, readable mirror of the volumes of many filers",
    max_term_width = 100,
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 not reachable, 78 bad configuration."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Hub(serve::HubArguments),
    Source(serve::SourceArguments),
    Demo(demo::DemoArguments),
    Status(status::StatusArguments),
    Top(top::TopArguments),
    Events(events::EventsArguments),
    Checkpoint(checkpoint::CheckpointArguments),
    Kept(kept::KeptArguments),
    Drop(drop::DropArguments),
    Verify(verify::VerifyArguments),
    Failover(failover::FailoverArguments),
    Failback(failback::FailbackArguments),
    Onboard(onboard::OnboardArguments),
    Certify(certify::CertifyArguments),
    Forget(forget::ForgetArguments),
    Seed(seed::SeedArguments),
    Scrub(scrub::ScrubArguments),
    #[command(subcommand)]
    Device(device::DeviceCommand),
    Import(import::ImportArguments),
    Hash(hash::HashArguments),
    #[command(subcommand)]
    Config(config_check::ConfigCommand),
    Completions(completions::CompletionsArguments),
    Man(man::ManArguments),
}

/// How a command ended that did not fail. The number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done(pub u8);

impl Done {
    /// All well.
    pub const WELL: Self = Self(0);
}

/// Runs the command that `arguments` (the program's name first) ask for.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let terminal = Terminal::of_process();
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too, for stdout. Nobody is left to tell of a failure.
            let _nobody_reads = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(failure::USAGE));
        }
    };
    let result = match &arguments.command {
        Command::Hub(hub) => serve::run_hub(hub),
        Command::Source(source) => serve::run_source(source),
        Command::Demo(demo) => demo::run(demo, &terminal),
        Command::Device(device) => device::run(device, &terminal),
        Command::Import(import) => import::run(import),
        Command::Scrub(scrub) => scrub::run(scrub, &terminal),
        Command::Hash(hash) => hash::run(hash, &terminal),
        Command::Status(status) => status::run(status, &terminal),
        Command::Top(top) => top::run(top, &terminal),
        Command::Events(events) => events::run(events, &terminal),
        Command::Checkpoint(checkpoint) => checkpoint::run(checkpoint, &terminal),
        Command::Kept(kept) => kept::run(kept, &terminal),
        Command::Drop(drop) => drop::run(drop, &terminal),
        Command::Verify(verify) => verify::run(verify, &terminal),
        Command::Failover(failover) => failover::run(failover, &terminal),
        Command::Failback(failback) => failback::run(failback, &terminal),
        Command::Onboard(onboard) => onboard::run(onboard),
        Command::Certify(certify) => certify::run(certify),
        Command::Forget(forget) => forget::run(forget, &terminal),
        Command::Seed(seed) => seed::run(seed, &terminal),
        Command::Config(config) => config_check::run(config, &terminal),
        Command::Completions(completions) => completions::run(completions),
        Command::Man(man) => man::run(man),
    };
    match result {
        Ok(Done(code)) => ExitCode::from(code),
        Err(failure) => {
            let text = failure.render(terminal.error.colour);
            let _nobody_reads = std::io::stderr().write_all(text.as_bytes());
            ExitCode::from(failure.code())
        }
    }
}
