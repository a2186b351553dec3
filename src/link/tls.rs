//! TLS between sources and their hub: mutual, TLS 1.3, by certificates of one authority.
//!
//! Who a source is, its certificate says: the DNS names in it are the names of the sources that may
//! come with it. A hub is known by the name in its certificate, not by its address, so that it may
//! move. Neither end falls back to plain TCP. Early data is never taken, so a recorded session is of no
//! use.
//!
//! Who comes again resumes its session, by a ticket: the keys of tickets live as long as the process, through
//! every reading of the files but one with another authority. The library takes the certificate of a resumed
//! session as it was, so its end is looked at here, for each connection ([`Shown`]).
//!
//! The doors for clients, NBD and HTTP, are behind TLS where the configuration says so
//! ([`ServedTls`]); TLS 1.2 is taken there as well, as the NBD protocol wants. A client shows a
//! certificate, or need not.
//!
//! Files are PEM. They are read at start and whenever the configuration is; what cannot be read then
//! is an error, and what was read before stays in force. An own certificate that has expired is no error of
//! reading: the process serves what needs none, and each connection says why it fails.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::movable::Movable;
use super::refusals::Refusals;
use super::shown::{Fingerprint, Shown};
use crate::nbd::tls::Upgrade;
use crate::units::machine;
use crate::units::times::time_of_day;

/// Where the PEM files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authority: what the other end must be signed by.
    pub ca: PathBuf,
    /// The own certificate, and what lies between it and the authority.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is no PEM of the kind that is wanted.
    #[error("{}: {error}", .path.display())]
    File { path: PathBuf, error: pem::Error },
    /// A file has none.
    #[error("{}: there is no certificate in it", .0.display())]
    Empty(PathBuf),
    /// A certificate cannot be read.
    #[error("{}: {what}", .path.display())]
    Certificate { path: PathBuf, what: String },
    /// They do not go together.
    #[error("{} and {}: {error}", .files.cert.display(), .files.key.display())]
    Pair { files: Box<TlsFiles>, error: rustls::Error },
    /// The name of the hub is none.
    #[error("{0:?} is no name that a certificate can have")]
    Name(String),
}

/// What files held.
struct Loaded {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// The bytes of the files.
struct Bytes {
    ca: Vec<u8>,
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl Bytes {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = |path: &PathBuf| {
            let failed =
                |error| TlsError::File { path: path.clone(), error: pem::Error::Io(error) };
            std::fs::read(path).map_err(failed)
        };
        Ok(Self { ca: read(&files.ca)?, cert: read(&files.cert)?, key: read(&files.key)? })
    }

    fn parts(&self) -> [&[u8]; 3] {
        [&self.ca, &self.cert, &self.key]
    }
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error| TlsError::File { path: path.to_owned(), error };
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    let all = all.map_err(failed)?;
    if all.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(all) }
}

/// What they say, and when the own certificate ends, in seconds since 1970.
fn parse(files: &TlsFiles, bytes: &Bytes) -> Result<(Loaded, i64), TlsError> {
    let of = |path: &Path, what: String| TlsError::Certificate { path: path.to_owned(), what };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca, &bytes.ca)? {
        roots.add(certificate).map_err(|error| of(&files.ca, error.to_string()))?;
    }
    let chain = certificates(&files.cert, &bytes.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes.key)
        .map_err(|error| TlsError::File { path: files.key.clone(), error })?;
    let own = chain.first().ok_or_else(|| TlsError::Empty(files.cert.clone()))?;
    let ends = Shown::of(own).map_err(|what| of(&files.cert, what))?.ends;
    Ok((Loaded { roots: Arc::new(roots), chain, key }, ends))
}

/// What the files say.
struct Made<C> {
    config: Arc<C>,
    /// When the own certificate ends, in seconds since 1970.
    ends: i64,
    /// Of each file, so that files that say the same change nothing.
    of: [Fingerprint; 3],
}

/// Makes the side of one end. What was made before is given where the authority is still the same.
type Make<C> = fn(&TlsFiles, Loaded, Option<&C>) -> Result<C, TlsError>;

/// One end's side, made of its files.
pub struct Tls<C> {
    files: TlsFiles,
    make: Make<C>,
    made: ArcSwap<Made<C>>,
}

impl<C> fmt::Debug for Tls<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl<C> Tls<C> {
    fn of(files: TlsFiles, make: Make<C>) -> Result<Self, TlsError> {
        let bytes = Bytes::read(&files)?;
        let (loaded, ends) = parse(&files, &bytes)?;
        let config = Arc::new(make(&files, loaded, None)?);
        let of = bytes.parts().map(Fingerprint::of);
        Ok(Self { made: ArcSwap::from_pointee(Made { config, ends, of }), files, make })
    }

