//! From the greeting to an opened export: fixed newstyle negotiation.
//!
//! Called by `serve` under a deadline. Every option is answered before the next is read. State
//! kept between options: whether structured replies were agreed on, and for which export the
//! metadata context was selected. An export opened to answer a question about it is closed with
//! the answer, so that a question never pins an image.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::end::End;
use super::export::{Export, Exports, OpenError};
use super::protocol::option::{
    CLIENT_FLAGS_BYTES, ClientFlags, ContextRequest, InfoRequest, OPTION_HEADER_BYTES, OptionError,
    OptionHeader, OptionKind, empty, greeting, text,
};
use super::protocol::option_reply::{self as reply, OptionRefusal};
use super::protocol::request::Terms;
use super::protocol::transmission_flags;
use crate::limits::{NBD_OPTION_BYTES_MAX, NBD_OPTION_SKIP_BYTES_MAX, NBD_OPTIONS_MAX};
use crate::units::convert::{to_u64, u32_to_usize};

/// Answers are sent on once they are this long, so that a long list needs no long buffer.
const ANSWER_BYTES: usize = 64 * 1024;

/// A connection that may send requests.
pub struct Opened {
    /// What it opened.
    pub export: Arc<dyn Export>,
    /// What decides about its requests.
    pub terms: Terms,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("export", self.export.info()).finish_non_exhaustive()
    }
}

/// What an option led to.
enum Step {
    /// The next option.
    More,
    /// Requests.
    Opened(Opened),
    /// The end.
    Aborted,
}

/// A refused option: which error, and its text.
struct Refused(OptionRefusal, String);

impl From<OptionError> for Refused {
    fn from(error: OptionError) -> Self {
        Self(OptionRefusal::Invalid, error.to_string())
    }
}

impl From<OpenError> for Refused {
    fn from(error: OpenError) -> Self {
        let refusal = match error {
            OpenError::Unknown => OptionRefusal::Unknown,
            OpenError::Refused(_) => OptionRefusal::Policy,
            OpenError::Shutdown => OptionRefusal::Shutdown,
        };
        Self(refusal, error.to_string())
    }
}

/// Negotiates until an export is open or the connection is to end.
pub async fn negotiate<R, W>(
    reader: &mut R,
    writer: &mut W,
    exports: &dyn Exports,
    stopping: &CancellationToken,
) -> Result<Opened, End>
where
    R: AsyncBufRead + Unpin,
    W: AsyncWrite + Unpin,
{
    writer.write_all(&greeting()).await?;
    let mut bytes = [0; CLIENT_FLAGS_BYTES];
    fill(reader, &mut bytes, "client flags", true).await?;
    let flags = ClientFlags::decode(bytes).ok_or(End::ClientFlags(u32::from_be_bytes(bytes)))?;
    haggle((reader, writer), (flags, false), exports, stopping).await
}

/// The same behind the client's flags, which came in the clear if the connection is `secured`.
pub(super) async fn haggle<R, W>(
    (reader, writer): (&mut R, &mut W),
    (flags, secured): (ClientFlags, bool),
    exports: &dyn Exports,
    stopping: &CancellationToken,
) -> Result<Opened, End>
where
    R: AsyncBufRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut handshake = Handshake {
        writer,
        exports,
        stopping,
        flags,
        secured,
        structured: false,
        allocation_of: None,
        out: BytesMut::new(),
    };
    for _ in 0..NBD_OPTIONS_MAX {
        let option = tokio::select! {
            biased;
            option = read_option(reader) => option?,
            () = stopping.cancelled() => return Err(End::Stopped),
        };
        match handshake.step(option).await? {
            Step::More => (),
            Step::Opened(opened) => return Ok(opened),
            Step::Aborted => return Err(End::Aborted),
        }
    }
    Err(End::TooManyOptions(NBD_OPTIONS_MAX))
}

/// An option with its payload, or without if that was too long to take.
struct Taken {
    header: OptionHeader,
    payload: Option<Vec<u8>>,
}

