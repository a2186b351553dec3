//! Both sides have written, and the administrator keeps the filer's: what the hub had stays under a
//! name, nothing of either is lost, whichever end is lost at whichever step.

use std::sync::Mutex;

use super::failback::{
    World, all, at_filer, at_hub, fail_over, filer_options, follows, give_back, go_on, name, put,
    served, state,
};
use super::*;
use crate::filer::Filer;
use crate::hub::extension::State;
use crate::hub::failback::{self, Ask, Report, Side, Step};
use crate::hub::failover;
use crate::hub::failover::Refusal;
use crate::units::names::KeptName;
use crate::units::numbers::{Epoch, VolumeNumber};
use crate::volume::root::hash_reader;

/// A filer that went alone, and a hub that was failed over where the filer did not find it.
struct Split {
    world: World,
    /// What the filer has; the world's image is what the hub has.
    alone: Vec<u8>,
}

impl Split {
    async fn new() -> (Self, Filer) {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a", "b"])).await;
        let address = hub.address();
        let filer_dir = tempfile::tempdir().unwrap();
        let start = filer_options(filer_dir.path(), address, go_on());
        let filer = Filer::start(start).await.unwrap();
        served(&filer).await;
        let mut image = vec![0; usize::try_from(super::failback::VOLUME).unwrap()];
        let export = at_filer(&filer).await;
        put(&export, &mut image, 0, &[1; 300_000]).await;
        filer.checkpoint().await.unwrap();
        hub.stop().await;
        drop(hub);
        let mut alone = image.clone();
        put(&export, &mut alone, 50_000, &[7; 60_000]).await;
        put(&export, &mut alone, 3_500_000, &[7; 6000]).await;
        let hub = start_again(options(dir.path(), &["a", "b"])).await;
        fail_over(&hub).await;
        put(&at_hub(&hub).await, &mut image, 60_000, &[9; 90_000]).await;
        hub.stop().await;
        drop(hub);
        let again = HubOptions { listen: address, ..options(dir.path(), &["a", "b"]) };
        let hub = start_again(again).await;
        let mut world = World::of(dir, hub, filer_dir, image, go_on());
        follows(&world.hub).await;
        put(&at_hub(&world.hub).await, &mut world.image, 0, &[2]).await;
        (Self { world, alone }, filer)
    }

    /// The filer serves what it had, the image was brought up to that, and what the hub had is there
    /// under a name.
    async fn check_filers_side(mut self, filer: &Filer) -> World {
        let here = std::mem::replace(&mut self.world.image, self.alone);
        self.world.is_whole(filer).await;
        until("its mark is gone", || filer.status().alone.is_none()).await;
        let wanted = hash_reader(&here[..], ByteCount(super::failback::VOLUME)).unwrap();
        let kept = self.world.hub.kept(&name()).unwrap();
        let split = kept.iter().filter(|kept| kept.row.name.as_str().starts_with("split-"));
        let names: Vec<KeptName> = split.map(|kept| kept.row.name.clone()).collect();
        let pool = &self.world.hub.shared().pool;
        let root = |name: &KeptName| {
            let pin = pool.pin_kept(filer.status().id, name, VolumeNumber(0)).unwrap();
            pin.tree().root()
        };
        assert!(names.iter().any(|name| root(name) == wanted), "{names:?}");
        self.world
    }
}

async fn keep_source(hub: &Hub) -> Result<Report, Refusal> {
    give_back(hub, Some(Side::Source)).await
}

