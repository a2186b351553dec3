//! Each command and each error of the transmission phase.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::*;
use super::exports::{Fault, Faulty, GATED, Gate, Only};
use super::*;
use crate::nbd::budget::Pot;
use crate::nbd::counters::Counters;
use crate::nbd::end::End;
use crate::nbd::export::{ErrorCode, Extent, Segment};
use crate::nbd::handshake::Opened;
use crate::nbd::protocol::request::{Operation, Terms};
use crate::nbd::transmission::{self, Surroundings};

const DATA: u16 = 1;
const HOLE: u16 = 2;
const STATUS: u16 = 5;
const SIZE: u64 = 1 << 20;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;

async fn opened(structured: bool) -> (Running, Client, Arc<Memory>) {
    let (running, memory) = serve_volume().await;
    let mut client = running.connect().await;
    client.open("vol0", structured).await;
    (running, client, memory)
}

fn chunk(done: bool, kind: u16, payload: Vec<u8>) -> Chunk {
    Chunk { done, kind, cookie: 5, payload }
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), bytes].concat()
}

fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

fn status(extents: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 1];
    for (length, state) in extents {
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&state.to_be_bytes());
    }
    bytes
}

#[tokio::test]
async fn structured_reads_show_holes() {
    let (running, mut client, _) = opened(true).await;
    client.request(READ, 0, 5, 4000, 3 * 4096).await;
    let expected = [
        chunk(false, HOLE, hole(4000, 96)),
        chunk(false, DATA, data(4096, &[0xab; 4096])),
        chunk(false, HOLE, hole(8192, 4096)),
        chunk(true, DATA, data(12288, &[0xcd; 4000])),
    ];
    for wanted in expected {
        assert_eq!(client.chunk().await, wanted);
    }
    running.finish().await;
}

#[tokio::test]
async fn reads_that_must_not_be_cut_come_as_one_chunk() {
    let (running, mut client, _) = opened(true).await;
    let bytes = [&[0; 96][..], &[0xab; 4096], &[0; 100]].concat();
    let wanted = chunk(true, DATA, data(4000, &bytes));
    assert_eq!(client.ask(READ, DF, 4000, 96 + 4096 + 100).await, wanted);
    let wanted = chunk(true, HOLE, hole(16384, 65536));
    assert_eq!(client.ask(READ, DF, 16384, 65536).await, wanted);
    running.finish().await;
}

#[tokio::test]
async fn simple_reads_spell_holes_out() {
    let (running, mut client, _) = opened(false).await;
    client.request(READ, 0, 5, 4000, 96 + 4096 + 100).await;
    assert_eq!(client.simple().await, (0, 5));
    let bytes = [&[0; 96][..], &[0xab; 4096], &[0; 100]].concat();
    assert_eq!(client.bytes(bytes.len()).await, bytes);
    assert_eq!(client.ask_simple(READ, DF, 0, 1).await, 22, "no DF without structured replies");
    running.finish().await;
}

#[tokio::test]
async fn block_status_tells_extents() {
    let (running, mut client, _) = opened(true).await;
    let all = status(&[(4096, 3), (4096, 0), (4096, 3), (4096, 0), (0x10_0000 - 16384, 3)]);
    assert_eq!(client.ask(BLOCK_STATUS, 0, 0, 1 << 20).await, chunk(true, STATUS, all));
    let one = chunk(true, STATUS, status(&[(4096, 3)]));
    assert_eq!(client.ask(BLOCK_STATUS, REQ_ONE, 0, 1 << 20).await, one);
    let short = chunk(true, STATUS, status(&[(100, 0)]));
    assert_eq!(client.ask(BLOCK_STATUS, REQ_ONE, 4100, 100).await, short);
    let edge = chunk(true, STATUS, status(&[(96, 3), (4, 0)]));
    assert_eq!(client.ask(BLOCK_STATUS, 0, 4000, 100).await, edge);
    running.finish().await;
}