async fn read_option<R: AsyncBufRead + Unpin>(reader: &mut R) -> Result<Taken, End> {
    let mut bytes = [0; OPTION_HEADER_BYTES];
    fill(reader, &mut bytes, "an option's header", true).await?;
    let header = OptionHeader::decode(&bytes).ok_or(End::OptionMagic)?;
    let OptionHeader { code, length } = header;
    if u64::from(length) > NBD_OPTION_SKIP_BYTES_MAX {
        return Err(End::OptionTooLong { code, length });
    }
    if u64::from(length) > NBD_OPTION_BYTES_MAX {
        skip(reader, u64::from(length)).await?;
        return Ok(Taken { header, payload: None });
    }
    let mut payload = vec![0; u32_to_usize(length)];
    if !payload.is_empty() {
        fill(reader, &mut payload, "an option", false).await?;
    }
    Ok(Taken { header, payload: Some(payload) })
}

/// Fills `bytes`. At a `boundary` between messages, a connection may close before the first.
async fn fill<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    bytes: &mut [u8],
    what: &'static str,
    boundary: bool,
) -> Result<(), End> {
    let mut filled = 0;
    while filled < bytes.len() {
        match reader.read(&mut bytes[filled..]).await? {
            0 if boundary && filled == 0 => return Err(End::Closed),
            0 => return Err(End::Truncated(what)),
            count => filled += count,
        }
    }
    Ok(())
}

async fn skip<R: AsyncBufRead + Unpin>(reader: &mut R, mut left: u64) -> Result<(), End> {
    while left > 0 {
        let there = to_u64(reader.fill_buf().await?.len()).min(left);
        if there == 0 {
            return Err(End::Truncated("an option"));
        }
        reader.consume(crate::units::convert::to_usize(there));
        left -= there;
    }
    Ok(())
}

struct Handshake<'a, W> {
    writer: &'a mut W,
    exports: &'a dyn Exports,
    stopping: &'a CancellationToken,
    flags: ClientFlags,
    /// TLS was initiated.
    secured: bool,
    structured: bool,
    /// The export whose allocation context is selected, by the name the client used.
    allocation_of: Option<String>,
    out: BytesMut,
}

