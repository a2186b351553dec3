//! The commands as a user types them, the real binary against an admin socket whose answers are
//! known: what is printed, and with which exit code (section 13).

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use mirrorhub::control::feed::Feed;
use mirrorhub::control::message::{AdminError, ProgressSender, Request, code};
use mirrorhub::control::server::{Admin, AdminServer};
use mirrorhub::status::answers::{
    CheckpointAnswer, CheckpointOfSource, DropAnswer, FailbackAnswer, FailoverAnswer, ForgetAnswer,
    KeptAnswer, KeptCp, KeptOfSource, Verdict, VerifyAnswer, VerifyOfEnd, VerifyOfVolume,
    VolumeRoot,
};
use mirrorhub::status::config::{ConfigChange, ConfigDiffAnswer};
use mirrorhub::status::document::{SourceEntry, State, StatusDocument, WaitsStatus};
use mirrorhub::units::hash::Root;
use mirrorhub::units::names::SourceName;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

const BINARY: &str = env!("CARGO_BIN_EXE_mirrorhub");

/// A hub with one source in that state, whose verify finds both ends equal or not.
#[derive(Clone, Copy)]
struct Fake {
    state: State,
    verdict: Verdict,
}

fn entry(state: State) -> SourceEntry {
    SourceEntry {
        name: "filer-a".parse().unwrap(),
        id: None,
        state,
        reason: "because of the test".into(),
        next_step: "end the test".into(),
        policy: None,
        policy_next: None,
        alone_since: None,
        resync: None,
        epoch: 1,
        generation: 1,
        applied_cp: Some(7),
        image_age_seconds: Some(0.0),
        lag_bytes: Some(0),
        lag_seconds: Some(0.0),
        acknowledged_bytes: 4096,
        staged_bytes: 4096,
        drained_bytes: Some(4096),
        applied_bytes: Some(4096),
        visible_bytes: 4096,
        pool_used_bytes: None,
        pool_limit_bytes: None,
        seeds: Vec::new(),
        volumes: Vec::new(),
        waits: WaitsStatus::default(),
    }
}

fn kept_of_source() -> KeptOfSource {
    let volumes = vec![VolumeRoot { name: "vol0".parse().unwrap(), root: Root([0xab; 32]) }];
    let (name, kept_at) = ("mon".parse().unwrap(), 1_795_273_400);
    let kept = KeptCp { name, cp: 7, held_bytes: 8192, kept_at, volumes };
    KeptOfSource { name: "filer-a".parse().unwrap(), kept: vec![kept] }
}

impl Fake {
    fn answer_kept(request: Request) -> Result<Value, AdminError> {
        let json = |value: Result<Value, serde_json::Error>| Ok(value.unwrap());
        match request {
            Request::Kept { .. } => {
                let source = kept_of_source();
                json(serde_json::to_value(KeptAnswer { schema: 1, sources: vec![source] }))
            }
            Request::Drop { target } if target.name.as_str() != "mon" => {
                let message = format!("{target} is not dropped: it is not kept");
                Err(AdminError::new(code::UNKNOWN_KEPT, message, "mirrorhub kept lists them"))
            }
            Request::Drop { target } => json(serde_json::to_value(DropAnswer {
                schema: 1,
                source: target.source,
                name: target.name,
                cp: 7,
                freed_bytes: 8192,
            })),
            Request::Failover { accept_gap: false, .. } => {
                let next = "`mirrorhub failover --accept-gap`";
                Err(AdminError::new(code::REFUSED, "the log has a gap", next))
            }
            Request::Failover { source, dry_run, .. } => {
                json(serde_json::to_value(FailoverAnswer {
                    schema: 1,
                    source,
                    dry_run,
                    outcome: "up-to-gap".into(),
                    epoch: 2,
                    cp: 9,
                    sequence: 40,
                    entries: 3,
                    bytes: 4096,
                    may_be_lost: true,
                    applied: true,
                    sentences: vec!["failed over with entry 40".into()],
                    next_step: "give it back".into(),
                }))
            }
            other @ (Request::Status { .. }
            | Request::Failback { .. }
            | Request::Checkpoint { .. }
            | Request::Verify { .. }
            | Request::ConfigDiff {}
            | Request::Forget { .. }
            | Request::Seed { .. }
            | Request::SeedDiscard { .. }
            | Request::Seeds {}
            | Request::Events { .. }
            | Request::PoolCheck { .. }
            | Request::Scrub { .. }
            | Request::DeviceList {}
            | Request::DeviceFail { .. }
            | Request::DeviceReplace { .. }
            | Request::DeviceAdd { .. }) => panic!("{other:?} is answered elsewhere"),
        }
    }

