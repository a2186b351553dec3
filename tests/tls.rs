//! Real processes that speak TLS: the newcomer's path, who is refused, what a listener hears.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mirrorhub::cli::authority::Authority;
use mirrorhub::units::machine::unix_seconds;
use mirrorhub::units::times::parse_timestamp;

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
pub fn certify(cluster: &Cluster, source: &str, name: &str) {
    let authority = cluster.path("hub/state/tls");
    Authority(&authority).ensure("mirrorhub-hub").expect("an authority");
    let issued = Authority(&authority).issue(name).expect("a certificate");
    let base = cluster.path(source);
    for (file, text) in [("ca", &issued.ca), ("cert", &issued.cert), ("key", &issued.key)] {
        fs::write(base.join(format!("{file}.pem")), text).expect("a PEM file");
    }
}

const TLS: &str = "[tls]\nca = \"ca.pem\"\ncert = \"cert.pem\"\nkey = \"key.pem\"\n";

pub fn certified(names: &[&str]) -> Cluster {
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

pub fn write(volume: &str) {
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
    // A copy of the bundle on another machine: it has been used, and makes nobody a source.
    let copied = cluster.path("copied/source.toml");
    fs::create_dir_all(cluster.path("copied")).expect("directory");
    let mut command = Command::new(BINARY);
    command.args(["source", "--join"]).arg(&bundle).arg("--config").arg(&copied);
    // On this machine the ports are taken: what it has written is kept.
    assert!(!try_run(&mut command).status.success(), "two have the same ports");
    let text = fs::read_to_string(&copied).expect("source.toml");
    fs::write(
        &copied,
        format!("nbd_listen = \"unix:n.sock\"\nhttp_listen = \"unix:h.sock\"\n{text}"),
    )
    .expect("source.toml");
    let log = cluster.path("copied.log");
    let mut command = Command::new(BINARY);
    let mut copy = Process::start(NAME, log, command.arg("source").arg("--config").arg(&copied));
    wait_for("the copy is told why", LIMIT, || {
        assert!(copy.runs(), "{}", copy.output());
        status(&copied).unwrap_or_default().to_string().contains("belongs to source")
    });
    assert_eq!(cluster.on_hub(NAME)["state"], "in-sync", "the first one does not notice");
    copy.stop(LIMIT);
    crate::service::the_unit_starts_what_root_joined(&cluster, &bundle);
    a_bundle_that_has_ended_is_of_no_use(&cluster);
    source.stop(LIMIT);
}

/// Goal: with a bundle that has ended `--join` writes nothing, and the hub takes nobody who has changed
/// the bundle; the hub's log has it once with the peer. Control: a later date in the hub's file.
fn a_bundle_that_has_ended_is_of_no_use(cluster: &Cluster) {
    let bundle = cluster.path("late.join.toml");
    let mut onboard = Command::new(BINARY);
    onboard.args(["onboard", "late", "--volume", "vol0=64MiB", "--valid", "1s", "--bundle"]);
    run(onboard.arg(&bundle).arg("--config").arg(cluster.hub_config()));
    let config = cluster.path("late/source.toml");
    fs::create_dir_all(cluster.path("late")).expect("directory");
    let join = || {
        let mut command = Command::new(BINARY);
        command.args(["source", "--join"]).arg(&bundle).arg("--config").arg(&config);
        let output = try_run(&mut command);
        assert!(!output.status.success(), "it runs");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = fs::read_to_string(&bundle).expect("the bundle");
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        line.expect("a time").trim_matches('"').to_owned()
    };
    let (made, ends) = (value("made"), value("ends"));
    // A second of the clock: until then it may be used.
    let end = parse_timestamp(&ends).expect("a time");
    wait_for("the bundle has ended", LIMIT, || unix_seconds() > end);
    let said = join();
    assert!(said.contains("this bundle ended at") && said.contains("by the clock here"), "{said}");
    assert!(said.contains("mirrorhub onboard"), "no next step: {said}");
    assert_eq!(fs::read_dir(cluster.path("late")).expect("a look").count(), 0, "it has written");
    // Somebody has a wrong clock, or writes another date into it.
    fs::write(&bundle, text.replace(&ends, "2099-01-01T00:00:00Z")).expect("the bundle");
    assert!(made < ends && !join().contains("this bundle ended"), "ports are taken, no more");
    let text = fs::read_to_string(&config).expect("source.toml");
    let doors = "nbd_listen = \"unix:n.sock\"\nhttp_listen = \"unix:h.sock\"";
    fs::write(&config, format!("{doors}\n{text}")).expect("source.toml");
    let before = refused(cluster);
    let mut command = Command::new(BINARY);
    let log = cluster.path("late.log");
    let mut late = Process::start("late", log, command.arg("source").arg("--config").arg(&config));
    wait_for("the hub refuses it again and again", LIMIT, || refused(cluster) >= before + 2.0);
    let shown = status(&config).unwrap_or_default().to_string();
    assert!(shown.contains("the join bundle of source late ended at"), "{shown}");
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("source late ended")).collect();
    assert!(lines.len() == 1 && lines[0].contains("peer="), "{lines:?}");
    let file = cluster.path("hub/sources.d/late.toml");
    replace(&file, &ends, "2099-01-01T00:00:00Z");
    wait_for("with a later date it joins", LIMIT, || {
        assert!(late.runs(), "{}", late.output());
        status(&config).is_some_and(|document| document["source"]["state"] == "in-sync")
    });
    // It is there: the date says nothing any more, also to a new session.
    replace(&file, "2099-01-01T00:00:00Z", &ends);
    late.stop(LIMIT);
    let mut command = Command::new(BINARY);
    let log = cluster.path("late.log");
    let mut late = Process::start("late", log, command.arg("source").arg("--config").arg(&config));
    wait_for("it is itself", LIMIT, || {
        status(&config).is_some_and(|document| document["source"]["state"] == "in-sync")
    });
    late.stop(LIMIT);
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
    // However often it comes.
    wait_for("it was refused more than once", LIMIT, || refused(&cluster) >= 2.0);
    let [line] = &refusals(&cluster)[..] else { panic!("{:?}", refusals(&cluster)) };
    assert!(line.contains("filer-b") && line.contains(" peer=\"127."), "{line}");
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

pub fn refused(cluster: &Cluster) -> f64 {
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    metric_sum(&page, "mirrorhub_refused_connections_total", "")
}

/// What the hub's log has of connections that were refused, a line each.
fn refusals(cluster: &Cluster) -> Vec<String> {
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    let lines =
        log.lines().filter(|line| line.contains("WARN") && line.contains("connection refused"));
    lines.map(str::to_owned).collect()
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
    let (before, said_before) = (refused(&cluster), refusals(&cluster).len());
    let recorded = tap.heard.lock().expect("heard").clone();
    assert!(recorded.len() > 4 << 20, "the tap heard {} bytes only", recorded.len());
    let mut peers = Vec::new();
    for again in 1..=3_u8 {
        let mut stream = TcpStream::connect(cluster.hub_address()).expect("a connection");
        peers.push(stream.local_addr().expect("its own address").to_string());
        // The hub may close before all of it was said.
        drop(stream.write_all(&recorded));
        let all = before + f64::from(again);
        wait_for("the replay is counted", LIMIT, || refused(&cluster) >= all);
    }
    // Each is counted; the log has one line, with the address of the first.
    let said = refusals(&cluster).split_off(said_before);
    let [line] = &said[..] else { panic!("{said:?}") };
    assert!(line.contains(&peers[0]), "{line} has not {peers:?}");
    assert_eq!(cluster.on_hub(NAME)["state"], "in-sync");
    cluster.checkpoint(NAME);

    let mut plain = Cluster::prepare(&[SourceSettings::new(NAME)]);
    assert!(
        tapped(&mut plain).hears(),
        "without TLS the tap hears nothing: the test shows nothing"
    );
}

/// Keys of a client, under the names that QEMU and libnbd look for.
fn client_keys(cluster: &Cluster, directory: &str, authority: &Path) -> String {
    Authority(authority).ensure("mirrorhub-hub").expect("an authority");
    let issued = Authority(authority).issue_for("a client", &[]).expect("a certificate");
    keys(
        cluster,
        directory,
        &[("ca-cert", issued.ca), ("client-cert", issued.cert), ("client-key", issued.key)],
    )
}

fn keys(cluster: &Cluster, directory: &str, files: &[(&str, String)]) -> String {
    let directory = cluster.path(directory);
    fs::create_dir_all(&directory).expect("directory");
    for (file, text) in files {
        fs::write(directory.join(format!("{file}.pem")), text).expect("a PEM file");
    }
    directory.display().to_string()
}

pub fn replace(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).expect("a configuration");
    assert!(text.contains(from), "{from:?} is not in {text}");
    fs::write(file, text.replace(from, to)).expect("a configuration");
}