impl<W: AsyncWrite + Unpin> Handshake<'_, W> {
    /// Answers one option.
    async fn step(&mut self, option: Taken) -> Result<Step, End> {
        let kind = option.header.kind();
        let code = option.header.code;
        if kind == OptionKind::ExportName {
            return self.export_name(option.payload).await.map(Step::Opened);
        }
        if !self.flags.fixed_newstyle {
            return Err(End::NotFixedNewstyle(code));
        }
        if kind == OptionKind::Abort {
            reply::acknowledge(&mut self.out, code);
            self.send().await?;
            return Ok(Step::Aborted);
        }
        let answer = match (&option.payload, self.stopping.is_cancelled()) {
            (_, true) => Err(OpenError::Shutdown.into()),
            (None, false) => Err(too_long(kind)),
            (Some(payload), false) => self.answer(kind, code, payload).await,
        };
        let step = match answer {
            Ok(opened) => {
                reply::acknowledge(&mut self.out, code);
                opened.map_or(Step::More, Step::Opened)
            }
            Err(Refused(refusal, text)) => {
                reply::refuse(&mut self.out, code, refusal, &text);
                Step::More
            }
        };
        self.send().await?;
        Ok(step)
    }

    /// The part of an answer that stands before its ACK, and the export if GO opened one.
    async fn answer(
        &mut self,
        kind: OptionKind,
        code: u32,
        payload: &[u8],
    ) -> Result<Option<Opened>, Refused> {
        match kind {
            OptionKind::List => self.list(code, payload).await,
            OptionKind::Info => self.info(code, payload).await.map(|_| None),
            OptionKind::Go => self.info(code, payload).await.map(Some),
            OptionKind::StructuredReply => {
                empty(payload)?;
                self.structured = true;
                Ok(None)
            }
            OptionKind::ListMetaContext => {
                if self.contexts(payload).await?.lists_allocation() {
                    reply::context_listed(&mut self.out, code);
                }
                Ok(None)
            }
            OptionKind::SetMetaContext => {
                // A selection is replaced also by one that fails.
                self.allocation_of = None;
                let request = self.contexts(payload).await?;
                if request.allocation {
                    self.allocation_of = Some(request.name.to_owned());
                    reply::context_selected(&mut self.out, code);
                }
                Ok(None)
            }
            OptionKind::StartTls if self.secured => {
                Err(Refused(OptionRefusal::Invalid, "TLS was initiated already".to_owned()))
            }
            OptionKind::ExportName
            | OptionKind::Abort
            | OptionKind::StartTls
            | OptionKind::Other => {
                Err(Refused(OptionRefusal::Unsupported, format!("option {code} is unknown here")))
            }
        }
    }

    async fn list(&mut self, code: u32, payload: &[u8]) -> Result<Option<Opened>, Refused> {
        empty(payload)?;
        for listed in self.exports.list() {
            reply::server(&mut self.out, code, &listed);
            if self.out.len() > ANSWER_BYTES {
                // A socket that failed fails again where the answer ends, and is reported there.
                self.send().await.map_err(|end| Refused(OptionRefusal::Policy, end.to_string()))?;
            }
        }
        Ok(None)
    }

    async fn info(&mut self, code: u32, payload: &[u8]) -> Result<Opened, Refused> {
        let request = InfoRequest::decode(payload)?;
        let opened = self.open(request.name).await?;
        let info = opened.export.info();
        let out = &mut self.out;
        reply::info_export(out, code, info, flags_of(&opened));
        if request.wants_name {
            reply::info_name(out, code, info);
        }
        if request.wants_description {
            reply::info_description(out, code, info);
        }
        if request.wants_block_size {
            reply::info_block_size(out, code, info);
        }
        Ok(opened)
    }

    async fn contexts<'p>(&self, payload: &'p [u8]) -> Result<ContextRequest<'p>, Refused> {
        if !self.structured {
            let text = "metadata contexts need structured replies".to_owned();
            return Err(Refused(OptionRefusal::Invalid, text));
        }
        let request = ContextRequest::decode(payload)?;
        drop(self.exports.open(request.name).await?);
        Ok(request)
    }

    async fn export_name(&mut self, payload: Option<Vec<u8>>) -> Result<Opened, End> {
        let not_opened = |name: &str, reason: String| End::NotOpened { name: name.into(), reason };
        let Some(payload) = payload else {
            return Err(not_opened("", "its name is too long".into()));
        };
        let name =
            text(&payload, "export name").map_err(|error| not_opened("", error.to_string()))?;
        if self.stopping.is_cancelled() {
            return Err(End::Stopped);
        }
        let opened = self.open(name).await.map_err(|error| not_opened(name, error.to_string()))?;
        let (info, flags) = (opened.export.info(), flags_of(&opened));
        reply::export_name(&mut self.out, info, flags, self.flags.no_zeroes);
        self.send().await?;
        Ok(opened)
    }

    async fn open(&self, name: &str) -> Result<Opened, OpenError> {
        let export = self.exports.open(name).await?;
        let info = export.info();
        let terms = Terms {
            size: info.size.0,
            read_only: info.read_only,
            structured: self.structured,
            allocation: self.allocation_of.as_deref() == Some(name),
        };
        Ok(Opened { export, terms })
    }

    async fn send(&mut self) -> Result<(), End> {
        self.writer.write_all(&self.out).await?;
        self.out.clear();
        self.writer.flush().await?;
        Ok(())
    }
}

fn flags_of(opened: &Opened) -> u16 {
    let info = opened.export.info();
    transmission_flags(info.read_only, info.multi_conn, opened.terms.structured)
}

fn too_long(kind: OptionKind) -> Refused {
    match kind {
        OptionKind::Other | OptionKind::StartTls => {
            Refused(OptionRefusal::Unsupported, "option is unknown here".into())
        }
        OptionKind::ExportName
        | OptionKind::Abort
        | OptionKind::List
        | OptionKind::Info
        | OptionKind::Go
        | OptionKind::StructuredReply
        | OptionKind::ListMetaContext
        | OptionKind::SetMetaContext => {
            let text = format!("option of more than {NBD_OPTION_BYTES_MAX} bytes");
            Refused(OptionRefusal::TooBig, text)
        }
    }
}
