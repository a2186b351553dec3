//! Broken and mutated connections: the server lives, serves others, and keeps nothing.

use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;

use super::client::*;
use super::*;

/// SplitMix64: chance from a seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound).unwrap()).unwrap()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_be_bytes()[0]).collect()
    }
}

/// A whole client: options of every kind, then requests of every kind.
fn transcript() -> Vec<u8> {
    [
        vec![0, 0, 0, 3],
        option(11, b""),
        option(3, b""),
        option(8, b""),
        option(9, &context_payload("vol0", &["base:"])),
        option(10, &context_payload("vol0", &["base:allocation", "qemu:x"])),
        option(6, &info_payload("vol0", &[1, 2, 3])),
        option(7, &info_payload("vol0", &[3])),
        request(READ, 0, 1, 4000, 20_000),
        [request(WRITE, 1, 2, 4097, 700), vec![7; 700]].concat(),
        request(READ, 4, 3, 4000, 5000),
        request(WRITE_ZEROES, 2, 4, 100, 9000),
        request(TRIM, 0, 5, 0, 65536),
        request(BLOCK_STATUS, 8, 6, 0, 1 << 20),
        request(CACHE, 0, 7, 0, 4096),
        request(FLUSH, 0, 8, 0, 0),
        request(DISC, 0, 9, 0, 0),
    ]
    .concat()
}

fn mutate(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let at = chance.below(bytes.len());
    match chance.below(7) {
        0 => bytes[at] ^= 1 << chance.below(8),
        1 => bytes[at] = chance.next().to_be_bytes()[0],
        2 => bytes.truncate(at + 1),
        3 => {
            let end = (at + 1 + chance.below(40)).min(bytes.len());
            bytes.drain(at..end);
        }
        4 => {
            let end = (at + 1 + chance.below(60)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        5 => {
            let count = 1 + chance.below(30);
            let fresh = chance.bytes(count);
            bytes.splice(at..at, fresh);
        }
        _ => {
            let extreme = [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, 1 << 25, 0x0400_0001];
            let value = extreme[chance.below(extreme.len())].to_be_bytes();
            let end = (at + 4).min(bytes.len());
            bytes[at..end].copy_from_slice(&value[..end - at]);
        }
    }
    if bytes.is_empty() {
        bytes.push(0);
    }
}

/// Sends everything, closes its direction, and reads until the server hangs up.
async fn play(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut client = Client::connect(address).await;
    let (mut reader, mut writer) = client.stream.split();
    let mut answer = Vec::new();
    let saying = async {
        // The server may hang up in the middle: that is its right.
        if writer.write_all(bytes).await.is_ok() {
            writer.shutdown().await.ok();
        }
    };
    let hearing = tokio::io::AsyncReadExt::read_to_end(&mut reader, &mut answer);
    let both = async { tokio::join!(saying, hearing) };
    timeout(PATIENCE, both).await.expect("server hangs up").1.ok();
    answer
}

/// Sockets of this process with that local port, by state: those listening, and all others.
/// A descriptor that leaked keeps its socket in the table. One look may miss a line while other
/// tests open and close sockets, so callers look until it fits.
fn sockets(port: u16) -> (usize, usize) {
    let local = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let states = table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (local_address, state) = (fields.nth(1)?, fields.nth(1)?);
        // 06 is TIME_WAIT, which no descriptor holds.
        (local_address.ends_with(&local) && state != "06").then(|| state.to_owned())
    });
    let states: Vec<String> = states.collect();
    let listening = states.iter().filter(|state| *state == "0A").count();
    (listening, states.len() - listening)
}

/// The server is as if nothing had been: nothing open, nothing held, and a client is served.
async fn check_unharmed(running: &Running) {
    running.connections(0).await;
    assert_eq!(running.server.bytes_in_flight(), ByteCount(0));
    until(|| sockets(running.address.port()) == (1, 0)).await;
    assert_eq!(running.server.counters().panics(), 0);
    let mut client = running.connect().await;
    client.open("vol0", true).await;
    assert_eq!(client.ask(BLOCK_STATUS, 8, 0, 4096).await.kind, 5);
    // Control: an open socket is seen.
    until(|| sockets(running.address.port()) == (1, 1)).await;
}

#[tokio::test]
async fn every_truncation_is_survived() {
    let (running, _) = serve_volume().await;
    let whole = transcript();
    let answer = play(running.address, &whole).await;
    assert!(answer.len() > 5_000, "control: the whole transcript is served");
    for length in (0..whole.len()).filter(|length| *length < 420 || length % 7 == 0) {
        let answer = play(running.address, &whole[..length]).await;
        assert_eq!(&answer[..8], b"NBDMAGIC");
    }
    assert_eq!(running.server.counters().protocol_errors(), 0, "a cut is no wrong byte");
    check_unharmed(&running).await;
    running.finish().await;
}

/// 2000 seeded mutations, eight at a time, beside a client that must see none of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutated_connections_do_no_harm() {
    let (running, _) = serve_volume().await;
    let address = running.address;
    let eight = Arc::new(Semaphore::new(8));
    let mut plays = tokio::task::JoinSet::new();
    let mut bystander = running.connect().await;
    bystander.open("vol0", false).await;
    for seed in 0..2000 {
        let permit = Arc::clone(&eight).acquire_owned().await.unwrap();
        plays.spawn(async move {
            let mut chance = Chance(seed);
            let mut bytes = transcript();
            for _ in 0..=chance.below(4) {
                mutate(&mut bytes, &mut chance);
            }
            let played = tokio::spawn(async move { play(address, &bytes).await });
            played.await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            drop(permit);
        });
        if seed % 10 == 0 {
            assert_eq!(bystander.ask_simple(FLUSH, 0, 0, 0).await, 0);
        }
    }
    while let Some(played) = plays.join_next().await {
        played.unwrap();
    }
    let errors = running.server.counters().protocol_errors();
    assert!(errors > 400, "control: mutations do break connections, {errors} did");
    drop(bystander);
    check_unharmed(&running).await;
    running.finish().await;
}
