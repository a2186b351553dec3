//! The link is cut, one way or both, without anybody being told: packets vanish. Hub and source
//! run in a network namespace of their own, so that rules there touch nothing else.
//!
//! Needs root, `ip netns` and `nft`.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::crashes::check;
use crate::failover::{check_fenced, check_hub, fail_over, failing, open};
use crate::harness::oracle::{Known, Writer, content};
use crate::harness::{
    BINARY, Cluster, SourceSettings, is_full, pause, run, status, try_run, wait_for,
};
use crate::outage::socket;

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(30);
const HUB_TIMEOUT: Duration = Duration::from_secs(1);

/// Which packets vanish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    ToHub,
    FromHub,
    Both,
}

pub const CUTS: [Cut; 3] = [Cut::ToHub, Cut::FromHub, Cut::Both];

/// A network namespace with a loopback device, removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    pub fn new(cluster: &Cluster) -> Self {
        let tail = cluster.dir.path().file_name().expect("a name").to_string_lossy().into_owned();
        let name = tail.replace('.', "");
        run(Command::new("ip").args(["netns", "add", &name]));
        let made = Self { name };
        run(made.inside("ip").args(["link", "set", "lo", "up"]));
        made
    }

    /// A command that runs in it.
    pub fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    pub fn cut(&self, cluster: &Cluster, cut: Cut) {
        let hub = cluster.hub_address();
        let (ip, port) = (hub.ip(), hub.port());
        let to = format!("add rule inet cut input ip daddr {ip} tcp dport {port} drop\n");
        let from = format!("add rule inet cut input ip saddr {ip} tcp sport {port} drop\n");
        let mut rules = "add table inet cut\nadd chain inet cut input { type filter hook input \
                         priority 0; }\n"
            .to_owned();
        if cut != Cut::FromHub {
            rules.push_str(&to);
        }
        if cut != Cut::ToHub {
            rules.push_str(&from);
        }
        run(self.inside("nft").arg(rules));
    }

    /// Of each hundred packets, so many vanish at random, in both directions.
    pub fn lose(&self, cluster: &Cluster, of_hundred: u32) {
        let hub = cluster.hub_address();
        let (ip, port) = (hub.ip(), hub.port());
        let chance = format!("numgen random mod 100 < {of_hundred} counter drop");
        let rules = format!(
            "add table inet cut\nadd chain inet cut input {{ type filter hook input priority 0; }}\n\
             add rule inet cut input ip daddr {ip} tcp dport {port} {chance}\n\
             add rule inet cut input ip saddr {ip} tcp sport {port} {chance}\n"
        );
        run(self.inside("nft").arg(rules));
    }

    /// Packets that the rules of [`Namespace::lose`] have taken, to the hub and from it.
    pub fn lost(&self) -> Vec<u64> {
        let listed = run(self.inside("nft").args(["list", "table", "inet", "cut"]));
        let text = String::from_utf8(listed.stdout).expect("text");
        let counts = text.lines().filter_map(|line| line.split_once("counter packets "));
        let number = |rest: &str| rest.split(' ').next().and_then(|count| count.parse().ok());
        counts.map(|(_, rest)| number(rest).expect("a number")).collect()
    }

    pub fn mend(&self) {
        run(self.inside("nft").arg("delete table inet cut"));
    }

    /// Starts both ends inside and waits until they are in sync.
    pub fn start(&self, cluster: &mut Cluster) {
        self.start_hub(cluster);
        self.start_source(cluster);
        cluster.wait_in_sync(NAME);
    }

    pub fn start_hub(&self, cluster: &mut Cluster) {
        let mut hub = self.inside(BINARY);
        cluster.start_hub_with(hub.args(["hub", "--config"]).arg(cluster.hub_config()));
    }

    pub fn start_source(&self, cluster: &mut Cluster) {
        let mut source = self.inside(BINARY);
        let config = cluster.source_config(NAME);
        cluster.start_source_with(NAME, source.args(["source", "--config"]).arg(config));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["netns", "del", &self.name]).output());
    }
}

