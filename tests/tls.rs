//! Real processes that speak TLS: the newcomer's path, who is refused, what a listener hears.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mirrorhub::cli::authority::Authority;

use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, http_get, metric_sum, run, status, try_run, wait_for,
};

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(30);
/// What a listener looks for: the content of a volume.
const PATTERN: u8 = 0xa7;

fn append(file: &Path, text: &str) {
    let before = fs::read_to_string(file).expect("a configuration");
    fs::write(file, format!("{before}\n{text}")).expect("a configuration");
}

/// Gives a source the certificate of that name.
fn certify(cluster: &Cluster, source: &str, name: &str) {
    let authority = cluster.path("hub/state/tls");
    Authority(&authority).ensure("mirrorhub-hub").expect("an authority");
    let issued = Authority(&authority).issue(name).expect("a certificate");
    let base = cluster.path(source);
    for (file, text) in [("ca", &issued.ca), ("cert", &issued.cert), ("key", &issued.key)] {
        fs::write(base.join(format!("{file}.pem")), text).expect("a PEM file");
    }
}

const TLS: &str = "[tls]\nca = \"ca.pem\"\ncert = \"cert.pem\"\nkey = \"key.pem\"\n";

fn certified(names: &[&str]) -> Cluster {
    let settings: Vec<_> = names.iter().map(|name| SourceSettings::new(name)).collect();
    let cluster = Cluster::prepare(&settings);
    secure(&cluster);
    cluster
}

/// Has a cluster that was prepared speak TLS.
pub fn secure(cluster: &Cluster) {
    append(&cluster.hub_config(), "[tls]\n");
    for name in cluster.source_names() {
        certify(cluster, &name, &name);
        append(&cluster.source_config(&name), TLS);
    }
}

fn write(volume: &str) {
    let command = format!("write -P {PATTERN} 0 4M");
    run(Command::new("qemu-io").args(["-f", "raw", "-c", &command, volume]));
}

/// Goal: the path of a newcomer, with the commands that `onboard` itself prints: a hub with [tls],
/// `onboard`, `source --join`, a volume that is mirrored.
#[test]
fn a_new_filer_joins_with_its_bundle() {
    let mut cluster = Cluster::prepare(&[]);
    secure(&cluster);
    cluster.start_hub();
    let bundle = cluster.path("filer-a.join.toml");
    let onboard = |name: &str| {
        let mut command = Command::new(BINARY);
        command.args(["onboard", name, "--volume", "vol0=64MiB", "--bundle"]).arg(&bundle);
        try_run(command.arg("--config").arg(cluster.hub_config()))
    };
    let said = onboard(NAME);
    assert!(said.status.success(), "{said:?}");
    assert!(String::from_utf8_lossy(&said.stdout).contains("source --join"), "{said:?}");
    // The name of the bundle is taken: nothing is left of the second source.
    assert!(!onboard("filer-b").status.success());
    let file = cluster.path("hub/sources.d/filer-b.toml");
    assert!(!file.try_exists().expect("a look"), "half of an onboarding is left");

    let config = cluster.path("joined/source.toml");
    fs::create_dir_all(cluster.path("joined")).expect("directory");
    let mut command = Command::new(BINARY);
    command.args(["source", "--join"]).arg(&bundle).arg("--config").arg(&config);
    let mut source = Process::start(NAME, cluster.path("joined.log"), &mut command);
    wait_for("the joined filer is in sync", LIMIT, || {
        assert!(source.runs(), "{}", source.output());
        status(&config).is_some_and(|document| document["source"]["state"] == "in-sync")
    });
    write(&format!("nbd://{}/vol0", "127.0.0.1:10809"));
    let answer = run(Command::new(BINARY).args(["checkpoint", "--config"]).arg(&config));
    assert!(String::from_utf8_lossy(&answer.stdout).contains("published"), "{answer:?}");
    run(Command::new(BINARY).args(["verify", NAME, "--config"]).arg(cluster.hub_config()));
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    let ends = metric_sum(&page, "mirrorhub_tls_certificate_expiry_timestamp_seconds", "");
    assert!(ends > 1.0e9, "the end of the hub's certificate is not shown");
    source.stop(LIMIT);
}

