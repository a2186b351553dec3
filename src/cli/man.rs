//! `mirrorhub man DIR`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::failure::Failure;
use super::{Arguments, Done};

/// Write the manual pages into a directory
#[derive(Debug, Args)]
pub struct ManArguments {
    /// The directory, which must be there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes `mirrorhub.1` and one page for each command.
pub fn run(arguments: &ManArguments) -> Result<Done, Failure> {
    let directory = &arguments.directory;
    clap_mangen::generate_to(Arguments::command(), directory).map_err(|error| {
        let shown = directory.display();
        let next = format!("look at it: ls -ld {shown}");
        Failure::failed(format!("cannot write manual pages into {shown}: {error}"), next)
    })?;
    Ok(Done::WELL)
}
