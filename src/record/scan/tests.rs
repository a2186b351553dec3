//! Torn or rotten: every subset of a torn group commit, every bad tail, laps and borders.

use super::super::envelope::{RecordKind, record_bytes};
use super::*;
use crate::units::hash::crc32c;
use crate::units::numbers::Epoch;

const RING: RingId = RingId([7; 16]);
const SECTOR: usize = 512;

/// A ring's data area and a writer that does what a committing thread does.
#[derive(Clone)]
struct Area {
    bytes: Vec<u8>,
    written: u64,
}

/// A record's bytes, ready to be put down sector by sector.
fn record(position: u64, durable: u64, source: u8, body: &[u8]) -> Vec<u8> {
    let envelope = Envelope {
        kind: RecordKind::Transfer,
        ring: RING,
        position: LogPosition(position),
        durable: LogPosition(durable),
        source: SourceId([source; 16]),
        epoch: Epoch { number: 1, id: 1 },
        body_bytes: u32::try_from(body.len()).unwrap(),
        record_bytes: u32::try_from(record_bytes(to_u64(body.len()))).unwrap(),
        body_crc: crc32c(body),
    };
    let mut bytes = envelope.encode().to_vec();
    bytes.extend_from_slice(body);
    bytes.resize(u32_to_usize(envelope.record_bytes), 0);
    bytes
}

/// A body that makes a record of so many sectors.
fn body(sectors: usize, fill: u8) -> Vec<u8> {
    vec![fill; sectors * SECTOR - ENVELOPE_BYTES]
}

impl Area {
    fn new(sectors: usize) -> Self {
        Self { bytes: vec![0; sectors * SECTOR], written: 0 }
    }

    fn capacity(&self) -> u64 {
        to_u64(self.bytes.len())
    }

    fn put(&mut self, position: u64, bytes: &[u8]) {
        for (position, byte) in (position..).zip(bytes) {
            let at = to_usize(position % self.capacity());
            self.bytes[at] = *byte;
        }
    }

    /// One group commit of records of these sectors, the first of source 1, the second of 2, ...
    fn commit(&mut self, sectors: &[usize]) -> Vec<u64> {
        let durable = self.written;
        let mut starts = Vec::new();
        for (source, sectors) in (1..).zip(sectors) {
            starts.push(self.written);
            // No two records of a test are alike, so that a sector not kept is never right by luck.
            let fill = u8::try_from(self.written / 512 % 251).unwrap();
            let bytes = record(self.written, durable, source, &body(*sectors, fill));
            self.put(self.written, &bytes);
            self.written += to_u64(bytes.len());
        }
        starts
    }

    fn rot(&mut self, position: u64) {
        let at = to_usize(position % self.capacity());
        self.bytes[at] ^= 0x40;
    }

    fn scan_from(&self, from: u64, durable: u64) -> (Scan, Vec<u64>) {
        self.scan_within(from, durable, None)
    }

    fn scan_within(&self, from: u64, durable: u64, reach: Option<ByteCount>) -> (Scan, Vec<u64>) {
        let range = Range {
            ring: RING,
            from: LogPosition(from),
            limit: LogPosition(from + self.capacity()),
            durable: LogPosition(durable),
            reach,
        };
        let mut found = Vec::new();
        let scan = scan(range, |at, out| self.read(at, out), &mut |envelope, body| {
            assert_eq!(crc32c(&body), envelope.body_crc);
            found.push(envelope.position.0);
        });
        (scan.unwrap(), found)
    }

    fn read(&self, at: LogPosition, out: &mut [u8]) -> Result<(), std::fmt::Error> {
        for (position, byte) in (at.0..).zip(out) {
            *byte = self.bytes[to_usize(position % self.capacity())];
        }
        Ok(())
    }
}

fn ranges(scan: &Scan) -> Vec<(u64, u64)> {
    scan.damage.iter().map(|damage| (damage.from.0, damage.to.0)).collect()
}

