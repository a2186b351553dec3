//! Which configuration file a command means, and where that process listens.

use std::path::{Path, PathBuf};

use clap::Args;

use super::failure::{CONFIGURATION, Failure, USAGE};
use crate::config::load::{Kind, load_data_dir};
use crate::control::socket_path;

/// Where files are looked for that nobody names.
const DIRECTORY: &str = "/etc/mirrorhub";

/// A process that may be running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// Its admin socket.
    pub socket: PathBuf,
    /// The command that starts it.
    pub start: String,
}

/// `--config`.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgument {
    /// The hub's or the source's configuration [default: /etc/mirrorhub/hub.toml or source.toml]
    #[arg(long, value_name = "FILE", env = "MIRRORHUB_CONFIG")]
    pub config: Option<PathBuf>,
}

impl ConfigArgument {
    /// The file that is meant: the one named, or the one that is there.
    pub fn file(&self) -> Result<PathBuf, Failure> {
        match &self.config {
            Some(file) => Ok(file.clone()),
            None => default_file(Path::new(DIRECTORY)),
        }
    }

    /// The process that runs with that file.
    pub fn process(&self) -> Result<Located, Failure> {
        let file = self.file()?;
        let (kind, data_dir) = load_data_dir(&file)?;
        let command = match kind {
            Kind::Hub => "hub",
            Kind::Source | Kind::SourceFile => "source",
        };
        let start = format!("mirrorhub {command} --config {}", file.display());
        Ok(Located { socket: socket_path(&data_dir), start })
    }
}

fn default_file(directory: &Path) -> Result<PathBuf, Failure> {
    let (hub, source) = (directory.join("hub.toml"), directory.join("source.toml"));
    let there = |file: &Path| file.try_exists().unwrap_or(true);
    match (there(&hub), there(&source)) {
        (true, false) => Ok(hub),
        (false, true) => Ok(source),
        (true, true) => Err(Failure::Message {
            code: USAGE,
            what: format!("both {} and {} are there", hub.display(), source.display()),
            next: format!("say which: --config {}", hub.display()),
        }),
        (false, false) => Err(Failure::Message {
            code: CONFIGURATION,
            what: format!("neither {} nor {} is there", hub.display(), source.display()),
            next: "name the file: --config FILE, or set MIRRORHUB_CONFIG".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_is_there_is_meant_and_two_are_not_guessed() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path();
        assert_eq!(default_file(base).unwrap_err().code(), CONFIGURATION);
        std::fs::write(base.join("source.toml"), "").unwrap();
        assert_eq!(default_file(base).unwrap(), base.join("source.toml"));
        std::fs::write(base.join("hub.toml"), "").unwrap();
        assert_eq!(default_file(base).unwrap_err().code(), USAGE);
        std::fs::remove_file(base.join("source.toml")).unwrap();
        assert_eq!(default_file(base).unwrap(), base.join("hub.toml"));
    }
}
