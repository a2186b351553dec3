//! What is not opened, and why; and what is opened although its header is damaged.

use super::*;
use crate::nvlog::format::{Header, HeaderError, SLOT_BYTES};
use crate::units::convert::to_u64;
use crate::units::hash::crc32c;

fn open(sim: &Arc<SimDevice>) -> Result<Recovery, RingError> {
    let device: Arc<dyn Device> = sim.clone();
    Ring::open(device, OWNER, RingOptions::default(), &mut |_| {}).map(|(_, recovery)| recovery)
}

fn device(bytes: u64) -> Arc<SimDevice> {
    Arc::new(SimDevice::new("ring", ByteCount(bytes)))
}

#[test]
fn a_new_ring_is_empty_and_opens_again() {
    let sim = small_ring(4);
    for _ in 0..3 {
        let recovery = open(&sim).unwrap();
        assert_eq!((recovery.records, recovery.end), (0, LogPosition(0)));
        assert!(!recovery.slot_damaged && !recovery.header_stale && !recovery.cut);
    }
}

#[test]
fn create_refuses_what_cannot_be_a_ring_or_is_one() {
    let create = |sim: &Arc<SimDevice>, shape| Ring::create(sim.clone(), OWNER, shape);
    let full = RingShape::default();
    let too_small = create(&device(8 << 20), full);
    assert!(matches!(too_small, Err(RingError::TooSmall { wanted: 8_396_800, .. })));
    assert!(create(&device((8 << 20) + 8192), full).is_ok());
    assert!(matches!(create(&device(8192), SMALL), Err(RingError::TooSmall { .. })));
    assert!(matches!(create(&device(512), SMALL), Err(RingError::TooSmall { .. })));
    for commit_bytes_max in [0, 100, 513, 8192, 8 << 20] {
        let shape = RingShape { area_bytes_min: 4096, commit_bytes_max };
        let made = create(&device(8192 + 4096), shape);
        assert!(matches!(made, Err(RingError::Shape { .. })), "{commit_bytes_max}");
    }
    let sim = small_ring(1);
    assert!(matches!(create(&sim, SMALL), Err(RingError::AlreadyRing { .. })));
    // One good slot is enough to be one, and so is a damaged one.
    sim.plant(0, &[0; SLOT_BYTES]);
    assert!(matches!(create(&sim, SMALL), Err(RingError::AlreadyRing { .. })));
    sim.rot(4096 + 100, &[1]);
    assert!(matches!(create(&sim, SMALL), Err(RingError::AlreadyRing { .. })));
    let sim = device(1 << 20);
    sim.plant(1024, b"a file system");
    assert!(matches!(create(&sim, SMALL), Err(RingError::NotEmpty { .. })));
    // Some leave the beginning alone; behind the first MiB nobody looks.
    let sim = device(2 << 20);
    sim.plant(64 << 10, b"_BHRfS_M");
    assert!(matches!(create(&sim, SMALL), Err(RingError::NotEmpty { .. })));
    sim.plant(64 << 10, &[0; 8]);
    sim.plant(1 << 20, b"what nobody reads");
    assert!(create(&sim, SMALL).is_ok());
}

/// A ring that was given up can be made anew, also if the power went at any write of that.
#[test]
fn a_ring_is_given_up_whole_whenever_the_power_goes() {
    use crate::device::sim::Effect;
    for nth in 0..4 {
        let sim = small_ring(8);
        sim.plant(8192 + 4096, b"records");
        sim.fail_change(nth, Effect::PowerCut);
        assert_eq!(Ring::erase(&*sim).is_err(), nth < 3, "{nth}");
        let sim = Arc::new(SimDevice::from_image("ring", sim.image()));
        match open(&sim) {
            Ok(_) => assert_eq!(nth, 0, "as it was"),
            Err(RingError::Blank { .. }) => {
                Ring::create(sim.clone(), OWNER, SMALL).unwrap();
                assert!(open(&sim).is_ok());
            }
            Err(error) => panic!("{nth}: {error}"),
        }
    }
}