#[tokio::test]
async fn what_is_written_zeroed_and_trimmed_is_read_back() {
    let (running, mut client, memory) = opened(true).await;
    client.write(0, 1, 8000, &[1; 1000]).await;
    assert_eq!(client.simple().await, (0, 1));
    assert_eq!(client.ask_simple(WRITE_ZEROES, 0, 8100, 200).await, 0);
    let bytes = [&[1; 100][..], &[0; 200], &[1; 700]].concat();
    let wanted = chunk(true, DATA, data(8000, &bytes));
    assert_eq!(client.ask(READ, 0, 8000, 1000).await, wanted);
    assert_eq!(client.ask_simple(TRIM, 0, 4097, 8191).await, 0);
    let wanted = status(&[(4096, 3), (4096, 0), (4096, 3), (4096, 0)]);
    let got = client.ask(BLOCK_STATUS, 0, 0, 16384).await;
    assert_eq!(got, chunk(true, STATUS, wanted), "trim takes whole blocks only");
    assert_eq!(client.ask_simple(WRITE_ZEROES, NO_HOLE | FAST_ZERO, 8192, 4096).await, 0);
    let wanted = chunk(true, STATUS, status(&[(4096, 2)]));
    assert_eq!(client.ask(BLOCK_STATUS, REQ_ONE, 8192, 4096).await, wanted);
    assert_eq!(client.ask_simple(CACHE, 0, 0, 1 << 20).await, 0);
    assert_eq!(client.ask_simple(FLUSH, 0, 0, 0).await, 0);
    assert_eq!((memory.flushes(), memory.durable_writes()), (1, 0));
    running.finish().await;
}

#[tokio::test]
async fn fua_is_taken_on_every_command() {
    let (running, mut client, memory) = opened(true).await;
    client.write(FUA, 1, 0, b"x").await;
    assert_eq!(client.simple().await, (0, 1));
    for kind in [TRIM, WRITE_ZEROES, CACHE] {
        assert_eq!(client.ask_simple(kind, FUA, 0, 4096).await, 0);
    }
    assert_eq!(client.ask_simple(FLUSH, FUA, 0, 0).await, 0);
    assert_eq!(client.ask(READ, FUA, 0, 1).await.kind, HOLE);
    assert_eq!(client.ask(BLOCK_STATUS, FUA, 0, 1).await.kind, STATUS);
    assert_eq!(memory.durable_writes(), 3, "only what writes passes it on");
    running.finish().await;
}

/// Goal: each refusal has its code and its text, in both kinds of replies, and leaves the
/// connection in step.
#[tokio::test]
async fn refusals_have_the_errors_of_the_protocol_text() {
    let cases: &[(u16, u16, u64, u32, u32)] = &[
        (READ, 0, SIZE, 1, 22),
        (READ, 0, u64::MAX, u32::MAX, 22),
        (READ, NO_HOLE, 0, 1, 22),
        (READ, 1 << 15, 0, 1, 22),
        (TRIM, 0, SIZE - 1, 2, 22),
        (TRIM, NO_HOLE, 0, 1, 22),
        (WRITE_ZEROES, 0, SIZE, 1, 28),
        (WRITE_ZEROES, REQ_ONE, 0, 1, 22),
        (WRITE_ZEROES, 0, 0, u32::MAX, 28),
        (CACHE, 0, SIZE, 1, 22),
        (BLOCK_STATUS, 0, SIZE, 1, 22),
        (BLOCK_STATUS, 0, 0, 0, 22),
        (BLOCK_STATUS, DF, 0, 1, 22),
        (FLUSH, 0, 1, 0, 22),
        (FLUSH, DF, 0, 0, 22),
        (8, 0, 0, 0, 22),
        (u16::MAX, 0, 0, 0, 22),
    ];
    for structured in [true, false] {
        let (running, mut client, _) = opened(structured).await;
        for &(kind, flags, offset, length, error) in cases {
            if structured {
                let chunk = client.ask(kind, flags, offset, length).await;
                assert!(chunk.done && chunk.cookie == 5);
                assert_eq!(chunk.error(), error, "{kind} {flags} {offset} {length}");
                assert!(!chunk.text().is_empty());
            } else {
                let got = client.ask_simple(kind, flags, offset, length).await;
                assert_eq!(got, error, "{kind} {flags} {offset} {length}");
            }
        }
        running.finish().await;
    }
}

