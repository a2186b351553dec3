//! Where the server listens: a TCP address or a unix socket.
//!
//! Used by `serve` and by whoever binds for it. A unix socket's file that nobody listens on (left
//! by a killed process) is replaced; a live one, or a file that is no socket, is an error. Our
//! own file is removed when the listener is dropped. Who may connect to a unix socket is decided
//! by the directory it is in and by the process's umask.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::units::entrance;

/// Silence after which the kernel asks whether a client's host is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Time between such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Questions without answer until the connection is dead.
const KEEPALIVE_COUNT: u32 = 4;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address; port 0 lets the kernel choose.
    Tcp(SocketAddr),
    /// A unix socket at this path.
    Unix(PathBuf),
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The kernel refused.
    #[error("cannot listen on {listen}: {error}")]
    Io { listen: Listen, error: io::Error },
    /// Another process listens there.
    #[error("cannot listen on {listen}: another process does")]
    InUse { listen: Listen },
    /// There is a file that is no socket.
    #[error("cannot listen on {listen}: there is a file that is no socket")]
    NoSocket { listen: Listen },
}

/// A bound socket. Must be made inside a tokio runtime.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    listen: Listen,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix { socket: UnixListener, _file: OwnFile },
}

/// A connection just made, and who made it.
#[derive(Debug)]
pub(super) enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listener {
    /// Binds.
    pub async fn bind(listen: &Listen) -> Result<Self, ListenError> {
        let failed = |error| ListenError::Io { listen: listen.clone(), error };
        match listen {
            Listen::Tcp(address) => {
                let socket = entrance::listen(*address).map_err(failed)?;
                let listen = Listen::Tcp(socket.local_addr().map_err(failed)?);
                Ok(Self { socket: Socket::Tcp(socket), listen })
            }
            Listen::Unix(path) => {
                make_way(path, listen).await?;
                let socket = UnixListener::bind(path).map_err(failed)?;
                let file = OwnFile::of(path).map_err(failed)?;
                Ok(Self { socket: Socket::Unix { socket, _file: file }, listen: listen.clone() })
            }
        }
    }

    /// Where it listens, with the port the kernel chose.
    pub fn listens_on(&self) -> &Listen {
        &self.listen
    }

    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, peer) = socket.accept().await?;
                tune(&stream);
                Ok(Accepted::Tcp(stream, peer))
            }
            Socket::Unix { socket, .. } => Ok(Accepted::Unix(socket.accept().await?.0)),
        }
    }
}

/// Replies leave at once, and a host that vanished is noticed. Neither is worth a connection.
fn tune(stream: &TcpStream) {
    let result = stream
        .set_nodelay(true)
        .and_then(|()| Ok(sockopt::set_socket_keepalive(stream, true)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?));
    if let Err(error) = result {
        tracing::debug!("cannot tune an nbd connection: {error}");
    }
}

/// Removes a socket file that nobody listens on.
async fn make_way(path: &Path, listen: &Listen) -> Result<(), ListenError> {
    let failed = |error| ListenError::Io { listen: listen.clone(), error };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NoSocket { listen: listen.clone() });
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!("removing {}: nobody listens there", path.display());
            fs::remove_file(path).map_err(failed)
        }
        Ok(_) => Err(ListenError::InUse { listen: listen.clone() }),
        // A full backlog, for one, also means that somebody listens.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(ListenError::InUse { listen: listen.clone() })
        }
        Err(error) => Err(failed(error)),
    }
}

/// The socket's file: removed when dropped, if it is still the one we made.
#[derive(Debug)]
struct OwnFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl OwnFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        let ours = identity(&self.path).is_ok_and(|identity| identity == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let listen = Listen::Unix(directory.path().join("nbd.sock"));
        let Listen::Unix(path) = &listen else { unreachable!() };

        drop(std::os::unix::net::UnixListener::bind(path).unwrap());
        assert!(path.try_exists().unwrap(), "std leaves the file behind");
        let live = Listener::bind(&listen).await.unwrap();
        assert_eq!(live.listens_on(), &listen);
        let refused = Listener::bind(&listen).await.unwrap_err();
        assert!(matches!(refused, ListenError::InUse { .. }), "{refused}");
        drop(live);
        assert!(!path.try_exists().unwrap(), "our own file goes with us");

        fs::write(path, "precious").unwrap();
        let refused = Listener::bind(&listen).await.unwrap_err();
        assert!(matches!(refused, ListenError::NoSocket { .. }), "{refused}");
        assert_eq!(fs::read(path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_file_that_is_no_longer_ours_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        let ours = Listener::bind(&Listen::Unix(path.clone())).await.unwrap();
        fs::rename(&path, directory.path().join("old")).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(ours);
        assert!(path.try_exists().unwrap());
    }

    #[tokio::test]
    async fn port_zero_is_told_and_a_taken_port_is_named() {
        let listen = Listen::Tcp("127.0.0.1:0".parse().unwrap());
        let listener = Listener::bind(&listen).await.unwrap();
        let Listen::Tcp(address) = listener.listens_on() else { unreachable!() };
        assert_ne!(address.port(), 0);
        let refused = Listener::bind(listener.listens_on()).await.unwrap_err().to_string();
        assert!(refused.contains(&address.to_string()), "{refused}");
    }
}
