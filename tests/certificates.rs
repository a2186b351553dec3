//! Certificates that end, are renewed and are taken back, between real processes.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mirrorhub::cli::bundle::join;
use mirrorhub::cli::place::Package;
use mirrorhub::link::tls::{SourceTls, TlsFiles};
use mirrorhub::units::machine::unix_seconds;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::oracle::{Known, Writer};
use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, http_get, metric_sum, run, status, try_run, wait_for,
};
use crate::hostile::Record;
use crate::resync::Proxy;
use crate::tls::{certified, certify, refused, replace, secure, write};

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(60);

/// Certificate and key of that name by the hub's authority, which end so many days from now.
fn ending(cluster: &Cluster, name: &str, days: i64) -> (String, String) {
    let authority = cluster.path("hub/state/tls");
    let read = |file: &str| fs::read_to_string(authority.join(file)).expect("the authority");
    let key = KeyPair::from_pem(&read("ca-key.pem")).expect("its key");
    let issuer = Issuer::from_ca_cert_pem(&read("ca-cert.pem"), key).expect("its certificate");
    let (own, mut params) = (KeyPair::generate().expect("a key"), CertificateParams::default());
    params.subject_alt_names = vec![SanType::DnsName(name.try_into().expect("a name"))];
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::days(730);
    params.not_after = now + time::Duration::days(days);
    let cert = params.signed_by(&own, &issuer).expect("a certificate");
    (cert.pem(), own.serialize_pem())
}

fn put(directory: &Path, [cert, key]: [&str; 2], made: &(String, String)) {
    fs::write(directory.join(cert), &made.0).expect("a certificate");
    fs::write(directory.join(key), &made.1).expect("a key");
}

fn reasons(document: &serde_json::Value) -> String {
    document["health"]["reasons"].to_string()
}

/// Goal: a process whose certificate has expired does all that needs none: the volumes of a filer that may
/// go on alone, the hub's images; both say why nobody is connected, as a critical reason, in the log and as a
/// metric. Control: with new files and HUP they are in sync, the reason is gone, and neither was restarted.
#[test]
fn an_expired_certificate_stops_the_link_and_nothing_else() {
    let alone =
        SourceSettings::new(NAME).replication("on_hub_loss = \"continue\"\nhub_timeout = \"1s\"");
    let mut cluster = Cluster::prepare(&[alone]);
    secure(&cluster);
    cluster.start_hub();
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    write(&cluster.volume(NAME, "vol0"));
    cluster.checkpoint(NAME);
    cluster.stop_source(NAME);
    cluster.stop_hub();
    let (hub, source) = (cluster.path("hub/state/tls"), cluster.path(NAME));
    let files = ["server-cert.pem", "server-key.pem"];
    put(&hub, files, &ending(&cluster, "mirrorhub-hub", -1));
    put(&source, ["cert.pem", "key.pem"], &ending(&cluster, NAME, -1));
    // A hub with files of an authority elsewhere: it cannot help itself.
    let named = "[tls]\nca = \"state/tls/ca-cert.pem\"\ncert = \"state/tls/server-cert.pem\"\nkey = \"state/tls/server-key.pem\"";
    replace(&cluster.hub_config(), "[tls]", named);
    cluster.start_hub();
    cluster.start_source(NAME);
    let own = cluster.source_config(NAME);
    wait_for("the filer is alone, and says why", LIMIT, || {
        let shown = status(&own).unwrap_or_default();
        shown["source"]["reason"].to_string().contains("cert.pem expired at")
    });
    let mut alone = Command::new("qemu-io");
    alone.args(["-f", "raw", "-c", "write -P 0xa8 4M 4M"]).arg(cluster.volume(NAME, "vol0"));
    wait_for("it serves alone", LIMIT, || try_run(&mut alone).status.success());
    let shown = status(&own).expect("a status");
    assert!(reasons(&shown).contains("certificate-expired"), "{shown}");
    assert_eq!(shown["health"]["word"], "critical", "{shown}");
    let (_, page) = http_get(&cluster.source_url(NAME, "/metrics"));
    let ends = metric_sum(&page, "mirrorhub_tls_certificate_expiry_timestamp_seconds", "");
    assert!(ends > 1.0e9, "{ends}");
    let shown = cluster.hub_status();
    assert!(reasons(&shown).contains("server-cert.pem expired at"), "{shown}");
    let mut read = Command::new("qemu-io");
    run(read.args(["-r", "-f", "raw", "-c", "read -P 0xa7 0 4M"]).arg(cluster.image(NAME, "vol0")));
    let log = fs::read_to_string(cluster.path("filer-a.log")).expect("the log");
    assert!(log.contains("nobody takes this end's certificate"), "{log}");

    put(&hub, files, &ending(&cluster, "mirrorhub-hub", 9));
    cluster.signal_hub("HUP");
    certify(&cluster, NAME, NAME);
    cluster.signal_source(NAME, "HUP");
    cluster.wait_in_sync(NAME);
    let shown = status(&own).expect("a status");
    assert!(!reasons(&shown).contains("certificate-expired"), "{shown}");
}