/// Power cut between the two slots of a new ring, and before the first.
#[test]
fn a_half_made_ring_is_a_ring_or_blank() {
    use crate::device::sim::Effect;
    for nth in 0..2 {
        let sim = device(8192 + 16_384);
        sim.fail_change(nth, Effect::PowerCut);
        assert!(Ring::create(sim.clone(), OWNER, SMALL).is_err());
        sim.power_cut_choosing(&mut |_, _| 0);
        sim.power_on();
        match open(&sim) {
            Err(RingError::Blank { .. }) => assert_eq!(nth, 0),
            opened => assert!(opened.is_ok() && nth == 1),
        }
    }
}

/// Changes a slot and seals it again.
fn resealed(sim: &SimDevice, slot: u64, change: impl FnOnce(&mut [u8])) {
    let at = slot * 4096;
    let mut bytes = vec![0; SLOT_BYTES];
    sim.read_at(at, &mut bytes).unwrap();
    change(&mut bytes);
    let crc = crc32c(&bytes[..508]);
    bytes[508..512].copy_from_slice(&crc.to_le_bytes());
    sim.plant(at, &bytes);
}

#[test]
fn each_foreign_ring_is_refused_with_its_reason() {
    assert!(matches!(open(&device(1 << 20)), Err(RingError::Blank { .. })));
    assert!(matches!(open(&device(8192)), Err(RingError::TooSmall { .. })));
    let sim = device(1 << 20);
    sim.plant(0, b"MHPO");
    let magic = HeaderError::Magic(*b"MHPO");
    assert!(matches!(open(&sim), Err(RingError::Headers { first, .. }) if first == magic));

    let sim = small_ring(4);
    let other = Ring::open(sim.clone(), [6; 16], RingOptions::default(), &mut |_| {});
    let text = other.unwrap_err().to_string();
    assert_eq!(text, format!("ring: belongs to {}, not to {}", "05".repeat(16), "06".repeat(16)));

    for slot in 0..2 {
        let sim = small_ring(4);
        resealed(&sim, slot, |bytes| bytes[4] = 3);
        assert!(matches!(open(&sim), Err(RingError::Version { version: 3, .. })));
        let sim = small_ring(4);
        resealed(&sim, slot, |bytes| bytes[8] ^= 1);
        assert!(matches!(open(&sim), Err(RingError::Mixed { .. })));
    }
    let shrunk = SimDevice::from_image("ring", small_ring(4).image()[..8192 + 8192].to_vec());
    let refused = open(&Arc::new(shrunk));
    assert!(matches!(refused, Err(RingError::TooSmall { wanted: 24_576, .. })));
}

/// A refused device is as it was.
#[test]
fn a_refusal_writes_nothing() {
    let sim = small_ring(4);
    resealed(&sim, 0, |bytes| bytes[4] = 3);
    let before = sim.image();
    sim.clear_trace();
    assert!(open(&sim).is_err());
    assert!(sim.image() == before);
    use crate::device::sim::On;
    assert!(sim.trace().iter().all(|call| matches!(call.on, On::Read | On::Flush)));
}

/// Goal: with either header slot damaged after any number of laps the records are all found and
/// nothing is called damaged; with both the ring is refused with both reasons.
/// Method: several laps with releases, then rot in each slot, also with records in flight.
#[test]
fn one_damaged_header_slot_is_survived() {
    for commits in 0..30 {
        for slot in 0..2 {
            let sim = small_ring(2);
            let mut driven = drive(sim.clone()).unwrap();
            let mut kept = Vec::new();
            for ticket in 0..commits {
                driven.commit(ticket, &[3]);
                kept.push(ticket);
                if kept.len() == 4 {
                    driven.release_all();
                    kept.clear();
                }
            }
            drop(driven);
            sim.rot(slot * 4096 + 60, &[0x10]);
            let driven = drive(sim.clone()).unwrap();
            assert!(driven.recovery.slot_damaged);
            // An older header knows an older release: more may be found, never less.
            let found = driven.tickets_found();
            assert!(found.ends_with(&kept), "after {commits}: {found:?} for {kept:?}");
            let whole = driven.recovery.damage.iter().all(|damage| {
                // What a reused record leaves of its older neighbour is all that may be missing.
                driven.recovery.header_stale && damage.to.0 - damage.from.0 < 1536
            });
            assert!(whole, "after {commits}: {:?}", driven.recovery);
            // The slot is good again after the opening and the next header.
            drop(driven);
            assert!(drive(sim.clone()).is_ok());
            assert!(!drive(sim).unwrap().recovery.slot_damaged);
        }
    }
    let sim = small_ring(2);
    sim.rot(100, &[1]);
    sim.rot(4200, &[1]);
    let both = open(&sim).unwrap_err();
    assert!(matches!(
        both,
        RingError::Headers {
            first: HeaderError::Checksum { .. },
            second: HeaderError::Checksum { .. },
            ..
        }
    ));
}

