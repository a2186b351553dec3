//! The end that comes from the server's side.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;

use super::client::*;
use super::exports::{GATED, Gate, Only};
use super::*;
use crate::nbd::protocol::request::Operation;

/// Requests under way are finished, those that arrive are told, nobody new gets in.
#[tokio::test]
async fn a_stop_finishes_what_was_begun_and_refuses_the_rest() {
    let gate = Gate::new();
    let running = Running::start(options(), Arc::new(Only(gate.clone()))).await;
    let mut client = running.connect().await;
    client.open("x", true).await;
    client.write(0, 1, GATED, b"begun").await;
    until(|| gate.begun() == 1).await;
    let mut idle = running.connect().await;
    idle.open("x", true).await;
    let mut undecided = running.connect().await;
    undecided.greet(3).await;
    undecided.expect_option(11, b"", ERR_UNSUP).await;

    running.stop.cancel();
    idle.expect_closed().await;
    undecided.expect_closed().await;
    running.connections(1).await;
    client.request(READ, 0, 2, 0, 1).await;
    let refused = client.chunk().await;
    assert_eq!((refused.error(), refused.cookie), (108, 2));
    client.write(0, 3, 0, b"too late").await;
    assert_eq!(client.chunk().await.error(), 108);
    let refused = TcpStream::connect(running.address).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);

    gate.gate.add_permits(1);
    assert_eq!(client.simple().await, (0, 1));
    client.expect_closed().await;
    running.finish().await;
}

/// What has arrived before the stop is answered, not cut: here all in one write, with the first
/// request holding the connection open.
#[tokio::test]
async fn requests_that_have_arrived_are_answered() {
    let gate = Gate::new();
    let running = Running::start(options(), Arc::new(Only(gate.clone()))).await;
    let mut client = running.connect().await;
    client.open("x", false).await;
    let first: Vec<u8> = (0..128).flat_map(|cookie| request(TRIM, 0, cookie, GATED, 1)).collect();
    let later: Vec<u8> = (128..300).flat_map(|cookie| request(TRIM, 0, cookie, 0, 1)).collect();
    client.send(&[first, later].concat()).await;
    until(|| gate.begun() == 128).await;
    running.stop.cancel();
    gate.gate.add_permits(128);
    for _ in 0..300 {
        let (error, cookie) = client.simple().await;
        assert_eq!(error, if cookie < 128 { 0 } else { 108 }, "{cookie}");
    }
    client.expect_closed().await;
    running.finish().await;
}

#[tokio::test]
async fn an_export_that_ends_closes_its_connections_and_no_others() {
    let (ending, staying) = (Gate::new(), volume());
    let running = Running::start(options(), Arc::new(Only(ending.clone()))).await;
    let other = Running::start(options(), Arc::new(MemoryExports::new([staying]))).await;
    let mut client = running.connect().await;
    client.open("x", true).await;
    let mut bystander = other.connect().await;
    bystander.open("vol0", true).await;
    client.request(TRIM, 0, 1, GATED, 1).await;
    until(|| ending.begun() == 1).await;
    ending.ended.cancel();
    assert_eq!(client.ask(READ, 0, 0, 1).await.error(), 108);
    ending.gate.add_permits(1);
    assert_eq!(client.simple().await, (0, 1));
    client.expect_closed().await;
    assert_eq!(bystander.ask(READ, 0, 0, 1).await.kind, 2);
    running.finish().await;
    other.finish().await;
}

/// A request that never ends does not keep the process.
#[tokio::test]
async fn a_stop_has_a_deadline() {
    let gate = Gate::new();
    let options = Options { drain_deadline: Duration::from_millis(50), ..options() };
    let running = Running::start(options, Arc::new(Only(gate.clone()))).await;
    let mut client = running.connect().await;
    client.open("x", true).await;
    client.request(TRIM, 0, 1, GATED, 1).await;
    until(|| gate.begun() == 1).await;
    running.stop.cancel();
    client.expect_closed().await;
    running.finish().await;
    assert_eq!(gate.finished(), 0);
}

/// Clients that never stop asking are told for a moment, and then no longer read: the stop does
/// not wait for its deadline.
#[tokio::test]
async fn clients_that_keep_asking_do_not_keep_the_server() {
    let running = Running::start(options(), Arc::new(Only(Gate::new()))).await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let mut client = running.connect().await;
        client.open("x", true).await;
        let (mut reader, mut writer) = client.stream.into_split();
        clients.spawn(async move {
            let bytes = request(READ, 0, 1, 0, 1).repeat(100);
            while tokio::io::AsyncWriteExt::write_all(&mut writer, &bytes).await.is_ok() {}
        });
        clients.spawn(async move {
            // The end is a close or a reset, by what is under way at that moment.
            tokio::io::copy(&mut reader, &mut tokio::io::sink()).await.ok();
        });
    }
    until(|| running.server.counters().operation(Operation::Read).requests > 1000).await;
    timeout(Duration::from_secs(5), running.finish()).await.expect("long before the deadline");
    timeout(PATIENCE, clients.join_all()).await.unwrap();
}

#[tokio::test]
async fn two_listeners_of_a_server_share_caps_and_counters() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let options = Options { connections_max: 1, ..options() };
    let exports = Arc::new(MemoryExports::new([volume()]));
    let running = Running::start(options, exports.clone()).await;
    let listener = Listener::bind(&Listen::Unix(path.clone())).await.unwrap();
    let (server, stop) = (running.server.clone(), running.stop.clone());
    let second = tokio::spawn(async move { server.run(listener, exports, stop).await });
    let mut client = running.connect().await;
    client.open("vol0", true).await;
    let mut refused = tokio::net::UnixStream::connect(&path).await.unwrap();
    let mut bytes = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut refused, &mut bytes).await.unwrap();
    assert!(bytes.is_empty());
    assert_eq!(running.server.counters().connections_refused(), 1);
    running.finish().await;
    timeout(PATIENCE, second).await.unwrap().unwrap();
    assert!(!path.try_exists().unwrap());
}