/// Goal: who comes with a certificate that has ended is refused and counted each time, and logged once with
/// its address and the reason. Control: the same client with one that lasts gets through the handshake.
#[test]
fn an_expired_certificate_is_refused_counted_and_logged_once() {
    let mut cluster = certified(&[NAME]);
    cluster.refusals_wanted = true;
    cluster.start_hub();
    let base = cluster.path("client");
    fs::create_dir_all(&base).expect("directory");
    let ca = cluster.path("hub/state/tls/ca-cert.pem");
    let files = TlsFiles { ca, cert: base.join("cert.pem"), key: base.join("key.pem") };
    let hub = cluster.hub_address();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let come = || {
        let tls = SourceTls::load(files.clone(), "mirrorhub-hub").expect("files");
        runtime.block_on(async {
            let stream = TcpStream::connect(hub).await.expect("a connection");
            let mut stream = tls.connect(stream).await.expect("the hub's part is done first");
            let mut byte = [0];
            let read = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut byte));
            // Who was let in is asked for its Hello, and hears nothing till then.
            read.await.is_err()
        })
    };
    put(&base, ["cert.pem", "key.pem"], &ending(&cluster, NAME, 9));
    assert!(come(), "one that lasts is refused");
    put(&base, ["cert.pem", "key.pem"], &ending(&cluster, NAME, -1));
    let before = refused(&cluster);
    for _ in 0..3 {
        assert!(!come(), "it was let in");
    }
    wait_for("each is counted", LIMIT, || refused(&cluster) >= before + 3.0);
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    let lines: Vec<_> = log.lines().filter(|line| line.contains("shown expired at")).collect();
    assert!(lines.len() == 1, "{lines:?}");
    assert!(lines[0].contains("peer=\"127."), "{lines:?}");
}

/// `onboard` for the filer, with the bundle `name.toml`.
fn onboard(cluster: &Cluster, name: &str, hub: SocketAddr, more: &[&str]) {
    let mut command = Command::new(BINARY);
    command.args(["onboard", NAME, "--hub", &hub.to_string()]).args(more);
    command.arg("--bundle").arg(cluster.path(&format!("{name}.toml")));
    run(command.arg("--config").arg(cluster.hub_config()));
}

/// `source --join` on the filer that has joined; its files are kept under `name` as well.
fn join_again(cluster: &Cluster, config: &Path, name: &str) {
    let mut command = Command::new(BINARY);
    command.args(["source", "--join"]).arg(cluster.path(&format!("{name}.toml")));
    let said = run(command.arg("--config").arg(config));
    assert!(String::from_utf8_lossy(&said.stdout).contains("were replaced"), "{said:?}");
    keep(cluster, name);
}

fn keep(cluster: &Cluster, name: &str) {
    for file in ["client-cert.pem", "client-key.pem"] {
        let (from, to) =
            (cluster.path("joined/tls").join(file), cluster.path(&format!("{name}-{file}")));
        fs::copy(from, to).expect("a copy");
    }
}

