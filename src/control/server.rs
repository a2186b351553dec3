//! The listening end of the admin socket.
//!
//! Called by the `hub` and `source` commands: [`AdminServer::bind`] at start, before anything
//! slow, so that a second process on the same data directory fails at once; then
//! [`AdminServer::run`] until stopped. One request a connection. A caller that goes away ends its
//! command's future; what that future has already set in motion (a CP, say) goes on.
//!
//! Who waits for the next event has a place of its own kind, so that any number of readers leaves the
//! places of commands to commands.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::feed::Feed;
use super::journal::{Journal, words};
use super::message::{AdminError, AnswerLine, ProgressSender, Request, code};
use super::message::{answer, answer_line, parse_request};
use super::socket_path;
use crate::limits::{
    ADMIN_ANSWER_BYTES_MAX, ADMIN_CONNECTIONS_MAX, ADMIN_FOLLOWERS_MAX, ADMIN_IO_SECONDS_MAX,
    ADMIN_MESSAGE_BYTES_MAX, ADMIN_PART_BYTES, ADMIN_PROGRESS_MS,
};
use crate::units::convert::to_u64;

/// Shorter under test, so that tests see it end.
const IO_TIME: Duration =
    if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(ADMIN_IO_SECONDS_MAX) };
/// What a refused connection may hold up the next one.
const REFUSAL_TIME: Duration = Duration::from_millis(100);
const PROGRESS_TIME: Duration = Duration::from_millis(ADMIN_PROGRESS_MS);

/// Who does what is asked: a hub or a source.
pub trait Admin: Send + Sync + 'static {
    /// Does one request, behind which more may follow in its `feed`. The future is dropped when the
    /// caller goes away or the process stops.
    fn handle(
        &self,
        request: Request,
        feed: Feed,
        progress: ProgressSender,
    ) -> BoxFuture<'_, Result<Value, AdminError>>;
}

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A living process has it.
    #[error("{}: another mirrorhub process runs on this data_dir", path.display())]
    AlreadyRunning {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else of that name.
    #[error("{}: is no socket; it is not ours to remove", path.display())]
    NotASocket {
        /// The socket.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{}: {operation}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The answer.
        error: io::Error,
    },
}

/// The bound socket.
#[derive(Debug)]
pub struct AdminServer {
    listener: UnixListener,
    path: PathBuf,
    journal: Arc<Journal>,
    /// Locked as long as this process lives, so that of two that start at once one wins.
    _lock: File,
}

impl AdminServer {
    /// Takes `admin.sock` in `data_dir`, mode 0600. A socket left behind by a process that died is
    /// replaced; one that answers is not.
    pub async fn bind(data_dir: &Path) -> Result<Self, BindError> {
        let path = socket_path(data_dir);
        let lock = take_lock(&path)?;
        refuse_living(&path).await?;
        let listener = bind_private(&path)?;
        Ok(Self { listener, path, journal: Arc::default(), _lock: lock })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it notes the commands that it is given, and the process what else happens.
    pub fn journal(&self) -> Arc<Journal> {
        Arc::clone(&self.journal)
    }

    /// Answers requests until `stop`, then tells those under way that the process stops, and
    /// removes the socket.
    pub async fn run(self, admin: Arc<dyn Admin>, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(ADMIN_CONNECTIONS_MAX));
        let followers = Arc::new(Semaphore::new(ADMIN_FOLLOWERS_MAX));
        let connections = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the admin socket cannot accept a connection");
                    // Out of descriptors, most likely: without a pause this would spin.
                    tokio::time::sleep(PROGRESS_TIME).await;
                    continue;
                }
            };
            match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => {
                    let (admin, stop) = (Arc::clone(&admin), stop.clone());
                    let journal = Arc::clone(&self.journal);
                    let places = (place, Arc::clone(&followers));
                    connections.spawn(converse(stream, (admin, journal), places, stop));
                }
                Err(_full) => refuse(&stream).await,
            }
        }
        connections.close();
        connections.wait().await;
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the admin socket");
        }
    }
}

fn io_error(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> BindError {
    let path = path.to_owned();
    move |error| BindError::Io { path, operation, error }
}

fn take_lock(socket: &Path) -> Result<File, BindError> {
    let path = socket.with_extension("lock");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        // Whoever may open it may hold the lock, for reading too.
        .mode(0o600)
        .open(&path)
        .map_err(io_error(&path, "open"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(BindError::AlreadyRunning { path: socket.to_owned() })
        }
        Err(std::fs::TryLockError::Error(error)) => Err(io_error(&path, "lock")(error)),
    }
}

/// The lock is ours; but a process may live that was started with another lock file, or whose lock
/// the file system lost.
async fn refuse_living(path: &Path) -> Result<(), BindError> {
    match timeout(IO_TIME, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            use std::os::unix::fs::FileTypeExt;
            let kind = std::fs::symlink_metadata(path).map_err(io_error(path, "look at"))?;
            if kind.file_type().is_socket() {
                Ok(())
            } else {
                Err(BindError::NotASocket { path: path.to_owned() })
            }
        }
        Ok(Err(error)) => Err(io_error(path, "connect to")(error)),
        Ok(Ok(_)) | Err(_) => Err(BindError::AlreadyRunning { path: path.to_owned() }),
    }
}

