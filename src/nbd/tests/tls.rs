//! FORCEDTLS: what is answered before the upgrade, and that nothing said in the clear counts behind it.

use std::io;
use std::sync::{Arc, Mutex};

use rcgen::{CertificateParams, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::client::{
    ACK, Client, ERR_INVALID, ERR_TLS_REQD, ERR_UNSUP, READ, context_payload, info_payload, option,
    request,
};
use super::*;
use crate::nbd::tls::Upgrade;

/// A certificate that signs itself, and who takes it.
#[derive(Debug)]
struct Own {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    refuses: bool,
    /// Peers that were told of, and why.
    said: Mutex<Vec<(String, String)>>,
}

impl Own {
    fn new(refuses: bool) -> Arc<Self> {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let cert = cert.self_signed(&key).unwrap();
        let der: CertificateDer<'static> = cert.der().clone();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let provider = Arc::new(aws_lc_rs::default_provider());
        let server = ServerConfig::builder_with_provider(provider.clone());
        let server = server.with_safe_default_protocol_versions().unwrap();
        let server = server.with_no_client_auth().with_single_cert(vec![der.clone()], key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(der).unwrap();
        let client = ClientConfig::builder_with_provider(provider);
        let client = client.with_safe_default_protocol_versions().unwrap();
        let client = client.with_root_certificates(roots).with_no_client_auth();
        let said = Mutex::default();
        Arc::new(Self { server: Arc::new(server), client: Arc::new(client), refuses, said })
    }

    async fn connect(&self, plain: Client) -> io::Result<Behind> {
        let connector = TlsConnector::from(self.client.clone());
        let name = ServerName::try_from("localhost").unwrap();
        let connected = timeout(PATIENCE, connector.connect(name, plain.stream)).await;
        connected.expect("in time").map(Behind)
    }
}

impl Upgrade for Own {
    fn config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    fn admits(&self, _: Option<&CertificateDer<'_>>) -> Result<(), String> {
        if self.refuses { Err("nobody may come".to_owned()) } else { Ok(()) }
    }

    fn refused(&self, peer: &str, reason: &str) {
        self.said.lock().unwrap().push((peer.to_owned(), reason.to_owned()));
    }
}

/// A client behind the upgrade.
struct Behind(TlsStream<tokio::net::TcpStream>);

impl Behind {
    async fn send(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.0.write_all(bytes)).await.expect("server reads").unwrap();
        self.0.flush().await.unwrap();
    }

    async fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let read = timeout(PATIENCE, self.0.read_exact(&mut bytes)).await;
        read.expect("server answers").expect("server does not hang up");
        bytes
    }

    /// The kind of the last answer to an option.
    async fn option(&mut self, code: u32, payload: &[u8]) -> u32 {
        self.send(&option(code, payload)).await;
        loop {
            let header = self.bytes(20).await;
            let field = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
            assert_eq!(field(8), code);
            self.bytes(usize::try_from(field(16)).unwrap()).await;
            if field(12) == ACK || field(12) >= 1 << 31 {
                return field(12);
            }
        }
    }
}

async fn serve_behind(own: &Arc<Own>) -> (Running, Arc<Memory>) {
    let memory = volume();
    let exports = Arc::new(MemoryExports::new([Arc::clone(&memory)]));
    let tls: Option<Arc<dyn Upgrade>> = Some(own.clone());
    (Running::start(Options { tls, ..options() }, exports).await, memory)
}

