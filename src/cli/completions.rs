//! `mirrorhub completions SHELL`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::failure::{Failure, print};
use super::{Arguments, Done};

/// Print the completions of a shell
#[derive(Debug, Args)]
pub struct CompletionsArguments {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints them.
pub fn run(arguments: &CompletionsArguments) -> Result<Done, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "mirrorhub", &mut text);
    print(&String::from_utf8_lossy(&text))?;
    Ok(Done::WELL)
}
