//! Where the files of a filer that joins belong, and to whom.
//!
//! Below `/etc/mirrorhub` the package is at home: its unit runs as a user of its own, which may write below
//! `/var/lib/mirrorhub` and nowhere else, and has to read what `source --join` writes as root. Anywhere else a
//! filer's state lies beside its configuration, and all of it belongs to whoever joins it.
//!
//! Called by `bundle` and by the start of a source. What fails is said with its file, before anything is written.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use super::new_file::Owner;
use crate::units::names::SourceName;

/// The user of the units.
const USER: &str = "mirrorhub";
/// The file that the unit of a source starts with, below `etc`.
const FILE: &str = "source.toml";

/// Where the package keeps what, and as whom this process runs.
#[derive(Debug)]
pub struct Package {
    etc: PathBuf,
    state: PathBuf,
    users: PathBuf,
    root: bool,
}

/// What is written for one filer.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// Its `data_dir`, as the file has it.
    pub state: PathBuf,
    owner: Option<Owner>,
}

impl Package {
    /// Of this machine and process.
    pub fn here() -> Self {
        Self {
            etc: "/etc/mirrorhub".into(),
            state: "/var/lib/mirrorhub".into(),
            users: "/etc/passwd".into(),
            root: rustix::process::geteuid().is_root(),
        }
    }

    /// The place of a source whose configuration is in that directory.
    pub fn place(&self, base: &Path, name: &SourceName) -> io::Result<Place> {
        if !self.is_home(base)? {
            return Ok(Place { state: "state".into(), owner: None });
        }
        let state = self.state.join(name.as_str());
        Ok(Place { state, owner: if self.root { self.owner()? } else { None } })
    }

    /// Whether that directory is the package's, also by another way to it.
    fn is_home(&self, base: &Path) -> io::Result<bool> {
        let base = if base == Path::new("") { Path::new(".") } else { base };
        let real = match fs::canonicalize(base) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            real => real.ok(),
        };
        let named = std::path::absolute(base)?;
        Ok(named.starts_with(&self.etc) || real.is_some_and(|real| real.starts_with(&self.etc)))
    }

    /// The user of the units, where the package has made one (`systemd-sysusers` writes it there).
    fn owner(&self) -> io::Result<Option<Owner>> {
        let users = match fs::read_to_string(&self.users) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            users => users?,
        };
        let own = |line: &&str| line.split(':').next() == Some(USER);
        let Some(line) = users.lines().find(own) else { return Ok(None) };
        let mut ids = line.split(':').skip(2).map(|field| field.parse().ok());
        match (ids.next().flatten(), ids.next().flatten()) {
            (Some(user), Some(group)) => Ok(Some(Owner { user, group })),
            (_, _) => {
                let what =
                    format!("{}: user {USER} has no user and group id", self.users.display());
                Err(io::Error::new(ErrorKind::InvalidData, what))
            }
        }
    }

    /// What is said behind `--join --no-start`.
    pub fn told(&self, file: &Path, state: &Path) -> io::Result<String> {
        let base = file.parent().unwrap_or(Path::new("."));
        let mut text = format!(
            "{}: written, the state will be in {}\nthe bundle can be deleted; ",
            file.display(),
            state.display()
        );
        let home = self.is_home(base)?;
        let user = if home && self.root { self.owner()? } else { None };
        match user {
            Some(_) if file.file_name().is_some_and(|name| name == FILE) => {
                text.push_str(&format!(
                    "the key belongs to {USER}, as whom the unit runs. Start it:\n\n  \
                     systemctl enable --now mirrorhub-source\n"
                ));
            }
            Some(_) => text.push_str(&format!(
                "the key belongs to {USER}. The package's unit starts with {FILE}: for this file copy that unit\n"
            )),
            None => {
                if home && self.root {
                    text.push_str(&format!("no user {USER} is there for the unit. "));
                }
                text.push_str(&format!(
                    "Start it:\n\n  mirrorhub source --config {}\n",
                    file.display()
                ));
            }
        }
        Ok(text)
    }
}