/// Goal: stock clients read and write under TLS with their certificate, on a source and on the hub,
/// and everybody else is refused and counted: plain ones, those of another authority, a source's
/// certificate; HTTP answers under TLS and not in the clear. Method: nbdinfo, nbdcopy, qemu-img, curl;
/// the same commands with the right keys are the control.
#[test]
#[expect(clippy::too_many_lines, reason = "one story and its control beside each step")]
fn clients_come_with_certificates_or_not_at_all() {
    let mut cluster = certified(&[NAME]);
    let authority = cluster.path("hub/state/tls");
    let address = cluster.hub_address().ip();
    replace(&cluster.hub_config(), "unix:nbd.sock", &format!("{address}:10811"));
    replace(&cluster.hub_config(), "[tls]", "[tls]\nnbd = \"mutual\"\nhttp = \"server\"");
    let issued = Authority(&authority).issue_for(NAME, &[address.to_string()]).expect("issued");
    keys(&cluster, NAME, &[("served-cert", issued.cert), ("served-key", issued.key)]);
    replace(&cluster.source_config(NAME), "unix:nbd.sock", &format!("{address}:10812"));
    let served = "served_cert = \"served-cert.pem\"\nserved_key = \"served-key.pem\"";
    let doors = format!("[tls]\nnbd = \"mutual\"\n{served}");
    replace(&cluster.source_config(NAME), "[tls]", &doors);
    cluster.start_hub();
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);

    let right = cluster.path("client").display().to_string();
    let mut certify = Command::new(BINARY);
    run(certify.args(["certify", &right, "--config"]).arg(cluster.hub_config()));
    assert!(!try_run(&mut certify).status.success(), "written over");
    let other = client_keys(&cluster, "other", &cluster.path("other-authority"));
    let source = Authority(&authority).issue(NAME).expect("issued");
    let source = [("ca-cert", source.ca), ("client-cert", source.cert), ("client-key", source.key)];
    let source = keys(&cluster, "as-source", &source);
    let uri = |port: u16, keys: &str| {
        format!("nbds://{address}:{port}/{NAME}/vol0?tls-certificates={keys}")
    };
    let image = cluster.path("image.raw");
    let content: Vec<u8> =
        (0..8_u32 << 20).map(|at| (at / 4096 % 251 + at % 7).to_le_bytes()[0]).collect();
    fs::write(&image, &content).expect("an image");
    run(Command::new("nbdcopy").arg(&image).arg(uri(10812, &right)));
    let said = run(Command::new("nbdinfo").args(["--json", &uri(10812, &right)]));
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).expect("JSON of nbdinfo");
    assert_eq!((&said["TLS"], &said["structured"]), (&true.into(), &true.into()), "{said}");
    cluster.checkpoint(NAME);
    let copy = cluster.path("copy.raw");
    let qemu = |keys: &str, tls: bool| {
        let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={keys}");
        let mut options = format!("driver=nbd,host={address},port=10811,export={NAME}/vol0");
        let mut command = Command::new("qemu-img");
        command.arg("convert");
        if tls {
            options.push_str(",tls-creds=tls0");
            command.args(["--object", &object]);
        }
        try_run(command.arg("--image-opts").arg(options).args(["-O", "raw"]).arg(&copy))
    };
    let read = qemu(&right, true);
    assert!(read.status.success(), "{read:?}");
    assert!(fs::read(&copy).expect("the copy")[..content.len()] == content[..], "another image");

    let refused_of = |cluster: &Cluster| {
        let page = run(Command::new("curl")
            .args(["-sS", "--cacert", &format!("{right}/ca-cert.pem")])
            .arg(cluster.hub_url("/metrics").replace("http:", "https:")));
        metric_sum(
            &String::from_utf8_lossy(&page.stdout),
            "mirrorhub_nbd_refused_clients_total",
            "",
        )
    };
    let before = refused_of(&cluster);
    let info = |uri: &str| try_run(Command::new("nbdinfo").args(["--size", uri]));
    let plain = info(&format!("nbd://{address}:10811/{NAME}/vol0"));
    assert!(!plain.status.success(), "{plain:?}");
    assert!(String::from_utf8_lossy(&plain.stderr).contains("TLS"), "{plain:?}");
    wait_for("a client in the clear is counted", LIMIT, || refused_of(&cluster) >= before + 1.0);
    assert!(!qemu(&right, false).status.success());
    wait_for("and the next one", LIMIT, || refused_of(&cluster) >= before + 2.0);
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("in the clear")).collect();
    assert!(lines.len() == 1 && lines[0].contains("an nbd client is refused"), "{lines:?}");
    assert!(lines[0].contains("peer=\"127."), "its address: {lines:?}");
    let before = refused_of(&cluster);
    for keys in [&other, &source] {
        let met = info(&uri(10811, keys));
        assert!(!met.status.success(), "{keys}: {met:?}");
        assert!(!qemu(keys, true).status.success(), "{keys}");
    }
    assert!(info(&uri(10811, &right)).status.success(), "the control");
    // A client of another authority ends by itself: it does not trust this server. A source's
    // certificate is refused here.
    assert!(refused_of(&cluster) > before);
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    assert!(log.contains("an nbd client is refused") && log.contains(NAME), "{log}");
    let plain = try_run(Command::new("curl").arg("-sS").arg(cluster.hub_url("/healthz")));
    assert!(!plain.status.success() || !String::from_utf8_lossy(&plain.stdout).contains("health"));
    run(Command::new(BINARY).args(["verify", NAME, "--config"]).arg(cluster.hub_config()));
}