/// The payload of a refused write is read and thrown away, also if it looks like a request.
#[tokio::test]
async fn refused_writes_leave_the_stream_in_step() {
    let (running, mut client, memory) = opened(true).await;
    let trap = request(WRITE_ZEROES, 0, 66, 4096, 4096);
    for (flags, offset, error) in
        [(0, SIZE - 1, 28), (0, u64::MAX, 28), (NO_HOLE, 0, 22), (1 << 5, 0, 22)]
    {
        client.write(flags, 1, offset, &trap).await;
        assert_eq!(client.chunk().await.error(), error);
    }
    client.write(0, 1, 0, &vec![9; (32 << 20) + 1]).await;
    assert_eq!(client.chunk().await.error(), 28, "past the end of this small export");
    let wanted = chunk(true, DATA, data(4096, &[0xab; 4096]));
    assert_eq!(client.ask(READ, 0, 4096, 4096).await, wanted);
    assert_eq!(memory.allocated(), 2 * 4096);
    running.finish().await;
}

#[tokio::test]
async fn long_requests_are_served_refused_or_cut() {
    let gate = Gate::new();
    let running = Running::start(options(), Arc::new(Only(gate))).await;
    for structured in [true, false] {
        let mut client = running.connect().await;
        client.open("gate", structured).await;
        let limit = 32 << 20;
        client.request(READ, 0, 5, 3, limit).await;
        if structured {
            let got = client.chunk().await;
            assert_eq!((got.kind, got.payload.len()), (DATA, (32 << 20) + 8));
            assert_eq!(client.ask(READ, 0, 0, limit + 1).await.error(), 75);
            assert_eq!(client.ask(READ, 0, 0, u32::MAX).await.error(), 75);
        } else {
            assert_eq!(client.simple().await, (0, 5));
            assert_eq!(client.bytes(32 << 20).await.len(), 32 << 20);
            assert_eq!(client.ask_simple(READ, 0, 0, limit + 1).await, 22);
        }
        client.write(0, 7, 0, &vec![0; 32 << 20]).await;
        assert_eq!(client.simple().await, (0, 7));
        client.write(0, 8, 0, &vec![0; (32 << 20) + 1]).await;
        let error = if structured { client.chunk().await.error() } else { client.simple().await.0 };
        assert_eq!(error, 22);
        for kind in [TRIM, WRITE_ZEROES, CACHE] {
            assert_eq!(client.ask_simple(kind, 0, 0, u32::MAX).await, 0);
        }
        client.request(WRITE, 0, 9, 0, (64 << 20) + 1).await;
        client.expect_closed().await;
    }
    running.protocol_errors(2).await;
    running.finish().await;
}

#[tokio::test]
async fn requests_of_no_byte_succeed() {
    let (running, mut client, _) = opened(true).await;
    for kind in [READ, TRIM, CACHE, WRITE_ZEROES, WRITE] {
        for offset in [0, SIZE] {
            assert_eq!(client.ask(kind, 0, offset, 0).await, chunk(true, 0, Vec::new()));
        }
        assert_ne!(client.ask(kind, 0, SIZE + 1, 0).await.error(), 0);
    }
    running.finish().await;
}