    fn answer_failback(source: SourceName, named: bool) -> Result<Value, AdminError> {
        if !named {
            let next = "`mirrorhub failback filer-a --keep hub`";
            return Err(AdminError::new(code::REFUSED, "split brain", next));
        }
        let answer = FailbackAnswer {
            schema: 1,
            source,
            epoch: 3,
            cp: 9,
            rounds: 2,
            pause_ms: 80,
            serves: true,
            kept: Some("split-2".parse().unwrap()),
            kept_on_hub: None,
            dry_run: false,
            sentences: vec!["given back".into()],
            next_step: String::new(),
        };
        Ok(serde_json::to_value(answer).unwrap())
    }

    #[expect(clippy::too_many_lines, reason = "a table: one answer a request")]
    fn answer(self, request: Request) -> Result<Value, AdminError> {
        let json = |value: Result<Value, serde_json::Error>| Ok(value.unwrap());
        match request {
            Request::Status { source: Some(name) } if name.as_str() != "filer-a" => {
                let message = format!("there is no source {name}");
                Err(AdminError::new(code::UNKNOWN_SOURCE, message, "mirrorhub status lists them"))
            }
            Request::Status { .. } => {
                let document = StatusDocument::hub(vec![entry(self.state)], None, None);
                json(serde_json::to_value(document))
            }
            Request::Checkpoint { .. } => {
                let root = Root([0xab; 32]);
                let volumes = vec![VolumeRoot { name: "vol0".parse().unwrap(), root }];
                let source =
                    CheckpointOfSource { name: "filer-a".parse().unwrap(), cp: 8, volumes };
                json(serde_json::to_value(CheckpointAnswer {
                    schema: 1,
                    sources: vec![source],
                    failed: Vec::new(),
                }))
            }
            Request::Verify { .. } => {
                let end = |byte| VerifyOfEnd {
                    root: Some(Root([byte; 32])),
                    blocks_read: 1,
                    bad_blocks: 0,
                };
                let (mut source_end, hub_end) = (end(1), end(1));
                match self.verdict {
                    Verdict::Equal => {}
                    Verdict::Differ => source_end = end(2),
                    Verdict::Unproven => source_end.root = None,
                }
                assert_eq!(Verdict::of(&source_end, &hub_end), self.verdict);
                let volume = VerifyOfVolume {
                    source: "filer-a".parse().unwrap(),
                    volume: "vol0".parse().unwrap(),
                    cp: 8,
                    verdict: self.verdict,
                    equal: self.verdict == Verdict::Equal,
                    source_end,
                    hub_end,
                };
                json(serde_json::to_value(VerifyAnswer::of(vec![volume], Vec::new())))
            }
            Request::Failback { source, keep, .. } => Self::answer_failback(source, keep.is_some()),
            other @ (Request::Kept { .. } | Request::Drop { .. } | Request::Failover { .. }) => {
                Self::answer_kept(other)
            }
            Request::Forget { source } => json(serde_json::to_value(ForgetAnswer {
                schema: 1,
                source,
                volumes: 1,
                kept: 2,
                freed_bytes: 8192,
            })),
            Request::ConfigDiff {} => {
                let change = ConfigChange {
                    key: "replication.mode".into(),
                    from: "sync".into(),
                    to: "async".into(),
                    when: "next-cp".into(),
                };
                let (changes, problems) = (vec![change], Vec::new());
                json(serde_json::to_value(ConfigDiffAnswer { schema: 1, changes, problems }))
            }
            Request::PoolCheck {}
            | Request::Seed { .. }
            | Request::SeedDiscard { .. }
            | Request::Seeds {}
            | Request::Events { .. }
            | Request::Scrub { .. }
            | Request::DeviceList {}
            | Request::DeviceFail { .. }
            | Request::DeviceReplace { .. }
            | Request::DeviceAdd { .. } => {
                Err(AdminError::new(code::FAILED, "there is no pool here", ""))
            }
        }
    }
}

impl Admin for Fake {
    fn handle(
        &self,
        request: Request,
        _feed: Feed,
        _progress: ProgressSender,
    ) -> BoxFuture<'_, Result<Value, AdminError>> {
        let fake = *self;
        async move { fake.answer(request) }.boxed()
    }
}

/// A directory with a configuration, and the process that belongs to it.
struct Running {
    directory: tempfile::TempDir,
    stop: CancellationToken,
    runtime: tokio::runtime::Runtime,
}

