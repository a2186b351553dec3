//! One request, from the export's answer to the bytes of the reply.
//!
//! Called by `transmission`; the only place where an export is asked to do something. Errors of
//! the export become replies; an answer that does not fit the request is logged as our own fault
//! and becomes EIO.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::budget::Held;
use super::export::{ErrorCode, Export, ExportError};
use super::intake::{Incoming, extents_max};
use super::protocol::reply::{self, Pieces};
use super::protocol::request::{Command, Operation, RequestHeader};

/// A request answered.
pub(super) struct Finished {
    pub(super) reply: Pieces,
    pub(super) held: Held,
    pub(super) operation: Operation,
    /// Bytes it covered, or `None` if it failed.
    pub(super) bytes: Option<u64>,
    pub(super) busy: Duration,
}

/// Does what `incoming` asks. `structured` says which kind of replies was negotiated.
pub(super) async fn execute(
    export: Arc<dyn Export>,
    incoming: Incoming,
    structured: bool,
) -> Finished {
    let begun = Instant::now();
    let Incoming { header, verdict, data, held } = incoming;
    let result = match verdict {
        Ok(command) => perform(export.as_ref(), command, data, header.cookie, structured).await,
        Err(refusal) => Err(ExportError::new(refusal.code, refusal.message)),
    };
    let bytes = result.is_ok().then_some(u64::from(header.length));
    let reply = result.unwrap_or_else(|error| failure(&header, structured, &error));
    Finished { reply, held, operation: header.operation(), bytes, busy: begun.elapsed() }
}

/// A request that is refused because the server or the export is about to end.
pub(super) fn refuse_at_the_end(incoming: Incoming, structured: bool) -> Finished {
    let Incoming { header, held, .. } = incoming;
    let error = ExportError::new(ErrorCode::Shutdown, "the server is being stopped");
    let reply = failure(&header, structured, &error);
    let operation = header.operation();
    Finished { reply, held, operation, bytes: None, busy: Duration::ZERO }
}

fn failure(header: &RequestHeader, structured: bool, error: &ExportError) -> Pieces {
    vec![if structured {
        reply::structured_error(header.cookie, error.code, &error.message)
    } else {
        reply::simple(header.cookie, Some(error.code))
    }]
}

/// A success without content. A simple reply is allowed also beside structured ones, but not to
/// a read.
fn done(cookie: u64) -> Pieces {
    vec![reply::simple(cookie, None)]
}

async fn perform(
    export: &dyn Export,
    command: Command,
    data: Bytes,
    cookie: u64,
    structured: bool,
) -> Result<Pieces, ExportError> {
    match command {
        Command::Read { offset, length, single_chunk } => {
            let segments = export.read(offset, length).await?;
            let pieces = match (structured, single_chunk) {
                (false, _) => reply::simple_read(cookie, length, segments),
                (true, false) => reply::structured_read(cookie, offset, length, segments),
                (true, true) => reply::single_chunk_read(cookie, offset, length, segments),
            };
            pieces.map_err(|wrong| fault(export, wrong.to_string()))
        }
        Command::Write { offset, fua, .. } => {
            export.write(offset, data, fua).await.map(|()| done(cookie))
        }
        Command::Flush => export.flush().await.map(|()| done(cookie)),
        Command::Trim { offset, length, fua } => {
            export.trim(offset, length, fua).await.map(|()| done(cookie))
        }
        Command::Cache { offset, length } => {
            export.cache(offset, length).await.map(|()| done(cookie))
        }
        Command::WriteZeroes { offset, length, no_hole, fua } => {
            export.write_zeroes(offset, length, no_hole, fua).await.map(|()| done(cookie))
        }
        Command::BlockStatus { offset, length, one } => {
            let at_most = extents_max(length, one);
            let mut extents = export.extents(offset, length, at_most).await?;
            extents.truncate(at_most);
            reply::block_status(cookie, length, one, &extents)
                .map(|chunk| vec![chunk])
                .ok_or_else(|| fault(export, "export told no extent".into()))
        }
        Command::Nothing if structured => Ok(vec![reply::structured_done(cookie)]),
        Command::Nothing => Ok(done(cookie)),
    }
}

/// The export broke its contract: the client gets an error, the log gets the fault.
fn fault(export: &dyn Export, message: String) -> ExportError {
    tracing::error!(export = %export.info().name, "{message}");
    ExportError::new(ErrorCode::Io, message)
}
