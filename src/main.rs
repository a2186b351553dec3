//! The `mirrorhub` program. Everything is in the library; see [`mirrorhub::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    mirrorhub::cli::run(std::env::args_os())
}
