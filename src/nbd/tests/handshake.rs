//! Each option and each way a handshake can go wrong.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::*;
use super::exports::{Gate, Only};
use super::*;
use crate::nbd::serve::{Guard, Told};

const FLAGS_SIMPLE: [u8; 2] = [0x0d, 0x6d];
const SIZE: [u8; 8] = [0, 0, 0, 0, 0, 0x10, 0, 0];

/// A server with one volume, and a client that has said its flags.
async fn greeted() -> (Running, Client) {
    let (running, _) = serve_volume().await;
    let mut client = running.connect().await;
    client.greet(3).await;
    (running, client)
}

#[tokio::test]
async fn unknown_client_flags_end_the_connection() {
    let (running, _) = serve_volume().await;
    for bit in [2, 16, 31] {
        let mut client = running.connect().await;
        client.greet(3 | 1 << bit).await;
        client.expect_closed().await;
    }
    running.protocol_errors(3).await;
    running.finish().await;
}

#[tokio::test]
async fn unknown_options_are_unsupported_and_their_payload_is_read() {
    let (running, mut client) = greeted().await;
    for code in [0, 4, 5, 11, 12, 1 << 31, u32::MAX] {
        client.expect_option(code, b"", ERR_UNSUP).await;
        client.expect_option(code, &option(7, b"looks like GO"), ERR_UNSUP).await;
    }
    client.expect_option(7, &info_payload("vol0", &[]), ACK).await;
    running.finish().await;
}

#[tokio::test]
async fn oversized_options_are_skipped_or_cut_off() {
    let (running, mut client) = greeted().await;
    client.expect_option(7, &vec![0; 16 * 1024 + 1], ERR_TOO_BIG).await;
    client.expect_option(3, &vec![0; 1 << 20], ERR_TOO_BIG).await;
    client.expect_option(11, &vec![0; 1 << 20], ERR_UNSUP).await;
    client.expect_option(7, &info_payload("vol0", &[]), ACK).await;
    for length in [(1 << 20) + 1, u32::MAX] {
        let mut client = running.connect().await;
        client.greet(3).await;
        client.send(&[&option(7, b"")[..12], &length.to_be_bytes()].concat()).await;
        client.expect_closed().await;
    }
    running.finish().await;
}

#[tokio::test]
async fn a_wrong_option_magic_ends_the_connection() {
    let (running, mut client) = greeted().await;
    let mut bytes = option(7, &info_payload("vol0", &[]));
    bytes[7] ^= 1;
    client.send(&bytes).await;
    client.expect_closed().await;
    running.protocol_errors(1).await;
    running.finish().await;
}

#[tokio::test]
async fn export_name_with_and_without_zeroes() {
    let (running, _) = serve_volume().await;
    for (flags, zeroes) in [(3, 0), (1, 124), (0, 124), (2, 0)] {
        let mut client = running.connect().await;
        client.greet(flags).await;
        client.send(&option(1, b"vol0")).await;
        let answer = client.bytes(10 + zeroes).await;
        assert_eq!(answer, [&SIZE[..], &FLAGS_SIMPLE, &vec![0; zeroes]].concat());
        client.request(READ, 0, 9, 4095, 2).await;
        assert_eq!(client.simple().await, (0, 9));
        assert_eq!(client.read().await, [0, 0xab]);
    }
    running.finish().await;
}

#[tokio::test]
async fn export_name_that_fails_can_only_hang_up() {
    let (running, _) = serve_volume().await;
    for name in [&b"nothing"[..], b"vol0\0", b"\xff", &[b'a'; 4097], &[b'a'; 20_000]] {
        let mut client = running.connect().await;
        client.greet(3).await;
        client.send(&option(1, name)).await;
        client.expect_closed().await;
    }
    assert_eq!(running.server.counters().protocol_errors(), 0);
    running.finish().await;
}