/// Binds beside the final name and renames, so that at no moment the name leads to a socket that
/// others may open.
fn bind_private(path: &Path) -> Result<UnixListener, BindError> {
    let fresh = path.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error(&fresh, "remove")(error)),
    }
    let listener = UnixListener::bind(&fresh).map_err(io_error(&fresh, "bind"))?;
    std::fs::set_permissions(&fresh, Permissions::from_mode(0o600))
        .map_err(io_error(&fresh, "set mode 0600"))?;
    std::fs::rename(&fresh, path).map_err(io_error(path, "rename"))?;
    Ok(listener)
}

/// Says why and closes. The send buffer of a new connection is empty, so this waits only until the
/// runtime has seen that.
async fn refuse(stream: &UnixStream) {
    let message = format!("{ADMIN_CONNECTIONS_MAX} commands are under way, that is the limit");
    let error = AdminError::new(code::BUSY, message, "wait for one of them, then try again");
    let Ok(line) = answer_line(&AnswerLine::Error(error)) else { return };
    let tell = async {
        loop {
            stream.writable().await?;
            match stream.try_write(&line) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return written,
            }
        }
    };
    match timeout(REFUSAL_TIME, tell).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::debug!(%error, "a refused admin connection did not take its reason");
        }
        Err(_) => tracing::debug!("a refused admin connection took no reason in time"),
    }
}

/// The place of a connection, and those of readers that wait for events.
type Places = (OwnedSemaphorePermit, Arc<Semaphore>);

fn too_many_readers() -> AdminError {
    let message = format!("{ADMIN_FOLLOWERS_MAX} readers follow the events, that is the limit");
    let next = "end one of them; `mirrorhub events` shows what there is without waiting";
    AdminError::new(code::BUSY, message, next)
}

async fn converse(
    stream: UnixStream,
    (admin, journal): (Arc<dyn Admin>, Arc<Journal>),
    (mut place, followers): Places,
    stop: CancellationToken,
) {
    let caller = stream.peer_cred().map(|peer| peer.uid());
    let who = caller.map_or_else(|_| "somebody".to_owned(), |uid| format!("uid {uid}"));
    let (read, mut write) = stream.into_split();
    let answer = match timeout(IO_TIME, read_request(read)).await {
        Ok(Ok(Some((Request::Events { boot, since, wait: true }, _)))) => {
            match followers.try_acquire_owned() {
                Ok(of_a_reader) => {
                    // That of a command is free from here on.
                    place = of_a_reader;
                    follow(&journal, (boot.as_deref(), since), &write, &stop).await
                }
                Err(_full) => Some(Err(too_many_readers())),
            }
        }
        Ok(Ok(Some((Request::Events { boot, since, wait: false }, _)))) => {
            Some(answer(&journal.behind(boot.as_deref(), since, false).await))
        }
        Ok(Ok(Some((request, feed)))) => {
            let what = words(&request);
            let answer = work((request, feed), &admin, &mut write, &stop).await;
            if let Some(what) = what {
                let result = match &answer {
                    Some(Ok(_)) => "done",
                    Some(Err(error)) => &error.message,
                    None => "the caller went away",
                };
                journal.note(&who, &what, result);
            }
            answer
        }
        Ok(Ok(None)) => None,
        Ok(Err(error)) => Some(Err(error)),
        Err(_) => {
            let message = format!("no request within {ADMIN_IO_SECONDS_MAX} s");
            Some(Err(AdminError::new(code::BAD_REQUEST, message, "send it at once")))
        }
    };
    let Some(answer) = answer else { return };
    let line = match answer {
        Ok(value) => AnswerLine::Result(value),
        Err(error) => AnswerLine::Error(error),
    };
    if let Err(error) = send(&mut write, &line).await {
        tracing::debug!(%error, "an admin caller did not take its answer");
    }
    drop(place);
}

