//! Unix sockets that a long-running command listens on.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Removes the socket that a process left behind that died. A socket that answers, or a file that
/// is no socket, is not ours: `AddrInUse`. Nothing there is fine.
///
/// Of two processes with one `data_dir` only one comes here (`control::server` holds the lock).
pub fn remove_stale(path: &Path) -> io::Result<()> {
    let kind = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_socket() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_a_dead_socket_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        remove_stale(&path).unwrap();
        let living = UnixListener::bind(&path).unwrap();
        assert_eq!(remove_stale(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(living);
        remove_stale(&path).unwrap();
        assert!(!path.try_exists().unwrap());
        std::fs::write(&path, "somebody's").unwrap();
        assert_eq!(remove_stale(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
    }
}