#[tokio::test]
async fn go_tells_what_was_asked_for() {
    let (running, mut client) = greeted().await;
    client.expect_option(8, b"", ACK).await;
    let replies = client.option(6, &info_payload("vol0", &[3, 1, 2, 99])).await;
    let export = [&[0, 0][..], &SIZE, &[0x0d, 0xed]].concat();
    let block_size = b"\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00";
    let expected = [
        (3, export.clone()),
        (3, b"\x00\x01vol0".to_vec()),
        (3, b"\x00\x02a test".to_vec()),
        (3, block_size.to_vec()),
        (1, Vec::new()),
    ];
    assert_eq!(replies, expected);
    assert_eq!(client.option(7, &info_payload("vol0", &[3, 1, 2, 99])).await, expected);
    assert_eq!(client.ask_simple(FLUSH, 0, 0, 0).await, 0);
    running.finish().await;
}

#[tokio::test]
async fn go_without_block_size_serves_requests_of_any_alignment() {
    let (running, mut client) = greeted().await;
    let replies = client.option(7, &info_payload("", &[])).await;
    let export = [&[0, 0][..], &SIZE, &FLAGS_SIMPLE].concat();
    assert_eq!(replies, [(3, export), (1, Vec::new())]);
    client.write(0, 1, 4095, b"xyz").await;
    assert_eq!(client.simple().await, (0, 1));
    client.request(READ, 0, 2, 4094, 5).await;
    assert_eq!(client.simple().await, (0, 2));
    assert_eq!(client.read().await, *b"\0xyz\xab");
    running.finish().await;
}

#[tokio::test]
async fn exports_that_cannot_be_opened_are_told_apart() {
    let gate = Gate::new();
    let running = Running::start(options(), Arc::new(Only(gate))).await;
    let mut client = running.connect().await;
    client.greet(3).await;
    for code in [6, 7] {
        for (name, error) in [("none", ERR_UNKNOWN), ("closed", ERR_POLICY), ("late", ERR_SHUTDOWN)]
        {
            let replies = client.option(code, &info_payload(name, &[3])).await;
            assert_eq!(replies.len(), 1, "no information before the error");
            assert_eq!(replies[0].0, error);
        }
        let replies = client.option(code, &info_payload("closed", &[])).await;
        assert_eq!(replies[0].1, b"not today");
    }
    client.expect_option(7, &info_payload("gate", &[]), ACK).await;
    running.finish().await;
}

#[tokio::test]
async fn malformed_info_requests_are_invalid() {
    let (running, mut client) = greeted().await;
    let good = info_payload("vol0", &[1]);
    for bad in [&b""[..], &good[..good.len() - 1], &[&good[..], b"x"].concat(), b"\xff\xff\xff\xff"]
    {
        client.expect_option(6, bad, ERR_INVALID).await;
        client.expect_option(7, bad, ERR_INVALID).await;
    }
    client.expect_option(7, &good, ACK).await;
    running.finish().await;
}

#[tokio::test]
async fn the_list_has_names_and_descriptions() {
    let (running, mut client) = greeted().await;
    let replies = client.option(3, b"").await;
    assert_eq!(replies, [(2, b"\x00\x00\x00\x04vol0a test".to_vec()), (1, Vec::new())]);
    client.expect_option(3, b"x", ERR_INVALID).await;
    running.finish().await;
}

#[tokio::test]
async fn a_long_list_arrives_whole() {
    let running = Running::start(options(), Arc::new(Only(Gate::new()))).await;
    let mut client = running.connect().await;
    client.greet(3).await;
    let replies = client.option(3, b"").await;
    assert_eq!(replies.len(), 5001);
    assert!(replies[..5000].iter().all(|reply| reply.1 == b"\x00\x00\x00\x04gate"));
    running.finish().await;
}

