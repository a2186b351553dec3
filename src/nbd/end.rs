//! Why a connection ended: one line in the log for each, and whether it counts as an error.
//!
//! Made by `handshake`, `intake` and `transmission`, logged by `serve`.

use std::io;
use std::time::Duration;

/// The reason a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client sent DISC.
    #[error("client disconnected")]
    Disconnected,
    /// The client sent ABORT.
    #[error("client aborted the handshake")]
    Aborted,
    /// The client closed the connection between two messages.
    #[error("client closed the connection")]
    Closed,
    /// The connection ended inside a message.
    #[error("connection ended inside {0}")]
    Truncated(&'static str),
    /// The socket failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// EXPORT_NAME cannot be answered with an error, only by hanging up.
    #[error("export {name:?} was not opened: {reason}")]
    NotOpened { name: String, reason: String },
    /// This process is being stopped.
    #[error("server is being stopped")]
    Stopped,
    /// The export ended before its client wanted it to.
    #[error("export ended")]
    ExportEnded,
    /// Too little moved in the middle of a message.
    #[error("client stalled for {0:?} inside {1}")]
    Stalled(Duration, &'static str),
    /// The handshake took too long.
    #[error("handshake not done within {0:?}")]
    HandshakeDeadline(Duration),
    /// A client flag that we do not know.
    #[error("unknown client flags {0:#010x}")]
    ClientFlags(u32),
    /// A client without fixed newstyle may only send EXPORT_NAME.
    #[error("option {0} without fixed newstyle")]
    NotFixedNewstyle(u32),
    /// Not an option where one was due.
    #[error("wrong magic before an option")]
    OptionMagic,
    /// More options than a client can have use for.
    #[error("more than {0} options")]
    TooManyOptions(usize),
    /// An option too long to skip.
    #[error("option {code} with {length} bytes")]
    OptionTooLong { code: u32, length: u32 },
    /// Not a request where one was due.
    #[error("wrong magic before a request")]
    RequestMagic,
    /// A write too long to skip.
    #[error("write of {0} bytes")]
    WriteTooLong(u32),
    /// The TLS handshake failed, or the client is not one of those that may come.
    #[error("TLS: {0}")]
    Tls(String),
    /// The client was told that TLS comes first, and has left without it.
    #[error("it speaks in the clear, and this door wants TLS")]
    InTheClear,
    /// It was not done with its handshake, and all places were held.
    #[error("made room for a newer one")]
    MadeRoom,
}

/// Who brought it about.
enum Cause {
    /// The client, against the protocol.
    BrokenProtocol,
    /// The client, who has left.
    Left,
    /// This end.
    Ours,
}

impl End {
    /// Whether the client broke the protocol.
    pub const fn is_protocol_error(&self) -> bool {
        matches!(self.cause(), Cause::BrokenProtocol)
    }

    /// Whether the client has left.
    pub const fn is_leave(&self) -> bool {
        matches!(self.cause(), Cause::Left)
    }

    const fn cause(&self) -> Cause {
        match self {
            Self::HandshakeDeadline(_)
            | Self::ClientFlags(_)
            | Self::NotFixedNewstyle(_)
            | Self::OptionMagic
            | Self::TooManyOptions(_)
            | Self::OptionTooLong { .. }
            | Self::RequestMagic
            | Self::WriteTooLong(_)
            | Self::Tls(_)
            | Self::InTheClear => Cause::BrokenProtocol,
            Self::Disconnected
            | Self::Aborted
            | Self::Closed
            | Self::Truncated(_)
            | Self::Io(_) => Cause::Left,
            Self::NotOpened { .. }
            | Self::Stopped
            | Self::ExportEnded
            | Self::Stalled(..)
            | Self::MadeRoom => Cause::Ours,
        }
    }

    /// Whether the client may still be sending, so that closing at once could take from it the
    /// replies that are on their way.
    pub const fn client_may_be_sending(&self) -> bool {
        match self {
            Self::Disconnected
            | Self::Closed
            | Self::Truncated(_)
            | Self::Io(_)
            | Self::Stalled(..)
            | Self::Tls(_)
            | Self::InTheClear
            | Self::MadeRoom
            | Self::HandshakeDeadline(_) => false,
            Self::Aborted
            | Self::NotOpened { .. }
            | Self::Stopped
            | Self::ExportEnded
            | Self::ClientFlags(_)
            | Self::NotFixedNewstyle(_)
            | Self::OptionMagic
            | Self::TooManyOptions(_)
            | Self::OptionTooLong { .. }
            | Self::RequestMagic
            | Self::WriteTooLong(_) => true,
        }
    }
}