/// Before the upgrade everything but STARTTLS and ABORT gets TLS_REQD, known or not; behind it all is
/// as on any other connection, requests and long answers too.
#[tokio::test]
async fn nothing_is_told_before_the_upgrade() {
    let own = Own::new(false);
    let (running, _) = serve_behind(&own).await;
    let mut client = running.connect().await;
    client.greet(3).await;
    let contexts = context_payload("vol0", &["base:allocation"]);
    let info = info_payload("vol0", &[]);
    for (code, payload) in [
        (3, &b""[..]),
        (6, &info),
        (7, &info),
        (8, b""),
        (9, &contexts),
        (10, &contexts),
        (11, b""),
        (99, &[7; 10_000]),
    ] {
        client.expect_option(code, payload, ERR_TLS_REQD).await;
    }
    client.expect_option(5, b"x", ERR_INVALID).await;
    client.expect_option(5, b"", ACK).await;
    let mut behind = own.connect(client).await.unwrap();
    assert_eq!(behind.option(5, b"").await, ERR_INVALID, "it was initiated already");
    assert_eq!(behind.option(11, b"").await, ERR_UNSUP);
    assert_eq!(behind.option(3, b"").await, ACK);
    assert_eq!(behind.option(7, &info).await, ACK);
    // Simple replies: what was agreed on in the clear would not count, and nothing was.
    let wanted = 600_000_u32;
    behind.send(&request(READ, 0, 9, 0, wanted)).await;
    let reply = behind.bytes(16).await;
    assert_eq!(reply[..4], [0x67, 0x44, 0x66, 0x98]);
    let data = behind.bytes(usize::try_from(wanted).unwrap()).await;
    assert_eq!((data[4095], data[4096], data[3 * 4096]), (0, 0xab, 0xcd));
    drop(behind);
    // ABORT is taken in the clear; EXPORT_NAME, which has no answer, ends the connection.
    let mut client = running.connect().await;
    client.greet(3).await;
    client.expect_option(2, b"", ACK).await;
    client.expect_closed().await;
    let mut client = running.connect().await;
    client.greet(3).await;
    client.send(&option(1, b"vol0")).await;
    client.expect_closed().await;
    running.finish().await;
}

/// What somebody on the way puts behind STARTTLS in the clear is no option under TLS: the handshake
/// fails on it. The control: without it the same client gets in.
#[tokio::test]
async fn what_follows_starttls_in_the_clear_is_not_honoured() {
    let own = Own::new(false);
    let (running, _) = serve_behind(&own).await;
    for injected in [true, false] {
        let mut client = running.connect().await;
        client.greet(3).await;
        let mut bytes = option(5, b"");
        if injected {
            bytes.extend(option(8, b""));
            bytes.extend(option(7, &info_payload("vol0", &[])));
        }
        client.send(&bytes).await;
        assert_eq!(client.option_replies(5).await.last().unwrap().0, ACK);
        let behind = own.connect(client).await;
        assert_eq!(behind.is_err(), injected);
    }
    running.protocol_errors(1).await;
    running.finish().await;
}

/// Goal: who speaks in the clear and leaves is counted and told of, each with its address, however it leaves;
/// EXPORT_NAME in the clear as well. The controls: who goes on to TLS after the same TLS_REQD, and who only looks
/// whether somebody listens, is neither.
#[tokio::test]
async fn a_client_in_the_clear_is_counted_and_told_of() {
    let own = Own::new(false);
    let (running, _) = serve_behind(&own).await;
    let info = info_payload("vol0", &[]);
    let mut client = running.connect().await;
    client.greet(3).await;
    client.expect_option(7, &info, ERR_TLS_REQD).await;
    client.expect_option(5, b"", ACK).await;
    let mut behind = own.connect(client).await.unwrap();
    assert_eq!(behind.option(7, &info).await, ACK);
    drop(behind);
    let mut client = running.connect().await;
    client.greet(3).await;
    client.expect_option(2, b"", ACK).await;
    client.expect_closed().await;
    drop(running.connect().await);
    let mut client = running.connect().await;
    client.greet(3).await;
    drop(client);
    running.connections(0).await;
    assert_eq!(running.server.counters().protocol_errors(), 0);
    assert!(own.said.lock().unwrap().is_empty());

    let mut peers = Vec::new();
    for leaves in ["closes", "aborts", "closes inside an option", "EXPORT_NAME"] {
        let mut client = running.connect().await;
        peers.push(client.stream.local_addr().unwrap().to_string());
        client.greet(3).await;
        if leaves == "EXPORT_NAME" {
            client.send(&option(1, b"vol0")).await;
            client.expect_closed().await;
        } else {
            client.expect_option(7, &info, ERR_TLS_REQD).await;
        }
        match leaves {
            "aborts" => client.expect_option(2, b"", ACK).await,
            "closes inside an option" => client.send(b"IHAVEOPT").await,
            _ => (),
        }
        drop(client);
        running.protocol_errors(u64::try_from(peers.len()).unwrap()).await;
    }
    let said = own.said.lock().unwrap().clone();
    let reason = "it speaks in the clear, and this door wants TLS".to_owned();
    assert_eq!(said, peers.into_iter().map(|peer| (peer, reason.clone())).collect::<Vec<_>>());
    running.finish().await;
}