#[tokio::test]
async fn a_read_only_export_refuses_what_writes() {
    let mut info = ExportInfo::new("image", ByteCount(1 << 20));
    info.read_only = true;
    let memory = Arc::new(Memory::new(info));
    memory.fill(0, b"kept");
    let running = Running::start(options(), Arc::new(MemoryExports::new([memory]))).await;
    let mut client = running.connect().await;
    client.greet(3).await;
    client.expect_option(8, b"", ACK).await;
    let replies = client.option(7, &info_payload("image", &[])).await;
    assert_eq!(replies[0].1[10..], [0x04, 0x8f], "no trim, no zeroes, no fast zeroes");
    client.write(0, 5, 0, b"lost").await;
    assert_eq!(client.chunk().await.error(), 1);
    client.write(FUA, 5, SIZE, b"lost").await;
    assert_eq!(client.chunk().await.error(), 1);
    assert_eq!(client.ask(TRIM, 0, 0, 4096).await.error(), 1);
    assert_eq!(client.ask(WRITE_ZEROES, NO_HOLE, 0, 4096).await.error(), 1);
    assert_eq!(client.ask_simple(FLUSH, 0, 0, 0).await, 0);
    assert_eq!(client.ask(READ, 0, 0, 4).await, chunk(true, DATA, data(0, b"kept")));
    running.finish().await;
}

/// Goal: the eight codes and their texts pass through; broken answers become EIO; a panic ends
/// one connection.
#[tokio::test]
async fn faults_of_an_export_reach_the_client_as_errors() {
    let faulty = Faulty::new();
    let exports = Arc::new(Only(faulty.clone()));
    let running = Running::start(options(), exports).await;
    let (mut client, mut simple) = (running.connect().await, running.connect().await);
    client.open("x", true).await;
    simple.open("x", false).await;
    for (code, number) in [
        (ErrorCode::Perm, 1),
        (ErrorCode::Io, 5),
        (ErrorCode::NoMem, 12),
        (ErrorCode::Inval, 22),
        (ErrorCode::NoSpc, 28),
        (ErrorCode::Overflow, 75),
        (ErrorCode::NotSup, 95),
        (ErrorCode::Shutdown, 108),
    ] {
        faulty.set(Fault::Error(code, "the reason"));
        for kind in [READ, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
            let chunk = client.ask(kind, 0, 0, 512).await;
            assert_eq!((chunk.error(), chunk.text()), (number, "the reason"));
        }
        assert_eq!(simple.ask_simple(READ, 0, 0, 512).await, number);
        client.write(0, 5, 0, b"x").await;
        assert_eq!(client.chunk().await.error(), number);
    }
    let seven = Segment::Data(Bytes::from_static(b"1234567"));
    for segments in [vec![], vec![seven.clone()], vec![seven, Segment::Hole(2)]] {
        faulty.set(Fault::Read(segments));
        for flags in [0, DF] {
            assert_eq!(client.ask(READ, flags, 0, 8).await.error(), 5);
        }
        assert_eq!(simple.ask_simple(READ, 0, 0, 8).await, 5);
    }
    for extents in [vec![], vec![Extent { length: 0, hole: true, zero: true }]] {
        faulty.set(Fault::Extents(extents));
        assert_eq!(client.ask(BLOCK_STATUS, 0, 0, 8).await.error(), 5);
    }
    faulty.set(Fault::Panic);
    client.request(READ, 0, 5, 0, 8).await;
    client.expect_closed().await;
    until(|| running.server.counters().panics() == 1).await;
    running.connections(1).await;
    faulty.set(Fault::Error(ErrorCode::Io, "still here"));
    assert_eq!(simple.ask_simple(READ, 0, 0, 512).await, 5);
    running.finish().await;
}

#[tokio::test]
async fn an_export_that_tells_too_many_extents_is_cut_short() {
    let faulty = Faulty::new();
    let exports = Arc::new(Only(faulty.clone()));
    let running = Running::start(options(), exports).await;
    let mut client = running.connect().await;
    client.open("x", true).await;
    let extent = |n: u32| Extent { length: 1, hole: n.is_multiple_of(2), zero: true };
    faulty.set(Fault::Extents((0..5000).map(extent).collect()));
    let got = client.ask(BLOCK_STATUS, 0, 0, 1024).await;
    assert_eq!(got.payload.len(), 4 + 8 * 4, "1024 bytes are asked for as at most 4 extents");
    running.finish().await;
}