#[tokio::test]
async fn the_empty_name_is_the_only_export_or_none() {
    let (one, two) = (volume(), Memory::new(ExportInfo::new("vol1", ByteCount(4096))));
    let exports = MemoryExports::new([one, Arc::new(two)]);
    let running = Running::start(options(), Arc::new(exports)).await;
    let mut client = running.connect().await;
    client.greet(3).await;
    client.expect_option(6, &info_payload("", &[]), ERR_UNKNOWN).await;
    client.expect_option(6, &info_payload("vol1", &[]), ACK).await;
    running.finish().await;
}

#[tokio::test]
async fn questions_do_not_keep_an_export_open() {
    let (running, memory) = serve_volume().await;
    let mut client = running.connect().await;
    client.greet(3).await;
    let closed = Arc::strong_count(&memory);
    client.expect_option(8, b"", ACK).await;
    client.expect_option(6, &info_payload("vol0", &[3]), ACK).await;
    client.expect_option(9, &context_payload("vol0", &[]), ACK).await;
    client.expect_option(10, &context_payload("vol0", &["base:allocation"]), ACK).await;
    // The next option is answered after the question's export was dropped.
    client.expect_option(11, b"", ERR_UNSUP).await;
    assert_eq!(Arc::strong_count(&memory), closed);
    client.expect_option(7, &info_payload("vol0", &[]), ACK).await;
    assert_eq!(client.ask(READ, 0, 0, 1).await.kind, 2);
    assert_eq!(Arc::strong_count(&memory), closed + 1);
    drop(client);
    running.connections(0).await;
    assert_eq!(Arc::strong_count(&memory), closed);
    running.finish().await;
}

#[tokio::test]
async fn structured_replies_take_no_payload() {
    let (running, mut client) = greeted().await;
    client.expect_option(8, b"x", ERR_INVALID).await;
    client.expect_option(7, &info_payload("vol0", &[]), ACK).await;
    assert_eq!(client.ask_simple(BLOCK_STATUS, 0, 0, 4096).await, 22);
    running.finish().await;
}

#[tokio::test]
async fn contexts_are_listed_and_selected() {
    let (running, mut client) = greeted().await;
    for code in [9, 10] {
        client.expect_option(code, &context_payload("vol0", &[]), ERR_INVALID).await;
    }
    client.expect_option(8, b"", ACK).await;
    let listed = (4, b"\x00\x00\x00\x00base:allocation".to_vec());
    let selected = (4, b"\x00\x00\x00\x01base:allocation".to_vec());
    let ack = (1, Vec::new());
    for (queries, lists, selects) in [
        (&[][..], true, false),
        (&["base:"], true, false),
        (&["base:allocation"], true, true),
        (&["qemu:", "x-a:b", "base:allocation", "base:allocation"], true, true),
        (&["base:other", "qemu:allocation-depth"], false, false),
    ] {
        for (code, context, expected) in [(9, &listed, lists), (10, &selected, selects)] {
            let replies = client.option(code, &context_payload("vol0", queries)).await;
            let mut wanted = if expected { vec![context.clone()] } else { Vec::new() };
            wanted.push(ack.clone());
            assert_eq!(replies, wanted, "{code} {queries:?}");
        }
    }
    for code in [9, 10] {
        client.expect_option(code, &context_payload("none", &[]), ERR_UNKNOWN).await;
        client.expect_option(code, &context_payload("vol0", &["base"]), ERR_INVALID).await;
        client.expect_option(code, b"\x00\x00\x00\x00\xff\xff\xff\xff", ERR_INVALID).await;
    }
    running.finish().await;
}