impl Running {
    fn start(fake: Fake) -> Self {
        let directory = configured();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let stop = CancellationToken::new();
        let data_dir = directory.path().join("hub-state");
        let server = runtime.block_on(AdminServer::bind(&data_dir)).unwrap();
        runtime.spawn(server.run(Arc::new(fake), stop.clone()));
        Self { directory, stop, runtime }
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("hub.toml")
    }

    fn end(self) {
        self.stop.cancel();
        self.runtime.shutdown_timeout(std::time::Duration::from_secs(10));
    }
}

fn configured() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path();
    std::fs::create_dir_all(base.join("hub-state")).unwrap();
    std::fs::create_dir_all(base.join("sources.d")).unwrap();
    let text = "[pool]\ndevices = [{ path = \"hub-state/disk0\", size = \"1GiB\" }]\n";
    std::fs::write(base.join("hub.toml"), text).unwrap();
    directory
}

fn mirrorhub(config: Option<&Path>, arguments: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(arguments).env_remove("MIRRORHUB_CONFIG").stdin(Stdio::null());
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    command.output().unwrap()
}

/// Exit code, stdout, stderr.
fn said(output: &Output) -> (i32, String, String) {
    (
        output.status.code().unwrap(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn status_is_shown_printed_and_checked() {
    for (state, level, word) in
        [(State::InSync, 0, "OK"), (State::Behind, 1, "WARNING"), (State::Offline, 2, "CRITICAL")]
    {
        let running = Running::start(Fake { state, verdict: Verdict::Equal });
        let config = running.config();
        let (code, out, error) = said(&mirrorhub(Some(&config), &["status"]));
        assert_eq!((code, error.as_str()), (0, ""));
        assert!(out.contains(&format!("filer-a  {}", sign(state))), "{out}");
        assert!(!out.contains('\x1b'), "colours in a pipe: {out}");
        let (code, out, _) = said(&mirrorhub(Some(&config), &["status", "--json"]));
        let document: StatusDocument = serde_json::from_str(&out).unwrap();
        assert_eq!((code, &*document.sources()), (0, &[entry(state)][..]));
        let (code, out, _) = said(&mirrorhub(Some(&config), &["status", "--check"]));
        assert_eq!(code, level);
        assert!(out.starts_with(&format!("MIRRORHUB {word} - ")), "{out}");
        running.end();
    }
}

fn sign(state: State) -> String {
    let sign = match state.word().level() {
        0 => '\u{25cf}',
        1 => '\u{25b2}',
        _ => '\u{2716}',
    };
    format!("{sign} {state}")
}

#[test]
fn a_difference_of_the_configuration_is_shown_key_by_key() {
    let running = Running::start(Fake { state: State::InSync, verdict: Verdict::Equal });
    let config = running.config();
    let (code, out, error) = said(&mirrorhub(Some(&config), &["config", "diff"]));
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(out, "replication.mode  sync -> async, behind the next CP\n");
    let (_, out, _) = said(&mirrorhub(Some(&config), &["config", "diff", "--json"]));
    let answer: ConfigDiffAnswer = serde_json::from_str(&out).unwrap();
    assert_eq!(answer.changes[0].when, "next-cp");
    running.end();
}

#[test]
fn an_unknown_source_is_a_failure_with_a_next_step() {
    let running = Running::start(Fake { state: State::InSync, verdict: Verdict::Equal });
    let (code, out, error) = said(&mirrorhub(Some(&running.config()), &["status", "filer-z"]));
    assert_eq!((code, out.as_str()), (1, ""));
    let wanted = "error: status: there is no source filer-z\n  next: mirrorhub status lists them\n";
    assert_eq!(error, wanted);
    let (code, _, _) = said(&mirrorhub(Some(&running.config()), &["status", "filer-z", "--check"]));
    assert_eq!(code, 3);
    running.end();
}

#[test]
fn checkpoint_prints_its_number_and_roots() {
    let running = Running::start(Fake { state: State::InSync, verdict: Verdict::Equal });
    let (code, out, error) = said(&mirrorhub(Some(&running.config()), &["checkpoint", "filer-a"]));
    let root = "ab".repeat(32);
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(out, format!("filer-a: CP 8 is published\n  vol0  {root}\n"));
    let (code, out, _) = said(&mirrorhub(Some(&running.config()), &["checkpoint", "--json"]));
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["sources"][0]["cp"], &answer["schema"]), (0, &8.into(), &1.into()));
    running.end();
}

#[test]
fn kept_cps_are_listed_and_dropped_only_when_told_twice() {
    let running = Running::start(Fake { state: State::InSync, verdict: Verdict::Equal });
    let config = running.config();
    let (code, out, error) = said(&mirrorhub(Some(&config), &["checkpoint", "--keep", "mon"]));
    assert_eq!((code, error.as_str()), (0, ""));
    assert!(out.starts_with("filer-a: CP 8 is published and kept as mon\n"), "{out}");
    let (code, out, _) = said(&mirrorhub(Some(&config), &["kept"]));
    assert_eq!(code, 0);
    assert!(
        out.starts_with("filer-a@mon  CP 7  2026-11-21 15:03:20 UTC  holds 8.0 KiB\n  vol0  abab"),
        "{out}"
    );
    let (code, out, _) = said(&mirrorhub(Some(&config), &["kept", "filer-a", "--json"]));
    let answer: KeptAnswer = serde_json::from_str(&out).unwrap();
    assert_eq!((code, answer.sources[0].kept[0].held_bytes), (0, 8192));

    // Nobody is at a terminal here: without --yes it does not even ask the hub.
    let (code, out, error) = said(&mirrorhub(Some(&config), &["drop", "filer-a@mon"]));
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(error.contains("nobody is there to confirm it"), "{error}");
    let (code, out, _) = said(&mirrorhub(Some(&config), &["drop", "filer-a@mon", "--yes"]));
    assert_eq!(code, 0);
    assert_eq!(out, "filer-a@mon: CP 7 is no longer kept, 8.0 KiB are free again\n");
    let (code, _, error) = said(&mirrorhub(Some(&config), &["drop", "filer-a@tue", "--yes"]));
    assert_eq!(code, 1);
    assert!(error.contains("next: mirrorhub kept lists them"), "{error}");
    for bad in ["filer-a", "filer-a@", "filer-a@x@y", "filer-a/vol0@mon"] {
        let (code, _, error) = said(&mirrorhub(Some(&config), &["drop", bad, "--yes"]));
        assert_eq!(code, 2, "{bad}: {error}");
    }
    running.end();
}

#[test]
fn verify_says_by_its_exit_code_whether_both_ends_are_equal() {
    for (verdict, shown, word) in [
        (Verdict::Equal, "equal", "equal"),
        (Verdict::Differ, "NOT EQUAL", "differ"),
        (Verdict::Unproven, "unproven", "unproven"),
    ] {
        let equal = verdict == Verdict::Equal;
        let running = Running::start(Fake { state: State::InSync, verdict });
        let arguments = ["verify", "filer-a/vol0"];
        let (code, out, error) = said(&mirrorhub(Some(&running.config()), &arguments));
        assert_eq!((code, error.as_str()), (i32::from(!equal), ""));
        assert!(out.contains(&format!("filer-a/vol0: {shown} at CP 8")), "{out}");
        let (code, out, _) = said(&mirrorhub(Some(&running.config()), &["verify", "--json"]));
        let answer: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((code, &answer["equal"]), (i32::from(!equal), &equal.into()));
        assert_eq!(answer["verdict"], word);
        running.end();
    }
}

#[test]
fn failback_says_what_it_did_or_why_not() {
    let running = Running::start(Fake { state: State::FailedOver, verdict: Verdict::Differ });
    let (code, out, error) = said(&mirrorhub(Some(&running.config()), &["failback", "filer-a"]));
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(error.contains("failback of filer-a: split brain"), "{error}");
    assert!(error.contains("--keep hub"), "{error}");
    let named = ["failback", "filer-a", "--keep", "hub"];
    let (code, out, error) = said(&mirrorhub(Some(&running.config()), &named));
    assert_eq!((code, out.as_str(), error.as_str()), (0, "filer-a: given back\n", ""));
    let (code, out, _) =
        said(&mirrorhub(Some(&running.config()), &[&named[..], &["--json"]].concat()));
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["kept"], &answer["serves"]), (0, &"split-2".into(), &true.into()));
    let nobody = ["failback", "filer-a", "--keep", "nobody"];
    assert_eq!(said(&mirrorhub(Some(&running.config()), &nobody)).0, 2);
    running.end();
}

