//! Makes directories and files that stay after a power cut.
//!
//! Called at start by whoever keeps files below a directory of its own. A file's name is only as
//! durable as the names above it, so the parent of each directory that is made is synced before
//! anything is put into it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path};

/// Makes the directory and those above it that are missing, durably.
pub fn create_durably(path: &Path) -> io::Result<()> {
    create(path, &mut |path| fs::create_dir(path), &mut |path| File::open(path)?.sync_all())?;
    if path.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

/// Puts a file in the place of what was there: all of it or nothing, whenever the power is cut.
pub fn replace_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = File::create(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// One level after the other, each durable before the next, so that after a kill at most the
/// deepest one that is there was not synced: its parent is synced again.
fn create(
    path: &Path,
    make: &mut dyn FnMut(&Path) -> io::Result<()>,
    sync: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> io::Result<()> {
    if !matches!(path.components().next_back(), Some(Component::Normal(_))) {
        // A root, `.` or `..`: nothing to make.
        return Ok(());
    }
    let parent = parent_of(path);
    match make(path) {
        Ok(()) => {
            sync_found(parent, sync)?;
            sync(parent)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => sync_found(path, sync),
        Err(error) if error.kind() == io::ErrorKind::NotFound && parent != Path::new(".") => {
            create(parent, make, sync)?;
            make(path)?;
            sync(parent)
        }
        Err(error) => Err(error),
    }
}

/// Makes the name of a directory that was found there durable.
fn sync_found(path: &Path, sync: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    if !matches!(path.components().next_back(), Some(Component::Normal(_))) {
        return Ok(());
    }
    match sync(parent_of(path)) {
        // What we cannot read we have hardly made anything in.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;

    /// Goal: dead at any call, no directory that a later start finds and fills can vanish. Method:
    /// every prefix of the calls is followed by a whole run; after it, each directory's name was
    /// synced since it was made.
    #[test]
    fn every_name_is_durable_however_often_it_was_tried() {
        let path = Path::new("/a/b/c/d");
        for dead_at in 0..20 {
            let there: RefCell<BTreeSet<PathBuf>> = RefCell::new(["/".into(), "/a".into()].into());
            let durable: RefCell<BTreeSet<PathBuf>> = there.clone();
            let mut calls = 0;
            for last in [false, true] {
                let mut step = || {
                    calls += 1;
                    if !last && calls > dead_at { Err(io::Error::other("dead")) } else { Ok(()) }
                };
                let step = RefCell::new(&mut step);
                let mut make = |path: &Path| {
                    (step.borrow_mut())()?;
                    if there.borrow().contains(path) {
                        return Err(io::ErrorKind::AlreadyExists.into());
                    }
                    if !there.borrow().contains(path.parent().unwrap()) {
                        return Err(io::ErrorKind::NotFound.into());
                    }
                    there.borrow_mut().insert(path.to_owned());
                    Ok(())
                };
                let mut sync = |path: &Path| {
                    (step.borrow_mut())()?;
                    let there = there.borrow();
                    let inside = there.iter().filter(|name| name.parent() == Some(path));
                    durable.borrow_mut().extend(inside.cloned());
                    Ok(())
                };
                let done = create(path, &mut make, &mut sync);
                assert!(!last || done.is_ok(), "{done:?}");
            }
            assert!(there.borrow().contains(path));
            assert_eq!(there, durable, "dead at call {dead_at}");
        }
    }

    #[test]
    fn real_directories_are_made_and_a_file_in_the_way_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x/y/z");
        create_durably(&path).unwrap();
        create_durably(&path).unwrap();
        assert!(path.is_dir());
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(create_durably(&file.join("below")).is_err());
        assert!(create_durably(&file).is_err());
    }
}
