//! Routes and answers of the HTTP listener.
//!
//! Called by the `hub` and `source` commands: bind, then [`serve`] until stopped.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::sse::{self, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream;
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Deserialize;
use serde_json::json;
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::encrypted::Encrypted;
use super::listener::Bounded;
use super::live::Live;
use super::page;
use super::plain::Plain;
use crate::limits::{
    HTTP_CONNECTIONS_MAX, HTTP_IDLE_SECONDS_MAX, HTTP_STOP_SECONDS_MAX, METRIC_UPKEEP_SECONDS,
};
use crate::link::plain::PlainDoor;
use crate::link::tls::ServedTls;
use crate::metric::catalogue::HEALTH_STATUS;
use crate::status::SCHEMA;
use crate::status::answers::Event;
use crate::status::document::StatusDocument;
use crate::status::health::HealthWord;
use crate::units::entrance;

/// What the process publishes. Every function returns at once, from copies: it is called on an
/// async thread, and never takes a lock of the data path.
pub trait Observed: Send + Sync + 'static {
    /// Sets the gauges and absolute counters that are only brought up to date when somebody looks.
    fn collect(&self);

    /// The document of `mirrorhub status --json`.
    fn status(&self) -> StatusDocument;

    /// What has happened since the last call that no state in status shows afterwards. One reader.
    fn news(&self) -> Vec<News> {
        Vec::new()
    }
}

/// Something that has happened, for `mirrorhub events`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Whom it is about.
    pub object: String,
    /// What.
    pub what: String,
    /// With what result.
    pub result: String,
}

/// The newest events of the process from that number on, at most so many, oldest first.
pub type Events = Arc<dyn Fn(u64, usize) -> Vec<Event> + Send + Sync>;

/// Where HTTP is served.
#[derive(Debug)]
pub enum HttpListener {
    /// A TCP port; loopback.
    Tcp(TcpListener),
    /// A TCP port for clients of known networks.
    Plain(TcpListener, Arc<PlainDoor>),
    /// A TCP port behind TLS.
    Tls(TcpListener, Arc<ServedTls>),
    /// A unix socket.
    Unix(UnixListener),
}

/// Why HTTP cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("http_listen: cannot listen on {address}: {error}")]
pub struct ListenError {
    /// As configured.
    pub address: String,
    /// The kernel's answer.
    pub error: io::Error,
}

impl HttpListener {
    /// Binds a TCP address.
    pub fn tcp(address: std::net::SocketAddr) -> Result<Self, ListenError> {
        entrance::listen(address)
            .map(Self::Tcp)
            .map_err(|error| ListenError { address: address.to_string(), error })
    }

    /// Binds a unix socket; one left behind by a process that died must be gone already.
    pub fn unix(path: &Path) -> Result<Self, ListenError> {
        UnixListener::bind(path)
            .map(Self::Unix)
            .map_err(|error| ListenError { address: format!("unix:{}", path.display()), error })
    }

    /// Has TCP connections encrypted; or, in the clear, those of known networks only taken.
    #[must_use]
    pub fn behind(self, tls: Option<Arc<ServedTls>>, plain: Option<Arc<PlainDoor>>) -> Self {
        match (self, tls, plain) {
            (Self::Tcp(tcp), Some(tls), _) => Self::Tls(tcp, tls),
            (Self::Tcp(tcp), None, Some(door)) => Self::Plain(tcp, door),
            (other, _, _) => other,
        }
    }

    /// The address in words, with the port that was chosen if none was asked for.
    pub fn describe(&self) -> String {
        match self {
            Self::Tcp(tcp) | Self::Plain(tcp, _) | Self::Tls(tcp, _) => {
                tcp.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string())
            }
            Self::Unix(unix) => {
                let path = unix.local_addr().ok();
                let path = path.and_then(|address| address.as_pathname().map(PathBuf::from));
                format!("unix:{}", path.unwrap_or_default().display())
            }
        }
    }
}

#[derive(Clone)]
struct Shared {
    observed: Arc<dyn Observed>,
    metrics: PrometheusHandle,
    live: Arc<Live>,
}