/// What was selected counts only for the export it was selected for, and not after a selection
/// that failed.
#[tokio::test]
async fn a_selection_is_replaced_and_bound_to_its_export() {
    let (running, _) = serve_volume().await;
    let selection = context_payload("vol0", &["base:allocation"]);
    let none = context_payload("vol0", &[]);
    let broken = context_payload("vol0", &["base"]);
    for (second, name, status) in [
        (None, "vol0", true),
        (None, "", false),
        (Some(&selection), "vol0", true),
        (Some(&none), "vol0", false),
        (Some(&broken), "vol0", false),
    ] {
        let mut client = running.connect().await;
        client.greet(3).await;
        client.expect_option(8, b"", ACK).await;
        client.expect_option(10, &selection, ACK).await;
        if let Some(second) = second {
            client.option(10, second).await;
        }
        client.expect_option(7, &info_payload(name, &[]), ACK).await;
        let chunk = client.ask(BLOCK_STATUS, 0, 0, 4096).await;
        assert_eq!(chunk.kind, if status { 5 } else { 0x8001 }, "{name:?} {second:?}");
        if !status {
            assert_eq!(chunk.error(), 22);
        }
    }
    running.finish().await;
}

#[tokio::test]
async fn without_fixed_newstyle_only_export_name_is_taken() {
    let (running, _) = serve_volume().await;
    for code in [2, 3, 7, 11] {
        let mut client = running.connect().await;
        client.greet(2).await;
        client.send(&option(code, b"")).await;
        client.expect_closed().await;
    }
    running.protocol_errors(4).await;
    running.finish().await;
}

#[tokio::test]
async fn abort_is_acknowledged_and_ends_the_connection() {
    let (running, _) = serve_volume().await;
    for payload in [&b""[..], b"goodbye", &[0; 20_000]] {
        let mut client = running.connect().await;
        client.greet(3).await;
        client.expect_option(2, payload, ACK).await;
        client.expect_closed().await;
    }
    assert_eq!(running.server.counters().protocol_errors(), 0);
    running.finish().await;
}

#[tokio::test]
async fn options_are_counted() {
    let (running, mut client) = greeted().await;
    for _ in 0..256 {
        client.expect_option(11, b"", ERR_UNSUP).await;
    }
    client.send(&option(11, b"")).await;
    client.expect_closed().await;
    running.protocol_errors(1).await;
    running.finish().await;
}

/// Clients that say nothing, that drip options, and whose export never opens are all cut.
#[tokio::test]
async fn a_handshake_that_takes_too_long_is_cut() {
    let options = Options { handshake_deadline: Duration::from_millis(150), ..options() };
    let running = Running::start(options, Arc::new(Only(Gate::new()))).await;
    let mut silent = running.connect().await;
    assert_eq!(silent.rest().await.len(), 18);

    let mut stuck = running.connect().await;
    stuck.greet(3).await;
    stuck.send(&option(7, &info_payload("never", &[]))).await;
    stuck.expect_closed().await;

    let mut dripping = running.connect().await;
    dripping.greet(3).await;
    let drip = async {
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        loop {
            tick.tick().await;
            if dripping.stream.write_all(&option(11, b"")).await.is_err() {
                return;
            }
        }
    };
    timeout(PATIENCE, drip).await.expect("dripping does not keep it open");
    running.connections(0).await;
    running.protocol_errors(3).await;
    running.finish().await;
}

#[tokio::test]
async fn connections_over_the_cap_are_closed_at_once() {
    let options = Options { connections_max: 2, ..options() };
    let exports = Arc::new(MemoryExports::new([volume()]));
    let running = Running::start(options, exports).await;
    let (mut one, mut two) = (running.connect().await, running.connect().await);
    one.open("vol0", true).await;
    two.open("vol0", false).await;
    let mut three = running.connect().await;
    three.expect_closed().await;
    assert_eq!(running.server.counters().connections_refused(), 1);
    assert_eq!(one.ask(READ, 0, 0, 1).await.kind, 2, "those who are in stay in");
    drop(two);
    running.connections(1).await;
    let mut four = running.connect().await;
    four.open("vol0", true).await;
    assert_eq!(running.server.counters().connections_total(), 3);
    running.finish().await;
}

/// Who was told of, and why.
#[derive(Debug, Default)]
struct Log(Mutex<Vec<(String, String)>>);

