//! The volumes of a lost filer find another home: a new filer under the same name, another filer
//! beside its own volumes, or the hub again when whoever was to have them is lost as well.

use std::collections::BTreeMap;
use std::sync::Mutex;

use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::failback::{
    VOLUME, World, all, at_hub, fail_over, filer_options, follows, give_back, go_on, name, put,
    served, state, stop,
};
use super::*;
use crate::filer::Filer;
use crate::filer::homes::{Home, HomeExports, Homes, Reloaded};
use crate::filer::status::SourceState as End;
use crate::hub::extension::State;
use crate::hub::failback::{self, Ask, Step};
use crate::hub::failover;
use crate::link::{FrameReader, Outgoing};
use crate::nbd::export::Exports;
use crate::pool::rows::SourceRow;
use crate::units::hash::StreamHash;
use crate::units::ids::SourceId;
use crate::units::names::SourceName;
use crate::units::numbers::{Epoch, Generation, SequenceNumber, TransferId};
use crate::units::policy::{Mode, OnHubLoss, Policy};
use crate::wire::homes::Adopted;
use crate::wire::message::{Follow, Frame, Reached, TakeOver, WirePlace};

fn other() -> SourceName {
    "b".parse().unwrap()
}

async fn is_refused(filer: &Filer) -> String {
    let met = filer.exports().open("a/vol0").await;
    met.err().expect("it serves nobody").to_string()
}

/// A filer with an empty data directory, under the name of the one that is lost.
async fn new_filer(world: &World) -> (Filer, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let options = filer_options(dir.path(), world.hub.address(), stop());
    (Filer::start(options).await.unwrap(), dir)
}