/// A client that is not taken is hung up on behind its handshake, and counted.
#[tokio::test]
async fn a_client_that_may_not_come_is_counted() {
    let own = Own::new(true);
    let (running, _) = serve_behind(&own).await;
    let mut client = running.connect().await;
    client.greet(3).await;
    client.expect_option(5, b"", ACK).await;
    if let Ok(mut behind) = own.connect(client).await {
        let mut rest = Vec::new();
        drop(timeout(PATIENCE, behind.0.read_to_end(&mut rest)).await.expect("hung up"));
        assert!(rest.is_empty());
    }
    running.protocol_errors(1).await;
    running.finish().await;
}

/// Longer than a test: what has so much time ends for another reason.
const NEVER: Duration = Duration::from_secs(3600);

impl Own {
    /// A client that has asked for TLS, which it may begin now.
    async fn asked(&self, running: &Running) -> Client {
        let mut client = running.connect().await;
        client.greet(3).await;
        client.expect_option(5, b"", ACK).await;
        client
    }

    /// A client that has opened the volume.
    async fn opened(&self, running: &Running) -> Behind {
        let mut behind = self.connect(self.asked(running).await).await.unwrap();
        assert_eq!(behind.option(7, &info_payload("vol0", &[])).await, ACK);
        behind
    }
}

/// Goal: clients that ask for TLS and then say nothing keep nobody out, however many they are. Method: they hold
/// all places of the handshake, and others of them wait; a good client is served, and as many have made room as
/// had to. Control: where nobody makes room, it waits until they are gone.
#[tokio::test]
async fn silent_handshakes_hold_up_nobody() {
    for upgrade_grace in [Duration::from_millis(50), NEVER] {
        let own = Own::new(false);
        let exports = Arc::new(MemoryExports::new([volume()]));
        let tls: Option<Arc<dyn Upgrade>> = Some(own.clone());
        let few = Options { tls, upgrades_max: 4, upgrade_grace, ..options() };
        let few = Options { handshake_deadline: NEVER, ..few };
        let running = Running::start(few, exports).await;
        let mut silent = Vec::new();
        for _ in 0..6 {
            silent.push(own.asked(&running).await);
        }
        let client = own.asked(&running).await;
        if upgrade_grace == NEVER {
            let connector = TlsConnector::from(own.client.clone());
            let name = ServerName::try_from("localhost").unwrap();
            let mut come = std::pin::pin!(connector.connect(name, client.stream));
            assert!(timeout(Duration::from_millis(500), &mut come).await.is_err());
            assert_eq!(running.server.counters().connections_refused(), 0);
            silent.clear();
            timeout(PATIENCE, come).await.expect("they are gone").unwrap();
        } else {
            let mut behind = own.connect(client).await.unwrap();
            assert_eq!(behind.option(7, &info_payload("vol0", &[])).await, ACK);
            until(|| running.server.counters().connections_refused() == 3).await;
            assert_eq!(running.server.counters().protocol_errors(), 0);
            silent[0].expect_closed().await;
            running.connections(4).await;
        }
        drop(silent);
        running.finish().await;
    }
}

/// Goal: whoever has opened no export makes room for who comes, however far it got: in the clear, before its
/// handshake, behind it. Control: those who have opened one stay; then it is the newcomer who is closed.
#[tokio::test]
async fn who_has_opened_no_export_makes_room() {
    let own = Own::new(false);
    let exports = Arc::new(MemoryExports::new([volume()]));
    let tls: Option<Arc<dyn Upgrade>> = Some(own.clone());
    let few = Options { tls, connections_max: 3, handshake_deadline: NEVER, ..options() };
    let running = Running::start(few, exports).await;
    let mut in_the_clear = running.connect().await;
    in_the_clear.greet(3).await;
    let mut asked = own.asked(&running).await;
    let mut behind = own.connect(own.asked(&running).await).await.unwrap();
    assert_eq!(behind.option(3, b"").await, ACK);
    let mut good = Vec::new();
    for count in 1..=3 {
        good.push(own.opened(&running).await);
        assert_eq!(running.server.counters().connections_refused(), count);
    }
    in_the_clear.expect_closed().await;
    asked.expect_closed().await;
    let ended = timeout(PATIENCE, behind.0.read(&mut [0; 1])).await.expect("closed");
    assert!(!matches!(ended, Ok(1)), "{ended:?}");
    running.connect().await.expect_closed().await;
    assert_eq!(running.server.counters().connections_refused(), 4);
    for client in &mut good {
        client.send(&request(READ, 0, 9, 4095, 2)).await;
        assert_eq!(client.bytes(18).await[16..], [0, 0xab]);
    }
    assert_eq!(running.server.counters().protocol_errors(), 0);
    assert!(own.said.lock().unwrap().is_empty());
    running.finish().await;
}
