//! The certificates of a filer are exchanged for others: all of its files, or none.
//!
//! 1. The new files are written into a directory beside the old ones that nobody reads, and are durable.
//! 2. That directory gets its name: from here on the new ones count.
//! 3. Each of them is renamed over the old one; then the directory goes.
//!
//! A cut before 2 leaves the old ones, and a directory that the next exchange empties. A cut behind it is
//! finished by whoever reads the files next: a start, a reload, another exchange. A start that may not write
//! there, the package's unit, reads each file from where it counts ([`counting`]). So key and certificate of
//! two exchanges never meet, but for a reload in the very moment of 3, which refuses them and goes on as before.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::new_file::{Owner, write_new_for};
use crate::device::directory::create_durably;

/// What counts, and is not in its place yet.
const STAGED: &str = ".joining";
/// What does not count yet.
const DRAFT: &str = ".joining.draft";

/// Puts these files, with their permissions, over those of the same names in a directory.
pub fn exchange(directory: &Path, files: &[(&str, &str, u32)]) -> io::Result<()> {
    finish(directory)?;
    stage(directory, files)?;
    finish(directory)
}

fn stage(directory: &Path, files: &[(&str, &str, u32)]) -> io::Result<()> {
    let draft = directory.join(DRAFT);
    removed(&draft)?;
    // Nothing is written where a file is not one.
    let owners: io::Result<Vec<_>> =
        files.iter().map(|(name, ..)| owner_of(&directory.join(name))).collect();
    create_durably(&draft)?;
    // Whoever reads the files may look for them here, whatever mask the administrator's shell has.
    File::open(&draft)?.set_permissions(Permissions::from_mode(0o755))?;
    for ((name, text, mode), owner) in files.iter().zip(owners?) {
        write_new_for(owner, &draft.join(name), text, *mode)?;
    }
    fs::rename(&draft, directory.join(STAGED))?;
    File::open(directory)?.sync_all()
}

/// Whoever reads the old file reads the new one: the unit's user, where root exchanges them. A link is not
/// followed: whom it leads to may be said by others.
fn owner_of(old: &Path) -> io::Result<Option<Owner>> {
    let met = match fs::symlink_metadata(old) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        met => met?,
    };
    if !met.is_file() {
        let what = format!("{} is a link or no file: put the three there by hand", old.display());
        return Err(io::Error::new(ErrorKind::InvalidInput, what));
    }
    Ok(Some(Owner::of(&met)))
}

/// Removes what an exchange left that does not count any more: its filer is gone.
pub fn forget(directory: &Path) -> io::Result<()> {
    removed(&directory.join(STAGED))?;
    removed(&directory.join(DRAFT))?;
    File::open(directory)?.sync_all()
}

fn removed(directory: &Path) -> io::Result<()> {
    gone_is_done(fs::remove_dir_all(directory))
}

/// Where a file is read that an exchange may be about to put there.
pub fn counting(file: &Path) -> io::Result<PathBuf> {
    let (Some(directory), Some(name)) = (file.parent(), file.file_name()) else {
        return Ok(file.to_owned());
    };
    let staged = directory.join(STAGED).join(name);
    Ok(if staged.try_exists()? { staged } else { file.to_owned() })
}

/// Finishes an exchange that was cut, as far as this process may write there. What it says if it may not: what
/// was met, and what is to be done.
pub fn finish_if_allowed(directory: &Path) -> io::Result<Option<(String, String)>> {
    let error = match finish(directory) {
        Err(error)
            if [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem]
                .contains(&error.kind()) =>
        {
            error
        }
        done => return done.map(|()| None),
    };
    let (at, staged) = (directory.display(), directory.join(STAGED));
    let staged = staged.display();
    let met = format!(
        "an exchange of certificates was cut, and {staged} cannot be put in its place: {error}"
    );
    let fix = format!(
        "as root: find {staged} -type f -exec mv -t {at} {{}} + && rmdir {staged}; then restart this source"
    );
    Ok(Some((met, fix)))
}

/// Finishes an exchange that was cut. Nothing, mostly.
pub fn finish(directory: &Path) -> io::Result<()> {
    let staged = directory.join(STAGED);
    let files = match fs::read_dir(&staged) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        files => files?,
    };
    for file in files {
        let file = file?;
        gone_is_done(fs::rename(file.path(), directory.join(file.file_name())))?;
    }
    File::open(directory)?.sync_all()?;
    gone_is_done(fs::remove_dir(&staged))?;
    File::open(directory)?.sync_all()
}

