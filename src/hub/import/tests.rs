//! Goal: an import that ends anywhere is taken up by the next one; what is another's, damaged or blank is
//! refused by name and not touched.

use std::time::Duration;

use super::super::identity::identity;
use super::super::recover;
use super::*;
use crate::raid::files::PoolFiles;
use crate::raid::layout::Level;
use crate::units::numbers::ByteCount;

fn options(dir: &Path) -> HubOptions {
    let device = |n| (dir.join(format!("disks/disk{n}")), ByteCount(16 << 20));
    let devices = (0..3).map(device).collect();
    HubOptions {
        data_dir: dir.join("state"),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        nvram: (dir.join("state/nvram"), ByteCount(16 << 20)),
        realtime: false,
        log_dir: dir.join("state/logs"),
        pool: PoolFiles {
            level: Level::Parity1,
            devices,
            accept_missing: false,
            adding: vec![],
            plain: |_| None,
        },
        sources: vec![],
        image_pin: Duration::from_secs(1),
        promoted: promoted::PromotedOptions::default(),
        hooks: crate::hub::hooks::HookOptions::default(),
        appliers: 1,
        arbiters: 1,
    }
}

/// A hub that knows two sources.
fn made(dir: &Path) -> (HubOptions, HubId) {
    let options = options(dir);
    let hub = identity(&options).unwrap();
    let array = options.pool.open().unwrap().array;
    let pool = Pool::open(array, PoolOptions::default()).unwrap();
    for n in 1..3 {
        let name = format!("s{n}").parse().unwrap();
        pool.catalog().put_source(SourceRow::new(SourceId([n; 16]), name)).unwrap();
    }
    (options, hub)
}

fn disks(options: &HubOptions) -> Vec<Vec<u8>> {
    options.pool.devices.iter().map(|(path, _)| fs::read(path).unwrap()).collect()
}

fn marked(options: &HubOptions) -> usize {
    let all = (1..3).map(|n| SourceId([n; 16]));
    Refills::of(&options.data_dir).marked(all).unwrap().len()
}

#[test]
fn an_import_ended_at_any_step_is_done_by_the_next() {
    for steps in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let (options, hub) = made(dir.path());
        fs::remove_dir_all(&options.data_dir).unwrap();
        let before = disks(&options);
        let done = take_within(&options, hub, &mut Steps(steps));
        if done.is_err() {
            // A start makes nothing of it.
            let error = identity(&options).unwrap_err().to_string();
            assert!(error.contains("holds something"), "{error}");
            let again = take(&options, hub).unwrap();
            assert_eq!((again.hub, again.sources.len()), (hub, 2), "ended at step {steps}");
        }
        assert!(disks(&options) == before, "an import has written to the pool");
        assert_eq!(marked(&options), 2, "ended at step {steps}");
        assert_eq!(identity(&options).unwrap(), hub);
        identity::own_logs(&options.log_dir, hub).unwrap();
        let ring: Arc<dyn Device> =
            Arc::new(FileDevice::open(&options.nvram.0, Access::Cached).unwrap());
        Ring::open(ring, hub.0, RingOptions::default(), &mut |_| {}).unwrap();
        assert!(look(&options).unwrap_err().to_string().contains("already"));
        if done.is_ok() {
            assert!(steps > 3, "{steps}");
            return;
        }
    }
}

/// Goal: a hub that has its identity, and lost its ring or its logs, is told by its start to import, and the
/// import makes it whole behind marks: neither sends to the other for ever. Ended anywhere it is done by
/// the next, also if a start that was refused has made the ring meanwhile.
#[test]
fn what_a_hub_lost_beside_its_identity_is_made_again() {
    for (lost, first) in [("nvram", 0), ("logs", 99)] {
        for steps in first.. {
            let dir = tempfile::tempdir().unwrap();
            let (options, hub) = made(dir.path());
            let gone = options.data_dir.join(lost);
            if gone.is_dir() { fs::remove_dir_all(&gone) } else { fs::remove_file(&gone) }.unwrap();
            let start =
                || recover::recover(&options, Vec::new()).map(drop).unwrap_err().to_string();
            if steps == first {
                let said = start();
                assert!(said.contains("mirrorhub import"), "{said}");
            }
            let found = look(&options).unwrap();
            assert_eq!(
                (found.nvram == Part::Gone, found.logs == Part::Gone),
                (lost == "nvram", lost == "logs")
            );
            let done = take_within(&options, hub, &mut Steps(steps));
            if done.is_err() {
                drop(identity(&options));
                match take(&options, hub) {
                    Ok(again) => assert_eq!(again.hub, hub),
                    // All is there by now, and the start says nothing else.
                    Err(error) => assert!(error.to_string().contains("start it"), "{error}"),
                }
            }
            assert_eq!(identity(&options).unwrap(), hub);
            if steps > 0 {
                assert_eq!(marked(&options), 2, "{lost}, ended at step {steps}");
            }
            assert!(look(&options).unwrap_err().to_string().contains("start it"));
            if done.is_ok() {
                assert!(steps > 3, "{steps}");
                break;
            }
        }
    }
}

