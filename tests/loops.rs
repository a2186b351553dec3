//! Failover and failback, again and again, with what a bad week brings in between, drawn by a seed:
//! the link cut one way or both, SIGSTOP, kill -9, power cut, of either end, also in the middle of a
//! failback. After each loop every answered write is on both ends and their roots are equal.
//!
//! Hub and source run in a network namespace of their own, each with its state on a disk that has a
//! volatile cache ([`crate::power`]). The oracle keeps what was answered outside the volumes. The
//! controls of its parts are beside them; here one more: an older oracle's image is found wanting.
//! `MIRRORHUB_SEED` repeats a run.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cuts::{CUTS, Cut, Namespace};
use crate::failover::{check_fenced, check_hub, fail_over, failing};
use crate::harness::oracle::{Known, Writer};
use crate::harness::{BINARY, Cluster, Process, is_full, pause, wait_for};
use crate::homes::{ask, checked, on_hub, roots_meet};
use crate::outage::socket;
use crate::power::{Cache, Disk, next, seed};

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(60);

/// What happens to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Its packets vanish.
    Cut(Cut),
    /// One packet in ten vanishes, at random.
    Loss,
    /// SIGSTOP.
    Sleep,
    /// kill -9.
    Kill,
    /// The power of its disk goes, and it with it.
    Power,
}

/// Of a hundred packets.
const LOST: u32 = 10;

/// Faults as they are dealt: each of them comes before one comes again.
#[derive(Debug, Default)]
struct Deck(Vec<Fault>);

impl Deck {
    fn dealt(&mut self, state: &mut u64) -> Fault {
        if self.0.is_empty() {
            let cut = |state: &mut u64| CUTS[usize::try_from(next(state) % 3).expect("small")];
            let cuts = [cut(state), cut(state)].map(Fault::Cut);
            self.0.extend(cuts);
            self.0.extend([Fault::Loss, Fault::Sleep, Fault::Kill, Fault::Power]);
        }
        let left = u64::try_from(self.0.len()).expect("small");
        self.0.swap_remove(usize::try_from(next(state) % left).expect("small"))
    }
}

impl Fault {
    /// Those that loops have to meet.
    const KINDS: [&'static str; 5] = ["cut", "loss", "sleep", "kill", "power"];

    fn kind(self) -> &'static str {
        match self {
            Self::Cut(_) => "cut",
            Self::Loss => "loss",
            Self::Sleep => "sleep",
            Self::Kill => "kill",
            Self::Power => "power",
        }
    }

    /// Its clients learn of it at once.
    fn ends_it(self) -> bool {
        matches!(self, Self::Kill | Self::Power)
    }
}

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Hub,
    Source,
}

/// Both ends, their disks and their network.
#[derive(Debug)]
struct World {
    // The disks are taken away before the cluster's directory goes.
    hub: Disk,
    source: Disk,
    namespace: Namespace,
    cluster: Cluster,
    deck: Deck,
    /// Kinds of faults that have happened.
    met: BTreeSet<&'static str>,
}

impl Drop for World {
    fn drop(&mut self) {
        // The processes end first, else they would hold the disks.
        self.cluster.end();
    }
}

impl World {
    fn start() -> Self {
        let settings = failing("stop").interval("300ms").nvram("16MiB").pool("384MiB");
        let mut cluster = Cluster::prepare_with(&[settings], "32MiB", "512MiB");
        let hub = Disk::new(cluster.path("hub/state"), Cache::Honest);
        let source = Disk::new(cluster.path(NAME).join("state"), Cache::Honest);
        let namespace = Namespace::new(&cluster);
        namespace.start(&mut cluster);
        let (deck, met) = (Deck::default(), BTreeSet::new());
        Self { hub, source, namespace, cluster, deck, met }
    }

    fn strike(&mut self, end: End, fault: Fault) {
        self.met.insert(fault.kind());
        match (fault, end) {
            (Fault::Cut(cut), _) => self.namespace.cut(&self.cluster, cut),
            (Fault::Loss, _) => self.namespace.lose(&self.cluster, LOST),
            (Fault::Sleep, End::Hub) => self.cluster.signal_hub("STOP"),
            (Fault::Sleep, End::Source) => self.cluster.signal_source(NAME, "STOP"),
            (Fault::Kill, End::Hub) => self.cluster.kill_hub(),
            (Fault::Kill, End::Source) => self.cluster.kill_source(NAME),
            (Fault::Power, End::Hub) => {
                self.cluster.signal_hub("STOP");
                self.hub.cut();
                self.cluster.kill_hub();
            }
            (Fault::Power, End::Source) => {
                self.cluster.signal_source(NAME, "STOP");
                self.source.cut();
                self.cluster.kill_source(NAME);
            }
        }
    }

    fn mend(&mut self, end: End, fault: Fault) {
        if fault == Fault::Power {
            let disk = if end == End::Hub { &mut self.hub } else { &mut self.source };
            disk.take_away();
            disk.on(Cache::Honest);
        }
        match (fault, end) {
            (Fault::Loss, _) => {
                println!("  packets lost: {:?}", self.namespace.lost());
                self.namespace.mend();
            }
            (Fault::Cut(_), _) => self.namespace.mend(),
            (Fault::Sleep, End::Hub) => self.cluster.signal_hub("CONT"),
            (Fault::Sleep, End::Source) => self.cluster.signal_source(NAME, "CONT"),
            (Fault::Kill | Fault::Power, End::Hub) => self.namespace.start_hub(&mut self.cluster),
            (Fault::Kill | Fault::Power, End::Source) => {
                self.namespace.start_source(&mut self.cluster);
            }
        }
    }