/// Serves until `stop`; requests under way are finished first, within some seconds. Also keeps the
/// recorder tidy.
///
/// # Errors
/// If the listener itself fails; a bad client never does that.
pub async fn serve(
    listener: HttpListener,
    (observed, events): (Arc<dyn Observed>, Events),
    metrics: PrometheusHandle,
    stop: CancellationToken,
) -> io::Result<()> {
    let idle_max = Duration::from_secs(HTTP_IDLE_SECONDS_MAX);
    let live = Live::new(stop.clone());
    let shared =
        Shared { observed: observed.clone(), metrics: metrics.clone(), live: live.clone() };
    let app = router(shared);
    let stopped = stop.clone().cancelled_owned();
    let served = async {
        match listener {
            HttpListener::Tcp(tcp) => {
                let bounded = Bounded::new(tcp, HTTP_CONNECTIONS_MAX, idle_max);
                axum::serve(bounded, app).with_graceful_shutdown(stopped).await
            }
            HttpListener::Plain(tcp, door) => {
                let bounded = Bounded::new(Plain::new(tcp, door), HTTP_CONNECTIONS_MAX, idle_max);
                axum::serve(bounded, app).with_graceful_shutdown(stopped).await
            }
            HttpListener::Tls(tcp, tls) => {
                let encrypted = Encrypted::new(tcp, tls);
                let bounded = Bounded::new(encrypted, HTTP_CONNECTIONS_MAX, idle_max);
                axum::serve(bounded, app).with_graceful_shutdown(stopped).await
            }
            HttpListener::Unix(unix) => {
                let bounded = Bounded::new(unix, HTTP_CONNECTIONS_MAX, idle_max);
                axum::serve(bounded, app).with_graceful_shutdown(stopped).await
            }
        }
    };
    tokio::select! {
        result = served => result,
        () = upkeep(metrics) => Ok(()),
        () = live.run(&observed, &events) => Ok(()),
        () = overdue(&stop) => Ok(()),
    }
}

/// A reader that does not read holds up the end of the process for this long and no longer.
async fn overdue(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(Duration::from_secs(HTTP_STOP_SECONDS_MAX)).await;
}

/// Histograms gather samples until somebody renders or this runs: without it a process that nobody
/// scrapes would grow.
async fn upkeep(metrics: PrometheusHandle) {
    let mut tick = interval(Duration::from_secs(METRIC_UPKEEP_SECONDS));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        metrics.run_upkeep();
    }
}

/// `get` answers HEAD as well and every other method with 405 and `Allow: GET,HEAD`.
fn router(shared: Shared) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(health))
        .route("/api/v1/status", get(status))
        .route("/api/v1/live", get(live))
        .route("/api/v1/history", get(history))
        .route("/", get(page::html))
        .route("/page.css", get(page::css))
        .route("/page.js", get(page::script))
        .fallback(not_found)
        .with_state(shared)
}

const NO_STORE: (HeaderName, &str) = (header::CACHE_CONTROL, "no-store");

async fn metrics_text(State(shared): State<Shared>) -> Response {
    shared.observed.collect();
    super::recorder::tell_build();
    let level = shared.observed.status().health().word.level();
    metrics::gauge!(HEALTH_STATUS.name).set(f64::from(level));
    let content = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([content, NO_STORE], shared.metrics.render()).into_response()
}

