//! What a user meets first: the commands of the README, and the demo, just as they are printed.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, own_address, run, status, try_run, wait_for,
};

fn project(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The commands of that section of the README: its first block.
fn commands_of_the_readme(section: &str) -> Vec<String> {
    let readme = fs::read_to_string(project("README.md")).expect("README.md");
    let (_, section) = readme.split_once(&format!("\n## {section}\n")).expect("the section");
    let (_, block) = section.split_once("```text\n").expect("its commands");
    let (block, _) = block.split_once("```").expect("their end");
    block.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
}

/// Copies the example files; another loopback address and smaller sizes are the only changes.
fn copy_examples(directory: &Path) -> String {
    let address = own_address(directory).to_string();
    fs::create_dir_all(directory.join("config/sources.d")).expect("directory");
    for name in ["hub.toml", "source.toml", "sources.d/filer-a.toml"] {
        let text = fs::read_to_string(project("config").join(name)).expect("an example");
        let text = text.replace("127.0.0.1", &address);
        let text = text.replace("\"1GiB\"", "\"64MiB\"").replace("\"512MiB\"", "\"32MiB\"");
        let text = text.replace("\"8GiB\"", "\"1GiB\"");
        fs::write(directory.join("config").join(name), text).expect("its copy");
    }
    address
}

fn shell(directory: &Path, line: &str) -> Command {
    let programs = Path::new(BINARY).parent().expect("a directory");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("sh");
    command.arg("-c").arg(line).current_dir(directory);
    command.env("PATH", format!("{}:{path}", programs.display()));
    command
}

/// Goal: whoever types the README's commands, in their order and on the files that come with the
/// program, gets a hub and a source that run side by side, and the root that is promised.
#[test]
fn the_commands_of_the_readme_work_together() {
    let directory = tempfile::Builder::new().prefix("mirrorhub-").tempdir().expect("directory");
    let base = directory.path();
    let address = copy_examples(base);
    let data: Vec<u8> =
        (0..64_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    fs::write(base.join("disk.img"), data).expect("disk.img");
    let (hub, source) = (base.join("config/hub.toml"), base.join("config/source.toml"));
    let mut running = Vec::new();
    let mut printed = Vec::new();
    for line in commands_of_the_readme("A hub and a source") {
        let line = line.replace("127.0.0.1", &address);
        if line.starts_with("mirrorhub hub ") || line.starts_with("mirrorhub source ") {
            let name = if running.is_empty() { "hub" } else { "source" };
            let mut command = shell(base, &format!("exec {line}"));
            running.push(Process::start(name, base.join(format!("{name}.log")), &mut command));
            let config = if running.len() == 1 { &hub } else { &source };
            wait_for(&line, Duration::from_secs(30), || {
                assert!(running.iter_mut().all(Process::runs), "{line}: a process ended");
                status(config).is_some_and(|status| {
                    running.len() == 1 || status["source"]["state"] == "in-sync"
                })
            });
            continue;
        }
        let output = run(&mut shell(base, &line));
        printed.push((line, String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    assert_eq!(running.len(), 2, "the README starts a hub and a source");
    run(Command::new("cmp").arg(base.join("disk.img")).arg(base.join("copy.img")));
    let told = |start: &str| {
        let found = printed.iter().find(|(line, _)| line.starts_with(start));
        found.unwrap_or_else(|| panic!("the README has no {start:?}")).1.clone()
    };
    let root = told("mirrorhub hash").trim().to_owned();
    assert!(told("mirrorhub checkpoint").contains(&root), "another root than that of the copy");
    assert!(told("mirrorhub verify").contains("equal"), "verify: {}", told("mirrorhub verify"));
    for process in &mut running {
        assert!(process.stop(Duration::from_secs(20)).success());
    }
}

/// The block of that section as it is pasted: with its ends of lines.
fn block_of_the_readme(section: &str) -> String {
    commands_of_the_readme(section).iter().map(|line| format!("{line}\n")).collect()
}

/// Goal: the README's four commands, pasted as one block, lead to a mirrored volume with TLS; nobody waits between
/// them. The build was done beforehand. Beside the host's ports, in a network of its own: the commands name none.
/// Control: without the hub `onboard` waits, and says for what.
#[test]
fn four_commands_lead_from_a_checkout_to_a_mirror() {
    let directory = tempfile::Builder::new().prefix("mirrorhub-").tempdir().expect("directory");
    let base = directory.path();
    fs::create_dir_all(base.join("config/first/sources.d")).expect("directory");
    fs::create_dir_all(base.join("target/release")).expect("directory");
    fs::copy(project("config/first/hub.toml"), base.join("config/first/hub.toml")).expect("a copy");
    let program = base.join("target/release/mirrorhub");
    std::os::unix::fs::symlink(BINARY, program).expect("the program");
    let block = block_of_the_readme("From a checkout to a mirror");
    let lines: Vec<&str> = block.lines().collect();
    let [build, hub, onboard, source] = lines.as_slice() else { panic!("{block}") };
    assert_eq!(*build, "cargo build --release");
    assert!(hub.ends_with(" &") && source.ends_with(" &"));
    let (code, alone) = said(&mut shell(base, &format!("timeout 5 {onboard}")));
    let waits = alone.contains("waiting up to 30 s for the hub to make its authority in ");
    assert!(code == Some(124) && waits, "{code:?}: {alone}");
    let script = format!(
        "set -e\n\
         ip link set lo up\n\
         trap 'kill $(jobs -p); wait' EXIT\n\
         cargo() {{ test \"$*\" = 'build --release'; }}\n\
         shows() {{ target/release/mirrorhub status --config config/first/hub.toml | grep -q \"$1\"; }}\n\
         until_shown() {{\n\
           n=0\n\
           until shows \"$1\"; do n=$((n + 1)); test $n -lt 900; sleep 0.1; done\n\
         }}\n\
         {block}\
         until_shown in-sync\n\
         head -c 8388608 /dev/urandom > data\n\
         nbdcopy data nbd://127.0.0.1:10809/vol0\n\
         target/release/mirrorhub checkpoint filer-a --config config/first/hub.toml\n\
         nbdcopy nbd://127.0.0.1:10810/filer-a/vol0 - | head -c 8388608 | cmp - data\n\
         cat target/first/filer/source.toml\n"
    );
    let begin = std::time::Instant::now();
    let mut command = Command::new("unshare");
    command.args(["--net", "bash", "-c", &script]).current_dir(base);
    let output = run(&mut command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}from the hub's start to a volume whose image was read: {:?}", begin.elapsed());
    assert!(text.contains("[tls]"), "the source speaks TLS: {text}");
}

fn said(command: &mut Command) -> (Option<i32>, String) {
    let output = try_run(command);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

fn verify(config: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    said(Command::new(BINARY).arg("verify").args(arguments).arg("--config").arg(config))
}

/// Goal: `verify` ends with 0 only where something was read and is equal; a mistyped name is an
/// error, and an end that is away is neither proof nor alarm.
#[test]
fn verify_proves_nothing_that_it_has_not_read() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new("filer-a")]);
    cluster.start_hub();
    let hub = cluster.hub_config();
    let (code, text) = verify(&hub, &[]);
    assert_eq!(code, Some(1), "no source was ever heard: {text}");
    assert!(text.contains("filer-a: unproven"), "{text}");
    cluster.start_all();
    let volume = cluster.volume("filer-a", "vol0");
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 3 0 1M", &volume]));
    cluster.checkpoint("filer-a");
    let source = cluster.source_config("filer-a");
    for config in [&hub, &source] {
        let (code, text) = verify(config, &["filer-a/vol0"]);
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("filer-a/vol0: equal"), "{text}");
        let (code, text) = verify(config, &["filer-a/typo"]);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("source filer-a has no volume typo"), "{text}");
    }
    cluster.kill_source("filer-a");
    wait_for("offline is shown", Duration::from_secs(20), || {
        cluster.on_hub("filer-a")["state"] == "offline"
    });
    for arguments in [&[][..], &["filer-a"], &["filer-a/vol0"]] {
        let (code, text) = verify(&hub, arguments);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("unproven") && !text.contains("NOT EQUAL"), "{text}");
    }
    let (code, text) = verify(&hub, &["--json"]);
    let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((code, &answer["verdict"]), (Some(1), &"unproven".into()), "{text}");
    assert_eq!(
        (&answer["equal"], &answer["unproven"][0]["source"]),
        (&false.into(), &"filer-a".into())
    );
}