/// A device that lost its header writes leaves a header that lags by 1, 2, 3 laps: the records
/// say so, and every committed one that was not released is found.
#[test]
fn a_header_that_lags_laps_behind_is_told_by_the_records() {
    for (laps, sectors) in [(1, 2), (2, 2), (3, 2), (1, 3), (2, 3), (3, 3)] {
        let sim = small_ring(1);
        let old_header = sim.image()[..8192].to_vec();
        let mut driven = drive(sim.clone()).unwrap();
        let commits = laps * 8 / to_u64(sectors) + 2;
        for ticket in 0..commits {
            driven.commit(ticket, &[sectors]);
            if ticket + 1 < commits {
                driven.release_all();
            }
        }
        let durable = driven.handle.status().durable;
        drop(driven);
        sim.plant(0, &old_header);
        let driven = drive(sim).unwrap();
        assert!(driven.recovery.header_stale, "{laps}: {:?}", driven.recovery);
        assert_eq!(driven.recovery.end, durable);
        assert_eq!(driven.tickets_found().last(), Some(&(commits - 1)));
        // Where records do not divide the area, half of a reused one is left: no damage, since it
        // was released.
        assert_eq!(driven.recovery.damage, [], "{laps} laps of {sectors} sectors");
    }
}

#[test]
fn a_header_in_the_wrong_slot_is_a_misdirected_write() {
    let sim = small_ring(4);
    let image = sim.image();
    sim.plant(0, &image[4096..8192]);
    let recovery = open(&sim).unwrap();
    assert!(recovery.slot_damaged);
    let decoded = Header::decode(image[4096..8192].try_into().unwrap()).unwrap();
    assert_eq!(decoded.slot_offset(), 4096);
}

#[test]
fn a_record_of_a_later_version_refuses_the_ring_and_leaves_it_alone() {
    let sim = small_ring(4);
    let mut driven = drive(sim.clone()).unwrap();
    driven.commit(1, &[1, 1]);
    drop(driven);
    let mut head = vec![0; 128];
    sim.read_at(8192 + 512, &mut head).unwrap();
    head[4] = 2;
    let crc = crc32c(&head[..124]);
    head[124..].copy_from_slice(&crc.to_le_bytes());
    sim.plant(8192 + 512, &head);
    let before = sim.image();
    let refused = open(&sim);
    assert!(matches!(
        refused,
        Err(RingError::RecordVersion { position: LogPosition(512), version: 2, .. })
    ));
    assert!(sim.image() == before);
}

/// A passing read error must not cut an acknowledged tail.
#[test]
fn a_failed_read_refuses_the_ring_and_leaves_it_alone() {
    use crate::device::sim::{Effect, On};
    let sim = small_ring(4);
    let mut driven = drive(sim.clone()).unwrap();
    driven.commit(1, &[1, 3, 2]);
    drop(driven);
    let before = sim.image();
    for nth in 0..100 {
        sim.fail(On::Read, nth, Effect::Errno(5));
        let opened = open(&sim);
        if sim.forget_faults() == 1 {
            assert!(nth > 2, "the opening reads the slots and the area");
            assert_eq!(opened.unwrap().records, 3);
            return;
        }
        assert!(matches!(opened, Err(RingError::Device(_))), "read {nth}");
        assert!(sim.image() == before, "read {nth}");
    }
    panic!("the opening reads for ever");
}