/// Rule 3 test 1. Goal: however a power cut tears a group commit of three records of two sources,
/// it is a torn tail and the records before the first bad one are found; the same damage with a
/// later batch behind it, or with a header that knows better, is rot.
/// Method: all 2^6 subsets of the sectors of the batch, over the bytes of 0 to 3 earlier laps.
#[test]
fn every_subset_of_a_torn_group_commit() {
    let mut misjudged_by_the_plain_rule = 0;
    for laps in 0..4 {
        for kept in 0u32..64 {
            let (mut area, base) = area_after(laps);
            let before = area.clone();
            let starts = area.commit(&[1, 2, 3]);
            let end = area.written;
            let torn = tear(&before, &area, starts[0], kept);
            let whole = [kept & 1 == 1, kept & 6 == 6, kept & 56 == 56];
            let good = whole.iter().take_while(|whole| **whole).count();
            let wanted: Vec<u64> = [base].iter().chain(&starts[..good]).copied().collect();
            let at = starts.get(good).copied().unwrap_or(end);

            let (scan, found) = torn.scan_from(base, base);
            assert_eq!(found, wanted, "kept {kept:06b} after {laps} laps");
            assert_eq!((scan.end.0, ranges(&scan)), (at, vec![]), "kept {kept:06b}");
            if good < 3 && whole[good..].contains(&true) {
                misjudged_by_the_plain_rule += 1;
                assert!(scan.remains_end > scan.end);
            }
            let (scan, _) = torn.scan_from(base, end);
            assert_eq!(scan.end.0, end, "the header says all of it was durable");
            assert_eq!(good == 3, scan.damage.is_empty());

            let mut later = torn.clone();
            let next = later.commit(&[1])[0];
            let (scan, found) = later.scan_from(base, base);
            assert_eq!(scan.end.0, later.written);
            assert_eq!(found.last(), Some(&next), "the later batch is found behind the damage");
            assert_eq!(good == 3, scan.damage.is_empty());
            if good < 3 {
                assert_eq!(scan.damage[0].from.0, at);
            }
        }
    }
    // Control: "something valid follows, so it is rot" would be wrong as often as this.
    assert_eq!(misjudged_by_the_plain_rule, 4 * (11 + 3));
}

/// An area of 12 sectors that went round so many times, then one durable record at the position
/// returned.
fn area_after(laps: u64) -> (Area, u64) {
    let mut area = Area::new(12);
    while area.written < laps * area.capacity() + 1024 {
        area.commit(&[1, 3, 2]);
    }
    let base = area.commit(&[2])[0];
    (area, base)
}

/// `before` with those sectors of `after` from `start` on that the mask keeps.
fn tear(before: &Area, after: &Area, start: u64, kept: u32) -> Area {
    let mut torn = before.clone();
    let mut position = start;
    while position < after.written {
        let sector = (position - start) / 512;
        if kept >> sector & 1 == 1 {
            let mut bytes = [0; SECTOR];
            after.read(LogPosition(position), &mut bytes).unwrap();
            torn.put(position, &bytes);
        }
        position += 512;
    }
    torn.written = after.written;
    torn
}

/// `model/torn.py`: rot of record 2 is seen when a later batch exists, and in the last batch only
/// the header tells.
#[test]
fn rot_is_seen_by_what_was_written_later() {
    let mut area = Area::new(32);
    area.commit(&[1]);
    let batch = area.commit(&[2, 2, 2]);
    area.rot(batch[0] + 600);
    let (scan, found) = area.scan_from(0, 0);
    assert_eq!((scan.end.0, ranges(&scan), found), (batch[0], vec![], vec![0]));
    assert!(matches!(scan.tail, Some(Fault::Record(EnvelopeError::Body { .. }))));
    assert_eq!(scan.remains_end.0, area.written);

    let (scan, found) = area.scan_from(0, area.written);
    assert_eq!(ranges(&scan), [(batch[0], batch[1])]);
    assert_eq!(scan.damage[0].source, Some(SourceId([1; 16])), "only the body is bad");
    assert_eq!(found, [0, batch[1], batch[2]]);

    let later = area.commit(&[1, 1]);
    let (scan, found) = area.scan_from(0, 0);
    assert_eq!(ranges(&scan), [(batch[0], batch[1])]);
    assert_eq!(found, [0, batch[1], batch[2], later[0], later[1]]);
    assert_eq!(scan.end.0, area.written);
}

/// Two places of rot, the second up to what is durable, and a torn tail behind it.
#[test]
fn rot_and_a_torn_tail_are_told_apart_in_one_walk() {
    let mut area = Area::new(32);
    let first = area.commit(&[2, 1])[0];
    let second = area.commit(&[1, 2]);
    let last = area.commit(&[1, 1]);
    area.rot(first);
    area.rot(second[1] + 1023);
    area.rot(last[0] + 3);
    let (scan, found) = area.scan_from(0, 0);
    assert_eq!(ranges(&scan), [(0, 1024), (second[1], last[0])]);
    assert_eq!((scan.end.0, scan.remains_end.0), (last[0], area.written));
    assert_eq!(found, [1024, second[0]]);
    assert_eq!(scan.records, 2);
}

