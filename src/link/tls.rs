//! TLS between sources and their hub: mutual, TLS 1.3, by certificates of one authority.
//!
//! Who a source is, its certificate says: the DNS names in it are the names of the sources that may
//! come with it. A hub is known by the name in its certificate, not by its address, so that it may
//! move. Neither end falls back to plain TCP. Resumption is the library's; early data is never taken,
//! so a recorded session is of no use.
//!
//! The doors for clients, NBD and HTTP, are behind TLS where the configuration says so
//! ([`ServedTls`]); TLS 1.2 is taken there as well, as the NBD protocol wants. A client shows a
//! certificate, or need not.
//!
//! Files are PEM. They are read at start and whenever the configuration is; what cannot be read then
//! is an error, and what was read before stays in force.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::nbd::tls::Upgrade;

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
    File { path: PathBuf, error: rustls::pki_types::pem::Error },
    /// A file has none.
    #[error("{}: there is no certificate in it", .0.display())]
    Empty(PathBuf),
    /// A certificate cannot be read.
    #[error("{}: {what}", .path.display())]
    Certificate { path: PathBuf, what: String },
    /// The certificate's time is over.
    #[error("{}: the certificate has expired {}", .path.display(), .when)]
    Expired { path: PathBuf, when: String },
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
    /// Seconds since 1970 when the own certificate ends.
    ends: i64,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error| TlsError::File { path: path.to_owned(), error };
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(failed)?.collect();
    let all = all.map_err(failed)?;
    if all.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(all) }
}

fn load(files: &TlsFiles) -> Result<Loaded, TlsError> {
    let of = |path: &Path, what: String| TlsError::Certificate { path: path.to_owned(), what };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate).map_err(|error| of(&files.ca, error.to_string()))?;
    }
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| TlsError::File { path: files.key.clone(), error })?;
    let own = chain.first().ok_or_else(|| TlsError::Empty(files.cert.clone()))?;
    let (_, own) =
        X509Certificate::from_der(own).map_err(|error| of(&files.cert, error.to_string()))?;
    let ends = own.validity().not_after.timestamp();
    if ends < crate::units::machine::unix_seconds() {
        let when = own.validity().not_after.to_string();
        return Err(TlsError::Expired { path: files.cert.clone(), when });
    }
    Ok(Loaded { roots: Arc::new(roots), chain, key, ends })
}

/// The names of sources in a certificate.
pub fn names_in(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let dns = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::URI(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_)
        | GeneralName::Invalid(..) => None,
    };
    names.value.general_names.iter().filter_map(dns).collect()
}

/// What the files say.
struct Made<C> {
    config: Arc<C>,
    /// When the own certificate ends, in seconds since 1970.
    ends: i64,
}

type Read<C> = fn(&TlsFiles) -> Result<Made<C>, TlsError>;

/// One end's side, made of its files.
pub struct Tls<C> {
    files: TlsFiles,
    read: Read<C>,
    made: ArcSwap<Made<C>>,
}

impl<C> fmt::Debug for Tls<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl<C> Tls<C> {
    fn of(files: TlsFiles, read: Read<C>) -> Result<Self, TlsError> {
        let made = ArcSwap::from_pointee(read(&files)?);
        Ok(Self { files, read, made })
    }

    /// Reads the files again. Connections that are there stay; the next one is made with what they
    /// say.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.made.store(Arc::new((self.read)(&self.files)?));
        Ok(())
    }

    /// Seconds since 1970 when the own certificate ends.
    pub fn ends(&self) -> i64 {
        self.made.load().ends
    }

    fn config(&self) -> Arc<C> {
        Arc::clone(&self.made.load().config)
    }
}

/// The hub's side.
pub type HubTls = Tls<ServerConfig>;

fn read_server(files: &TlsFiles) -> Result<Made<ServerConfig>, TlsError> {
    let Loaded { roots, chain, key, ends } = load(files)?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
    let clients = clients.map_err(|error| TlsError::Certificate {
        path: files.ca.clone(),
        what: error.to_string(),
    })?;
    let pair = |error| TlsError::Pair { files: Box::new(files.clone()), error };
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(pair)?;
    let config = builder.with_client_cert_verifier(clients);
    let config = Arc::new(config.with_single_cert(chain, key).map_err(pair)?);
    Ok(Made { config, ends })
}

/// A door at which every client shows a certificate.
fn read_mutual(files: &TlsFiles) -> Result<Made<ServerConfig>, TlsError> {
    read_served(files, true)
}

/// A door at which a client may show one; what it shows has to be right.
fn read_open(files: &TlsFiles) -> Result<Made<ServerConfig>, TlsError> {
    read_served(files, false)
}