/// What happens next behind `since` of that boot; `None` if the caller has gone meanwhile.
async fn follow(
    journal: &Journal,
    (boot, since): (Option<&str>, u64),
    write: &OwnedWriteHalf,
    stop: &CancellationToken,
) -> Option<Result<Value, AdminError>> {
    let mut tick = interval(PROGRESS_TIME);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next = std::pin::pin!(journal.behind(boot, since, true));
    loop {
        tokio::select! {
            biased;
            news = &mut next => return Some(answer(&news)),
            () = stop.cancelled() => return Some(answer(&journal.behind(boot, since, false).await)),
            _ = tick.tick() => {}
        }
        if has_gone(write).await {
            return None;
        }
    }
}

/// Whether nobody waits for the answer any more. A caller that only closed its sending half still
/// waits; one that closed both has gone. One that does not read is held to the same wait as for a line.
async fn has_gone(write: &OwnedWriteHalf) -> bool {
    match timeout(IO_TIME, write.ready(Interest::WRITABLE)).await {
        Ok(Ok(ready)) => ready.is_write_closed(),
        Ok(Err(_)) | Err(_) => true,
    }
}

/// `None` if the caller sent nothing at all, as a probe does.
async fn read_request(read: OwnedReadHalf) -> Result<Option<(Request, Feed)>, AdminError> {
    let mut line = Vec::new();
    let mut bounded = BufReader::new(read).take(ADMIN_MESSAGE_BYTES_MAX);
    match bounded.read_until(b'\n', &mut line).await {
        Ok(0) => Ok(None),
        Ok(_) if line.last() == Some(&b'\n') => {
            parse_request(&line).map(|request| Some((request, Feed::new(bounded.into_inner()))))
        }
        Ok(_) if to_u64(line.len()) == ADMIN_MESSAGE_BYTES_MAX => {
            let message = format!("the request is longer than {ADMIN_MESSAGE_BYTES_MAX} bytes");
            Err(AdminError::new(code::BAD_REQUEST, message, "send a shorter one"))
        }
        Ok(_) => {
            let message = "the request ends without a newline";
            Err(AdminError::new(code::BAD_REQUEST, message, "end it with one"))
        }
        Err(error) => {
            let message = format!("the request cannot be read: {error}");
            Err(AdminError::new(code::BAD_REQUEST, message, "send it again"))
        }
    }
}

/// Ends the task when the conversation ends, however that happens.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Does the request and reports on the way; `None` if the caller has gone.
async fn work(
    (request, feed): (Request, Feed),
    admin: &Arc<dyn Admin>,
    write: &mut OwnedWriteHalf,
    stop: &CancellationToken,
) -> Option<Result<Value, AdminError>> {
    let (sender, mut newest) = ProgressSender::new();
    let admin = Arc::clone(admin);
    // A task of its own: a panic in the command is an error of that command.
    let mut task =
        AbortOnDrop(tokio::spawn(async move { admin.handle(request, feed, sender).await }));
    let mut tick = interval(PROGRESS_TIME);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            finished = &mut task.0 => return Some(finished.unwrap_or_else(|error| {
                let message = format!("the command failed inside the process: {error}");
                Err(AdminError::new(code::INTERNAL, message, "see the log of the process"))
            })),
            () = stop.cancelled() => {
                let next = "start the process again and repeat the command";
                return Some(Err(AdminError::new(code::STOPPING, "the process stops", next)));
            }
            _ = tick.tick() => {}
        }
        if has_gone(write).await {
            return None;
        }
        // The sender is gone once the command has finished: then the loop ends above.
        if newest.has_changed().unwrap_or(false) {
            let progress = newest.borrow_and_update().clone();
            if let Some(progress) = progress
                && send(write, &AnswerLine::Progress(progress)).await.is_err()
            {
                return None;
            }
        }
    }
}

async fn send(write: &mut OwnedWriteHalf, answer: &AnswerLine) -> io::Result<()> {
    let mut line = answer_line(answer)?;
    if to_u64(line.len()) > ADMIN_ANSWER_BYTES_MAX {
        let message = format!("the answer has {} bytes, too many to be sent", line.len());
        let error = AdminError::new(code::TOO_LARGE, message, "ask for one source at a time");
        line = answer_line(&AnswerLine::Error(error))?;
    }
    if to_u64(line.len()) <= ADMIN_MESSAGE_BYTES_MAX {
        return put(write, &line).await;
    }
    let mut text = str::from_utf8(&line).map_err(io::Error::other)?;
    while !text.is_empty() {
        let (part, rest) = text.split_at(text.floor_char_boundary(ADMIN_PART_BYTES));
        let part = AnswerLine::Part { text: part.to_owned(), last: rest.is_empty() };
        put(write, &answer_line(&part)?).await?;
        text = rest;
    }
    Ok(())
}

async fn put(write: &mut OwnedWriteHalf, line: &[u8]) -> io::Result<()> {
    timeout(IO_TIME, write.write_all(line)).await.map_err(|_| io::ErrorKind::TimedOut)?
}