fn inside(settings: SourceSettings) -> (Cluster, Namespace) {
    let mut cluster = Cluster::prepare(&[settings]);
    let namespace = Namespace::new(&cluster);
    namespace.start(&mut cluster);
    (cluster, namespace)
}

/// `stop` promises this whatever is cut: once failover has returned, the source answers no write
/// that the image lacks, although it runs and was never stopped.
fn no_write_is_answered(cut: Cut) {
    let (mut cluster, namespace) = inside(failing("stop"));
    let writer = Writer::start(socket(&cluster, NAME), EXPORT, Known::default(), 16, 3);
    writer.wait_answered(300);
    namespace.cut(&cluster, cut);
    let answer = fail_over(&cluster, NAME, &[]);
    assert_eq!(answer["may_be_lost"], false, "{answer}");
    let over = writer.answered();
    let mut served = open(&socket(&cluster, "hub"), EXPORT);
    pause(HUB_TIMEOUT * 2);
    assert_eq!(writer.answered(), over, "{cut:?}: a write was answered after the failover");
    namespace.mend();
    let known = writer.finish();
    known
        .check(|block| served.read(block * 4096, 4096).expect("a read of the image"))
        .expect("the image has every answered write");
    check_fenced(&mut cluster);
    cluster.kill_source(NAME);
    namespace.start_source(&mut cluster);
    check_fenced(&mut cluster);
}

/// And no read: the image may have taken other writes by then.
fn no_read_is_answered(cut: Cut) {
    let (mut cluster, namespace) = inside(failing("stop"));
    let mut reader = open(&socket(&cluster, NAME), EXPORT);
    reader.write(0, &content(0, 1)).expect("a write");
    namespace.cut(&cluster, cut);
    fail_over(&cluster, NAME, &[]);
    let mut served = open(&socket(&cluster, "hub"), EXPORT);
    served.write(0, &content(0, 2)).expect("the image takes a write");
    let began = Instant::now();
    reader.submit_read(0, 4096).expect("a read is sent");
    // A held read is answered, or refused, when the link is mended.
    let mender = std::thread::spawn(move || {
        pause(HUB_TIMEOUT * 3);
        namespace.mend();
        namespace
    });
    let reply = reader.reply().ok().and_then(|reply| reply.result.ok());
    let stale = reply.filter(|data| *data == content(0, 1)).map(|_| began.elapsed());
    let namespace = mender.join().expect("the link is mended");
    assert_eq!(stale, None, "{cut:?}: a read of what was overwritten was answered, after");
    check_fenced(&mut cluster);
    drop(namespace);
}

#[test]
fn a_source_that_cannot_reach_its_hub_answers_no_write() {
    no_write_is_answered(Cut::ToHub);
}

#[test]
fn a_source_that_cannot_hear_its_hub_answers_no_write() {
    no_write_is_answered(Cut::FromHub);
}

#[test]
fn a_source_that_is_cut_off_answers_no_write() {
    no_write_is_answered(Cut::Both);
}

#[test]
fn a_source_that_cannot_reach_its_hub_answers_no_read() {
    no_read_is_answered(Cut::ToHub);
}

#[test]
fn a_source_that_cannot_hear_its_hub_answers_no_read() {
    no_read_is_answered(Cut::FromHub);
}

#[test]
fn a_source_that_is_cut_off_answers_no_read() {
    no_read_is_answered(Cut::Both);
}