impl Told for Log {
    fn refused(&self, peer: &str, reason: &str) {
        self.0.lock().unwrap().push((peer.to_owned(), reason.to_owned()));
    }
}

/// Goal: connections that say nothing, or never come to an end, keep no client out, and cut off none that has
/// opened an export; each is counted and told of with its address. Method: many more of them than places; the
/// oldest goes for each. Control: with all places held by clients it is the newcomer, silent or not.
#[tokio::test]
async fn silent_connections_make_room_and_clients_stay() {
    let told = Arc::new(Log::default());
    let options = Options { connections_max: 4, told: Some(told.clone()), ..options() };
    let options = Options { handshake_deadline: Duration::from_secs(3600), ..options };
    let exports = Arc::new(MemoryExports::new([volume()]));
    let running = Running::start(options, exports).await;
    let mut one = running.connect().await;
    one.open("vol0", true).await;
    let (mut silent, mut peers) = (Vec::new(), Vec::new());
    for at in 0..10 {
        let mut client = running.connect().await;
        peers.push(client.stream.local_addr().unwrap().to_string());
        if at % 2 == 0 {
            client.greet(3).await;
        } else {
            client.read::<18>().await;
        }
        silent.push(client);
    }
    until(|| running.server.counters().connections_refused() == 7).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = running.connect().await;
        client.open("vol0", true).await;
        clients.push(client);
    }
    for mut client in silent {
        client.expect_closed().await;
    }
    let mut late = running.connect().await;
    let reason = "made room for a newer one".to_owned();
    let mut wanted: Vec<_> = peers.into_iter().map(|peer| (peer, reason.clone())).collect();
    let reason = "all places are held by clients that have opened an export".to_owned();
    wanted.push((late.stream.local_addr().unwrap().to_string(), reason));
    late.expect_closed().await;
    let mut said = told.0.lock().unwrap().clone();
    said.sort();
    wanted.sort();
    assert_eq!(said, wanted);
    assert_eq!(running.server.counters().connections_refused(), 11);
    assert_eq!(running.server.counters().protocol_errors(), 0);
    clients.push(one);
    for client in &mut clients {
        assert_eq!(client.ask(READ, 0, 0, 1).await.kind, 2, "those who are in stay in");
    }
    running.finish().await;
}

/// Loopback may not come, for once.
#[derive(Debug)]
struct Nobody;

impl Guard for Nobody {
    fn admits(&self, peer: SocketAddr) -> bool {
        assert!(peer.ip().is_loopback());
        false
    }
}

/// Who may not come is closed before any byte, takes no place, and is counted. Control: a unix socket, which has
/// no address, is not asked for one.
#[tokio::test]
async fn who_may_not_come_is_closed_before_any_byte() {
    let exports = Arc::new(MemoryExports::new([volume()]));
    let guard: Option<Arc<dyn Guard>> = Some(Arc::new(Nobody));
    let running = Running::start(Options { guard, ..options() }, exports.clone()).await;
    for count in 1..=3 {
        running.connect().await.expect_closed().await;
        until(|| running.server.counters().connections_turned_away() == count).await;
    }
    let counters = running.server.counters();
    assert_eq!((counters.connections_total(), counters.protocol_errors()), (0, 0));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let listener = Listener::bind(&Listen::Unix(path.clone())).await.unwrap();
    let (server, stop) = (running.server.clone(), running.stop.clone());
    let beside = tokio::spawn(async move { server.run(listener, exports, stop).await });
    let mut local = tokio::net::UnixStream::connect(&path).await.unwrap();
    let mut greeting = [0; 18];
    let read = timeout(PATIENCE, local.read_exact(&mut greeting)).await;
    read.expect("in time").expect("a greeting");
    drop(local);
    running.connections(0).await;
    running.finish().await;
    timeout(PATIENCE, beside).await.expect("run returns").unwrap();
}