/// 200 while the process does its work, warnings included; 503 when its health is critical.
async fn health(State(shared): State<Shared>) -> Response {
    let document = shared.observed.status();
    let health = document.health();
    let code = match health.word {
        HealthWord::Ok | HealthWord::Warning => StatusCode::OK,
        HealthWord::Critical => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = json!({ "schema": SCHEMA, "health": health });
    (code, [NO_STORE], axum::Json(body)).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    ([NO_STORE], axum::Json(shared.observed.status())).into_response()
}

/// Server-sent events: everything at first, then each second what changed.
async fn live(State(shared): State<Shared>) -> Response {
    let Some(watcher) = shared.live.watch() else {
        let body =
            json!({ "schema": SCHEMA, "error": "too many pages are open; this one tries again" });
        return (StatusCode::SERVICE_UNAVAILABLE, [NO_STORE], axum::Json(body)).into_response();
    };
    let events = stream::unfold(watcher, |mut watcher| async move {
        let news = watcher.next().await?;
        Some((Ok::<_, Infallible>(sse::Event::default().data(news)), watcher))
    });
    ([NO_STORE], Sse::new(events)).into_response()
}

#[derive(Deserialize)]
struct Of {
    source: Option<String>,
}

async fn history(State(shared): State<Shared>, Query(of): Query<Of>) -> Response {
    match shared.live.history(of.source.as_deref()) {
        Some(history) => ([NO_STORE], axum::Json(history)).into_response(),
        None => {
            let body = json!({ "schema": SCHEMA, "error": "no such source" });
            (StatusCode::NOT_FOUND, axum::Json(body)).into_response()
        }
    }
}

async fn not_found() -> Response {
    let body = json!({
        "schema": SCHEMA,
        "error": "there is /, /metrics, /healthz, /api/v1/status, /api/v1/live and /api/v1/history",
    });
    (StatusCode::NOT_FOUND, axum::Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::metric::catalogue::NVRAM_USED_BYTES;
    use crate::status::document::NvramStatus;

    /// Its ring fills by one percent with each collection; critical on command.
    #[derive(Default)]
    struct Fake {
        collected: AtomicU64,
        critical: Mutex<bool>,
    }

    /// A process of which nothing is told.
    fn none() -> Events {
        Arc::new(|_, _| Vec::new())
    }

    impl Observed for Fake {
        fn collect(&self) {
            self.collected.fetch_add(1, Ordering::SeqCst);
        }

        fn status(&self) -> StatusDocument {
            let nvram = NvramStatus {
                used_bytes: self.collected.load(Ordering::SeqCst),
                capacity_bytes: 100,
                durability: "simulated".into(),
            };
            let pool = self.critical.lock().unwrap().then(|| crate::status::document::PoolStatus {
                total_bytes: 100,
                free_bytes: 0,
                used_bytes: 100,
                kept_bytes: 0,
                pinned_bytes: 0,
                ..Default::default()
            });
            StatusDocument::hub(Vec::new(), Some(nvram), pool)
        }
    }

    struct Running {
        address: SocketAddr,
        fake: Arc<Fake>,
        stop: CancellationToken,
        server: tokio::task::JoinHandle<io::Result<()>>,
    }

    impl Running {
        async fn start() -> Self {
            let listener = HttpListener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
            let address = listener.describe().parse().unwrap();
            let recorder = super::super::recorder::builder().unwrap().build_recorder();
            let handle = recorder.handle();
            metrics::with_local_recorder(&recorder, || {
                metrics::gauge!(NVRAM_USED_BYTES.name).set(7.0);
            });
            let fake = Arc::new(Fake::default());
            let stop = CancellationToken::new();
            let observed: Arc<dyn Observed> = fake.clone();
            let server = tokio::spawn(serve(listener, (observed, none()), handle, stop.clone()));
            Self { address, fake, stop, server }
        }

        async fn ask(&self, method: &str, path: &str) -> String {
            let request =
                format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
            let address = self.address;
            tokio::task::spawn_blocking(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(request.as_bytes()).unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                text
            })
            .await
            .unwrap()
        }

        async fn end(self) {
            self.stop.cancel();
            self.server.await.unwrap().unwrap();
            assert!(TcpStream::connect(self.address).is_err(), "still listening after the end");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn metrics_are_collected_then_rendered() {
        let running = Running::start().await;
        let text = running.ask("GET", "/metrics").await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.contains("content-type: text/plain; version=0.0.4"), "{text}");
        assert!(text.contains("mirrorhub_nvram_used_bytes 7\n"), "{text}");
        assert_eq!(running.fake.collected.load(Ordering::SeqCst), 1);
        running.end().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn health_is_503_only_when_critical() {
        let running = Running::start().await;
        let text = running.ask("GET", "/healthz").await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        running.fake.collected.store(95, Ordering::SeqCst);
        let text = running.ask("GET", "/healthz").await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("nvram-nearly-full"));
        *running.fake.critical.lock().unwrap() = true;
        let text = running.ask("GET", "/healthz").await;
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        assert!(text.contains("\"code\":\"pool-full\""), "{text}");
        running.end().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_get_and_head_and_only_known_paths() {
        let running = Running::start().await;
        let text = running.ask("GET", "/api/v1/status").await;
        assert!(text.contains("{\"schema\":1,\"sources\":[],\"nvram\":{"), "{text}");
        let head = running.ask("HEAD", "/api/v1/status").await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            for path in ["/metrics", "/healthz", "/api/v1/status"] {
                let text = running.ask(method, path).await;
                assert!(text.starts_with("HTTP/1.1 405 "), "{method} {path}: {text}");
            }
        }
        assert!(running.ask("GET", "/../etc/passwd").await.starts_with("HTTP/1.1 404 "));
        running.end().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_oldest_silent_connection_makes_room() {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let bounded = Bounded::new(tcp, 2, Duration::from_secs(20));
        let app = Router::new().route("/", get(|| async { "here" }));
        let server = tokio::spawn(async move { axum::serve(bounded, app).await });
        let silent: Vec<TcpStream> = (0..2).map(|_| TcpStream::connect(address).unwrap()).collect();
        // Both places are taken: the older of the two makes room at once.
        let began = std::time::Instant::now();
        let answer = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
        .await
        .unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        assert!(began.elapsed() < Duration::from_secs(10), "a newcomer waited for idle ones");
        let mut silent = silent;
        assert_eq!(silent[0].read(&mut [0; 1]).unwrap(), 0, "the oldest is closed");
        silent[1].set_nonblocking(true).unwrap();
        let kept = silent[1].read(&mut [0; 1]).unwrap_err();
        assert_eq!(kept.kind(), io::ErrorKind::WouldBlock, "the other one stays");
        server.abort();
    }

    /// Goal: a client that is served keeps its connection, whatever number of silent ones comes. Control: as many
    /// that are served, as there are places, do push it out.
    #[tokio::test(flavor = "multi_thread")]
    async fn silent_newcomers_do_not_push_out_who_is_served() {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let bounded = Bounded::new(tcp, 4, Duration::from_secs(20));
        let app = Router::new().route("/", get(|| async { "here" }));
        let server = tokio::spawn(async move { axum::serve(bounded, app).await });
        let asking = tokio::task::spawn_blocking(move || {
            let connect = || {
                let stream = TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
                stream
            };
            let ask = |stream: &mut TcpStream| {
                stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").ok()?;
                let mut text = Vec::new();
                while !text.ends_with(b"here") {
                    let mut part = [0; 512];
                    let count = stream.read(&mut part).ok().filter(|count| *count > 0)?;
                    text.extend_from_slice(&part[..count]);
                }
                Some(())
            };
            let mut served = connect();
            ask(&mut served).expect("an answer");
            let mut silent: Vec<_> = (0..12).map(|_| connect()).collect();
            // All but the last ones are closed by then.
            assert_eq!(silent[8].read(&mut [0; 1]).unwrap(), 0);
            ask(&mut served).expect("it is still there");
            let others: Vec<_> = (0..4)
                .map(|_| {
                    let mut stream = connect();
                    ask(&mut stream).expect("newcomers are served");
                    stream
                })
                .collect();
            assert!(ask(&mut served).is_none(), "the one that was served longest ago is closed");
            drop(others);
        });
        asking.await.unwrap();
        server.abort();
    }

    /// Goal: a request that comes in drops has one deadline; no byte of it puts that off.
    /// Method: both places are taken by clients that send a byte of a header all the while; each is
    /// closed, and a third is served.
    #[tokio::test(flavor = "multi_thread")]
    async fn trickling_requests_are_cut_and_their_places_come_back() {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let bounded = Bounded::new(tcp, 2, Duration::from_millis(300));
        let app = Router::new().route("/", get(|| async { "here" }));
        let server = tokio::spawn(async move { axum::serve(bounded, app).await });
        let cut = Arc::new(AtomicU64::new(0));
        let tricklers: Vec<_> = (0..2)
            .map(|_| {
                let mut stream = TcpStream::connect(address).unwrap();
                let cut = Arc::clone(&cut);
                std::thread::spawn(move || {
                    stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
                    stream.write_all(b"GET / HTTP/1.1\r\nx: ").unwrap();
                    // The read is the pause between two bytes.
                    while stream.write_all(b"x").is_ok() {
                        if matches!(stream.read(&mut [0; 64]), Ok(0)) {
                            break;
                        }
                    }
                    cut.fetch_add(1, Ordering::SeqCst);
                })
            })
            .collect();
        let answer = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            for trickler in tricklers {
                trickler.join().unwrap();
            }
            text
        });
        let answer = tokio::time::timeout(Duration::from_secs(40), answer);
        let answer = answer.await.expect("the tricklers are cut").unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        assert_eq!(cut.load(Ordering::SeqCst), 2);
        server.abort();
    }
}