/// What the hub answers to a Hello that comes with the certificate kept under that name.
fn answer(cluster: &Cluster, name: &str) -> String {
    let at = |file: &str| cluster.path(&format!("{name}-client-{file}.pem"));
    let ca = cluster.path("hub/state/tls/ca-cert.pem");
    let files = TlsFiles { ca, cert: at("cert"), key: at("key") };
    let tls = SourceTls::load(files, "mirrorhub-hub").expect("files");
    let (hub, mut heard) = (cluster.hub_address(), Vec::new());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let stream = TcpStream::connect(hub).await.expect("a connection");
        let mut stream = tls.connect(stream).await.expect("a handshake");
        stream.write_all(&Record::new(NAME).hello()).await.expect("sent");
        let read = tokio::time::timeout(LIMIT, stream.read_to_end(&mut heard)).await;
        drop(read.expect("an answer in time"));
    });
    String::from_utf8_lossy(&heard).into_owned()
}

fn ends(cluster: &Cluster) -> f64 {
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    metric_sum(&page, "mirrorhub_tls_certificate_expiry_timestamp_seconds", "")
}

fn sessions(cluster: &Cluster) -> usize {
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    log.matches(&format!("source is in session source={NAME}")).count()
}

fn wait_joined(cluster: &Cluster, config: &Path, source: &mut Process) {
    wait_for("the filer is in sync", LIMIT, || {
        assert!(source.runs(), "{}", source.output());
        let there = status(&cluster.hub_config()).unwrap_or_default();
        let there = there["sources"].as_array().cloned().unwrap_or_default();
        let there = there.iter().any(|one| one["name"] == NAME && one["state"] == "in-sync");
        there && status(config).is_some_and(|own| own["source"]["state"] == "in-sync")
    });
}

/// Goal: a certificate that is taken out of the source's file ends the session that it began. Control: as long as
/// the file names it, whatever else it names, the session is not touched.
fn a_certificate_is_taken_out(cluster: &Cluster, (file, text): (&Path, &str), config: &Path) {
    let changes = || {
        let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
        let changed =
            |line: &&str| line.contains("changed by a reload") && line.contains(": certificates");
        log.lines().filter(changed).count()
    };
    let (before, other) = (sessions(cluster), "0a".repeat(32));
    let line = text.lines().find(|line| line.starts_with("certificates")).expect("a list");
    let write = |list: &str| {
        let taken = changes();
        fs::write(file, text.replace(line, list)).expect("the file of the source");
        wait_for("the file is taken", LIMIT, || changes() > taken);
    };
    write(&line.replace("[\"", &format!("[\"{other}\", \"")));
    assert_eq!(cluster.on_hub(NAME)["state"], "in-sync");
    write(&format!("certificates = [\"{other}\"]"));
    let shown = cluster.on_hub(NAME);
    assert_ne!(shown["state"], "in-sync", "the session goes on: {shown}");
    assert_eq!(sessions(cluster), before, "it was ended before");
    wait_for("the filer is told why", LIMIT, || {
        status(config).unwrap_or_default().to_string().contains("does not name the certificate")
    });
    write(line);
}