    /// Reads the files again. Connections that are there stay; the next one is made with what they
    /// say. Files that say the same leave everything as it is, sessions that can be resumed among it.
    pub fn reload(&self) -> Result<(), TlsError> {
        let bytes = Bytes::read(&self.files)?;
        let (of, before) = (bytes.parts().map(Fingerprint::of), self.made.load_full());
        if of == before.of {
            return Ok(());
        }
        let (loaded, ends) = parse(&self.files, &bytes)?;
        // A session that another authority vouched for is not resumed.
        let same = (of[0] == before.of[0]).then_some(before.config.as_ref());
        let config = Arc::new((self.make)(&self.files, loaded, same)?);
        self.made.store(Arc::new(Made { config, ends, of }));
        Ok(())
    }

    /// Seconds since 1970 when the own certificate ends.
    pub fn ends(&self) -> i64 {
        self.made.load().ends
    }

    /// Why nobody takes the own certificate any more.
    pub fn expired(&self) -> Option<String> {
        let now = time_of_day(machine::unix_seconds());
        self.ended().map(|ended| format!("{ended}, and it is {now} by the clock here"))
    }

    /// The same without what is another thing each time.
    fn ended(&self) -> Option<String> {
        let ends = self.ends();
        let cert = self.files.cert.display();
        (ends < machine::unix_seconds())
            .then(|| format!("the certificate {cert} expired at {}", time_of_day(ends)))
    }

    fn config(&self) -> Arc<C> {
        Arc::clone(&self.made.load().config)
    }
}

/// The hub's side.
pub type HubTls = Tls<ServerConfig>;

fn pair(files: &TlsFiles) -> impl Fn(rustls::Error) -> TlsError {
    move |error| TlsError::Pair { files: Box::new(files.clone()), error }
}

/// Links between source and hub.
fn make_link(
    files: &TlsFiles,
    loaded: Loaded,
    before: Option<&ServerConfig>,
) -> Result<ServerConfig, TlsError> {
    make_server(files, loaded, before, (true, &[&rustls::version::TLS13]))
}

/// A door at which every client shows a certificate.
fn make_mutual(
    files: &TlsFiles,
    loaded: Loaded,
    before: Option<&ServerConfig>,
) -> Result<ServerConfig, TlsError> {
    make_server(files, loaded, before, (true, &[&rustls::version::TLS13, &rustls::version::TLS12]))
}

/// A door at which a client may show one; what it shows has to be right.
fn make_open(
    files: &TlsFiles,
    loaded: Loaded,
    before: Option<&ServerConfig>,
) -> Result<ServerConfig, TlsError> {
    make_server(files, loaded, before, (false, &[&rustls::version::TLS13, &rustls::version::TLS12]))
}

fn make_server(
    files: &TlsFiles,
    Loaded { roots, chain, key }: Loaded,
    before: Option<&ServerConfig>,
    (mutual, versions): (bool, &[&'static rustls::SupportedProtocolVersion]),
) -> Result<ServerConfig, TlsError> {
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let clients = if mutual { clients } else { clients.allow_unauthenticated() };
    let clients = clients.build().map_err(|error| TlsError::Certificate {
        path: files.ca.clone(),
        what: error.to_string(),
    })?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .map_err(pair(files))?;
    let builder = builder.with_client_cert_verifier(clients);
    let mut config = builder.with_single_cert(chain, key).map_err(pair(files))?;
    // The peer keeps its session: any number of them come again, and nobody crowds another's out.
    config.ticketer = match before {
        Some(before) => Arc::clone(&before.ticketer),
        None => aws_lc_rs::Ticketer::new().map_err(pair(files))?,
    };
    Ok(config)
}

/// Sessions of another certificate are not resumed: what was put there is to be shown.
fn make_client(
    files: &TlsFiles,
    Loaded { roots, chain, key }: Loaded,
    _before: Option<&ClientConfig>,
) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(pair(files))?;
    let builder = builder.with_root_certificates(roots);
    builder.with_client_auth_cert(chain, key).map_err(pair(files))
}

/// Why a handshake failed; a time that is told is not that of this moment, so that the same reason is the
/// same text.
fn told(error: io::Error) -> io::Error {
    let time = |at: &UnixTime| time_of_day(i64::try_from(at.as_secs()).unwrap_or(i64::MAX));
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let Some(rustls::Error::InvalidCertificate(what)) = inner else { return error };
    let text = if let CertificateError::ExpiredContext { not_after, .. } = what {
        format!("the certificate shown expired at {}", time(not_after))
    } else if let CertificateError::NotValidYetContext { not_before, .. } = what {
        format!("the certificate shown is not valid before {}", time(not_before))
    } else {
        return error;
    };
    io::Error::new(error.kind(), text)
}

impl HubTls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        Self::of(files, make_link)
    }

    /// The handshake; then the connection, and what the source has shown. The caller says how long it
    /// may take.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(TlsStream<Movable>, Shown)> {
        let stream = Movable::In(stream);
        let stream = match TlsAcceptor::from(self.config()).accept(stream).await {
            Ok(stream) => stream,
            Err(error) => {
                let (error, own) = (told(error), self.ended());
                return Err(match own {
                    Some(own) => io::Error::other(format!("{error}; {own}")),
                    None => error,
                });
            }
        };
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let shown = shown.ok_or_else(|| io::Error::other("no certificate was shown"))?;
        let shown = Shown::of(shown).map_err(io::Error::other)?;
        shown.in_time().map_err(io::Error::other)?;
        Ok((stream.into(), shown))
    }
}