/// What follows the wrong magic stays unread, and closing a socket with bytes unread resets it and
/// drops what it had still to send: the end must not take the replies from before it.
#[tokio::test]
async fn a_wrong_request_magic_ends_the_connection_after_what_came_before() {
    let options = Options { linger: PATIENCE, ..Options::default() };
    let running = Running::start(options, Arc::new(Only(Gate::new()))).await;
    // A small window: most of the first reply is still with the server when it hangs up.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = Client { stream: socket.connect(running.address).await.unwrap() };
    client.open("x", false).await;
    let length = 512 << 10;
    let mut bytes = [request(READ, 0, 1, 0, length), request(READ, 0, 2, 0, 1)].concat();
    bytes[28] ^= 1;
    bytes.resize(100_000, 0);
    client.send(&bytes).await;
    assert_eq!(client.simple().await, (0, 1));
    assert_eq!(client.bytes(512 << 10).await, vec![7; 512 << 10]);
    client.expect_closed().await;
    drop(client);
    running.protocol_errors(1).await;
    running.finish().await;
}

#[tokio::test]
async fn slow_requests_hold_up_no_others() {
    let gate = Gate::new();
    let exports = Arc::new(Only(gate.clone()));
    let running = Running::start(options(), exports).await;
    let mut client = running.connect().await;
    client.open("x", true).await;
    client.request(READ, 0, 1, GATED, 1).await;
    client.write(0, 2, GATED, &[0; 100_000]).await;
    client.request(TRIM, 0, 3, GATED, 1).await;
    for cookie in 10..200 {
        client.request(READ, 0, cookie, 0, 1).await;
        assert_eq!(client.chunk().await.cookie, cookie);
    }
    assert_eq!((gate.begun(), gate.finished()), (3, 0));
    gate.gate.add_permits(3);
    let mut done = Vec::new();
    for _ in 0..3 {
        let magic: [u8; 4] = client.read().await;
        // 16 bytes of a simple reply, or 20 of a chunk's header with a payload of 9.
        let rest = client.bytes(if magic[1] == 0x44 { 12 } else { 25 }).await;
        done.push(u64::from_be_bytes(rest[4..12].try_into().unwrap()));
    }
    done.sort_unstable();
    assert_eq!(done, [1, 2, 3]);
    running.finish().await;
}

#[tokio::test]
async fn requests_under_way_are_bounded_in_number() {
    let gate = Gate::new();
    let exports = Arc::new(Only(gate.clone()));
    let running = Running::start(options(), exports).await;
    let mut client = running.connect().await;
    client.open("x", false).await;
    let requests: Vec<u8> =
        (0..1000).flat_map(|cookie| request(TRIM, 0, cookie, GATED, 1)).collect();
    client.send(&requests).await;
    until(|| gate.begun() == 128).await;
    gate.gate.add_permits(1000);
    let mut cookies = std::collections::BTreeSet::new();
    for _ in 0..1000 {
        let (error, cookie) = client.simple().await;
        assert_eq!(error, 0);
        assert!(cookies.insert(cookie), "one reply a request");
    }
    assert_eq!(gate.active_max.load(std::sync::atomic::Ordering::SeqCst), 128);
    running.finish().await;
}

/// One connection holds at most 32 MiB of large requests, all together three quarters of what the
/// options say; what waits is served when there is room.
#[tokio::test]
async fn bytes_under_way_are_bounded() {
    let gate = Gate::new();
    let options = Options { bytes_in_flight: ByteCount(100 << 20), ..options() };
    let running = Running::start(options, Arc::new(Only(gate.clone()))).await;
    let length = 30 << 20;
    let mut clients = Vec::new();
    for begun in [1, 2, 2] {
        let mut client = running.connect().await;
        client.open("x", false).await;
        for cookie in 0..2 {
            client.request(READ, 0, cookie, GATED, length).await;
        }
        until(|| gate.begun() == begun).await;
        clients.push(client);
    }
    assert_eq!(running.server.bytes_in_flight(), ByteCount(60 << 20));
    gate.gate.add_permits(6);
    let [one, two, three] = &mut clients[..] else { unreachable!() };
    let take = async |client: &mut Client| {
        for _ in 0..2 {
            assert_eq!(client.simple().await.0, 0);
            client.bytes(30 << 20).await;
        }
    };
    tokio::join!(take(one), take(two), take(three));
    let active = gate.active_max.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(active, 2, "never more than two times 30 MiB in 75 MiB");
    running.finish().await;
}