/// Everything durable is gone: one damage, and new records join where it ends.
#[test]
fn nothing_left_of_what_the_header_counts() {
    let area = Area::new(32);
    let (scan, found) = area.scan_from(1024, 8192);
    assert_eq!(ranges(&scan), [(1024, 8192)]);
    assert_eq!((scan.end.0, found), (8192, vec![]));
    assert_eq!(scan.damage[0].fault, Fault::Record(EnvelopeError::Magic));
}

fn resealed(mut bytes: Vec<u8>, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    change(&mut bytes);
    let crc = crc32c(&bytes[..ENVELOPE_BYTES - 4]);
    bytes[ENVELOPE_BYTES - 4..ENVELOPE_BYTES].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Goal: each bad tail is refused for its own reason, is torn when nothing says otherwise, and
/// rot when a later record or the header does.
#[test]
fn each_bad_tail_has_its_verdict() {
    type Check = fn(&Fault) -> bool;
    let good = || record(1024, 512, 1, &body(1, 9));
    let bad: [(&str, Vec<u8>, Check); 9] = [
        ("never written", vec![0; 512], |f| matches!(f, Fault::Record(EnvelopeError::Magic))),
        ("zero length", resealed(good(), |b| b[68..72].fill(0)), |f| {
            matches!(f, Fault::Record(EnvelopeError::Field { field: "body bytes", value: 0 }))
        }),
        ("huge length", resealed(good(), |b| b[68..72].fill(0xff)), |f| {
            matches!(f, Fault::Record(EnvelopeError::Field { field: "body bytes", .. }))
        }),
        ("longer than the area", record(1024, 512, 1, &body(40, 9))[..512].into(), |f| {
            matches!(f, Fault::PastLimit { end: LogPosition(21_504) })
        }),
        ("wrong checksum of the envelope", flipped(good(), 60), |f| {
            matches!(f, Fault::Record(EnvelopeError::Checksum { .. }))
        }),
        ("wrong checksum of the body", flipped(good(), 200), |f| {
            matches!(f, Fault::Record(EnvelopeError::Body { .. }))
        }),
        ("older lap", resealed(good(), |b| b[24..40].fill(0)), |f| {
            matches!(f, Fault::Record(EnvelopeError::Position { met: LogPosition(0), .. }))
        }),
        ("another ring", resealed(good(), |b| b[8..24].fill(1)), |f| {
            matches!(f, Fault::Record(EnvelopeError::Ring { .. }))
        }),
        ("another ring of another version", resealed(good(), |b| b[4..24].fill(2)), |f| {
            matches!(f, Fault::Record(EnvelopeError::Version(0x0202)))
        }),
    ];
    for (name, bytes, check) in bad {
        let mut area = Area::new(32);
        area.commit(&[1]);
        area.commit(&[1]);
        area.put(1024, &bytes);
        area.written = 1536;
        let (scan, found) = area.scan_from(0, 0);
        assert_eq!((scan.end.0, found), (1024, vec![0, 512]), "{name}");
        assert!(scan.tail.as_ref().is_some_and(check), "{name}: {:?}", scan.tail);
        assert_eq!(scan.damage, vec![], "{name}");

        let (scan, _) = area.scan_from(0, 1536);
        assert_eq!(ranges(&scan), [(1024, 1536)], "{name}, the header says it was durable");
        assert!(check(&scan.damage[0].fault), "{name}");

        area.commit(&[1]);
        let (scan, found) = area.scan_from(0, 0);
        assert_eq!(ranges(&scan), [(1024, 1536)], "{name}, a later record follows");
        assert_eq!((scan.end.0, found), (2048, vec![0, 512, 1536]), "{name}");
    }
}

fn flipped(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes[at] ^= 1;
    bytes
}

/// Cutting it would destroy what another program acknowledged.
#[test]
fn a_record_of_a_later_version_ends_the_walk() {
    let mut area = Area::new(32);
    area.commit(&[1]);
    area.put(512, &resealed(record(512, 0, 1, &body(1, 9)), |b| b[4] = 2));
    let walk = |from, area: &Area| {
        let range = Range {
            ring: RING,
            from: LogPosition(from),
            limit: LogPosition(from + area.capacity()),
            durable: LogPosition(from),
            reach: None,
        };
        scan(range, |at, out| area.read(at, out), &mut |_, _| {})
    };
    let version = |at| move |error| matches!(error, ScanError::Version { position, version: 2 } if position == LogPosition(at));
    assert!(walk(0, &area).is_err_and(version(512)));
    // Also behind a bad one.
    area.rot(0);
    assert!(walk(0, &area).is_err_and(version(512)));
}

#[test]
fn a_failed_read_is_no_verdict() {
    let mut area = Area::new(32);
    area.commit(&[1, 1]);
    let range = Range {
        ring: RING,
        from: LogPosition(0),
        limit: LogPosition(16_384),
        durable: LogPosition(0),
        reach: None,
    };
    let verdict = scan(range, |_, _| Err("unreadable"), &mut |_, _| {});
    assert!(matches!(
        verdict,
        Err(ScanError::Read { position: LogPosition(0), error: "unreadable" })
    ));
}

/// Records that fill the area to its last byte, in each lap, wrapping in some.
#[test]
fn a_record_may_end_exactly_at_the_end_and_a_full_area_has_no_tail() {
    for laps in 0..4 {
        let mut area = Area::new(8);
        while area.written < laps * area.capacity() {
            area.commit(&[3, 4]);
        }
        let from = area.written;
        area.commit(&[3, 5]);
        let (scan, found) = area.scan_from(from, from);
        assert_eq!((found.len(), scan.end.0), (2, from + area.capacity()));
        assert_eq!((scan.tail.clone(), ranges(&scan)), (None, vec![]));
        // The same with the border inside the second record.
        area.commit(&[2]);
        let (scan, found) = area.scan_from(from + 1536, from + 1536);
        assert_eq!(found, [from + 1536, from + area.capacity()]);
        assert_eq!(scan.end.0, from + area.capacity() + 1024);
    }
}

/// Rule 3 test 6: a header that lags behind finds more records, not others; one that lags a lap
/// is told by positions that do not match, never by records of another lap.
#[test]
fn a_stale_release_point_after_1_2_3_laps() {
    for laps in 1..4 {
        let (mut area, base) = area_after(laps);
        area.commit(&[1, 1]);
        area.commit(&[2]);
        let (scan, found) = area.scan_from(base, base);
        assert_eq!(found.len(), 4);
        assert_eq!(scan.end.0, area.written);
        // Stale by some records that are still there.
        let (older, more) = area.scan_from(base - 1024, base - 1024);
        assert_eq!(older.end, scan.end);
        assert_eq!(more[1..], found);
        // Stale by more than a lap: that space was reused.
        let lost = base - 1024 - area.capacity();
        let (scan, found) = area.scan_from(lost, lost);
        assert!(found.iter().all(|at| *at >= area.written - area.capacity()));
        assert!(scan.end.0 < area.written);
    }
}

#[test]
fn no_more_damage_is_listed_than_bounded() {
    let records = DAMAGE_MAX * 2 + 100;
    let mut area = Area::new(records + 1);
    for _ in 0..records {
        area.commit(&[1]);
    }
    for bad in (0..records - 1).step_by(2) {
        area.rot(to_u64(bad) * 512);
    }
    let (scan, found) = area.scan_from(0, 0);
    assert_eq!(scan.damage.len(), DAMAGE_MAX);
    assert_eq!(found.len(), records / 2);
    assert_eq!(scan.damage.last().unwrap().to.0, to_u64(records - 1) * 512);
}

/// Goal: behind a fault later records are looked for as far as whoever knows the writer says, counted from
/// the fault or from what is durable, whichever is farther; a later fault has a reach of its own. Control: a
/// reach that is too short takes acknowledged history for a torn tail.
#[test]
fn later_records_are_looked_for_within_reach() {
    let mut area = Area::new(64);
    for sectors in [1, 9, 1, 9, 1] {
        area.commit(&[sectors]);
    }
    let at = [0, 512, 5120, 5632, 10_240];
    for bad in [0, 1, 2, 3] {
        area.rot(at[bad]);
    }
    let scan = |durable, reach| area.scan_within(0, durable, Some(ByteCount(reach)));
    assert_eq!(ranges(&scan(0, 16_384).0), [(0, 10_240)]);
    assert_eq!(ranges(&scan(0, 10_752).0), [(0, 10_240)]);
    assert_eq!(ranges(&scan(8192, 2560).0), [(0, 10_240)], "counted from what is durable");
    let (torn, found) = scan(0, 8192);
    assert_eq!((torn.end, torn.damage, found), (LogPosition(0), vec![], vec![]));
    // Two faults, each with what follows it within its own reach.
    let mut area = Area::new(64);
    for sectors in [1, 1, 30, 1, 1] {
        area.commit(&[sectors]);
    }
    area.rot(0);
    area.rot(16_384);
    let (scan, found) = area.scan_within(0, 0, Some(ByteCount(1536)));
    assert_eq!(ranges(&scan), [(0, 512), (16_384, 16_896)]);
    assert_eq!((found, scan.end), (vec![512, 1024, 16_896], LogPosition(17_408)));
}