/// `continue`: whatever is cut, the source goes on alone, and comes back when it is mended.
#[test]
fn a_cut_link_is_survived_by_a_source_that_continues() {
    let (mut cluster, namespace) = inside(failing("continue").interval("300ms"));
    let mut known = Known::default();
    let cuts = if is_full() { &CUTS[..] } else { &CUTS[2..] };
    for &cut in cuts {
        let writer = Writer::start(socket(&cluster, NAME), EXPORT, known, 16, 71);
        writer.wait_answered(200);
        namespace.cut(&cluster, cut);
        let config = cluster.source_config(NAME);
        wait_for(&format!("{cut:?}: it goes on alone"), LIMIT, || {
            status(&config).is_some_and(|shown| shown["source"]["alone_since"].is_object())
        });
        let before = writer.answered();
        writer.wait_answered(before + 300);
        namespace.mend();
        wait_for(&format!("{cut:?}: it is back"), LIMIT, || {
            status(&config).is_some_and(|shown| {
                let own = &shown["source"];
                own["state"] == "in-sync" && own["alone_since"].is_null()
            })
        });
        let back = writer.answered();
        writer.wait_answered(back + 100);
        known = writer.finish();
        check(&mut cluster, NAME, &known);
    }
    check_hub(&cluster, EXPORT, &known);
}

/// A source that was cut off and failed over, and is fenced now; what it answered, much of it alone.
/// The image has taken one write since: version 77 of block 0.
fn split(cut: Cut) -> (Cluster, Namespace, Known) {
    let (mut cluster, namespace) = inside(failing("continue").interval("300ms"));
    let writer = Writer::start(socket(&cluster, NAME), EXPORT, Known::default(), 16, 23);
    writer.wait_answered(200);
    namespace.cut(&cluster, cut);
    let config = cluster.source_config(NAME);
    wait_for("it goes on alone", LIMIT, || {
        status(&config).is_some_and(|shown| shown["source"]["alone_since"].is_object())
    });
    let before = writer.answered();
    writer.wait_answered(before + 300);
    for more in [&["--dry-run"][..], &["--now"]] {
        let answer = fail_over(&cluster, NAME, more);
        assert_eq!(answer["may_be_lost"], true, "{answer}");
        assert!(answer["sentences"].to_string().contains("gone on alone"), "{answer}");
    }
    let after = writer.answered();
    writer.wait_answered(after + 100);
    let mut served = open(&socket(&cluster, "hub"), EXPORT);
    served.write(0, &content(0, 77)).expect("the image takes a write");
    namespace.mend();
    check_fenced(&mut cluster);
    let known = writer.finish();
    let lost = known.lost(|block| served.read(block * 4096, 4096).expect("the image is read"));
    let lost = lost.expect("the image is a cut of what was written");
    println!("{cut:?}: {lost} of {} answered are not in the image", known.answered());
    assert!(lost > 0, "nothing was acknowledged alone: the test shows nothing");
    cluster.kill_source(NAME);
    namespace.start_source(&mut cluster);
    check_fenced(&mut cluster);
    wait_for("the source follows", LIMIT, || {
        let refused = give_back(&cluster, &[]);
        assert!(!refused.status.success(), "a split brain is not merged");
        String::from_utf8_lossy(&refused.stderr).contains("split brain")
    });
    (cluster, namespace, known)
}

fn give_back(cluster: &Cluster, more: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(["failback", NAME]).args(more).arg("--config").arg(cluster.hub_config());
    try_run(&mut command)
}

/// `continue`: what a source that is cut off acknowledges alone is not in the promoted image, and
/// failover says so before and after; it refuses clients from the moment that it hears of it, also
/// after a restart; and every such write is in the copy that failback keeps of its side.
fn what_was_acknowledged_alone_is_kept(cut: Cut) {
    let (cluster, _namespace, known) = split(cut);
    let given = give_back(&cluster, &["--keep", "hub"]);
    assert!(given.status.success(), "{given:?}");
    let copy = format!("{EXPORT}@split-2");
    let own = socket(&cluster, NAME);
    drop(open(&own, &copy));
    known.check_export(&own, &copy).expect("the copy has every answered write");
    let stays = known.check_export(&own, EXPORT);
    assert!(stays.is_err(), "the control: the side that stays has them all");
}