    fn load(&self, owner: &str, known: Known, state: &mut u64) -> Writer {
        let depth = 1 + next(state) % 16;
        let count = 20 + next(state) % (20 * depth);
        let depth = usize::try_from(depth).expect("small");
        let writer = Writer::start(socket(&self.cluster, owner), EXPORT, known, depth, next(state));
        writer.wait_answered(count);
        writer
    }

    /// The source is lost under load and failed over; it is fenced when this returns.
    fn lost(&mut self, known: Known, state: &mut u64) -> Known {
        let writer = self.load(NAME, known, state);
        let fault = self.deck.dealt(state);
        println!("  source: {fault:?}, {} answered", writer.answered());
        self.strike(End::Source, fault);
        let answer = fail_over(&self.cluster, NAME, &[]);
        assert_eq!(answer["may_be_lost"], false, "{answer}");
        // Those who only hear nothing are told when the source is.
        let known = if fault.ends_it() {
            let known = writer.finish();
            check_hub(&self.cluster, EXPORT, &known);
            let known = self.served(known, state);
            self.mend(End::Source, fault);
            check_fenced(&mut self.cluster);
            known
        } else {
            self.mend(End::Source, fault);
            check_fenced(&mut self.cluster);
            let known = writer.finish();
            check_hub(&self.cluster, EXPORT, &known);
            self.served(known, state)
        };
        check_hub(&self.cluster, EXPORT, &known);
        known
    }

    /// Clients write on the hub, which has troubles of its own.
    fn served(&mut self, known: Known, state: &mut u64) -> Known {
        let writer = self.load("hub", known, state);
        let fault = [None, Some(Fault::Kill), Some(Fault::Power)];
        let fault = fault[usize::try_from(next(state) % 3).expect("small")];
        println!("  hub, promoted: {fault:?}, {} answered", writer.answered());
        let Some(fault) = fault else { return writer.finish() };
        self.strike(End::Hub, fault);
        let known = writer.finish();
        self.mend(End::Hub, fault);
        check_hub(&self.cluster, EXPORT, &known);
        known
    }

    /// Given back while clients write on the hub, and something happens in the middle.
    fn given_back(&mut self, known: Known, state: &mut u64) -> Known {
        let writer = self.load("hub", known, state);
        let mut asked = Command::new(BINARY);
        asked.args(["failback", NAME, "--config"]).arg(self.cluster.hub_config());
        let log = self.cluster.path("failback.log");
        let mut asked = Process::start("failback", log, &mut asked);
        pause(Duration::from_millis(next(state) % 400));
        let end = if next(state).is_multiple_of(2) { End::Hub } else { End::Source };
        let happens = !next(state).is_multiple_of(4);
        let fault = happens.then(|| self.deck.dealt(state));
        println!("  failback: {fault:?} of the {end:?}, {} answered", writer.answered());
        if let Some(fault) = fault {
            self.strike(end, fault);
            if !fault.ends_it() {
                pause(Duration::from_millis(next(state) % 1500));
            }
        }
        let known = match fault {
            Some(fault) if fault.ends_it() => {
                let known = writer.finish();
                self.mend(end, fault);
                known
            }
            Some(fault) => {
                self.mend(end, fault);
                writer.finish()
            }
            None => writer.finish(),
        };
        wait_for("the command ends", LIMIT, || !asked.runs());
        drop(asked);
        let mut state_now = Value::Null;
        wait_for("somebody is primary", LIMIT, || {
            let shown = self.cluster.on_hub(NAME);
            state_now = shown["state"].clone();
            let handed_over = shown["reason"].to_string().contains("handed over");
            state_now == "in-sync" || state_now == "failed-over" && !handed_over
        });
        println!("  then: {state_now}");
        if state_now == "in-sync" {
            return known;
        }
        check_hub(&self.cluster, EXPORT, &known);
        let known = self.load("hub", known, state).finish();
        wait_for("it is given back", LIMIT, || ask(&self.cluster, &[]).status.success());
        known
    }

    /// Both ends have all of it, and are equal.
    fn check(&mut self, known: &Known) {
        on_hub(&self.cluster, NAME, "in-sync");
        checked(&self.cluster, NAME, EXPORT, known);
        roots_meet(&self.cluster, NAME, NAME);
        check_hub(&self.cluster, EXPORT, known);
    }
}

fn go_round(seed: u64, loops: u32) {
    println!("seed {seed}, {loops} loops (again with MIRRORHUB_SEED={seed})");
    let (mut state, begin) = (seed, Instant::now());
    let mut world = World::start();
    let (mut known, mut older) = (Known::default(), None);
    for round in 0..loops {
        println!("loop {round} at {:.1?}", begin.elapsed());
        known = world.lost(known, &mut state);
        known = world.given_back(known, &mut state);
        world.check(&known);
        older.get_or_insert_with(|| known.clone());
        known = world.load(NAME, known, &mut state).finish();
        world.check(&known);
    }
    println!("met: {:?}", world.met);
    let wanted = if loops >= 20 { Fault::KINDS.len() } else { 2 };
    assert!(world.met.len() >= wanted, "{:?} is all that {loops} loops met", world.met);
    let older = older.expect("a loop");
    println!("{} blocks answered, {:.1?}", known.answered(), begin.elapsed());
    let stale = older.check_export(&socket(&world.cluster, NAME), EXPORT);
    assert!(stale.is_err(), "the control: who knows less of the writes takes this for lost");
}

#[test]
fn loops_of_failover_and_failback_lose_nothing() {
    go_round(seed(11), if is_full() { 20 } else { 3 });
}