/// Goal: clients that begin large writes and then send a byte now and then keep nobody else from
/// reading and writing. Small requests go on beside them at once; a large one gets its turn when
/// they are cut, which no byte puts off.
#[tokio::test]
async fn trickling_clients_do_not_starve_the_others() {
    let options = Options {
        stall_deadline: Duration::from_secs(4),
        bytes_in_flight: ByteCount(64 << 20),
        ..options()
    };
    let memory = Arc::new(Memory::new(ExportInfo::new("x", ByteCount(64 << 20))));
    let running = Running::start(options, Arc::new(MemoryExports::new([memory]))).await;
    let mut other = running.connect().await;
    other.open("x", false).await;
    let mut tasks = Vec::new();
    for _ in 0..3 {
        let mut client = running.connect().await;
        client.open("x", false).await;
        client.request(WRITE, 0, 1, 0, 16 << 20).await;
        tasks.push(tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(10));
            while client.stream.write_all(b"x").await.is_ok() {
                tick.tick().await;
            }
        }));
    }
    until(|| running.server.bytes_in_flight() == ByteCount(48 << 20)).await;
    for cookie in 0..50 {
        other.write(0, cookie, 0, &[7; 65_536]).await;
        assert_eq!(other.simple().await, (0, cookie));
    }
    let held = running.server.bytes_in_flight();
    assert_eq!(held, ByteCount(48 << 20), "the small ones went on beside them, not after them");
    other.write(0, 99, 0, &vec![8; 16 << 20]).await;
    assert_eq!(timeout(PATIENCE, other.simple()).await.expect("its turn"), (0, 99));
    for task in tasks {
        timeout(PATIENCE, task).await.expect("cut while trickling").unwrap();
    }
    running.finish().await;
}

/// A client that has gone does not take with it what it asked for: each request ends.
#[tokio::test]
async fn requests_outlive_their_client() {
    for disconnect in [true, false] {
        let gate = Gate::new();
        let exports = Arc::new(Only(gate.clone()));
        let running = Running::start(options(), exports).await;
        let mut client = running.connect().await;
        client.open("x", true).await;
        for cookie in 0..5 {
            client.write(0, cookie, GATED, b"important").await;
        }
        if disconnect {
            client.request(DISC, 0, 9, 0, 0).await;
        }
        until(|| gate.begun() == 5).await;
        if disconnect {
            gate.gate.add_permits(5);
            for _ in 0..5 {
                assert_eq!(client.simple().await.0, 0, "DISC waits for what is outstanding");
            }
            client.expect_closed().await;
        } else {
            drop(client);
            gate.gate.add_permits(5);
        }
        running.connections(0).await;
        assert_eq!(gate.finished(), 5);
        running.finish().await;
    }
}

#[tokio::test]
async fn a_client_may_close_its_direction_and_still_gets_its_replies() {
    let gate = Gate::new();
    let exports = Arc::new(Only(gate.clone()));
    let running = Running::start(options(), exports).await;
    let mut client = running.connect().await;
    client.open("x", true).await;
    client.request(TRIM, 0, 1, GATED, 1).await;
    client.stream.shutdown().await.unwrap();
    until(|| gate.begun() == 1).await;
    gate.gate.add_permits(1);
    assert_eq!(client.simple().await, (0, 1));
    client.expect_closed().await;
    running.finish().await;
}