/// Somebody at the hub's address who gives what is not his to give: the filer publishes nothing for
/// it and keeps its NVRAM.
#[test]
fn an_epoch_that_is_not_new_changes_nothing() {
    in_system(async {
        let (split, filer) = Split::new().await;
        let row = || filer.pool().catalog().source(filer.status().id).unwrap().unwrap();
        let (before, hub) = (row(), &split.world.hub);
        // Its own epoch; the hub's, by another.
        for number in [1, 2] {
            follows(hub).await;
            failback::lie(hub.shared(), &name(), Epoch { number, id: 7 }).await;
            let says = format!("epoch {number} is given here");
            until(&says, || filer.status().reason.contains(&says)).await;
            assert_eq!(row(), before);
        }
        follows(hub).await;
        keep_source(hub).await.unwrap();
        let world = split.check_filers_side(&filer).await;
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// The NVRAM that the hub served with is gone, and with it the way to serve: what the filer has can
/// count all the same, and what the hub had published is kept. A cut behind the first step leaves
/// that way, and no other, also if the file is found again.
#[test]
fn an_nvram_that_is_gone_is_no_dead_end() {
    in_system(async {
        let (Split { world, alone }, filer) = Split::new().await;
        let World { hub, hub_dir, filer_dir, image, .. } = world;
        let address = hub.address();
        let path = hub.shared().promoted.nvram_path(filer.status().id);
        let aside = path.with_extension("aside");
        let again = || HubOptions { listen: address, ..options(hub_dir.path(), &["a", "b"]) };
        let mut hub = hub;
        // The file is found again: before anything was given up for it nothing has changed.
        for (end, said) in [(Step::Round(1), "split brain"), (Step::Reached, "given up")] {
            hub.stop().await;
            drop(hub);
            std::fs::rename(&path, &aside).unwrap();
            hub = start_again(again()).await;
            follows(&hub).await;
            let refused = give_back(&hub, None).await.unwrap_err();
            assert!(refused.reason.contains("is gone"), "{refused:?}");
            assert!(refused.next_step.contains("--keep source"), "{refused:?}");
            let ask = Ask { keep: Some(Side::Source), ..Ask::default() };
            let cut = hub.failback(&name(), ask, Box::new(move |step| step != end)).await;
            assert!(cut.unwrap_err().reason.contains("stops"));
            hub.stop().await;
            drop(hub);
            std::fs::rename(&aside, &path).unwrap();
            hub = start_again(again()).await;
            follows(&hub).await;
            let refused = give_back(&hub, None).await.unwrap_err();
            assert!(refused.reason.contains(said), "{end:?}: {refused:?}");
        }
        let report = keep_source(&hub).await.unwrap();
        assert!(report.serves && report.nvram_lost, "{report:?}");
        let world = World::of(hub_dir, hub, filer_dir, image, go_on());
        let world = Split { world, alone }.check_filers_side(&filer).await;
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

#[test]
fn the_filers_side_counts_and_the_hubs_is_kept() {
    in_system(async {
        let (split, filer) = Split::new().await;
        let hub = &split.world.hub;
        let refused = give_back(hub, None).await.unwrap_err();
        assert!(refused.next_step.contains("--keep source"), "{refused:?}");
        // A dry run changes nothing, and says what would be lost and where it stays.
        let ask = Ask { keep: Some(Side::Source), dry_run: true, ..Ask::default() };
        let dry = hub.failback(&name(), ask, Box::new(|_| true)).await.unwrap();
        assert!(dry.dry_run && !dry.serves, "{dry:?}");
        let said = dry.sentences(&name()).join("\n");
        assert!(said.contains("2 entries") && said.contains("a/VOLUME@split-2"), "{said}");
        assert_eq!(state(hub), State::Promoted);
        let ask = Ask { keep: Some(Side::Hub), dry_run: true, ..Ask::default() };
        let dry = hub.failback(&name(), ask, Box::new(|_| true)).await.unwrap();
        let said = dry.sentences(&name()).join("\n");
        assert!(said.contains("would be kept there as CP split-2"), "{said}");
        assert_eq!(state(hub), State::Promoted);
        let split_name =
            |kept: &crate::pool::kept::Kept| kept.row.name.as_str().starts_with("split");
        assert!(!hub.kept(&name()).unwrap().iter().any(split_name));
        let before = at_hub(hub).await;
        let report = keep_source(hub).await.unwrap();
        assert!(report.serves && report.kept.is_none(), "{report:?}");
        assert_eq!(report.kept_here, Some("split-2".parse().unwrap()));
        assert!(before.write(0, Bytes::from_static(b"late"), false).await.is_err());
        let world = split.check_filers_side(&filer).await;
        assert_eq!(filer.status().epoch, report.epoch);
        // Once more the other way: the filer has nothing by itself any more.
        fail_over(&world.hub).await;
        follows(&world.hub).await;
        let nothing = keep_source(&world.hub).await.unwrap_err();
        assert!(nothing.reason.contains("nothing that this hub never had"), "{nothing:?}");
        assert!(give_back(&world.hub, None).await.unwrap().serves);
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// Refused with a reason and a way on: nobody there, a new filer only, another filer.
#[test]
fn without_the_filer_there_is_no_side_to_keep() {
    in_system(async {
        let world = World::failed_over(go_on()).await;
        let nobody = keep_source(&world.hub).await.unwrap_err();
        assert!(nobody.reason.contains("is not connected"), "{nobody:?}");
        assert!(nobody.next_step.contains("start `mirrorhub source`"), "{nobody:?}");
        let new_dir = tempfile::tempdir().unwrap();
        let options = filer_options(new_dir.path(), world.hub.address(), go_on());
        let new = Filer::start(options).await.unwrap();
        follows(&world.hub).await;
        let nobody = keep_source(&world.hub).await.unwrap_err();
        assert!(nobody.reason.contains("is not connected"), "{nobody:?}");
        drop(new);
        let ask = Ask { keep: Some(Side::Source), to: Some("b".parse().unwrap()), dry_run: false };
        let other = world.hub.failback(&name(), ask, Box::new(|_| true)).await.unwrap_err();
        assert!(other.reason.contains("never here"), "{other:?}");
        // Nothing by itself: the hub has all of it.
        until("it is gone", || !world.hub.shared().failbacks.follows(&name())).await;
        let filer = world.filer().await;
        follows(&world.hub).await;
        let nothing = keep_source(&world.hub).await.unwrap_err();
        assert!(nothing.reason.contains("nothing that this hub never had"), "{nothing:?}");
        assert_eq!(state(&world.hub), State::Promoted);
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

const STEPS: [Step; 6] =
    [Step::Found, Step::Round(1), Step::Held, Step::Reached, Step::Kept, Step::HandedOver];

/// The filer is lost when that step is reached, with what it has on its devices then.
async fn filer_lost_at(step: Step) {
    let (mut split, filer) = Split::new().await;
    let left = tempfile::tempdir().unwrap();
    let (from, to) = (split.world.filer_dir.path().to_owned(), left.path().to_owned());
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
    let ask = Ask { keep: Some(Side::Source), ..Ask::default() };
    let given = split.world.hub.failback(&name(), ask, Box::new(told)).await;
    if matches!(step, Step::Found | Step::Round(_) | Step::Held) {
        assert!(given.unwrap_err().reason.contains("went away"));
        let export = at_hub(&split.world.hub).await;
        put(&export, &mut split.world.image, 7000, &[6; 70_000]).await;
    } else {
        assert!(!given.unwrap().serves);
        assert_eq!(state(&split.world.hub), State::HandedOver);
    }
    split.world.filer_dir = left;
    let filer = split.world.filer().await;
    if state(&split.world.hub) == State::Promoted {
        follows(&split.world.hub).await;
        assert!(keep_source(&split.world.hub).await.unwrap().serves);
    }
    let world = split.check_filers_side(&filer).await;
    filer.stop().await.unwrap();
    world.hub.stop().await;
}

#[test]
fn a_filer_lost_at_any_step_keeps_its_side() {
    for step in STEPS {
        in_system(filer_lost_at(step));
    }
}

/// The hub is lost when that step is reached; the filer finds the one that is started on what was left.
async fn hub_lost_at(step: Step) {
    let (mut split, filer) = Split::new().await;
    let told = move |reached: Step| reached != step;
    let ask = Ask { keep: Some(Side::Source), ..Ask::default() };
    assert!(split.world.hub.failback(&name(), ask, Box::new(told)).await.is_err());
    let left = promoted::copy_of(split.world.hub_dir.path());
    let address = split.world.hub.address();
    split.world.hub.stop().await;
    let again = HubOptions { listen: address, ..options(left.path(), &["a", "b"]) };
    split.world.hub = start_again(again).await;
    split.world.hub_dir = left;
    if state(&split.world.hub) == State::Promoted {
        assert!(!matches!(step, Step::HandedOver | Step::Told));
        let export = at_hub(&split.world.hub).await;
        put(&export, &mut split.world.image, 7000, &[6; 70_000]).await;
        follows(&split.world.hub).await;
        assert!(keep_source(&split.world.hub).await.unwrap().serves);
    }
    let world = split.check_filers_side(&filer).await;
    filer.stop().await.unwrap();
    world.hub.stop().await;
}

#[test]
fn a_hub_lost_at_any_step_keeps_the_filers_side() {
    for step in STEPS.into_iter().chain([Step::Told]) {
        in_system(hub_lost_at(step));
    }
}

/// The filer has published its state under the hub's number and is cut before it records that it is
/// primary; the hand-over never came to be. What it has looks like a CP of the hub, and is not taken
/// for one: either side can still be kept.
async fn half_taken_over(keep: Side) {
    let (mut split, filer) = Split::new().await;
    let cp = failback::half_taken_over(split.world.hub.shared(), &name()).await;
    until("it is published there", || filer.status().own_cp == cp).await;
    let filer_left = promoted::copy_of(split.world.filer_dir.path());
    drop(filer);
    split.world.filer_dir = filer_left;
    until("it is gone", || !split.world.hub.shared().failbacks.follows(&name())).await;
    let filer = split.world.filer().await;
    follows(&split.world.hub).await;
    let refused = give_back(&split.world.hub, None).await.unwrap_err();
    assert!(refused.reason.contains("split brain"), "{refused:?}");
    put(&at_hub(&split.world.hub).await, &mut split.world.image, 5000, &[4; 100]).await;
    assert!(give_back(&split.world.hub, Some(keep)).await.unwrap().serves);
    let mut world = if keep == Side::Source {
        split.check_filers_side(&filer).await
    } else {
        split.world.is_whole(&filer).await;
        let wanted = hash_reader(&split.alone[..], ByteCount(super::failback::VOLUME)).unwrap();
        let kept = "split-2".parse().unwrap();
        let kept = filer.pool().pin_kept(filer.status().id, &kept, VolumeNumber(0)).unwrap();
        assert_eq!(kept.tree().root(), wanted, "what it wrote by itself is there");
        split.world
    };
    world.image.clear();
    filer.stop().await.unwrap();
    world.hub.stop().await;
}

#[test]
fn a_filer_cut_in_taking_over_is_no_mirror_of_the_hub() {
    for keep in [Side::Source, Side::Hub] {
        in_system(half_taken_over(keep));
    }
}

/// A hand-over that no filer has taken up is taken back; the filer comes with its own state after all.
#[test]
fn a_hand_over_is_taken_back() {
    in_system(async {
        let (mut split, filer) = Split::new().await;
        let told = |reached: Step| reached != Step::HandedOver;
        let ask = Ask { keep: Some(Side::Source), ..Ask::default() };
        let hub = &split.world.hub;
        // Nobody is told: the hub stops here.
        assert!(hub.failback(&name(), ask, Box::new(told)).await.is_err());
        let filer_left = promoted::copy_of(split.world.filer_dir.path());
        drop(filer);
        split.world.filer_dir = filer_left;
        let left = promoted::copy_of(split.world.hub_dir.path());
        let address = hub.address();
        split.world.hub.stop().await;
        let again = HubOptions { listen: address, ..options(left.path(), &["a", "b"]) };
        split.world.hub = start_again(again).await;
        split.world.hub_dir = left;
        assert_eq!(state(&split.world.hub), State::HandedOver);
        fail_over(&split.world.hub).await;
        let export = at_hub(&split.world.hub).await;
        assert!(all(&export).await == split.world.image, "what was served is there");
        put(&export, &mut split.world.image, 9000, &[5; 100]).await;
        let filer = split.world.filer().await;
        follows(&split.world.hub).await;
        let refused = give_back(&split.world.hub, None).await.unwrap_err();
        assert!(refused.reason.contains("split brain"), "{refused:?}");
        assert!(keep_source(&split.world.hub).await.unwrap().serves);
        let world = split.check_filers_side(&filer).await;
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// R13's second way: the log is damaged behind the fence, nobody was served; the filer has it all.
async fn behind_a_damaged_log(restart: bool) {
    let hub_dir = tempfile::tempdir().unwrap();
    let mut hub = start_again(options(hub_dir.path(), &["a"])).await;
    let address = hub.address();
    let filer_dir = tempfile::tempdir().unwrap();
    let filer = Filer::start(filer_options(filer_dir.path(), address, go_on())).await.unwrap();
    served(&filer).await;
    let mut image = vec![0; usize::try_from(super::failback::VOLUME).unwrap()];
    let export = at_filer(&filer).await;
    put(&export, &mut image, 0, &[1; 300_000]).await;
    filer.checkpoint().await.unwrap();
    put(&export, &mut image, 100_000, &[0x77; 50_000]).await;
    let lane = hub.shared().lanes.get(&name()).unwrap();
    until("it is drained", || lane.cursors().drained.sequence == filer.status().own_durable).await;
    let (shared, source) = (hub.shared().clone(), name());
    let run = tokio::task::spawn_blocking(move || {
        let ask = failover::Ask { now: true, ..failover::Ask::default() };
        failover::run(&shared, &source, ask, &|step| *step != failover::Step::Drained, &|_| ())
    });
    run.await.unwrap().unwrap_err();
    hub.stop().await;
    drop((hub, lane));
    let logs = hub_dir.path().join("logs").join(filer.status().id.to_string());
    let log = std::fs::read_dir(logs).unwrap().map(|entry| entry.unwrap().path());
    let log = log.filter(|path| path.extension().is_some_and(|e| e == "log")).max().unwrap();
    let mut bytes = std::fs::read(&log).unwrap();
    let at = bytes.windows(64).rposition(|window| window == [0x77; 64]).unwrap();
    bytes[at] ^= 0x40;
    std::fs::write(&log, bytes).unwrap();
    super::failover::damage_ring(hub_dir.path());
    let again = HubOptions { listen: address, ..options(hub_dir.path(), &["a"]) };
    hub = start_again(again).await;
    until("it is said", || hub.snapshots()[0].next_step.contains("--accept-gap")).await;
    assert_eq!(state(&hub), State::FailingOver);
    until("it has ended", || hub.shared().failovers.turn(&name()).is_ok()).await;
    follows(&hub).await;
    let refused = give_back(&hub, None).await.unwrap_err();
    assert!(refused.reason.contains("being failed over"), "{refused:?}");
    let mut world = World::of(hub_dir, hub, filer_dir, image, go_on());
    if restart {
        let told = |reached: Step| reached != Step::HandedOver;
        let ask = Ask { keep: Some(Side::Source), ..Ask::default() };
        assert!(world.hub.failback(&name(), ask, Box::new(told)).await.is_err());
        let left = promoted::copy_of(world.hub_dir.path());
        world.hub.stop().await;
        let again = HubOptions { listen: address, ..options(left.path(), &["a"]) };
        world.hub = start_again(again).await;
        world.hub_dir = left;
    } else {
        let report = keep_source(&world.hub).await.unwrap();
        assert!(report.serves && report.kept_here.is_none(), "{report:?}");
    }
    world.is_whole(&filer).await;
    filer.stop().await.unwrap();
    world.hub.stop().await;
}

#[test]
fn a_damaged_log_is_given_up_for_the_filer_that_has_it() {
    for restart in [false, true] {
        in_system(behind_a_damaged_log(restart));
    }
}