/// Goal: what NBD and HTTP show is exchanged by a reload: who comes then sees the new certificate, and who is
/// there stays. A file that is half written changes nothing and is named. Control: the old one, before and after.
#[test]
fn what_the_doors_show_is_exchanged_by_a_reload() {
    let mut cluster = certified(&[]);
    let host = cluster.hub_address().ip().to_string();
    let made = |place: &str| {
        let authority = cluster.path(place);
        Authority(&authority).ensure("mirrorhub-hub").expect("an authority");
        Authority(&authority)
            .issue_for("a door", std::slice::from_ref(&host))
            .expect("a certificate")
    };
    let (first, second) = (made("first-authority"), made("second-authority"));
    let show = |cluster: &Cluster, cert: &str, key: &str| {
        keys(cluster, "hub", &[("door-cert", cert.to_owned()), ("door-key", key.to_owned())]);
    };
    show(&cluster, &first.cert, &first.key);
    let doors =
        "[tls]\nhttp = \"server\"\nserved_cert = \"door-cert.pem\"\nserved_key = \"door-key.pem\"";
    replace(&cluster.hub_config(), "[tls]", doors);
    cluster.start_hub();
    let url = cluster.hub_url("/healthz").replace("http:", "https:");
    let answers = |authority: &str| {
        let file = keys(&cluster, "trusted", &[("ca-cert", authority.to_owned())]);
        let ca = format!("{file}/ca-cert.pem");
        try_run(Command::new("curl").args(["-sS", "--cacert", &ca, &url])).status.success()
    };
    assert!(answers(&first.ca) && !answers(&second.ca), "the first one is shown");
    // Begun under the first certificate, it goes on under it.
    let mut live = Command::new("curl");
    let ca = keys(&cluster, "live", &[("ca-cert", first.ca.clone())]);
    live.args(["-sSN", "--cacert", &format!("{ca}/ca-cert.pem")])
        .arg(url.replace("healthz", "api/v1/live"));
    let heard = cluster.path("live.log");
    live.stdout(fs::File::create(&heard).expect("a file"));
    let mut live = live.spawn().expect("curl");
    let events = || fs::read_to_string(&heard).unwrap_or_default().matches("data:").count();
    wait_for("it is told", LIMIT, || events() > 0);
    show(&cluster, "half a certi", &second.key);
    cluster.signal_hub("HUP");
    wait_for("the half is named", LIMIT, || {
        let log = fs::read_to_string(cluster.path("hub.log")).unwrap_or_default();
        log.contains("door-cert.pem")
    });
    assert!(answers(&first.ca), "what was read before is shown");
    show(&cluster, &second.cert, &second.key);
    cluster.signal_hub("HUP");
    wait_for("the second one is shown", LIMIT, || answers(&second.ca));
    assert!(!answers(&first.ca), "the first one is shown as well");
    assert!(live.try_wait().expect("its state").is_none(), "it was cut off");
    live.kill().expect("ended");
    live.wait().expect("ended");
}