/// A door for clients.
#[derive(Debug)]
pub struct ServedTls {
    tls: Tls<ServerConfig>,
    /// The authority signs the certificates of sources as well: these open no door.
    shared: bool,
    refused: AtomicU64,
    said: Arc<Refusals>,
}

impl ServedTls {
    /// Reads the files; `mutual`: every client shows a certificate. `shared`: that of a source, which
    /// has its name in it, is none.
    pub fn load(files: TlsFiles, mutual: bool, shared: bool) -> Result<Self, TlsError> {
        let make = if mutual { make_mutual } else { make_open };
        let (refused, said) = Default::default();
        Ok(Self { tls: Tls::of(files, make)?, shared, refused, said })
    }

    /// Files and expiry.
    pub fn files(&self) -> &Tls<ServerConfig> {
        &self.tls
    }

    /// Counts and says that somebody was refused at this door.
    pub fn refuse(&self, what: &'static str, peer: &str, reason: &str) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.said.say(what, peer, reason, reason);
    }

    /// How many were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The handshake. The caller says how long it may take.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<ServedStream> {
        let stream = TlsAcceptor::from(self.tls.config()).accept(stream).await.map_err(told)?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        self.admits(shown).map_err(io::Error::other)?;
        Ok(stream)
    }
}

/// A connection behind such a door.
pub type ServedStream = tokio_rustls::server::TlsStream<TcpStream>;

impl Upgrade for ServedTls {
    fn config(&self) -> Arc<ServerConfig> {
        self.tls.config()
    }

    fn refused(&self, peer: &str, reason: &str) {
        self.refuse("an nbd client is refused", peer, reason);
    }

    fn admits(&self, shown: Option<&CertificateDer<'_>>) -> Result<(), String> {
        let Some(shown) = shown.map(Shown::of).transpose()? else { return Ok(()) };
        shown.in_time()?;
        match shown.names.first().filter(|_| self.shared) {
            None => Ok(()),
            Some(name) => Err(format!("the certificate is that of {name}, not of a client")),
        }
    }
}

/// The source's side.
#[derive(Debug)]
pub struct SourceTls {
    hub: ServerName<'static>,
    tls: Tls<ClientConfig>,
}

impl SourceTls {
    /// Reads the files; the hub is the one whose certificate has that name.
    pub fn load(files: TlsFiles, hub_name: &str) -> Result<Self, TlsError> {
        let hub = ServerName::try_from(hub_name.to_owned());
        let hub = hub.map_err(|_| TlsError::Name(hub_name.to_owned()))?;
        Ok(Self { hub, tls: Tls::of(files, make_client)? })
    }

    /// Files and expiry.
    pub fn files(&self) -> &Tls<ClientConfig> {
        &self.tls
    }

    /// Why there is no use in connecting.
    pub fn usable(&self) -> io::Result<()> {
        let next =
            "make a new one on the hub with `mirrorhub onboard NAME --renew`, join with it, reload";
        self.tls.expired().map_or(Ok(()), |why| Err(io::Error::other(format!("{why}: {next}"))))
    }

    /// The handshake. The caller says how long it may take.
    pub async fn connect(&self, stream: TcpStream) -> io::Result<TlsStream<Movable>> {
        let connector = TlsConnector::from(self.tls.config());
        let stream = Movable::In(stream);
        Ok(connector.connect(self.hub.clone(), stream).await.map_err(told)?.into())
    }
}

#[cfg(test)]
pub(crate) mod tests;