/// Goal: a certificate speaks for its own source only; who has none is nobody; each is refused with
/// its reason and counted, and the source in session does not notice.
#[test]
fn a_certificate_of_another_source_is_refused() {
    let mut cluster = certified(&[NAME, "filer-b"]);
    cluster.refusals_wanted = true;
    certify(&cluster, "filer-b", NAME);
    cluster.start_hub();
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    cluster.start_source("filer-b");
    let config = cluster.source_config("filer-b");
    wait_for("the reason is shown at the refused source", LIMIT, || {
        let shown = status(&config).unwrap_or_default().to_string();
        shown.contains("certificate is not one of source filer-b")
    });
    // Plain TCP, a handshake that never comes, and rubbish.
    let before = refused(&cluster);
    for bytes in [&b"\0\0\0\x05\0\0\0\0hello"[..], b"GET / HTTP/1.1\r\n\r\n", &[22, 3, 1, 255, 255]]
    {
        let mut stream = TcpStream::connect(cluster.hub_address()).expect("a connection");
        stream.write_all(bytes).expect("bytes");
        stream.shutdown(std::net::Shutdown::Write).expect("the end");
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer));
        assert!(answer.len() < 64, "a stranger is answered with {} bytes", answer.len());
    }
    wait_for("they are counted", LIMIT, || refused(&cluster) >= before + 3.0);
    write(&cluster.volume(NAME, "vol0"));
    cluster.checkpoint(NAME);
    assert_eq!(cluster.on_hub(NAME)["state"], "in-sync");
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    assert_eq!(log.matches(&format!("source is in session source={NAME}")).count(), 1);
}

fn refused(cluster: &Cluster) -> f64 {
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    metric_sum(&page, "mirrorhub_refused_connections_total", "")
}

/// What went from a source to its hub.
struct Tap {
    address: std::net::SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Tap {
    /// Stands between: passes everything on, and keeps what goes to the hub.
    fn before(hub: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind((hub.ip(), 0)).expect("a listener");
        let (address, heard) = (listener.local_addr().expect("its address"), Arc::default());
        let kept: Arc<Mutex<Vec<u8>>> = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Ok(there) = TcpStream::connect(hub) else { return };
                let (back, forth) = (stream.try_clone(), there.try_clone());
                let (Ok(mut back), Ok(mut forth)) = (back, forth) else { return };
                let (mut stream, mut there, kept) = (stream, there, Arc::clone(&kept));
                std::thread::spawn(move || drop(std::io::copy(&mut there, &mut back)));
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        kept.lock().expect("heard").extend_from_slice(&buffer[..length]);
                        if forth.write_all(&buffer[..length]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, heard }
    }

    fn hears(&self) -> bool {
        let heard = self.heard.lock().expect("heard");
        heard.windows(64).any(|window| window.iter().all(|byte| *byte == PATTERN))
    }
}

/// Writes through a tap between source and hub; what it has heard.
fn tapped(cluster: &mut Cluster) -> Tap {
    cluster.start_hub();
    let hub = cluster.hub_address();
    let tap = Tap::before(hub);
    let config = cluster.source_config(NAME);
    let text = fs::read_to_string(&config).expect("source.toml");
    let (from, to) = (format!("hub = \"{hub}\""), format!("hub = \"{}\"", tap.address));
    assert!(text.contains(&from), "{text}");
    fs::write(&config, text.replace(&from, &to)).expect("source.toml");
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    write(&cluster.volume(NAME, "vol0"));
    cluster.checkpoint(NAME);
    tap
}

/// Goal: a listener on the network reads nothing of a volume, and what it recorded, played again
/// byte for byte, is refused. Control: without TLS it reads the volume.
#[test]
fn a_listener_hears_nothing_and_can_repeat_nothing() {
    let mut cluster = certified(&[NAME]);
    let tap = tapped(&mut cluster);
    assert!(!tap.hears(), "the content of the volume is on the wire");
    let before = refused(&cluster);
    let recorded = tap.heard.lock().expect("heard").clone();
    assert!(recorded.len() > 4 << 20, "the tap heard {} bytes only", recorded.len());
    let mut stream = TcpStream::connect(cluster.hub_address()).expect("a connection");
    // The hub may close before all of it was said.
    drop(stream.write_all(&recorded));
    wait_for("the replay is counted", LIMIT, || refused(&cluster) > before);
    assert_eq!(cluster.on_hub(NAME)["state"], "in-sync");
    cluster.checkpoint(NAME);

    let mut plain = Cluster::prepare(&[SourceSettings::new(NAME)]);
    assert!(
        tapped(&mut plain).hears(),
        "without TLS the tap hears nothing: the test shows nothing"
    );
}