/// The administrator keeps the filer's side: it serves every write that it answered, the image is
/// brought up to that, and what the hub served stays readable there; killed, both ends have it still.
#[test]
fn the_filers_side_of_a_split_brain_is_kept() {
    let (mut cluster, namespace, known) = split(Cut::Both);
    let dry = give_back(&cluster, &["--keep", "source", "--dry-run"]);
    let said = String::from_utf8_lossy(&dry.stdout).into_owned();
    println!("{said}");
    assert!(dry.status.success() && said.contains("the image loses entry "), "{dry:?}");
    let shown = cluster.on_hub(NAME);
    assert_eq!(shown["state"], "failed-over", "a dry run has changed something: {shown}");
    let given = give_back(&cluster, &["--keep", "source"]);
    println!("{}", String::from_utf8_lossy(&given.stdout));
    assert!(given.status.success(), "{given:?}");
    let own = socket(&cluster, NAME);
    drop(open(&own, EXPORT));
    known.check_export(&own, EXPORT).expect("the filer has every answered write");
    cluster.wait_in_sync(NAME);
    let check = |cluster: &Cluster, known: &Known| {
        check_hub(cluster, EXPORT, known);
        let copy = format!("{EXPORT}@split-2");
        let mut served = open(&socket(cluster, "hub"), &copy);
        assert_eq!(served.read(0, 4096).expect("the copy is read"), content(0, 77));
        let lost = known.lost(|block| served.read(block * 4096, 4096).expect("the copy is read"));
        assert!(lost.is_err() || lost > Ok(0), "the control: the side that went has them all");
    };
    check(&cluster, &known);
    let writer = Writer::start(own, EXPORT, known, 16, 29);
    writer.wait_answered(200);
    cluster.kill_source(NAME);
    let known = writer.finish();
    cluster.kill_hub();
    namespace.start_hub(&mut cluster);
    namespace.start_source(&mut cluster);
    cluster.wait_in_sync(NAME);
    crate::crashes::check(&mut cluster, NAME, &known);
    check(&cluster, &known);
}

/// Random loss of packets, more and more of it, under load: the source goes on, whatever becomes of
/// its connections, and nothing is lost; mended, it is in sync.
#[test]
fn random_loss_of_packets_is_survived() {
    let (mut cluster, namespace) = inside(failing("continue").interval("300ms"));
    let mut known = Known::default();
    let length = Duration::from_secs(if is_full() { 20 } else { 4 });
    for of_hundred in [2, 10, 40] {
        let writer = Writer::start(socket(&cluster, NAME), EXPORT, known, 16, 101);
        writer.wait_answered(100);
        let before = writer.answered();
        namespace.lose(&cluster, of_hundred);
        pause(length);
        let (lost, answered) = (namespace.lost(), writer.answered() - before);
        namespace.mend();
        println!("{of_hundred}% lost, {lost:?} packets: {answered} writes answered in {length:?}");
        assert!(lost.len() == 2 && lost.iter().all(|&lost| lost > 0), "nothing was lost: {lost:?}");
        assert!(answered > 0, "nothing was answered");
        let back = writer.answered();
        writer.wait_answered(back + 100);
        let config = cluster.source_config(NAME);
        wait_for(&format!("{of_hundred}%: in sync again"), LIMIT, || {
            status(&config).is_some_and(|shown| {
                let own = &shown["source"];
                own["state"] == "in-sync" && own["alone_since"].is_null()
            })
        });
        known = writer.finish();
        check(&mut cluster, NAME, &known);
        check_hub(&cluster, EXPORT, &known);
    }
}

#[test]
fn what_a_source_that_is_cut_off_acknowledges_alone_is_kept() {
    what_was_acknowledged_alone_is_kept(Cut::Both);
}

#[test]
fn what_a_source_that_cannot_hear_its_hub_acknowledges_alone_is_kept() {
    if is_full() {
        what_was_acknowledged_alone_is_kept(Cut::FromHub);
        what_was_acknowledged_alone_is_kept(Cut::ToHub);
    }
}