/// Silence between requests is no reason to hang up; silence inside one is, in both directions.
#[tokio::test]
async fn clients_that_stall_are_cut() {
    let options = Options { stall_deadline: Duration::from_millis(100), ..options() };
    let running = Running::start(options, Arc::new(Only(Gate::new()))).await;
    let mut idle = running.connect().await;
    idle.open("x", false).await;

    for bytes in [
        request(READ, 0, 1, 0, 1)[..27].to_vec(),
        [request(WRITE, 0, 1, 0, 1000), vec![0; 999]].concat(),
        [request(WRITE, 0, 1, u64::MAX, 1000), vec![0; 999]].concat(),
    ] {
        let mut client = running.connect().await;
        client.open("x", false).await;
        client.send(&bytes).await;
        client.expect_closed().await;
    }

    let mut deaf = running.connect().await;
    deaf.open("x", false).await;
    for cookie in 0..2 {
        deaf.request(READ, 0, cookie, 0, 32 << 20).await;
    }
    running.connections(1).await;
    assert_eq!(running.server.bytes_in_flight(), ByteCount(0));
    assert_eq!(idle.ask_simple(FLUSH, 0, 0, 0).await, 0);
    running.finish().await;
}

/// A client that keeps moving a byte now and then is cut as well.
#[tokio::test]
async fn clients_that_trickle_are_cut() {
    let options = Options { stall_deadline: Duration::from_millis(200), ..options() };
    let running = Running::start(options, Arc::new(Only(Gate::new()))).await;
    let mut client = running.connect().await;
    client.open("x", false).await;
    client.request(WRITE, 0, 1, 0, 1 << 20).await;
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let trickle = async {
        while client.stream.write_all(b"x").await.is_ok() {
            tick.tick().await;
        }
    };
    timeout(PATIENCE, trickle).await.expect("cut while writing");
    running.finish().await;
}

/// The same for a client that takes its reply byte by byte; over a pipe, since the buffers of a
/// socket would hide it.
#[tokio::test]
async fn clients_that_take_their_replies_in_drops_are_cut() {
    let export = Gate::new();
    let terms = Terms { size: GATED, read_only: false, structured: false, allocation: false };
    let (memory, counters, stopping) =
        (Pot::new(1 << 30), Counters::default(), CancellationToken::new());
    let stall = Duration::from_millis(100);
    let surroundings = Surroundings {
        memory: &memory,
        counters: &counters,
        stall,
        linger: stall,
        stopping: &stopping,
    };
    let (near, mut far) = tokio::io::duplex(64);
    let (reader, mut writer) = tokio::io::split(near);
    let reader = tokio::io::BufReader::new(reader);
    let opened = Opened { export, terms };
    let serving = transmission::serve(reader, &mut writer, opened, surroundings);
    let taking = async {
        far.write_all(&request(READ, 0, 1, 0, 1 << 20)).await.unwrap();
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        loop {
            tick.tick().await;
            far.read_u8().await.unwrap();
        }
    };
    let end = tokio::select! {
        end = timeout(PATIENCE, serving) => end.expect("cut while reading"),
        () = taking => unreachable!(),
    };
    assert!(matches!(end, End::Stalled(_, "a reply")), "{end}");
    assert_eq!(memory.taken(), 0);
}

#[tokio::test]
async fn requests_are_counted() {
    let (running, mut client, _) = opened(true).await;
    client.ask(READ, 0, 4096, 100).await;
    client.ask(READ, 0, SIZE, 1).await;
    client.write(0, 5, 0, b"abc").await;
    client.simple().await;
    client.ask(99, 0, 0, 0).await;
    let counters = running.server.counters();
    let totals = |operation| {
        let totals = counters.operation(operation);
        (totals.requests, totals.errors, totals.bytes)
    };
    assert_eq!(totals(Operation::Read), (2, 1, 100));
    assert_eq!(totals(Operation::Write), (1, 0, 3));
    assert_eq!(totals(Operation::Unknown), (1, 1, 0));
    assert_eq!(totals(Operation::Trim), (0, 0, 0));
    running.finish().await;
}
