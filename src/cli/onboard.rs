//! `mirrorhub onboard`: writes the file of a new source into the hub's sources directory.
//!
//! The running hub takes it by itself. The join bundle that brings certificates to the filer is not
//! available in this version: the filer's own file is written by hand, as shown at the end.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::str::FromStr;

use clap::Args;

use super::Done;
use super::failure::{Failure, USAGE, print};
use super::locate::ConfigArgument;
use crate::config::around::{Around, load_around};
use crate::config::problem::Problems;
use crate::config::quantity::parse_size;
use crate::config::schema::HubConfig;
use crate::units::names::{SourceName, VolumeName};

/// Write the file of a new source for the hub of that configuration
///
/// The running hub takes it within two seconds. The join bundle for the filer is not available in
/// this version: its source.toml is written by hand.
#[derive(Debug, Args)]
pub struct OnboardArguments {
    /// Name of the source
    name: SourceName,
    /// A volume that it may announce, such as vol0=100GiB; several are given by several --volume
    #[arg(long, value_name = "VOLUME=SIZE", required = true)]
    volume: Vec<Wanted>,
    #[command(flatten)]
    config: ConfigArgument,
}

/// `VOLUME=SIZE`, as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    name: VolumeName,
    size: String,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, size) = text.split_once('=').ok_or("a volume is given as VOLUME=SIZE")?;
        let name = name.parse().map_err(|error| format!("{error}"))?;
        if parse_size(size).is_err() {
            return Err(format!("{size} is no size: write one such as 100GiB"));
        }
        Ok(Self { name, size: size.to_owned() })
    }
}

/// Runs it.
pub fn run(arguments: &OnboardArguments) -> Result<Done, Failure> {
    let file = arguments.config.file()?;
    let nothing = BTreeSet::new();
    let Around { config, .. } = load_around(&file, None, &nothing).map_err(Failure::Problems)?;
    let OnboardArguments { name, volume, .. } = arguments;
    let target = config.sources_dir.join(format!("{name}.toml"));
    write_new(&target, &text(name, volume)).map_err(|error| {
        if error.kind() == ErrorKind::AlreadyExists {
            return Failure::Message {
                code: USAGE,
                what: format!("onboard {name}: {} is there already", target.display()),
                next: "edit that file, or take another name".into(),
            };
        }
        Failure::failed(format!("onboard {name}: {}: {error}", target.display()), "")
    })?;
    // Judged with all the others: the sum of the shares may not fit.
    let judged = load_around(&file, None, &nothing).map_err(Failure::Problems)?;
    let own = |path: &Path| path.file_name() == target.file_name();
    let wrong: Vec<_> = judged.problems.into_iter().filter(|one| own(&one.file)).collect();
    if !wrong.is_empty() {
        // Nobody was told of it as done.
        drop(std::fs::remove_file(&target));
        return Err(Failure::Problems(Problems(wrong)));
    }
    print(&view(name, volume, &target, &config))?;
    Ok(Done::WELL)
}

fn text(name: &SourceName, volumes: &[Wanted]) -> String {
    let mut text = format!("name = \"{name}\"\n");
    for Wanted { name, size } in volumes {
        text.push_str(&format!("\n[[volume]]\nname = \"{name}\"\nsize = \"{size}\"\n"));
    }
    text
}

/// Writes a file that must not be there yet: whole and durable, or not at all.
fn write_new(target: &Path, text: &str) -> std::io::Result<()> {
    let directory = target.parent().unwrap_or(Path::new("."));
    let mut draft = tempfile_in(directory, target)?;
    let written = (|| {
        draft.0.write_all(text.as_bytes())?;
        draft.0.sync_all()?;
        // A link refuses a name that is taken, which a rename would replace.
        std::fs::hard_link(&draft.1, target)
    })();
    std::fs::remove_file(&draft.1)?;
    written?;
    File::open(directory)?.sync_all()
}

/// A hidden file beside `target`: the hub passes over it.
fn tempfile_in(directory: &Path, target: &Path) -> std::io::Result<(File, std::path::PathBuf)> {
    let stem = target.file_stem().unwrap_or_default().to_string_lossy();
    let path = directory.join(format!(".{stem}.{}.new", std::process::id()));
    Ok((File::options().write(true).create_new(true).open(&path)?, path))
}

fn view(name: &SourceName, volumes: &[Wanted], target: &Path, hub: &HubConfig) -> String {
    let volumes: String = volumes
        .iter()
        .map(|volume| {
            let Wanted { name, size } = volume;
            format!("  [[volume]]\n  name = \"{name}\"\n  size = \"{size}\"\n")
        })
        .collect();
    format!(
        "{}: written, the running hub takes it within two seconds\n\n\
         There is no join bundle in this version. On the filer write source.toml:\n\n  \
         name = \"{name}\"\n  hub = \"{}\"\n  [pool]\n  \
         devices = [{{ path = \"disk0\", size = \"..\" }}]\n{volumes}\n\
         and start it: mirrorhub source --config source.toml\n",
        target.display(),
        hub.listen,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_a_name_and_a_size() {
        let wanted: Wanted = "vol0=100GiB".parse().unwrap();
        assert_eq!((wanted.name.as_str(), wanted.size.as_str()), ("vol0", "100GiB"));
        for bad in ["vol0", "vol0=", "=1GiB", "Vol0=1GiB", "vol0=1GB", "vol0=-1GiB"] {
            assert!(bad.parse::<Wanted>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_is_written_once_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a.toml");
        write_new(&target, "name = \"a\"\n").unwrap();
        let error = write_new(&target, "other").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "name = \"a\"\n");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