#[test]
fn failover_says_what_it_did_or_why_not() {
    let running = Running::start(Fake { state: State::Offline, verdict: Verdict::Differ });
    let (code, out, error) = said(&mirrorhub(Some(&running.config()), &["failover", "filer-a"]));
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(error.contains("failover of filer-a: the log has a gap"), "{error}");
    assert!(error.contains("--accept-gap"), "{error}");
    let accepting = ["failover", "filer-a", "--accept-gap"];
    let (code, out, error) = said(&mirrorhub(Some(&running.config()), &accepting));
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(out, "filer-a: failed over with entry 40\n  next: give it back\n");
    let json = [&accepting[..], &["--dry-run", "--json"]].concat();
    let (code, out, _) = said(&mirrorhub(Some(&running.config()), &json));
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["dry_run"], &answer["may_be_lost"]), (0, &true.into(), &true.into()));
    assert_eq!(said(&mirrorhub(Some(&running.config()), &["failover"])).0, 2, "of which source");
    running.end();
}

#[test]
fn a_process_that_is_not_there_is_named_with_the_way_to_start_it() {
    let directory = configured();
    let config = directory.path().join("hub.toml");
    for arguments in [&["status"][..], &["checkpoint"], &["verify"]] {
        let (code, out, error) = said(&mirrorhub(Some(&config), arguments));
        assert_eq!((code, out.as_str()), (3, ""));
        assert!(error.contains(&format!("{}/hub-state/admin.sock", directory.path().display())));
        let start = format!("start it: mirrorhub hub --config {}", config.display());
        assert!(error.contains(&start), "{error}");
    }
    let (code, out, _) = said(&mirrorhub(Some(&config), &["status", "--check"]));
    assert!(code == 3 && out.starts_with("MIRRORHUB UNKNOWN - status: no process"), "{out}");
}