impl Place {
    /// Whether the process that joins may go on as the source: what it makes as root the unit's user
    /// could not open.
    pub fn may_start(&self) -> bool {
        self.owner.is_none()
    }

    /// Before anything is written: whoever is to read it may pass the directories, whatever mask the
    /// administrator's shell has. The key has a mode of its own.
    pub fn open_up(&self) {
        if self.owner.is_some() {
            rustix::process::umask(Mode::WGRP | Mode::WOTH);
        }
    }

    /// Whom its key and certificates belong to, where that is not whoever joins.
    pub fn owner(&self) -> Option<Owner> {
        self.owner
    }
}

#[cfg(test)]
impl Package {
    /// One that is at home in that directory: `etc`, `lib` and `passwd`.
    pub(super) fn at(home: &Path, root: bool) -> Self {
        let [etc, state, users] = ["etc", "lib", "passwd"].map(|name| home.join(name));
        Self { etc, state, users, root }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: below the package's directory, by whatever way, state and owner are the unit's; beside it nothing changes.
    #[test]
    fn the_package_is_at_home_in_its_directory_only() {
        let home = tempfile::tempdir().unwrap();
        let name: SourceName = "filer-a".parse().unwrap();
        let (etc, other) = (home.path().join("etc"), home.path().join("etc-other"));
        let users = "root:x:0:0::/:/bin/sh\nmirrorhub2:x:1:1::/:\nmirrorhub:x:997:996::/:\n";
        fs::write(home.path().join("passwd"), users).unwrap();
        let unit = Place {
            state: home.path().join("lib/filer-a"),
            owner: Some(Owner { user: 997, group: 996 }),
        };
        let package = Package::at(home.path(), true);
        // Not there yet, then there, then by a link.
        assert_eq!(package.place(&etc, &name).unwrap(), unit);
        fs::create_dir(&etc).unwrap();
        std::os::unix::fs::symlink(&etc, home.path().join("link")).unwrap();
        for base in [etc.clone(), etc.join("more"), other.join("../etc"), home.path().join("link")]
        {
            fs::create_dir_all(&other).unwrap();
            assert_eq!(package.place(&base, &name).unwrap(), unit, "{}", base.display());
        }
        assert!(!unit.may_start());
        let beside = Place { state: "state".into(), owner: None };
        for base in [other.as_path(), home.path(), Path::new(""), Path::new(".")] {
            assert_eq!(package.place(base, &name).unwrap(), beside, "{}", base.display());
        }
        assert!(beside.may_start());
        // Who is not root gives nothing away; without the user there is nobody to give to.
        let place = Package::at(home.path(), false).place(&etc, &name).unwrap();
        assert_eq!(place, Place { state: unit.state.clone(), owner: None });
        for (users, right) in [("root:x:0:0::/:\n", true), ("mirrorhub:x:one:\n", false)] {
            fs::write(home.path().join("passwd"), users).unwrap();
            let met = package.place(&etc, &name);
            assert_eq!(met.is_ok_and(|place| place.may_start()), right, "{users}");
        }
        fs::remove_file(home.path().join("passwd")).unwrap();
        assert!(package.place(&etc, &name).unwrap().may_start());
    }

    /// What is said names the unit where the unit can start it, else the command.
    #[test]
    fn the_next_step_is_one_that_works() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("passwd"), "mirrorhub:x:997:996::/:\n").unwrap();
        let told = |root: bool, file: &str| {
            let file = home.path().join(file);
            Package::at(home.path(), root).told(&file, Path::new("state")).unwrap()
        };
        assert!(told(true, "etc/source.toml").contains("systemctl enable --now mirrorhub-source"));
        assert!(told(true, "etc/second.toml").contains("copy that unit"));
        for (root, file) in [(true, "source.toml"), (false, "etc/source.toml")] {
            let text = told(root, file);
            assert!(text.contains("mirrorhub source --config /") && !text.contains("systemctl"));
        }
        fs::remove_file(home.path().join("passwd")).unwrap();
        assert!(told(true, "etc/source.toml").contains("no user mirrorhub"));
    }
}
