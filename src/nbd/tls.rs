//! The upgrade to TLS: what happens on a connection that has to be encrypted before anything else.
//!
//! Called by `serve` for connections over TCP where the configuration asks for it. FORCEDTLS, in
//! the words of the protocol text: until the upgrade every option but STARTTLS and ABORT is answered
//! with TLS_REQD, and EXPORT_NAME, which has no answer, ends the connection. Who leaves after either
//! was refused; who goes on to STARTTLS was not. Behind the upgrade a negotiation begins anew: nothing
//! that was said in the clear counts.
//!
//! In the clear each option is read to its last byte and no further, straight from the socket. What
//! a client, or somebody on its way, sends behind STARTTLS in the clear is met by the TLS handshake,
//! which is no place for it; it is never taken for an option said under TLS.
//!
//! So many TLS handshakes go on at once. Who says STARTTLS and then nothing gives way to those who come.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::end::End;
use super::protocol::option::{
    CLIENT_FLAGS_BYTES, ClientFlags, OPTION_HEADER_BYTES, OptionHeader, OptionKind, greeting,
};
use super::protocol::option_reply::{self as reply, OptionRefusal};
use crate::limits::{NBD_OPTION_SKIP_BYTES_MAX, NBD_OPTIONS_MAX};
use crate::units::convert::u32_to_usize;
use crate::units::entrance::Entrance;

/// How connections are encrypted, and whose are taken.
pub trait Upgrade: std::fmt::Debug + Send + Sync {
    /// Certificate and key of this end, and who the other may be. Asked for each connection.
    fn config(&self) -> Arc<ServerConfig>;

    /// Whether a client that has shown this certificate, or none, may go on.
    ///
    /// # Errors
    /// Why not.
    fn admits(&self, shown: Option<&CertificateDer<'_>>) -> Result<(), String>;

    /// Somebody was refused before it could say what it wants.
    fn refused(&self, peer: &str, reason: &str);
}

/// Negotiates in the clear until the client asks for TLS, and upgrades. Nobody has one of the `turns` before it
/// has asked; one that is not done within `grace` makes room.
pub(super) async fn upgrade(
    mut stream: TcpStream,
    address: IpAddr,
    tls: &dyn Upgrade,
    (turns, grace): (&Arc<Entrance>, Duration),
) -> Result<(TlsStream<TcpStream>, ClientFlags), End> {
    let flags = wanted(&mut stream).await?;
    let turn = turns.turn(Some(address), grace).await;
    let failed = |error: io::Error| End::Tls(error.to_string());
    let stream = tokio::select! {
        accepted = TlsAcceptor::from(tls.config()).accept(stream) => accepted.map_err(failed)?,
        () = turn.lost() => return Err(End::MadeRoom),
    };
    drop(turn);
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    tls.admits(shown).map_err(End::Tls)?;
    Ok((stream, flags))
}

/// Until STARTTLS was acknowledged.
async fn wanted<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<ClientFlags, End> {
    let mut told = false;
    match in_the_clear(stream, &mut told).await {
        Err(end) if told && end.is_leave() => Err(End::InTheClear),
        other => other,
    }
}

/// The same; `told` says whether the client has met TLS_REQD.
async fn in_the_clear<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    told: &mut bool,
) -> Result<ClientFlags, End> {
    stream.write_all(&greeting()).await?;
    let mut bytes = [0; CLIENT_FLAGS_BYTES];
    exactly(stream, &mut bytes, "client flags").await?;
    let flags = ClientFlags::decode(bytes).ok_or(End::ClientFlags(u32::from_be_bytes(bytes)))?;
    for _ in 0..NBD_OPTIONS_MAX {
        let mut bytes = [0; OPTION_HEADER_BYTES];
        exactly(stream, &mut bytes, "an option's header").await?;
        let header = OptionHeader::decode(&bytes).ok_or(End::OptionMagic)?;
        let OptionHeader { code, length } = header;
        if u64::from(length) > NBD_OPTION_SKIP_BYTES_MAX {
            return Err(End::OptionTooLong { code, length });
        }
        skip(stream, u32_to_usize(length)).await?;
        let mut out = BytesMut::new();
        match header.kind() {
            OptionKind::ExportName => return Err(End::InTheClear),
            _ if !flags.fixed_newstyle => return Err(End::NotFixedNewstyle(code)),
            OptionKind::Abort => reply::acknowledge(&mut out, code),
            OptionKind::StartTls if length > 0 => {
                reply::refuse(&mut out, code, OptionRefusal::Invalid, "option takes no payload");
            }
            OptionKind::StartTls => reply::acknowledge(&mut out, code),
            OptionKind::List
            | OptionKind::Info
            | OptionKind::Go
            | OptionKind::StructuredReply
            | OptionKind::ListMetaContext
            | OptionKind::SetMetaContext
            | OptionKind::Other => {
                *told = true;
                let text = "this server wants TLS before anything else";
                reply::refuse(&mut out, code, OptionRefusal::TlsRequired, text);
            }
        }
        stream.write_all(&out).await?;
        if header.kind() == OptionKind::Abort {
            return Err(End::Aborted);
        }
        if header.kind() == OptionKind::StartTls && length == 0 {
            return Ok(flags);
        }
    }
    Err(End::TooManyOptions(NBD_OPTIONS_MAX))
}

/// Not a byte more than asked for.
async fn exactly<S: AsyncRead + Unpin>(
    stream: &mut S,
    bytes: &mut [u8],
    what: &'static str,
) -> Result<(), End> {
    match stream.read_exact(bytes).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(End::Truncated(what)),
        Err(error) => Err(error.into()),
    }
}

async fn skip<S: AsyncRead + Unpin>(stream: &mut S, mut left: usize) -> Result<(), End> {
    let mut bytes = [0; 4096];
    while left > 0 {
        let part = left.min(bytes.len());
        exactly(stream, &mut bytes[..part], "an option").await?;
        left -= part;
    }
    Ok(())
}