#[test]
fn a_wrong_configuration_is_exit_code_78_and_a_wrong_line_is_2() {
    let directory = configured();
    let config = directory.path().join("hub.toml");
    let (code, out, error) = said(&mirrorhub(Some(&config), &["config", "check"]));
    assert_eq!((code, error.as_str()), (0, ""));
    assert!(out.contains(": ok, a hub with 0 sources\n"), "{out}");
    std::fs::write(&config, "data_dri = \"state\"\n").unwrap();
    let (code, out, error) = said(&mirrorhub(Some(&config), &["config", "check"]));
    assert_eq!((code, out.as_str()), (78, ""));
    assert!(error.contains("hub.toml:1:1") && error.contains("did you mean `data_dir`?"));
    let (code, out, _) = said(&mirrorhub(Some(&config), &["config", "check", "--json"]));
    let answer: Value = serde_json::from_str(&out).unwrap();
    let problems = answer["problems"].as_array().unwrap();
    let slip = problems.iter().find(|problem| problem["key"] == "data_dri").unwrap();
    assert_eq!((code, &answer["ok"], &slip["line"]), (78, &false.into(), &1.into()));
    std::fs::write(&config, "data_dir = 1\n").unwrap();
    assert_eq!(said(&mirrorhub(Some(&config), &["status"])).0, 78);
    for arguments in
        [&["statsu"][..], &["status", "--json", "--check"], &["status", "No/Name"], &[]]
    {
        assert_eq!(said(&mirrorhub(None, arguments)).0, 2, "{arguments:?}");
    }
    assert_eq!(said(&mirrorhub(None, &["--help"])).0, 0);
    assert_eq!(said(&mirrorhub(None, &["--version"])).1, "mirrorhub 0.1.0\n");
}

#[test]
fn hash_man_and_completions_need_no_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let image = path.join("image");
    std::fs::write(&image, vec![0; 8192]).unwrap();
    let (code, out, _) = said(&mirrorhub(None, &["hash", &image.display().to_string()]));
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"mirrorhub root v1").update(&8192_u64.to_le_bytes()).update(&[0; 16]);
    assert_eq!((code, out), (0, format!("{}\n", hasher.finalize().to_hex())));
    let (code, _, error) = said(&mirrorhub(None, &["hash", &path.display().to_string()]));
    assert!(code == 1 && error.contains("neither a file nor a block device"), "{error}");

    assert_eq!(said(&mirrorhub(None, &["man", &path.display().to_string()])).0, 0);
    let page = std::fs::read_to_string(path.join("mirrorhub-status.1")).unwrap();
    assert!(page.contains("MIRRORHUB_CONFIG"), "{page}");
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, _) = said(&mirrorhub(None, &["completions", shell]));
        assert!(code == 0 && out.contains("checkpoint"), "{shell}");
    }
}

/// `mirrorhub completions zsh | head -1`: the reader that goes is no failure.
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = Command::new(BINARY)
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let (code, _, error) = said(&child.wait_with_output().unwrap());
    assert_eq!((code, error.as_str()), (0, ""));
}
