//! Server and client together, over real sockets in a temporary directory.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as PlainStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::client::{CallError, call};
use super::feed::Feed;
use super::message::{AdminError, Progress, ProgressSender, ProgressUnit, Request, code};
use super::server::{Admin, AdminServer, BindError};
use super::socket_path;
use crate::limits::{
    ADMIN_ANSWER_BYTES_MAX, ADMIN_CONNECTIONS_MAX, ADMIN_FOLLOWERS_MAX, ADMIN_MESSAGE_BYTES_MAX,
};

/// Answers status at once, reports progress on a checkpoint, panics on verify, and never ends a
/// pool check but notes when it is given up.
#[derive(Default)]
struct Fake {
    given_up: Arc<AtomicBool>,
    /// Pool checks begun.
    begun: Arc<AtomicUsize>,
}

/// A text of that many bytes, of characters of one and of three, and quoted ones.
fn long(bytes: u64) -> String {
    let pattern = "\"ab\u{20ac}\n".repeat(1 << 10);
    pattern.repeat(usize::try_from(bytes).unwrap() / pattern.len() + 1)
}

struct NoteDrop(Arc<AtomicBool>);

impl Drop for NoteDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Admin for Fake {
    #[expect(clippy::too_many_lines, reason = "a table: one answer a request")]
    fn handle(
        &self,
        request: Request,
        _feed: Feed,
        progress: ProgressSender,
    ) -> BoxFuture<'_, Result<Value, AdminError>> {
        let note = NoteDrop(Arc::clone(&self.given_up));
        let begun = Arc::clone(&self.begun);
        async move {
            match request {
                Request::Status { source: None } => Ok(json!({"schema": 1})),
                Request::Status { source: Some(name) } => {
                    let message = format!("no source {name} here");
                    Err(AdminError::new(code::UNKNOWN_SOURCE, message, "see mirrorhub status"))
                }
                Request::Checkpoint { .. } => {
                    for done in 1..=3 {
                        progress.send(Progress {
                            what: "applying".into(),
                            object: "filer-a".into(),
                            done,
                            total: Some(3),
                            unit: ProgressUnit::Steps,
                        });
                        tokio::time::sleep(Duration::from_millis(150)).await;
                    }
                    Ok(json!("x".repeat(10)))
                }
                Request::Verify { target: Some(target) } => {
                    let many = if target.source.as_str() == "all" {
                        ADMIN_ANSWER_BYTES_MAX
                    } else {
                        ADMIN_MESSAGE_BYTES_MAX
                    };
                    Ok(json!(long(many)))
                }
                Request::Verify { target: None } => panic!("a fault of the program"),
                Request::Kept { .. }
                | Request::Drop { .. }
                | Request::ConfigDiff {}
                | Request::Scrub { .. }
                | Request::DeviceList {}
                | Request::DeviceFail { .. }
                | Request::DeviceReplace { .. }
                | Request::DeviceAdd { .. }
                | Request::Forget { .. }
                | Request::Seed { .. }
                | Request::SeedDiscard { .. }
                | Request::Seeds {}
                | Request::Failover { .. }
                | Request::Failback { .. } => Ok(Value::Null),
                Request::Events { .. } => panic!("the server answers that"),
                Request::PoolCheck {} => {
                    begun.fetch_add(1, Ordering::SeqCst);
                    let _note = note;
                    // Progress all the while, so that a caller can see that it is waited for.
                    let mut done = 0;
                    loop {
                        done += 1;
                        let (what, object) = ("checking".into(), "pool".into());
                        let unit = ProgressUnit::Steps;
                        progress.send(Progress { what, object, done, total: None, unit });
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
        }
        .boxed()
    }
}

struct Running {
    directory: tempfile::TempDir,
    stop: CancellationToken,
    server: JoinHandle<()>,
    given_up: Arc<AtomicBool>,
    begun: Arc<AtomicUsize>,
}

impl Running {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = AdminServer::bind(directory.path()).await.unwrap();
        let stop = CancellationToken::new();
        let fake = Fake::default();
        let (given_up, begun) = (Arc::clone(&fake.given_up), Arc::clone(&fake.begun));
        let server = tokio::spawn(server.run(Arc::new(fake), stop.clone()));
        Self { directory, stop, server, given_up, begun }
    }

    async fn call(&self, request: Request) -> Result<Value, CallError> {
        call(&socket_path(self.directory.path()), &request, None, &mut |_| {}).await
    }

    fn plain(&self) -> PlainStream {
        plain(self.directory.path())
    }

    async fn end(self) {
        self.stop.cancel();
        self.server.await.unwrap();
        assert!(!socket_path(self.directory.path()).try_exists().unwrap());
    }
}

fn plain(directory: &Path) -> PlainStream {
    let stream = PlainStream::connect(socket_path(directory)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Everything the server says to `bytes` until it closes.
async fn said(mut stream: PlainStream, bytes: Vec<u8>) -> String {
    tokio::task::spawn_blocking(move || {
        stream.write_all(&bytes).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    })
    .await
    .unwrap()
}

fn refused(result: Result<Value, CallError>) -> AdminError {
    match result {
        Err(CallError::Refused(error)) => error,
        other => panic!("wanted a refusal, met {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_answered_with_result_or_error() {
    let running = Running::start().await;
    assert_eq!(running.call(Request::Status { source: None }).await.unwrap(), json!({"schema": 1}));
    let name = Some("filer-z".parse().unwrap());
    let error = refused(running.call(Request::Status { source: name }).await);
    assert_eq!(error.code, code::UNKNOWN_SOURCE);
    assert_eq!(error.next_step, "see mirrorhub status");
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_comes_before_the_result_and_only_the_newest() {
    let running = Running::start().await;
    let mut seen = Vec::new();
    let socket = socket_path(running.directory.path());
    let request = Request::Checkpoint { source: None, keep: None };
    let result =
        call(&socket, &request, None, &mut |progress| seen.push(progress.done)).await.unwrap();
    assert_eq!(result, json!("xxxxxxxxxx"));
    assert!(!seen.is_empty() && seen.is_sorted(), "{seen:?}");
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_command_is_an_error_of_that_command_only() {
    let running = Running::start().await;
    let error = refused(running.call(Request::Verify { target: None }).await);
    assert_eq!(error.code, code::INTERNAL);
    running.call(Request::Status { source: None }).await.unwrap();
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_large_is_replaced_by_its_reason() {
    let running = Running::start().await;
    let target = Some("all".parse().unwrap());
    let error = refused(running.call(Request::Verify { target }).await);
    assert_eq!(error.code, code::TOO_LARGE);
    running.end().await;
}

/// The status of a full hub does not fit one message: it comes in parts, whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_answer_comes_in_parts() {
    let running = Running::start().await;
    let target = Some("a".parse().unwrap());
    let answer = running.call(Request::Verify { target }).await.unwrap();
    assert!(answer == json!(long(ADMIN_MESSAGE_BYTES_MAX)), "another answer");
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_a_reason_and_hurt_nobody() {
    let running = Running::start().await;
    let long = vec![b'x'; usize::try_from(ADMIN_MESSAGE_BYTES_MAX).unwrap()];
    let cases: [(Vec<u8>, &str); 3] = [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "no JSON"),
        (long, "longer than"),
        (b"{\"schema\":1,\"command\":\"status\"}".to_vec(), "no request within"),
    ];
    for (bytes, part) in cases {
        let text = said(running.plain(), bytes).await;
        assert!(text.contains("bad-request") && text.contains(part), "{text}");
    }
    let silent = said(running.plain(), Vec::new()).await;
    assert!(silent.contains("no request within"), "{silent}");
    running.call(Request::Status { source: None }).await.unwrap();
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_ends_its_command() {
    let running = Running::start().await;
    let mut stream = running.plain();
    stream.write_all(b"{\"schema\":1,\"command\":\"pool-check\"}\n").unwrap();
    // Half closed: the caller still waits, and hears on.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let (stream, lines) = tokio::task::spawn_blocking(move || {
        let mut reader = std::io::BufReader::new(stream);
        let mut lines = String::new();
        for _ in 0..3 {
            std::io::BufRead::read_line(&mut reader, &mut lines).unwrap();
        }
        (reader, lines)
    })
    .await
    .unwrap();
    assert_eq!(lines.matches("\"progress\"").count(), 3, "{lines}");
    assert!(!running.given_up.load(Ordering::SeqCst), "a caller that waits was given up");
    drop(stream);
    let given_up = async {
        while !running.given_up.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), given_up).await.expect("command goes on");
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_tells_those_who_wait() {
    let running = Running::start().await;
    let waiting = said(running.plain(), b"{\"schema\":1,\"command\":\"pool-check\"}\n".to_vec());
    let waiting = tokio::spawn(waiting);
    let begun = async {
        while running.begun.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), begun).await.expect("the command begins");
    running.end().await;
    assert!(waiting.await.unwrap().contains(code::STOPPING));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_capped_and_the_next_one_hears_why() {
    let running = Running::start().await;
    let mut held = Vec::new();
    for _ in 0..ADMIN_CONNECTIONS_MAX {
        let mut stream = running.plain();
        stream.write_all(b"{\"schema\":1,\"command\":\"pool-check\"}\n").unwrap();
        held.push(stream);
    }
    // Each of them, however new its connection is when the reason is written.
    for _ in 0..100 {
        let text = said(running.plain(), Vec::new()).await;
        assert!(text.contains(code::BUSY), "{text:?}");
    }
    drop(held);
    let free = async {
        while running.call(Request::Status { source: None }).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), free).await.expect("places come back");
    running.end().await;
}

/// Goal: readers that wait for events take no place of a command, however many they are; one too many
/// hears why, and can read without waiting; who goes away makes room before the next event comes.
#[tokio::test(flavor = "multi_thread")]
async fn readers_of_events_keep_nobody_out() {
    let running = Running::start().await;
    let events = |wait| Request::Events { boot: None, since: 0, wait };
    let waits = b"{\"schema\":1,\"command\":\"events\",\"since\":0,\"wait\":true}\n";
    let mut held = Vec::new();
    while held.len() < ADMIN_FOLLOWERS_MAX {
        let mut stream = running.plain();
        stream.write_all(waits).unwrap();
        held.push(stream);
    }
    // Each of them is refused or has its place: none waits for the place of a command.
    let full = async {
        loop {
            let asked =
                tokio::time::timeout(Duration::from_millis(200), running.call(events(true)));
            if let Ok(Err(error)) = asked.await {
                break refused(Err(error));
            }
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(20), full).await.expect("it gets full");
    assert_eq!(error.code, code::BUSY);
    assert!(error.message.contains("readers") && !error.next_step.is_empty(), "{error:?}");
    // Nothing has happened meanwhile: they go, and their places are there again.
    drop(held);
    let again = async {
        while let Ok(asked) =
            tokio::time::timeout(Duration::from_millis(200), running.call(events(true))).await
        {
            assert_eq!(refused(asked).code, code::BUSY);
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again).await.expect("places come back");
    let mut held = Vec::new();
    while held.len() < ADMIN_FOLLOWERS_MAX / 2 {
        let mut stream = running.plain();
        stream.write_all(waits).unwrap();
        held.push(stream);
    }
    // All places of commands are there, but for the one that is asked with.
    for begun in 1..ADMIN_CONNECTIONS_MAX {
        let mut stream = running.plain();
        stream.write_all(b"{\"schema\":1,\"command\":\"pool-check\"}\n").unwrap();
        held.push(stream);
        let under_way = async {
            while running.begun.load(Ordering::SeqCst) < begun {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), under_way).await.expect("a place");
    }
    running.call(events(false)).await.unwrap();
    running.call(Request::Status { source: None }).await.unwrap();
    running.end().await;
}

#[tokio::test]
async fn the_socket_is_private_and_only_a_stale_one_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = socket_path(directory.path());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.try_exists().unwrap(), "a dead process leaves its socket behind");
    let server = AdminServer::bind(directory.path()).await.unwrap();
    for private in [&path, &path.with_extension("lock")] {
        assert_eq!(std::fs::metadata(private).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let second = AdminServer::bind(directory.path()).await;
    assert!(matches!(second, Err(BindError::AlreadyRunning { .. })), "{second:?}");
    drop(server);

    // Somebody answers who does not hold our lock.
    std::fs::remove_file(&path).unwrap();
    let living = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let beside = AdminServer::bind(directory.path()).await;
    assert!(matches!(beside, Err(BindError::AlreadyRunning { .. })), "{beside:?}");
    drop(living);

    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a file of somebody").unwrap();
    let file = AdminServer::bind(directory.path()).await;
    assert!(matches!(file, Err(BindError::NotASocket { .. })), "{file:?}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file of somebody");
}

#[tokio::test]
async fn nobody_there_is_unreachable_and_silence_ends() {
    let directory = tempfile::tempdir().unwrap();
    let socket = socket_path(directory.path());
    let request = Request::Status { source: None };
    let result = call(&socket, &request, None, &mut |_| {}).await;
    assert!(matches!(result, Err(CallError::Unreachable { .. })), "{result:?}");

    let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let patience = Some(Duration::from_millis(50));
    let result = call(&socket, &request, patience, &mut |_| {}).await;
    assert!(matches!(result, Err(CallError::Broken { .. })), "{result:?}");
}
