//! `plain_networks`: who is served without TLS, and who is hung up on. Hub and source run in a network namespace
//! of their own, which has an address inside of the networks and one outside, of either family; a client that
//! asks one of its own machine's addresses comes from there.
//!
//! Needs root and `ip netns`.

use std::fs;
use std::process::Output;
use std::time::Duration;

use crate::cuts::Namespace;
use crate::harness::{Cluster, SourceSettings, done, metric_sum, run, try_run, wait_for};
use crate::tls::replace;

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(30);
/// Addresses of the namespace: two that may come, and two that may not.
const INSIDE: [&str; 2] = ["10.1.0.1", "fd00:1::1"];
const OUTSIDE: [&str; 2] = ["10.2.0.1", "fd00:2::1"];
const NETWORKS: &str = "plain_networks = [\"10.1.0.0/16\", \"fd00:1::/32\"]";
/// Both doors of the hub on all addresses: NBD takes IPv4 as IPv6.
const HUB_NBD: u16 = 10811;
const HUB_HTTP: u16 = 7421;
const SOURCE_NBD: u16 = 10812;

fn in_brackets(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// `curl` of that page of the hub, from that address.
fn get(namespace: &Namespace, address: &str, page: &str) -> Output {
    let url = format!("http://{}:{HUB_HTTP}{page}", in_brackets(address));
    try_run(namespace.inside("curl").args(["-sS", "--max-time", "20", &url]))
}

/// The size of the export as a stock client sees it, from that address.
fn size(namespace: &Namespace, address: &str, port: u16) -> Option<String> {
    let uri = format!("nbd://{}:{port}/{NAME}/vol0", in_brackets(address));
    let output = try_run(namespace.inside("timeout").args(["20", "nbdinfo", "--size", &uri]));
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(said)
}

/// How many bytes of the greeting a client is sent that says nothing.
fn greeting(namespace: &Namespace, address: &str) -> String {
    let script = format!("exec 3<>/dev/tcp/{address}/{HUB_NBD} && head -c 18 <&3 | wc -c");
    let output = run(namespace.inside("timeout").args(["20", "bash", "-c", &script]));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Clients that the doors of the hub have refused: NBD and HTTP.
fn refused(namespace: &Namespace) -> (f64, f64) {
    let page = get(namespace, "127.0.0.1", "/metrics");
    assert!(page.status.success(), "loopback is always served: {page:?}");
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    let of = |door| metric_sum(&page, &format!("mirrorhub_{door}_refused_clients_total"), "");
    (of("nbd"), of("http"))
}

fn lines(cluster: &Cluster, log: &str, what: &str) -> Vec<String> {
    let text = fs::read_to_string(cluster.path(log)).expect("the log");
    text.lines().filter(|line| line.contains(what)).map(str::to_owned).collect()
}

/// A cluster whose doors for clients are on all addresses, in a namespace that has those above.
fn open_to_networks() -> (Cluster, Namespace) {
    let cluster = Cluster::prepare(&[SourceSettings::new(NAME)]);
    let hub = cluster.hub_config();
    replace(&hub, "\"unix:nbd.sock\"", &format!("\"[::]:{HUB_NBD}\"\n{NETWORKS}"));
    let http = format!("http_listen = \"{}:{HUB_HTTP}\"", cluster.hub_address().ip());
    replace(&hub, &http, &format!("http_listen = \"[::]:{HUB_HTTP}\""));
    let nbd = format!("\"0.0.0.0:{SOURCE_NBD}\"\n{NETWORKS}");
    replace(&cluster.source_config(NAME), "\"unix:nbd.sock\"", &nbd);
    let namespace = Namespace::new(&cluster);
    for address in INSIDE.iter().chain(&OUTSIDE) {
        let bits = if address.contains(':') { 128 } else { 32 };
        let own = format!("{address}/{bits}");
        run(namespace.inside("ip").args(["address", "add", &own, "dev", "lo", "nodad"]));
    }
    (cluster, namespace)
}

/// Goal: who comes from one of the networks, or from this machine, is served by NBD and HTTP; who comes from
/// elsewhere is closed before any byte, counted at its door, and in the log once with its address. Control:
/// with a network more and a restart, which it takes, the same client is served.
#[test]
fn clients_of_known_networks_are_served_in_the_clear_and_no_others() {
    let (mut cluster, namespace) = open_to_networks();
    namespace.start(&mut cluster);
    let volume = format!("nbd://{}:{SOURCE_NBD}/{NAME}/vol0", INSIDE[0]);
    let write = ["-f", "raw", "-c", "write -P 7 0 1M", &volume];
    run(namespace.inside("qemu-io").args(write));
    cluster.checkpoint(NAME);

    let bytes = Some("67108864".to_owned());
    for address in INSIDE.into_iter().chain(["127.0.0.1", "::1"]) {
        assert_eq!(size(&namespace, address, HUB_NBD), bytes, "{address}");
        assert_eq!(greeting(&namespace, address), "18", "{address}");
        let page = get(&namespace, address, "/healthz");
        assert!(String::from_utf8_lossy(&page.stdout).contains("health"), "{address}: {page:?}");
    }
    assert_eq!(refused(&namespace), (0.0, 0.0));
    for round in 1..=2_u8 {
        for address in OUTSIDE {
            assert_eq!(greeting(&namespace, address), "0", "{address} was told something");
            let page = get(&namespace, address, "/metrics");
            assert!(!page.status.success() && page.stdout.is_empty(), "{address}: {page:?}");
        }
        let counted = f64::from(round) * 2.0;
        assert_eq!(refused(&namespace), (counted, counted));
    }
    assert_eq!(size(&namespace, OUTSIDE[0], HUB_NBD), None);
    assert_eq!(size(&namespace, OUTSIDE[0], SOURCE_NBD), None, "the source's door is another's");
    assert_eq!(size(&namespace, INSIDE[0], SOURCE_NBD), bytes, "the control");
    // Each address once at each door, however often it came.
    for (log, what, least) in [
        ("hub.log", "an nbd client is refused", 2),
        ("hub.log", "an HTTP client is refused", 2),
        ("filer-a.log", "an nbd client is refused", 1),
    ] {
        let told = lines(&cluster, log, what);
        assert_eq!(told.len(), least, "{told:?}");
        for (line, address) in told.iter().zip(OUTSIDE) {
            let peer = format!("peer=\"{}:", in_brackets(address));
            assert!(line.contains(&peer) && line.contains("none of plain_networks"), "{line}");
        }
    }

    let config = cluster.hub_config();
    replace(&config, NETWORKS, "plain_networks = [\"10.1.0.0/16\", \"10.2.0.0/16\"]");
    let told = done(&config, &["config", "diff"]);
    assert!(told.contains("plain_networks") && told.contains("restart"), "{told}");
    cluster.signal_hub("HUP");
    wait_for("it was read again", LIMIT, || {
        let waits = cluster.hub_status()["config"]["needs_restart"].clone();
        waits[0]["key"] == "plain_networks"
    });
    assert_eq!(size(&namespace, OUTSIDE[0], HUB_NBD), None, "it takes a restart");
    cluster.stop_hub();
    namespace.start_hub(&mut cluster);
    wait_for("the image is there again", LIMIT, || {
        size(&namespace, OUTSIDE[0], HUB_NBD) == Some("67108864".to_owned())
    });
    assert!(get(&namespace, OUTSIDE[0], "/healthz").status.success(), "the control");
    assert!(!get(&namespace, INSIDE[1], "/healthz").status.success(), "it was taken out");
}
