//! Who is taken, who is not, and what files that change do.

use std::fs;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::HandshakeKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::link::socket::Socket;
use crate::link::{FrameReader, LinkError, Outgoing};
use crate::wire::message::{Frame, Message};

/// An authority that lives as long as the test.
pub(crate) struct Ca(CertificateParams, KeyPair, String);

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.clone().self_signed(&key).unwrap().pem();
        Self(params, key, pem)
    }

    /// Files of a certificate with that name, which ends so many days from now.
    pub(crate) fn files(&self, directory: &Path, name: &str, days: i64) -> TlsFiles {
        self.ending(directory, name, time::Duration::days(days))
    }

    fn ending(&self, directory: &Path, name: &str, left: time::Duration) -> TlsFiles {
        let Self(ca, key, pem) = self;
        let at = |file: &str| directory.join(format!("{name}-{file}.pem"));
        let (of_it, mut params) = (KeyPair::generate().unwrap(), CertificateParams::default());
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::days(900);
        params.not_after = now + left;
        let cert = params.signed_by(&of_it, &Issuer::from_params(ca, key)).unwrap();
        let files = TlsFiles { ca: at("ca"), cert: at("cert"), key: at("key") };
        fs::write(&files.ca, pem).unwrap();
        fs::write(&files.cert, cert.pem()).unwrap();
        fs::write(&files.key, of_it.serialize_pem()).unwrap();
        files
    }
}

async fn meet(
    hub: &HubTls,
    source: &SourceTls,
) -> (io::Result<(TlsStream<Movable>, Shown)>, io::Result<TlsStream<Movable>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (here, _) = listener.accept().await.unwrap();
    tokio::join!(hub.accept(here), source.connect(there))
}