/// Gives it back as soon as the filer has found its way: the connection of one that was lost may
/// be taken for it, or the new one is not there yet.
async fn insist(hub: &Hub, to: Option<SourceName>) {
    loop {
        let ask = Ask { to: to.clone(), ..Ask::default() };
        match hub.failback(&name(), ask, Box::new(|_| true)).await {
            Ok(_) => return,
            Err(refused) => {
                let away = ["not connected", "went away", "does not follow", "not in session"];
                let passes = away.iter().any(|why| refused.reason.contains(why));
                assert!(passes, "{refused:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn says(filer: &Filer, what: &str) {
    until(&format!("it says {what:?}"), || filer.status().reason.contains(what)).await;
}

/// The whole way of a new filer, a restart of it, and the old one that comes back afterwards.
#[test]
fn a_new_filer_takes_the_volumes_over() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let (filer, dir) = new_filer(&world).await;
        follows(&world.hub).await;
        assert!(is_refused(&filer).await.contains("serves nothing before"));
        assert_eq!(state(&world.hub), State::Promoted);
        let report = give_back(&world.hub, None).await.unwrap();
        assert!(report.serves && report.kept.is_none(), "{report:?}");
        world.is_whole(&filer).await;
        filer.stop().await.unwrap();
        drop(filer);
        let options = filer_options(dir.path(), world.hub.address(), stop());
        let filer = Filer::start(options).await.unwrap();
        world.is_whole(&filer).await;
        // The one that was lost has its state, and its time is over.
        let old = world.filer().await;
        says(&old, "live on").await;
        assert_eq!(old.status().state, End::Fenced);
        assert!(old.status().next_step.contains("--to a"), "{}", old.status().next_step);
        assert!(is_refused(&old).await.contains("live on"));
        world.is_whole(&filer).await;
        old.stop().await.unwrap();
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// An empty filer is no reason to give anything up: while the old one has not been failed over it
/// serves nothing and changes nothing, and the old one goes on.
#[test]
fn a_new_filer_is_refused_while_the_old_one_is_primary() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let old = world.filer().await;
        follows(&world.hub).await;
        give_back(&world.hub, None).await.unwrap();
        world.is_whole(&old).await;
        let (new, _dir) = new_filer(&world).await;
        says(&new, "is new and empty").await;
        let next = new.status().next_step;
        assert!(next.contains("mirrorhub failover a"), "{next}");
        assert!(is_refused(&new).await.contains("new"));
        let refused = give_back(&world.hub, None).await.unwrap_err();
        assert!(refused.reason.contains("not failed over"), "{refused:?}");
        world.is_whole(&old).await;
        new.stop().await.unwrap();
        old.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// A new filer whose source.toml has other volumes is refused by name, and nothing has changed.
#[test]
fn a_new_filer_with_other_volumes_is_refused() {
    in_system(async {
        let world = World::failed_over(stop()).await;
        let dir = tempfile::tempdir().unwrap();
        let mut options = filer_options(dir.path(), world.hub.address(), stop());
        options.volumes = vec![("vol0".parse().unwrap(), ByteCount(VOLUME / 2))];
        let filer = Filer::start(options).await.unwrap();
        says(&filer, "volumes are not those").await;
        let refused = give_back(&world.hub, None).await.unwrap_err();
        assert!(refused.reason.contains("not connected"), "{refused:?}");
        assert_eq!(state(&world.hub), State::Promoted);
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// The new filer is lost when that step is reached, with what it has on its devices then.
async fn new_filer_lost_at(step: Step) {
    let mut world = World::failed_over(stop()).await;
    let (filer, dir) = new_filer(&world).await;
    follows(&world.hub).await;
    let left = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().to_owned(), left.path().to_owned());
    let doomed = Mutex::new(Some(filer));
    let told = move |reached: Step| {
        if reached == step
            && let Some(filer) = doomed.lock().unwrap().take()
        {
            promoted::copy(&from, &to);
            drop(filer);
        }
        true
    };
    let given = world.hub.failback(&name(), Ask::default(), Box::new(told)).await;
    let handed_over = matches!(step, Step::Reached | Step::HandedOver);
    assert_eq!(given.is_ok(), handed_over, "{given:?}");
    if !handed_over {
        assert_eq!(state(&world.hub), State::Promoted);
        let export = at_hub(&world.hub).await;
        put(&export, &mut world.image, 7000, &[6; 70_000]).await;
    }
    let options = filer_options(left.path(), world.hub.address(), stop());
    let filer = Filer::start(options).await.unwrap();
    if !handed_over {
        insist(&world.hub, None).await;
    }
    world.is_whole(&filer).await;
    filer.stop().await.unwrap();
    world.hub.stop().await;
}

#[test]
fn a_new_filer_lost_at_any_step_loses_nothing() {
    for step in [Step::Found, Step::Round(1), Step::Held, Step::Reached, Step::HandedOver] {
        in_system(new_filer_lost_at(step));
    }
}

/// A filer with volumes of its own, and those who live on it.
struct Beside {
    filer: Arc<Filer>,
    homes: Arc<Homes>,
    exports: Arc<HomeExports>,
    own: Vec<u8>,
}

impl Beside {
    async fn start(dir: &Path, hub: std::net::SocketAddr, own: Vec<u8>) -> Self {
        Self::promising(dir, hub, own, BTreeMap::new()).await
    }

    /// With what its file says of those who live there.
    async fn promising(
        dir: &Path,
        hub: std::net::SocketAddr,
        own: Vec<u8>,
        policies: BTreeMap<SourceName, Policy>,
    ) -> Self {
        let mut options = filer_options(dir, hub, stop());
        options.name = other();
        let filer = Arc::new(Filer::start(options.clone()).await.unwrap());
        let directory = dir.join("homes");
        let homes = Homes::start(filer.clone(), options, directory, (policies, Default::default()))
            .await
            .unwrap();
        let exports = HomeExports::new(homes.clone());
        served(&filer).await;
        Self { filer, homes, exports, own }
    }

    fn home(&self) -> Arc<Filer> {
        match self.homes.get(&name()) {
            Some(Home::Running(filer)) => filer,
            other => panic!("{other:?}"),
        }
    }

    async fn write_own(&mut self, at: usize, fill: u8) {
        let export = self.exports.open("b/vol0").await.unwrap();
        put(&export, &mut self.own, at, &vec![fill; 30_000]).await;
        assert_eq!(all(&export).await, self.own);
    }

    async fn stop(self) {
        self.homes.stop().await;
        self.filer.stop().await.unwrap();
    }
}

async fn to_b(hub: &Hub, told: failback::Told) -> Result<failback::Report, failover::Refusal> {
    hub.failback(&name(), Ask { to: Some(other()), ..Ask::default() }, told).await
}

/// The way: lost, failed over, given to a filer that has volumes of its own; both are
/// served there, mirrored, and found again after each end was started anew.
#[test]
fn another_filer_becomes_the_home() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let dir = tempfile::tempdir().unwrap();
        let absent = to_b(&world.hub, Box::new(|_| true)).await.unwrap_err();
        assert!(absent.reason.contains("no filer b"), "{absent:?}");
        let empty = vec![0; usize::try_from(VOLUME).unwrap()];
        let mut b = Beside::start(dir.path(), world.hub.address(), empty).await;
        b.write_own(5000, 1).await;
        let report = to_b(&world.hub, Box::new(|_| true)).await.unwrap();
        assert!(report.serves, "{report:?}");
        let home = b.home();
        world.is_whole(&home).await;
        b.write_own(50_000, 2).await;
        assert_eq!(home.status().epoch, report.epoch);
        let again = to_b(&world.hub, Box::new(|_| true)).await.unwrap_err();
        assert!(again.reason.contains("not failed over"), "{again:?}");
        let listed: Vec<_> = b.exports.list().into_iter().map(|l| l.name).collect();
        assert_eq!(listed, ["b/vol0", "a/vol0"]);
        // The filer is started anew: the home is found again.
        drop(home);
        let own = b.own.clone();
        b.stop().await;
        let mut b = Beside::start(dir.path(), world.hub.address(), own).await;
        let home = b.home();
        world.is_whole(&home).await;
        b.write_own(100_000, 3).await;
        // The old filer comes back, and may look.
        let old = world.filer().await;
        says(&old, "live on filer b").await;
        assert_eq!(old.status().state, End::Fenced);
        world.is_whole(&home).await;
        // Lost again, with its home this time; and home to where it was made.
        drop(home);
        let own = b.own.clone();
        b.stop().await;
        fail_over(&world.hub).await;
        let export = at_hub(&world.hub).await;
        put(&export, &mut world.image, 900_000, &[7; 9000]).await;
        follows(&world.hub).await;
        // Whose home is b by now does not ask for what would go there.
        until("it says what brings them here", || {
            old.status().next_step.contains("`mirrorhub failback a --to a`")
        })
        .await;
        let ask = Ask { to: Some(name()), ..Ask::default() };
        let report = world.hub.failback(&name(), ask, Box::new(|_| true)).await.unwrap();
        assert!(report.serves, "{report:?}");
        world.is_whole(&old).await;
        let b = Beside::start(dir.path(), world.hub.address(), own).await;
        let home = b.home();
        says(&home, "live on filer a").await;
        assert!(home.status().next_step.contains("--to b"), "{}", home.status().next_step);
        assert!(b.exports.open("a/vol0").await.is_err(), "a fenced home serves nobody");
        b.exports.open("b/vol0").await.unwrap();
        drop(home);
        b.stop().await;
        old.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// What cannot be kept durably is not promised, and said by name; the next reload tries again.
fn reloaded_half_way(b: &Beside, asked: &BTreeMap<SourceName, Policy>) {
    let hour = Duration::from_secs(3600);
    let rows = b.filer.pool().catalog().sources().unwrap();
    let row = rows.into_iter().find(|row| row.name == name()).unwrap();
    let write = |bytes: Vec<u8>| {
        let change = move |row: &mut SourceRow| row.extension = bytes;
        b.filer.pool().catalog().update_source(row.id, change).unwrap();
    };
    let before = b.home().shared().pledge.terms().wanted;
    write(vec![9; 3]);
    let half = b.homes.reload(hour, asked);
    assert_eq!((half.changed.len(), half.kept.len()), (0, 1), "{half:?}");
    let problem = half.problem().unwrap();
    assert!(problem.contains("stays in force for a (") && problem.contains("for: none"));
    assert_eq!(b.home().shared().pledge.terms().wanted, before);
    write(row.extension.clone());
    let all = b.homes.reload(hour, asked);
    assert_eq!((&all.changed, all.problem()), (&vec![name()], None));
}

/// What a source promises that lives elsewhere changes by that filer's file: on both ends, kept by a
/// start whose file does not say it, and changed by one whose file says something else.
#[test]
fn what_a_guest_promises_changes_by_a_reload() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let dir = tempfile::tempdir().unwrap();
        let empty = vec![0; usize::try_from(VOLUME).unwrap()];
        let b = Beside::start(dir.path(), world.hub.address(), empty).await;
        to_b(&world.hub, Box::new(|_| true)).await.unwrap();
        let home = b.home();
        world.is_whole(&home).await;
        let stops =
            |policy: Policy| (policy.mode, policy.on_hub_loss) == (Mode::Sync, OnHubLoss::Stop);
        assert!(stops(home.status().policy), "it promises what it promised");
        let hour = Duration::from_secs(3600);
        // What is said of others, or of nobody, changes nothing.
        let others = BTreeMap::from([("c".parse().unwrap(), go_on())]);
        assert_eq!(b.homes.reload(hour, &others), Reloaded::default());
        assert!(stops(home.shared().pledge.terms().wanted));
        let lazy = Policy { mode: Mode::Async, ..go_on() };
        reloaded_half_way(&b, &BTreeMap::from([(name(), lazy)]));
        let promises = async |home: &Filer, policy: Policy| {
            until("both ends know what it promises", || {
                let here = home.status();
                let there = world.hub.snapshots().into_iter().find(|shown| shown.name == name());
                let there = there.and_then(|shown| shown.policy);
                here.policy == policy && here.policy_next.is_none() && there == Some(policy)
            })
            .await;
        };
        promises(&home, lazy).await;
        assert!(stops(b.filer.status().policy), "the filer's own is not touched");
        let own = b.own.clone();
        drop(home);
        b.stop().await;
        let b = Beside::start(dir.path(), world.hub.address(), own.clone()).await;
        let home = b.home();
        served(&home).await;
        promises(&home, lazy).await;
        drop(home);
        b.stop().await;
        let policies = BTreeMap::from([(name(), go_on())]);
        let b = Beside::promising(dir.path(), world.hub.address(), own, policies).await;
        let home = b.home();
        served(&home).await;
        promises(&home, go_on()).await;
        drop(home);
        b.stop().await;
        world.hub.stop().await;
    });
}

/// The second home is lost when that step is reached; what it had is started again.
async fn home_lost_at(step: Step) {
    let mut world = World::failed_over(stop()).await;
    let (dir, left) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let empty = vec![0; usize::try_from(VOLUME).unwrap()];
    let mut b = Beside::start(dir.path(), world.hub.address(), empty).await;
    b.write_own(5000, 1).await;
    let (from, to, own) = (dir.path().to_owned(), left.path().to_owned(), b.own.clone());
    let doomed = Mutex::new(Some(b));
    let told = move |reached: Step| {
        if reached == step
            && let Some(b) = doomed.lock().unwrap().take()
        {
            promoted::copy(&from, &to);
            drop(b);
        }
        true
    };
    let given = to_b(&world.hub, Box::new(told)).await;
    let handed_over = matches!(step, Step::Reached | Step::HandedOver);
    assert_eq!(given.is_ok(), handed_over, "{step:?} {given:?}");
    let mut b = Beside::start(left.path(), world.hub.address(), own).await;
    b.write_own(90_000, 4).await;
    if !handed_over {
        assert_eq!(state(&world.hub), State::Promoted);
        let export = at_hub(&world.hub).await;
        put(&export, &mut world.image, 7000, &[6; 70_000]).await;
        insist(&world.hub, Some(other())).await;
    }
    let home = b.home();
    world.is_whole(&home).await;
    b.write_own(200_000, 5).await;
    drop(home);
    b.stop().await;
    world.hub.stop().await;
}

#[test]
fn a_home_lost_at_any_step_loses_nothing() {
    for step in [Step::Found, Step::Round(1), Step::Held, Step::Reached, Step::HandedOver] {
        in_system(home_lost_at(step));
    }
}

/// A filer without room says so before anything is promised, and nothing of it stays there.
#[test]
fn a_filer_without_room_is_not_given_anything() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let export = at_hub(&world.hub).await;
        put(&export, &mut world.image, 0, &[9; 4 << 20]).await;
        world.hub.checkpoint(&name()).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut options = filer_options(dir.path(), world.hub.address(), stop());
        options.name = other();
        let filer = Arc::new(Filer::start(options.clone()).await.unwrap());
        let (directory, policies) = (dir.path().join("homes"), BTreeMap::new());
        let homes = Homes::start(filer.clone(), options, directory, (policies, Default::default()))
            .await
            .unwrap();
        served(&filer).await;
        let space = filer.pool().space().unwrap();
        let room = space.free.0 - space.reserve.0 - space.held.0;
        let taken = filer.pool().reserve(BlockCount(room - 100)).unwrap();
        let refused = to_b(&world.hub, Box::new(|_| true)).await.unwrap_err();
        assert!(refused.reason.contains("room for 100 blocks"), "{refused:?}");
        assert!(refused.next_step.contains("more room"), "{refused:?}");
        assert_eq!(filer.pool().catalog().sources().unwrap().len(), 1);
        assert!(!dir.path().join("homes").try_exists().unwrap());
        assert_eq!(state(&world.hub), State::Promoted);
        drop(taken);
        assert!(to_b(&world.hub, Box::new(|_| true)).await.unwrap().serves);
        homes.stop().await;
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// Whoever was to take over is lost for good: failover at the CP that was handed over.
#[test]
fn a_hand_over_that_nobody_takes_up_is_taken_back() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let filer = world.filer().await;
        follows(&world.hub).await;
        let doomed = Mutex::new(Some(filer));
        let told = move |reached: Step| {
            if reached == Step::Reached {
                drop(doomed.lock().unwrap().take());
            }
            true
        };
        let ask = Ask::default();
        let report = world.hub.failback(&name(), ask, Box::new(told)).await.unwrap();
        assert!(!report.serves);
        assert_eq!(state(&world.hub), State::HandedOver);
        // Somebody else is not given what was promised to that filer.
        let (new, _new_dir) = new_filer(&world).await;
        says(&new, "handed over to").await;
        new.stop().await.unwrap();
        let ask = failover::Ask { now: true, dry_run: true, ..failover::Ask::default() };
        let dry = world.hub.failover(&name(), ask, |_| {}).await.unwrap();
        assert_eq!(dry.outcome.word(), "taken-back");
        assert_eq!(state(&world.hub), State::HandedOver, "a dry run changes nothing");
        let ask = failover::Ask { now: true, ..failover::Ask::default() };
        let back = world.hub.failover(&name(), ask, |_| {}).await.unwrap();
        assert_eq!((back.outcome.word(), back.cp), ("taken-back", report.cp));
        assert!(!back.may_be_lost(), "{:?}", back.sentences());
        assert!(back.epoch.number > report.epoch.number);
        let export = at_hub(&world.hub).await;
        assert_eq!(all(&export).await, world.image);
        put(&export, &mut world.image, 7000, &[6; 70_000]).await;
        // It was not lost after all: its time is over, it follows.
        let filer = world.filer().await;
        follows(&world.hub).await;
        assert!(give_back(&world.hub, None).await.unwrap().serves);
        world.is_whole(&filer).await;
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// A peer that says Follow by hand.
struct Peer {
    reader: FrameReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl Peer {
    async fn follow(hub: &Hub, follow: Follow) -> Self {
        let stream = tokio::net::TcpStream::connect(hub.address()).await.unwrap();
        let (read, write) = stream.into_split();
        let mut peer = Self { reader: FrameReader::new(read), write };
        peer.send(&Message::Follow(Box::new(follow))).await;
        peer
    }

    async fn send(&mut self, message: &Message) {
        let mut outgoing = Outgoing::default();
        outgoing.push(Frame::new(message, Bytes::new()));
        outgoing.write_all(&mut self.write).await.unwrap();
    }

    /// The refusal, or that the connection ended.
    async fn end(&mut self) -> Option<RefusedCode> {
        loop {
            match self.reader.next().await {
                Ok((Message::Refused(refused), _)) => return Some(refused.code),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }
}

/// What the filer that was failed over would say.
fn honest(hub: &Hub) -> Follow {
    let row = hub.shared().pool.catalog().sources().unwrap().into_iter().find(|r| r.name == name());
    let row = row.unwrap();
    let known = hub.shared().known(&name()).unwrap();
    Follow {
        version: 1,
        version_min: 1,
        name: name(),
        source: row.id,
        hub: Some(hub.shared().hub),
        generation: Generation { number: 1, id: 2 },
        epoch: Epoch { number: row.epoch.number - 1, id: 7 },
        fenced: row.epoch,
        volumes: known.volumes,
        own_cp: CpNumber(1),
        own: WirePlace(TransferId::default(), SequenceNumber(0), StreamHash::ZERO),
        last: SequenceNumber(0),
        cp_max: CpNumber(1),
        policy: Policy::default(),
        alone: None,
        filer: None,
    }
}

/// Who may not follow is refused by name.
#[test]
fn strangers_do_not_follow() {
    in_system(async {
        let world = World::failed_over(stop()).await;
        let good = honest(&world.hub);
        let stranger = SourceId([9; 16]);
        let cases: Vec<(&str, Follow, RefusedCode)> = vec![
            ("unknown name", Follow { name: other(), ..good.clone() }, RefusedCode::UnknownSource),
            ("other hub", Follow { hub: None, ..good.clone() }, RefusedCode::OtherHub),
            ("its epoch", Follow { epoch: good.fenced, ..good.clone() }, RefusedCode::Diverged),
            (
                "a later fence",
                Follow { fenced: Epoch { number: 900, id: 1 }, ..good.clone() },
                RefusedCode::Diverged,
            ),
            ("no volumes", Follow { volumes: vec![], ..good.clone() }, RefusedCode::Volume),
            ("version", Follow { version_min: 9, ..good.clone() }, RefusedCode::Version),
            (
                "another id with writes of its own",
                Follow { source: stranger, hub: None, ..good.clone() },
                RefusedCode::OtherSource,
            ),
            (
                "a new one that claims another filer",
                Follow {
                    source: stranger,
                    hub: None,
                    own_cp: CpNumber(0),
                    filer: Some(good.source),
                    ..good.clone()
                },
                RefusedCode::OtherSource,
            ),
        ];
        for (what, follow, code) in cases {
            let mut peer = Peer::follow(&world.hub, follow).await;
            assert_eq!(peer.end().await, Some(code), "{what}");
        }
        world.hub.stop().await;
    });
}

/// What is said out of place ends that connection, and nothing else.
#[test]
fn hostile_followers_touch_nobody() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let good = honest(&world.hub);
        let out_of_place = [
            Message::Reached(Reached { cp: CpNumber(5) }),
            Message::Adopted(Adopted { token: 1, refused: None }),
            Message::Follow(Box::new(good.clone())),
            Message::TakeOver(TakeOver {
                epoch: Epoch { number: 9, id: 9 },
                cp: CpNumber(1),
                place: WirePlace::default(),
                generation: 1,
                own: false,
            }),
        ];
        for message in out_of_place {
            let mut peer = Peer::follow(&world.hub, good.clone()).await;
            follows(&world.hub).await;
            peer.send(&message).await;
            assert_eq!(peer.end().await, None, "{}", message.name());
            until("it is gone", || !world.hub.shared().failbacks.follows(&name())).await;
        }
        // Many of them at once are bounded, and the one that counts keeps its place.
        let filer = world.filer().await;
        follows(&world.hub).await;
        let mut many = Vec::new();
        for n in 0..12 {
            let filer = Some(SourceId([n; 16]));
            many.push(Peer::follow(&world.hub, Follow { filer, ..good.clone() }).await);
        }
        assert_eq!(state(&world.hub), State::Promoted);
        assert!(give_back(&world.hub, None).await.unwrap().serves);
        world.is_whole(&filer).await;
        drop(many);
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}
