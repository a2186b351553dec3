//! The asking end of the admin socket, for the command line.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::feed::{self, Piece};
use super::message::{AdminError, AnswerLine, Progress, Request, request_line};
use crate::limits::{ADMIN_ANSWER_BYTES_MAX, ADMIN_IO_SECONDS_MAX, ADMIN_MESSAGE_BYTES_MAX};
use crate::units::convert::to_u64;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens, or the socket may not be opened.
    #[error("{}: {error}", socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The process answered in time neither with a result nor with an error.
    #[error("{}: {what}", socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// How it ended.
        what: String,
    },
    /// What was to be sent could not be read.
    #[error("{0}")]
    Unread(io::Error),
    /// The process said no.
    #[error(transparent)]
    Refused(#[from] AdminError),
}

/// Sends `request` and waits for its result; progress on the way goes to `on_progress`.
///
/// Without `patience` a command may take as long as it takes; with it, that is how long the process
/// may be silent.
pub async fn call(
    socket: &Path,
    request: &Request,
    patience: Option<Duration>,
    on_progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Value, CallError> {
    let (reader, _write) = begin(socket, request).await?;
    answer(socket, reader, patience, on_progress).await
}

/// As [`call`], with a file behind the request: what comes out of `pieces` is sent. Its first error, or
/// an answer, ends it.
pub async fn call_feeding(
    socket: &Path,
    request: &Request,
    mut pieces: mpsc::Receiver<io::Result<Piece>>,
    on_progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Value, CallError> {
    let (reader, mut write) = begin(socket, request).await?;
    let sent = async {
        while let Some(piece) = pieces.recv().await {
            let piece = piece.map_err(CallError::Unread)?;
            if feed::send(&mut write, &piece).await.is_err() {
                // It takes no more: its answer says why.
                break;
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        biased;
        answer = answer(socket, reader, None, on_progress) => answer,
        error = sent => error,
    }
}

async fn begin(
    socket: &Path,
    request: &Request,
) -> Result<(BufReader<OwnedReadHalf>, OwnedWriteHalf), CallError> {
    let unreachable = |error| CallError::Unreachable { socket: socket.to_owned(), error };
    let broken = |what: String| CallError::Broken { socket: socket.to_owned(), what };
    let io_time = Duration::from_secs(ADMIN_IO_SECONDS_MAX);
    let mut stream = timeout(io_time, UnixStream::connect(socket))
        .await
        .map_err(|_| unreachable(io::ErrorKind::TimedOut.into()))?
        .map_err(unreachable)?;
    let line = request_line(request).map_err(|error| broken(error.to_string()))?;
    timeout(io_time, stream.write_all(&line))
        .await
        .map_err(|_| broken("the process does not take the request".into()))?
        .map_err(|error| broken(error.to_string()))?;
    let (read, write) = stream.into_split();
    Ok((BufReader::new(read), write))
}

async fn answer(
    socket: &Path,
    mut reader: BufReader<OwnedReadHalf>,
    patience: Option<Duration>,
    on_progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Value, CallError> {
    let broken = |what: String| CallError::Broken { socket: socket.to_owned(), what };
    let mut parts = String::new();
    loop {
        let next = read_answer(&mut reader);
        let answer = match patience {
            Some(patience) => timeout(patience, next)
                .await
                .unwrap_or_else(|_| Err(format!("no answer within {} s", patience.as_secs()))),
            None => next.await,
        };
        let answer = match answer.map_err(broken)? {
            AnswerLine::Part { text, last } => {
                if to_u64(parts.len() + text.len()) > ADMIN_ANSWER_BYTES_MAX {
                    return Err(broken("the answer has no end".into()));
                }
                parts.push_str(&text);
                if !last {
                    continue;
                }
                let whole = serde_json::from_str(&std::mem::take(&mut parts));
                whole.map_err(|error| broken(format!("the answer is not understood: {error}")))?
            }
            other @ (AnswerLine::Progress(_) | AnswerLine::Result(_) | AnswerLine::Error(_)) => {
                other
            }
        };
        match answer {
            AnswerLine::Part { .. } => {
                return Err(broken("a part of an answer is in parts".into()));
            }
            AnswerLine::Progress(progress) => on_progress(progress),
            AnswerLine::Result(value) => return Ok(value),
            AnswerLine::Error(error) => return Err(error.into()),
        }
    }
}

async fn read_answer(reader: &mut BufReader<OwnedReadHalf>) -> Result<AnswerLine, String> {
    let mut line = Vec::new();
    let mut bounded = reader.take(ADMIN_MESSAGE_BYTES_MAX);
    let length = bounded.read_until(b'\n', &mut line).await.map_err(|error| error.to_string())?;
    match line.last() {
        None => Err("the process closed the connection without an answer".into()),
        Some(b'\n') => serde_json::from_slice(&line)
            .map_err(|error| format!("the answer is not understood: {error}")),
        Some(_) => Err(format!("the answer is cut off after {length} bytes")),
    }
}