fn in_runtime(test: impl Future<Output = ()>) {
    runtime().block_on(test);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Frames of all sizes come through whole, in order, however little the socket takes at once.
#[test]
fn both_ends_know_each_other_and_frames_pass() {
    in_runtime(async {
        let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
        let hub = HubTls::load(ca.files(directory.path(), "hub", 9)).unwrap();
        let own = ca.files(directory.path(), "filer-a", 9);
        let source = SourceTls::load(own, "hub").unwrap();
        assert!(hub.ends() > machine::unix_seconds());
        let (here, there) = meet(&hub, &source).await;
        let ((here, shown), there) = (here.unwrap(), there.unwrap());
        assert_eq!(shown.names, ["filer-a"]);
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

/// Both ends are accepted in one runtime and moved to another, and the first is no more: what is sent comes.
/// Control: ends that stayed behind can do nothing.
#[test]
fn a_connection_goes_on_in_another_runtime() {
    let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
    let hub = HubTls::load(ca.files(directory.path(), "hub", 9)).unwrap();
    let source = SourceTls::load(ca.files(directory.path(), "filer-a", 9), "hub").unwrap();
    let first = runtime();
    let accepted = || {
        let (here, there) = first.block_on(meet(&hub, &source));
        [here.unwrap().0, there.unwrap()].map(|end| Socket::Tls(Box::new(end)))
    };
    let moved = accepted().map(|end| end.detach().unwrap());
    let left = accepted();
    drop(first);
    runtime().block_on(async {
        let passed = passed(moved.map(|end| end.attach().unwrap())).await;
        assert_eq!(passed.unwrap(), (Message::Transfer, Bytes::from_static(b"moved")));
        passed_nothing(left).await;
    });
}

/// What one end reads, of a frame that the other writes.
async fn passed([here, there]: [Socket; 2]) -> Result<(Message, Bytes), LinkError> {
    let (_read, mut write) = there.into_split();
    let mut outgoing = Outgoing::default();
    outgoing.push(Frame::new(&Message::Transfer, Bytes::from_static(b"moved")));
    outgoing.write_all(&mut write).await?;
    FrameReader::new(here).next().await
}

async fn passed_nothing(ends: [Socket; 2]) {
    let error = passed(ends).await.unwrap_err().to_string();
    assert!(error.contains("shutdown"), "{error}");
}

/// The words that are logged.
fn why<T>(met: io::Result<T>) -> String {
    met.err().expect("no connection").to_string()
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
        assert_eq!(why(met.0), "received fatal alert: DecryptError");
        assert_eq!(why(met.1), "invalid peer certificate: BadSignature");
        // It trusts our authority, but is not of it. TLS 1.3: its own side may end first.
        let trusting = TlsFiles { ca: base.join("hub-ca.pem"), ..stranger };
        let met = meet(&hub, &SourceTls::load(trusting, "hub").unwrap()).await;
        assert_eq!(why(met.0), "invalid peer certificate: BadSignature");
        // A hub of another name is another hub.
        let own = ca.files(base, "filer-a", 9);
        let met = meet(&hub, &SourceTls::load(own.clone(), "another-hub").unwrap()).await;
        assert_eq!(why(met.0), "received fatal alert: BadCertificate");
        let other = why(met.1);
        assert!(other.contains("not valid for name \"another-hub\""), "{other}");
        // One that has ended: the own end says so before it connects, the hub in any case, in words that
        // are the same each time.
        let over = SourceTls::load(ca.files(base, "filer-b", -1), "hub").unwrap();
        let said = over.usable().unwrap_err().to_string();
        assert!(said.contains("filer-b-cert.pem expired at") && said.contains("--renew"), "{said}");
        let met = meet(&hub, &over).await.0.unwrap_err().to_string();
        assert!(met.starts_with("the certificate shown expired at "), "{met}");
        // A hub whose own one has ended is taken by nobody, and both say why.
        let late = HubTls::load(ca.files(base, "late", -1)).unwrap();
        let of_late = SourceTls::load(own.clone(), "late").unwrap();
        of_late.usable().unwrap();
        let met = meet(&late, &of_late).await;
        let (here, there) = (met.0.unwrap_err().to_string(), met.1.unwrap_err().to_string());
        assert!(here.contains("late-cert.pem expired at"), "{here}");
        assert!(there.starts_with("the certificate shown expired at "), "{there}");
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
        assert_eq!(
            why(hub.accept(here).await),
            "received corrupt message of type InvalidContentType"
        );
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
        meet(&hub, &source).await.1.unwrap();
        assert_eq!(hub.ends(), before);
        hub.reload().unwrap();
        assert!(hub.ends() > before + 80 * 86_400);
        meet(&hub, &source).await.1.unwrap();
        fs::write(&files.cert, "broken").unwrap();
        assert!(matches!(hub.reload(), Err(TlsError::Empty(cert)) if cert == files.cert));
        meet(&hub, &source).await.1.unwrap();
    });
}

/// Connects, takes what the hub gives for the next time, and goes; how the hub's handshake was done.
async fn visit(hub: &HubTls, source: &SourceTls) -> io::Result<HandshakeKind> {
    let (here, there) = meet(hub, source).await;
    let (mut here, _) = here?;
    let mut there = there?;
    here.write_all(b"x").await?;
    // Tickets come before the first byte.
    there.read_exact(&mut [0]).await?;
    Ok(here.get_ref().1.handshake_kind().unwrap())
}

/// Goal: who comes again resumes its session, though the files were read again, the hub has another
/// certificate of its own by then, and more sources came than a cache would hold. Controls: the first time, a
/// new certificate of the source, and another authority are whole handshakes.
#[test]
fn a_session_is_resumed_through_every_reading_of_the_files() {
    in_runtime(async {
        let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
        let base = directory.path();
        let files = ca.files(base, "hub", 9);
        let hub = HubTls::load(files.clone()).unwrap();
        let source = SourceTls::load(ca.files(base, "filer-a", 9), "hub").unwrap();
        assert_eq!(visit(&hub, &source).await.unwrap(), HandshakeKind::Full);
        let before = hub.config();
        hub.reload().unwrap();
        source.files().reload().unwrap();
        assert!(Arc::ptr_eq(&before, &hub.config()), "files that say the same changed something");
        assert_eq!(visit(&hub, &source).await.unwrap(), HandshakeKind::Resumed);
        ca.files(base, "hub", 99);
        hub.reload().unwrap();
        assert_eq!(visit(&hub, &source).await.unwrap(), HandshakeKind::Resumed);
        // What was put there is shown.
        ca.files(base, "filer-a", 99);
        source.files().reload().unwrap();
        assert_eq!(visit(&hub, &source).await.unwrap(), HandshakeKind::Full);
        assert_eq!(visit(&hub, &source).await.unwrap(), HandshakeKind::Resumed);
        // Both authorities are trusted now; that one was taken away may come next.
        let other = Ca::new();
        fs::write(&files.ca, format!("{}{}", ca.2, other.2)).unwrap();
        hub.reload().unwrap();
        assert_eq!(visit(&hub, &source).await.unwrap(), HandshakeKind::Full);
        fs::write(&files.ca, other.2).unwrap();
        hub.reload().unwrap();
        assert!(visit(&hub, &source).await.is_err(), "a session outlives its authority");
    });
}

/// Goal: a certificate that ends opens nothing from then on, also to a session that was begun before.
/// Control: it resumes while it lasts.
#[test]
fn a_session_ends_with_its_certificate() {
    in_runtime(async {
        let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
        let base = directory.path();
        let hub = HubTls::load(ca.files(base, "hub", 9)).unwrap();
        let door = ServedTls::load(ca.files(base, "door", 9), true, false).unwrap();
        let files = ca.ending(base, "filer-a", time::Duration::seconds(1));
        let source = SourceTls::load(files, "hub").unwrap();
        let ends = source.files().ends();
        let mut resumed = 0;
        let met = loop {
            let has_ended = machine::unix_seconds() > ends;
            match visit(&hub, &source).await {
                Ok(kind) => resumed += u32::from(kind == HandshakeKind::Resumed),
                Err(error) => break error.to_string(),
            }
            assert!(!has_ended, "it opens more than it may");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        };
        assert!(resumed > 0, "nothing was resumed: the test shows nothing");
        assert!(met.starts_with("the certificate shown expired at "), "{met}");
        let shown = CertificateDer::from_pem_file(base.join("filer-a-cert.pem")).unwrap();
        let met = door.admits(Some(&shown)).unwrap_err();
        assert!(met.starts_with("the certificate shown expired at "), "{met}");
    });
}
