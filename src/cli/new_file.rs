//! Writes a file that must not be there yet: whole and durable, or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes it. `mode` are its permissions; `AlreadyExists` if the name is taken.
pub fn write_new(target: &Path, text: &str, mode: u32) -> io::Result<()> {
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let stem = target.file_stem().unwrap_or_default().to_string_lossy();
    // Hidden: whoever watches the directory passes over it.
    let draft = directory.join(format!(".{stem}.{}.new", std::process::id()));
    let mut file = File::options().write(true).create_new(true).mode(mode).open(&draft)?;
    let written = (|| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        // A link refuses a name that is taken, which a rename would replace.
        fs::hard_link(&draft, target)
    })();
    fs::remove_file(&draft)?;
    written?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_written_once_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a.toml");
        write_new(&target, "name = \"a\"\n", 0o600).unwrap();
        let error = write_new(&target, "other", 0o600).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&target).unwrap(), "name = \"a\"\n");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