/// Goal: certificates of the hub and of a filer are exchanged with the commands that operations.md names, while
/// a client writes and neither process is started anew; the old one is taken until the filer has come with the new
/// one, and no longer. Then a key is stolen: with the file gone and another certificate named, it is refused with
/// reason, counted and logged once, and the filer goes on with its new one, still the same process. Controls: the
/// stolen certificate speaks for the source before that, and again when the file names none.
#[test]
#[expect(clippy::too_many_lines, reason = "one story and its control beside each step")]
fn certificates_are_renewed_under_traffic_and_taken_back() {
    let mut cluster = Cluster::prepare(&[]);
    cluster.refusals_wanted = true;
    secure(&cluster);
    cluster.start_hub();
    let proxy = Proxy::to(cluster.hub_address());
    onboard(&cluster, "first", proxy.address, &["--volume", "vol0=64MiB"]);
    let config = cluster.path("joined/source.toml");
    fs::create_dir_all(cluster.path("joined")).expect("directory");
    join(&cluster.path("first.toml"), Some(&config), &Package::here(), true)
        .expect("a configuration");
    keep(&cluster, "first");
    let text = fs::read_to_string(&config).expect("source.toml");
    let doors = "nbd_listen = \"unix:nbd.sock\"\nhttp_listen = \"unix:http.sock\"";
    let nvram = "[nvram]\nsize = \"32MiB\"";
    fs::write(&config, format!("{doors}\n{text}\n{nvram}\n")).expect("source.toml");
    let mut command = Command::new(BINARY);
    let log = cluster.path("joined.log");
    let mut source = Process::start(NAME, log, command.arg("source").arg("--config").arg(&config));
    wait_joined(&cluster, &config, &mut source);
    let socket = cluster.path("joined/nbd.sock");
    let writer = Writer::start(socket.clone(), "filer-a/vol0", Known::default(), 2, 7);
    writer.wait_answered(20);

    // The hub's own is in its last third: a reload makes another one.
    let hub = cluster.path("hub/state/tls");
    let short = ending(&cluster, "mirrorhub-hub", 10);
    put(&hub, ["server-cert.pem", "server-key.pem"], &short);
    cluster.signal_hub("HUP");
    wait_for("the hub makes itself another one", LIMIT, || {
        fs::read_to_string(hub.join("server-cert.pem")).is_ok_and(|pem| pem != short.0)
    });
    let days = |seconds: f64| seconds / 86_400.0;
    let now = f64::from(u32::try_from(unix_seconds()).expect("a time"));
    wait_for("and shows it", LIMIT, || days(ends(&cluster) - now) > 700.0);
    onboard(&cluster, "second", proxy.address, &["--renew"]);
    join_again(&cluster, &config, "second");
    source.signal("HUP");
    let is_about = |answer: &str| answer.contains("certificate");
    let said = answer(&cluster, "first");
    assert!(!said.is_empty() && !is_about(&said), "the old one is refused too early: {said}");
    let before = sessions(&cluster);
    wait_for("the filer has read its files again", LIMIT, || source.output().contains("reloaded"));
    proxy.cut();
    proxy.mend();
    wait_for("it comes again", LIMIT, || sessions(&cluster) > before);
    wait_joined(&cluster, &config, &mut source);
    let said = answer(&cluster, "first");
    assert!(said.contains("has come with a newer certificate"), "{said}");
    assert!(!is_about(&answer(&cluster, "second")), "the new one is refused");
    let count = writer.answered();
    writer.wait_answered(count + 20);
    writer.finish().check_export(&socket, "filer-a/vol0").expect("every answered write");

    // The second key is stolen.
    let file = cluster.path("hub/sources.d/filer-a.toml");
    fs::remove_file(&file).expect("the file of the source");
    wait_for("it is retired", LIMIT, || cluster.on_hub(NAME)["state"] == "retired");
    let said = answer(&cluster, "second");
    assert!(said.contains("no file for source"), "{said}");
    onboard(&cluster, "third", proxy.address, &["--volume", "vol0=64MiB"]);
    wait_for("the filer itself is told", LIMIT, || {
        status(&config).unwrap_or_default().to_string().contains("does not name the certificate")
    });
    let before = refused(&cluster);
    for _ in 0..2 {
        let said = answer(&cluster, "second");
        assert!(said.contains("does not name the certificate"), "{said}");
        assert!(said.contains("onboard NAME --renew"), "no next step: {said}");
    }
    assert!(refused(&cluster) >= before + 2.0);
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    let lines: Vec<_> = log.lines().filter(|line| line.contains("does not name the")).collect();
    assert!(lines.len() == 1 && lines[0].contains("peer="), "{lines:?}");
    join_again(&cluster, &config, "third");
    source.signal("HUP");
    wait_joined(&cluster, &config, &mut source);
    let text = fs::read_to_string(&file).expect("the file of the source");
    a_certificate_is_taken_out(&cluster, (&file, &text), &config);
    wait_joined(&cluster, &config, &mut source);
    let without: Vec<_> = text.lines().filter(|line| !line.starts_with("certificates")).collect();
    fs::write(&file, without.join("\n")).expect("the file of the source");
    wait_for("any is taken again", LIMIT, || !is_about(&answer(&cluster, "second")));
    source.stop(LIMIT);
}
