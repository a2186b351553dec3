//! Writes a file that must not be there yet, or over one that is: whole and durable, or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Whom a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Its id.
    pub user: u32,
    /// The id of its group.
    pub group: u32,
}

/// Writes it. `mode` are its permissions, whatever mask the process has; `AlreadyExists` if the name is taken.
pub fn write_new(target: &Path, text: &str, mode: u32) -> io::Result<()> {
    write_new_for(None, target, text, mode)
}

/// Writes it for another user: it is that user's before it has its name.
pub fn write_new_for(owner: Option<Owner>, target: &Path, text: &str, mode: u32) -> io::Result<()> {
    let (directory, draft) = draft_of(target);
    let mut file = create(&draft, mode)?;
    let written = (|| {
        match owner {
            Some(owner) if owner != Owner::of(&file.metadata()?) => {
                fchown(&file, Some(owner.user), Some(owner.group))?;
            }
            Some(_) | None => {}
        }
        fill(&mut file, text, mode)?;
        // A link refuses a name that is taken, which a rename would replace.
        fs::hard_link(&draft, target)
    })();
    fs::remove_file(&draft)?;
    written?;
    File::open(directory)?.sync_all()
}

/// Writes it over what is there: the old one, whole, or the new one, durable. Owner, group and permissions stay;
/// `mode` is for where no file is.
pub fn replace(target: &Path, text: &str, mode: u32) -> io::Result<()> {
    let (directory, draft) = draft_of(target);
    let old = match fs::symlink_metadata(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        // What a link says is not said of the file.
        old => Some(old?).filter(fs::Metadata::is_file),
    };
    let mode = old.as_ref().map_or(mode, |old| old.mode() & 0o777);
    let mut file = create(&draft, mode)?;
    let written = (|| {
        if let Some(old) = &old {
            keep(&file, Owner::of(old))?;
        }
        fill(&mut file, text, mode)?;
        fs::rename(&draft, target)
    })();
    if written.is_err() {
        fs::remove_file(&draft)?;
    }
    written?;
    File::open(directory)?.sync_all()
}

impl Owner {
    /// Of a file.
    pub fn of(file: &fs::Metadata) -> Self {
        Self { user: file.uid(), group: file.gid() }
    }
}

/// Others read nothing of it before it has its owner.
fn create(draft: &Path, mode: u32) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(mode & 0o600).open(draft)
}

/// By the open file: the mask of the process is not asked, nor what a name leads to.
fn fill(file: &mut File, text: &str, mode: u32) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Who is not root can give no file away: it is this user's then, as far as may be with the old group.
fn keep(file: &File, old: Owner) -> io::Result<()> {
    if Owner::of(&file.metadata()?) == old {
        return Ok(());
    }
    let denied = |done: &io::Result<()>| {
        let denied = matches!(done, Err(error) if error.kind() == ErrorKind::PermissionDenied);
        denied && !rustix::process::geteuid().is_root()
    };
    let mut done = fchown(file, Some(old.user), Some(old.group));
    if denied(&done) {
        done = fchown(file, None, Some(old.group));
    }
    if denied(&done) { Ok(()) } else { done }
}

/// Its directory, and where it is written first. Hidden: whoever watches the directory passes over it.
fn draft_of(target: &Path) -> (&Path, PathBuf) {
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let stem = target.file_stem().unwrap_or_default().to_string_lossy();
    (directory, directory.join(format!(".{stem}.{}.new", std::process::id())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_once_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a.toml");
        write_new(&target, "name = \"a\"\n", 0o600).unwrap();
        let error = write_new(&target, "other", 0o600).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&target).unwrap(), "name = \"a\"\n");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        replace(&target, "name = \"b\"\n", 0o600).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "name = \"b\"\n");
        assert!(replace(&directory.path().join("none/a.toml"), "", 0o600).is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    /// Goal: whoever could read a file can read the one in its place, whatever the mask; a link is not followed.
    /// Control: without the permissions set by hand the mask takes them away.
    #[test]
    fn mask_and_user_of_the_administrator_change_no_permissions() {
        let directory = tempfile::tempdir().unwrap();
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
        let of = |path: &Path| {
            let of = fs::symlink_metadata(path).unwrap();
            (of.mode() & 0o777, Owner::of(&of))
        };
        let (target, masked) = (directory.path().join("a.toml"), directory.path().join("masked"));
        fs::write(&masked, "").unwrap();
        assert_eq!(of(&masked).0, 0o600);
        write_new(&target, "new", 0o644).unwrap();
        let own = of(&target).1;
        assert_eq!(of(&target).0, 0o644);
        let root = own.user == 0;
        let other = if root { Owner { user: 997, group: 996 } } else { own };
        fchown(File::open(&target).unwrap(), Some(other.user), Some(other.group)).unwrap();
        fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        replace(&target, "replaced", 0o600).unwrap();
        assert_eq!(of(&target), (0o640, other));
        let theirs = directory.path().join("theirs.pem");
        write_new_for(Some(other), &theirs, "key", 0o600).unwrap();
        assert_eq!(of(&theirs), (0o600, other));
        // Over a link: a file of its own, and what the link led to is as it was.
        let link = directory.path().join("link.toml");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        replace(&link, "mine", 0o644).unwrap();
        assert_eq!((of(&link), of(&target)), ((0o644, own), (0o640, other)));
        assert_eq!(fs::read_to_string(&target).unwrap(), "replaced");
    }
}