/// Goal: of a ring that cannot be opened it is said what it is and what ends it; on a block device nothing
/// is believed but zeros.
#[test]
fn a_torn_ring_is_judged_by_where_it_lies() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), HubId([4; 16]));
    let path = dir.path().join("ring");
    drop(FileDevice::create(&path, ByteCount(16 << 20), Access::Direct).unwrap());
    let torn = || {
        // Both headers: of one the other is as good.
        let device: Arc<dyn Device> = Arc::new(FileDevice::open(&path, Access::Cached).unwrap());
        device.write_durable_at(0, &[7; 16 << 10]).unwrap();
        Ring::open(device, hub.0, RingOptions::default(), &mut |_| {}).map(drop)
    };
    let judged = |is_file, listed| judge_ring(torn(), hub, &path, (is_file, listed));
    assert_eq!(judged(true, true).unwrap(), Part::Gone, "it was being made, and is a file");
    let said = |is_file, listed| judged(is_file, listed).unwrap_err().to_string();
    assert!(said(true, false).contains("move this one away"));
    for listed in [true, false] {
        let text = said(false, listed);
        assert!(text.contains("dd if=/dev/zero") && text.contains("then import again"), "{text}");
        assert_eq!(text.contains("that was cut"), listed, "{text}");
    }
    assert_eq!(judge_ring(Ok(()), hub, &path, (false, false)).unwrap(), Part::Kept);
}

/// Somebody has started a hub before: it was refused, and may have left an id and a ring of its own.
#[test]
fn what_a_first_start_has_begun_is_in_nobodys_way() {
    let (dir, aside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (options, hub) = made(dir.path());
    fs::remove_dir_all(&options.data_dir).unwrap();
    let (others, other) = made(aside.path());
    assert_ne!(hub, other);
    fs::create_dir_all(&options.data_dir).unwrap();
    fs::copy(&others.nvram.0, &options.nvram.0).unwrap();
    let listed = Some(vec![options.nvram.0.clone()]);
    let file = options.data_dir.join(identity::FILE);
    // The control: that ring is not in the list, so it may be of value.
    identity::write(&file, &Identity::new(other, Some(vec![]))).unwrap();
    let error = take(&options, hub).unwrap_err().to_string();
    assert!(error.contains("belongs to") && error.contains("NVRAM"), "{error}");
    identity::write(&file, &Identity::new(other, listed)).unwrap();
    let found = take(&options, hub).unwrap();
    assert_eq!((found.nvram, found.logs), (Part::Gone, Part::Gone));
    assert_eq!(identity(&options).unwrap(), hub);
}

#[test]
fn what_was_outside_is_kept_and_nobody_has_to_send_again() {
    let dir = tempfile::tempdir().unwrap();
    let options = HubOptions {
        nvram: (dir.path().join("ring"), ByteCount(16 << 20)),
        log_dir: dir.path().join("logs"),
        ..options(dir.path())
    };
    let hub = identity(&options).unwrap();
    fs::remove_dir_all(&options.data_dir).unwrap();
    let found = take(&options, hub).unwrap();
    assert!(!found.log_is_lost());
    assert!(!Refills::of(&options.data_dir).directory().is_dir());
}

#[test]
fn what_is_anothers_or_nothing_is_refused_by_name() {
    let (dir, aside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (options, hub) = made(dir.path());
    let (others, other) = made(aside.path());
    let refused = |options: &HubOptions, what: &str| {
        let before = disks(options);
        let error = take(options, hub).unwrap_err().to_string();
        assert!(error.contains(what), "wanted {what}: {error}");
        assert!(disks(options) == before);
    };
    // Of another hub: all of it, its data_dir, its logs, its ring; half of the devices.
    let with = |data_dir: &Path| HubOptions {
        data_dir: data_dir.to_owned(),
        nvram: (data_dir.join("nvram"), options.nvram.1),
        log_dir: data_dir.join("logs"),
        ..options.clone()
    };
    let new = dir.path().join("new");
    let theirs = HubOptions { pool: others.pool.clone(), ..with(&new) };
    refused(&theirs, &format!("these devices are of hub {other}, not of {hub}"));
    refused(&with(&others.data_dir), &format!("data_dir of hub {other}"));
    refused(&with(&options.data_dir), "already, with its NVRAM and its logs: start it");
    refused(&HubOptions { log_dir: others.log_dir.clone(), ..with(&new) }, &other.to_string());
    refused(&HubOptions { nvram: others.nvram.clone(), ..with(&new) }, "belongs to");
    let mut mixed = with(&new);
    mixed.pool.devices[1..].clone_from_slice(&others.pool.devices[1..]);
    refused(&mixed, "not of");
    // One foreign device is left out, and named.
    let mut one = with(&new);
    one.pool.devices[2] = others.pool.devices[2].clone();
    let found = look(&one).unwrap();
    assert_eq!(found.left_out.len(), 1);
    assert!(found.left_out[0].reason.contains("belongs to array"), "{:?}", found.left_out);
    // Nothing there, and nothing on them.
    let mut blank = with(&new);
    for (path, _) in &mut blank.pool.devices {
        *path = path.with_extension("blank");
    }
    assert!(look(&blank).unwrap_err().to_string().contains("no device carries"));
    for (path, size) in &blank.pool.devices {
        fs::File::create(path).unwrap().set_len(size.0).unwrap();
    }
    refused(&blank, "no device carries");
    assert!(!new.is_dir(), "what was refused has made something");
}