fn read_served(files: &TlsFiles, mutual: bool) -> Result<Made<ServerConfig>, TlsError> {
    let Loaded { roots, chain, key, ends } = load(files)?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let clients = if mutual { clients } else { clients.allow_unauthenticated() };
    let clients = clients.build().map_err(|error| TlsError::Certificate {
        path: files.ca.clone(),
        what: error.to_string(),
    })?;
    let pair = |error| TlsError::Pair { files: Box::new(files.clone()), error };
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(pair)?;
    let config = builder.with_client_cert_verifier(clients);
    let config = Arc::new(config.with_single_cert(chain, key).map_err(pair)?);
    Ok(Made { config, ends })
}

fn read_client(files: &TlsFiles) -> Result<Made<ClientConfig>, TlsError> {
    let Loaded { roots, chain, key, ends } = load(files)?;
    let pair = |error| TlsError::Pair { files: Box::new(files.clone()), error };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(pair)?;
    let config = builder.with_root_certificates(roots);
    let config = Arc::new(config.with_client_auth_cert(chain, key).map_err(pair)?);
    Ok(Made { config, ends })
}

impl HubTls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        Self::of(files, read_server)
    }

    /// The handshake; then the connection, and the names in the source's certificate. The caller says
    /// how long it may take.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Vec<String>)> {
        let stream = TlsAcceptor::from(self.config()).accept(stream).await?;
        let names = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(names_in);
        Ok((stream.into(), names.unwrap_or_default()))
    }
}

/// A door for clients.
#[derive(Debug)]
pub struct ServedTls {
    tls: Tls<ServerConfig>,
    /// The authority signs the certificates of sources as well: these open no door.
    shared: bool,
}

impl ServedTls {
    /// Reads the files; `mutual`: every client shows a certificate. `shared`: that of a source, which
    /// has its name in it, is none.
    pub fn load(files: TlsFiles, mutual: bool, shared: bool) -> Result<Self, TlsError> {
        let read = if mutual { read_mutual } else { read_open };
        Ok(Self { tls: Tls::of(files, read)?, shared })
    }

    /// Files and expiry.
    pub fn files(&self) -> &Tls<ServerConfig> {
        &self.tls
    }

    /// The handshake. The caller says how long it may take.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<ServedStream> {
        let stream = TlsAcceptor::from(self.tls.config()).accept(stream).await?;
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