/// Two may finish the same exchange.
fn gone_is_done(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: [(&str, &str, u32); 2] = [("cert", "new cert", 0o644), ("key", "new key", 0o600)];

    /// Goal: wherever it is cut, the next one who reads finds all old files or all new ones; what lies beside
    /// them stays. Control: in the middle of step 3, before it is finished, they are mixed.
    #[test]
    fn files_are_exchanged_together_wherever_it_is_cut() {
        for cut in 0..6 {
            let directory = tempfile::tempdir().unwrap();
            let base = directory.path();
            for (name, text) in [("cert", "old cert"), ("key", "old key"), ("other", "other")] {
                fs::write(base.join(name), text).unwrap();
            }
            let text = |name: &str| fs::read_to_string(base.join(name)).unwrap();
            match cut {
                // Cut within the draft, or before its name.
                0 | 1 => {
                    fs::create_dir(base.join(DRAFT)).unwrap();
                    fs::write(base.join(DRAFT).join("cert"), ["half", "new cert"][cut]).unwrap();
                }
                2 => stage(base, &NEW).unwrap(),
                3 => {
                    stage(base, &NEW).unwrap();
                    fs::rename(base.join(STAGED).join("cert"), base.join("cert")).unwrap();
                    assert_eq!((text("cert"), text("key")), ("new cert".into(), "old key".into()));
                }
                4 => {
                    exchange(base, &NEW).unwrap();
                    fs::create_dir(base.join(STAGED)).unwrap();
                }
                _ => {}
            }
            finish(base).unwrap();
            let wanted = if (2..5).contains(&cut) { "new" } else { "old" };
            let both = (format!("{wanted} cert"), format!("{wanted} key"));
            assert_eq!((text("cert"), text("key")), both, "cut {cut}");
            exchange(base, &NEW).unwrap();
            assert_eq!((text("cert"), text("key")), ("new cert".into(), "new key".into()));
            assert_eq!(text("other"), "other");
            assert_eq!(fs::read_dir(base).unwrap().count(), 3, "cut {cut}");
            let mode = fs::metadata(base.join("key")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    /// Goal: a unit that may not write there reads the new ones wherever step 3 was cut, and says what to do;
    /// root's mask does not matter. Control: in place they are mixed.
    #[test]
    fn who_may_not_finish_reads_what_counts() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path();
        let own = fs::metadata(base).map(|own| Owner::of(&own)).unwrap();
        let user = if own.user == 0 { 65_534 } else { own.user };
        for name in ["cert", "key"] {
            let owner = (own.user == 0).then_some(Owner { user, group: user });
            write_new_for(owner, &base.join(name), "old", 0o600).unwrap();
        }
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
        stage(base, &NEW).unwrap();
        fs::rename(base.join(STAGED).join("cert"), base.join("cert")).unwrap();
        assert_eq!(fs::metadata(base.join(STAGED)).unwrap().permissions().mode() & 0o777, 0o755);
        for closed in [base.to_owned(), base.join(STAGED)] {
            fs::set_permissions(closed, Permissions::from_mode(0o555)).unwrap();
        }
        let unit = || {
            if own.user == 0 {
                rustix::thread::set_thread_uid(rustix::fs::Uid::from_raw(user)).unwrap();
            }
            let told = finish_if_allowed(base).unwrap().unwrap();
            let read = |name| fs::read_to_string(counting(&base.join(name)).unwrap()).unwrap();
            (told, read("cert"), read("key"), fs::read_to_string(base.join("key")).unwrap())
        };
        let ((met, fix), cert, key, in_place) =
            std::thread::scope(|scope| scope.spawn(unit).join().unwrap());
        assert!(met.contains("/.joining") && fix.contains("restart"), "{met} {fix}");
        assert_eq!(
            (cert.as_str(), key.as_str(), in_place.as_str()),
            ("new cert", "new key", "old")
        );
        for open in [base.to_owned(), base.join(STAGED)] {
            fs::set_permissions(open, Permissions::from_mode(0o755)).unwrap();
        }
        // What it says to do is what ends it.
        let command = fix.strip_prefix("as root: ").unwrap().split(';').next().unwrap();
        let done = std::process::Command::new("sh").args(["-ec", command]).status().unwrap();
        assert!(done.success(), "{command}");
        assert_eq!(fs::read_to_string(base.join("key")).unwrap(), "new key");
        assert!(finish_if_allowed(base).unwrap().is_none());
        assert_eq!(fs::read_dir(base).unwrap().count(), 2);
    }

    /// A link in the place of a key is refused, and whom it leads to gets nothing.
    #[test]
    fn a_link_gives_nothing_away() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path();
        fs::write(base.join("cert"), "old").unwrap();
        std::os::unix::fs::symlink(base.join("cert"), base.join("key")).unwrap();
        let met = exchange(base, &NEW).unwrap_err().to_string();
        assert!(met.contains("by hand"), "{met}");
        assert_eq!(fs::read_to_string(base.join("key")).unwrap(), "old");
    }
}