/// Processes with `mine` in their command line.
fn processes_of(mine: &str) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").expect("processes").flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(mine) {
            found.push(line);
        }
    }
    found
}

/// TERM, INT and HUP end what the demo has started; each is sent while the processes run.
#[test]
fn a_demo_that_is_ended_leaves_no_process_behind() {
    for signal in ["TERM", "INT", "HUP"] {
        let directory = tempfile::Builder::new().prefix("mirrorhub-").tempdir().expect("directory");
        let mine = directory.path().to_string_lossy().into_owned();
        let log = directory.path().join("demo.log");
        let mut command = Command::new(BINARY);
        let mut demo = Process::start("demo", log, command.arg("demo").env("TMPDIR", &mine));
        wait_for("hub and sources run", Duration::from_secs(30), || processes_of(&mine).len() == 3);
        demo.signal(signal);
        wait_for("the demo ends", Duration::from_secs(30), || !demo.runs());
        assert_eq!(processes_of(&mine), [""; 0], "left behind after {signal}");
        assert!(demo.output().contains("ended by a signal; the logs are kept in"), "{signal}");
    }
}

/// The demo on a small image: its verdict, and nothing left behind.
#[test]
fn the_demo_proves_and_cleans_up() {
    let directory = tempfile::Builder::new().prefix("mirrorhub-").tempdir().expect("directory");
    let (image, state) = (directory.path().join("small.img"), directory.path().join("state"));
    fs::create_dir(&state).expect("directory");
    let block = |n: u32| blake3::hash(&n.to_le_bytes()).as_bytes().repeat(128);
    fs::write(&image, (0..512).flat_map(block).collect::<Vec<u8>>()).expect("image");
    let output = run(Command::new("timeout")
        .args(["120", BINARY, "demo", "--image"])
        .arg(&image)
        .env("TMPDIR", &state));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("proven: no acknowledged write was lost"), "{text}");
    assert!(text.contains(&crate::harness::hash(&image)), "the root of the file:\n{text}");
    assert_eq!(fs::read_dir(&state).expect("directory").count(), 0, "state was left behind");
    let mine = state.to_string_lossy().into_owned();
    assert_eq!(processes_of(&mine), [""; 0], "left behind");
    // Negative control: what is no image is refused, and leaves nothing either.
    fs::write(&image, b"no whole blocks").expect("image");
    let refused =
        try_run(Command::new(BINARY).args(["demo", "--image"]).arg(&image).env("TMPDIR", &state));
    assert!(!refused.status.success());
    assert_eq!(fs::read_dir(&state).expect("directory").count(), 0, "a refusal leaves nothing");
    // Where it cannot work the reason is the process's own, not only its exit status.
    let long = state.join("x".repeat(90));
    fs::create_dir(&long).expect("directory");
    fs::write(&image, [1; 4096]).expect("image");
    let failed =
        try_run(Command::new(BINARY).args(["demo", "--image"]).arg(&image).env("TMPDIR", &long));
    let text = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(!failed.status.success() && text.contains("nbd_listen"), "{text}");
}