    fn admits(&self, shown: Option<&CertificateDer<'_>>) -> Result<(), String> {
        let names = shown.filter(|_| self.shared).map(names_in).unwrap_or_default();
        match names.first() {
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
        Ok(Self { hub, tls: Tls::of(files, read_client)? })
    }

    /// Files and expiry.
    pub fn files(&self) -> &Tls<ClientConfig> {
        &self.tls
    }

    /// The handshake. The caller says how long it may take.
    pub async fn connect(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let connector = TlsConnector::from(self.tls.config());
        Ok(connector.connect(self.hub.clone(), stream).await?.into())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use bytes::Bytes;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
    use tokio::net::TcpListener;

    use super::*;
    use crate::link::socket::Socket;
    use crate::link::{FrameReader, Outgoing};
    use crate::wire::message::{Frame, Message};

    /// An authority that lives as long as the test.
    pub(crate) struct Ca(CertificateParams, KeyPair);

    impl Ca {
        pub(crate) fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self(params, KeyPair::generate().unwrap())
        }

        /// Files of a certificate with that name, which ends so many days from now.
        pub(crate) fn files(&self, directory: &Path, name: &str, days: i64) -> TlsFiles {
            let Self(ca, key) = self;
            let at = |file: &str| directory.join(format!("{name}-{file}.pem"));
            let (of_it, mut params) = (KeyPair::generate().unwrap(), CertificateParams::default());
            params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
            let now = time::OffsetDateTime::now_utc();
            params.not_before = now - time::Duration::days(900);
            params.not_after = now + time::Duration::days(days);
            let cert = params.signed_by(&of_it, &Issuer::from_params(ca, key)).unwrap();
            let files = TlsFiles { ca: at("ca"), cert: at("cert"), key: at("key") };
            fs::write(&files.ca, ca.clone().self_signed(key).unwrap().pem()).unwrap();
            fs::write(&files.cert, cert.pem()).unwrap();
            fs::write(&files.key, of_it.serialize_pem()).unwrap();
            files
        }
    }

    async fn meet(
        hub: &HubTls,
        source: &SourceTls,
    ) -> (io::Result<(TlsStream<TcpStream>, Vec<String>)>, io::Result<TlsStream<TcpStream>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (here, _) = listener.accept().await.unwrap();
        tokio::join!(hub.accept(here), source.connect(there))
    }

    fn in_runtime(test: impl Future<Output = ()>) {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap().block_on(test);
    }

    /// Frames of all sizes come through whole, in order, however little the socket takes at once.
    #[test]
    fn both_ends_know_each_other_and_frames_pass() {
        in_runtime(async {
            let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
            let hub = HubTls::load(ca.files(directory.path(), "hub", 9)).unwrap();
            let own = ca.files(directory.path(), "filer-a", 9);
            let source = SourceTls::load(own, "hub").unwrap();
            assert!(hub.ends() > crate::units::machine::unix_seconds());
            let (here, there) = meet(&hub, &source).await;
            let ((here, names), there) = (here.unwrap(), there.unwrap());
            assert_eq!(names, ["filer-a"]);
            assert!(here.get_ref().1.alpn_protocol().is_none());
            let (here, there) = (Socket::Tls(Box::new(here)), Socket::Tls(Box::new(there)));
            there.tune().unwrap();
            let payload = Bytes::from(vec![7; 200_000]);
            let (sent, (_read, mut write)) = (payload.clone(), there.into_split());
            let writer = async move {
                let mut outgoing = Outgoing::default();
                for _ in 0..40 {
                    outgoing.push(Frame::new(&Message::Transfer, sent.clone()));
                }
                // Cut short again and again: what was taken is not lost, nor held back.
                while !outgoing.is_empty() {
                    let write = outgoing.write_some(&mut write);
                    if let Ok(done) = tokio::time::timeout(std::time::Duration::ZERO, write).await {
                        done.unwrap();
                    }
                    tokio::task::yield_now().await;
                }
                write
            };
            let reader = async move {
                let mut reader = FrameReader::new(here);
                for _ in 0..40 {
                    assert!(reader.next().await.unwrap() == (Message::Transfer, payload.clone()));
                }
            };
            tokio::join!(writer, reader);
        });
    }

    #[test]
    fn strangers_are_refused() {
        in_runtime(async {
            let (directory, ca, other) = (tempfile::tempdir().unwrap(), Ca::new(), Ca::new());
            let base = directory.path();
            let hub = HubTls::load(ca.files(base, "hub", 9)).unwrap();
            // Of another authority: neither end takes the other.
            let stranger = other.files(base, "filer-x", 9);
            let met = meet(&hub, &SourceTls::load(stranger.clone(), "hub").unwrap()).await;
            assert!(met.0.is_err() && met.1.is_err());
            // It trusts our authority, but is not of it. TLS 1.3: its own side may end first.
            let trusting = TlsFiles { ca: base.join("hub-ca.pem"), ..stranger };
            let met = meet(&hub, &SourceTls::load(trusting, "hub").unwrap()).await;
            assert!(met.0.is_err());
            // A hub of another name is another hub.
            let own = ca.files(base, "filer-a", 9);
            let met = meet(&hub, &SourceTls::load(own.clone(), "another-hub").unwrap()).await;
            assert!(met.0.is_err() && met.1.is_err());
            // A certificate that has ended is told at the start, not at the first connection.
            let over = SourceTls::load(ca.files(base, "filer-b", -1), "hub").unwrap_err();
            assert!(matches!(over, TlsError::Expired { .. }), "{over}");
            // A key that is another's, a file that is none.
            let crossed = TlsFiles { key: base.join("hub-key.pem"), ..own.clone() };
            let met = SourceTls::load(crossed, "hub").unwrap_err();
            assert!(matches!(met, TlsError::Pair { .. }), "{met}");
            let met = SourceTls::load(TlsFiles { ca: base.join("none"), ..own.clone() }, "hub");
            assert!(matches!(met.unwrap_err(), TlsError::File { .. }));
            fs::write(base.join("empty"), "").unwrap();
            let met = SourceTls::load(TlsFiles { cert: base.join("empty"), ..own }, "hub");
            assert!(matches!(met.unwrap_err(), TlsError::Empty(_)));
        });
    }

    /// Plain bytes, and a recorded handshake played again, are no connection.
    #[test]
    fn what_is_no_handshake_is_none() {
        in_runtime(async {
            let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
            let hub = HubTls::load(ca.files(directory.path(), "hub", 9)).unwrap();
            let plain = Message::Transfer;
            let mut outgoing = Outgoing::default();
            outgoing.push(Frame::new(&plain, Bytes::from_static(&[0; 100])));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut there = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (here, _) = listener.accept().await.unwrap();
            outgoing.write_all(&mut there).await.unwrap();
            assert!(hub.accept(here).await.is_err());
        });
    }

    /// Files that are replaced count from the next reading on; broken ones change nothing.
    #[test]
    fn certificates_are_rotated_without_a_restart() {
        in_runtime(async {
            let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
            let files = ca.files(directory.path(), "hub", 9);
            let hub = HubTls::load(files.clone()).unwrap();
            let own = ca.files(directory.path(), "filer-a", 9);
            let source = SourceTls::load(own, "hub").unwrap();
            let before = hub.ends();
            ca.files(directory.path(), "hub", 99);
            assert!(meet(&hub, &source).await.1.is_ok());
            assert_eq!(hub.ends(), before);
            hub.reload().unwrap();
            assert!(hub.ends() > before + 80 * 86_400);
            assert!(meet(&hub, &source).await.1.is_ok());
            fs::write(&files.cert, "broken").unwrap();
            assert!(hub.reload().is_err());
            assert!(meet(&hub, &source).await.1.is_ok());
        });
    }
}
