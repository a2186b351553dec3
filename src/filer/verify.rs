//! Proof on demand: reads every block of a CP that both ends have, and compares the roots.
//!
//! `mirrorhub verify` on the source asks here; the hub may ask as well. The blocks are read from
//! the device, by a pin that keeps the CP while newer ones are published. A CP that is not here
//! any more is answered with no roots: the asker takes the newer one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::mending;
use super::shared::{Common, Pins, Shared};
use crate::units::hash::Root;
use crate::units::machine;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::mend::Depth;
use crate::volume::scan::{Scanned as Scan, scan};
use crate::wire::message::{Scanned, VolumeScan};

/// How long the hub may read before the answer is given up.
const ANSWER_MAX: Duration = Duration::from_secs(24 * 3600);
/// Tries, when the hub has moved on to a newer CP meanwhile or reads for another question.
const TRIES: usize = 10;
/// Time between two of them.
const AGAIN_AFTER: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 500 });

/// A hub that cannot read says so within this.
const REFUSAL_MAX: Duration = Duration::from_millis(250);

/// Why nothing was proven.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// No CP is known to be on both ends.
    #[error("which checkpoint both ends have is not known: the hub was not met since the start")]
    NoCommon,
    /// One at a time.
    #[error("another verification is under way")]
    Busy,
    /// The hub cannot be asked.
    #[error("the hub is not connected")]
    NoHub,
    /// It did not answer, reads for another question, or newer CPs were published faster than it
    /// could read.
    #[error("the hub gave no roots of CP {cp}: {reason}")]
    NoAnswer { cp: CpNumber, reason: String },
    /// There is none.
    #[error("the source runs without a hub: there is no other end to compare with")]
    Sole,
    /// Own blocks could not be read.
    #[error("own copy: {0}")]
    Own(String),
}

/// What reading a volume at both ends gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedVolume {
    /// Which volume.
    pub volume: VolumeNumber,
    /// The root that was announced with the CP.
    pub announced: Root,
    /// What was read here; none if the volume could not be walked.
    pub here: Option<VolumeScan>,
    /// What was read on the hub; none if it did not say.
    pub hub: Option<VolumeScan>,
}

impl VerifiedVolume {
    /// Whether all three are the same.
    pub fn is_equal(&self) -> bool {
        let same = |end: &Option<VolumeScan>| {
            end.is_some_and(|end| end.root == Some(self.announced) && end.bad_blocks == 0)
        };
        same(&self.here) && same(&self.hub)
    }
}

/// What reading both ends gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// The CP.
    pub cp: CpNumber,
    /// Its volumes.
    pub volumes: Vec<VerifiedVolume>,
    /// What could not be read, at either end.
    pub problems: Vec<String>,
}

/// Reads every block that the pins keep, and tells volume, blocks passed and blocks in all.
/// Blocks.
fn scan_pins(
    shared: &Shared,
    pins: &Pins,
    mut progress: impl FnMut(VolumeNumber, u64, u64),
) -> (Vec<VolumeScan>, Vec<String>) {
    let mut volumes = Vec::new();
    let mut problems = Vec::new();
    for (&volume, pin) in pins.iter() {
        let all = pin.tree().size.blocks().0;
        let mut read = || {
            scan(pin.pool(), &pin.tree(), |passed| progress(volume, passed, all))
                .and_then(|scanned| Ok(pin.check().map(|()| scanned)?))
        };
        let scanned = match read() {
            Ok(found) if found.bad_blocks > 0 => {
                let mending = mending::mend_pin(shared, pin, Depth::Data);
                let mended = mending.is_ok_and(|mending| !mending.mended.is_empty());
                if mended { read() } else { Ok(found) }
            }
            Ok(sound) => {
                shared.mender.read_whole(pin.key());
                Ok(sound)
            }
            failed => failed,
        };
        match scanned {
            Ok(Scan { root, blocks_read, bad_blocks, problems: found }) => {
                volumes.push(VolumeScan { volume, root, blocks_read, bad_blocks });
                let named = |problem| format!("source: volume {volume}: {problem}");
                problems.extend(found.into_iter().map(named));
            }
            Err(error) => problems.push(format!("source: volume {volume}: {error}")),
        }
    }
    (volumes, problems)
}

/// Answers the hub's question about a CP, later and from another thread. One is answered at a
/// time.
pub fn answer(shared: &Arc<Shared>, cp: CpNumber, token: u64) {
    if shared.answering.swap(true, Ordering::AcqRel) {
        let problems = vec!["the source reads for another question already".to_owned()];
        shared.session.scanned(Scanned { cp, token, volumes: Vec::new(), problems });
        return;
    }
    let (common, own_cp) = (shared.common.borrow().clone(), shared.own().0);
    let pins = match common {
        Some(common) if common.cp == cp => Some(common.pins),
        _ if own_cp == cp => Some(shared.pins()),
        _ => None,
    };
    let shared = Arc::clone(shared);
    // Its answer goes through the session's slot; nobody waits for the task itself.
    machine::aside(move || {
        let turn = Turn(&shared.answering);
        let read = |pins| scan_pins(&shared, &pins, |_, _, _| {});
        let (volumes, problems) = pins.map_or_else(Default::default, read);
        drop(turn);
        shared.session.scanned(Scanned { cp, token, volumes, problems }.bounded());
    });
}

/// Ends the turn of one reading, also when it panics.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Reads the newest common CP at both ends. `progress` is told volume, blocks passed and blocks in
/// all of this end's reading.
pub async fn verify(
    shared: &Arc<Shared>,
    progress: impl FnMut(VolumeNumber, u64, u64) + Send + Clone + 'static,
) -> Result<Verification, VerifyError> {
    if shared.scanning.swap(true, Ordering::AcqRel) {
        return Err(VerifyError::Busy);
    }
    let _turn = Turn(&shared.scanning);
    if shared.sole {
        return Err(VerifyError::Sole);
    }
    let mut tries = 1;
    loop {
        let common = shared.common.borrow().clone().ok_or(VerifyError::NoCommon)?;
        match read_both_ends(shared, &common, progress.clone()).await? {
            Ok(read) => return Ok(read),
            Err(_) if tries < TRIES => tries += 1,
            Err(reason) => return Err(VerifyError::NoAnswer { cp: common.cp, reason }),
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

/// The inner error says why the hub has not read, which it may when asked again.
async fn read_both_ends(
    shared: &Arc<Shared>,
    common: &Common,
    progress: impl FnMut(VolumeNumber, u64, u64) + Send + 'static,
) -> Result<Result<Verification, String>, VerifyError> {
    let mut there = std::pin::pin!(ask_hub(shared, common.cp));
    // A hub that cannot read says so at once; then this end need not read for nothing.
    let early = match tokio::time::timeout(REFUSAL_MAX, &mut there).await {
        Ok(early) => Some(early?),
        Err(_) => None,
    };
    if let Some(Err(reason)) = early {
        return Ok(Err(reason));
    }
    let (own, reader) = (common.pins.clone(), Arc::clone(shared));
    let here = machine::blocking(move || scan_pins(&reader, &own, progress));
    let there = match early {
        Some(early) => early,
        None => there.await?,
    };
    let (here, problems) = here.await.map_err(|error| VerifyError::Own(error.to_string()))?;
    Ok(there.map(|there| compare(common, &here, &there, problems)))
}

/// What the hub has read, or why it has not: an answer without volumes has read nothing.
async fn ask_hub(
    shared: &Arc<Shared>,
    cp: CpNumber,
) -> Result<Result<Scanned, String>, VerifyError> {
    let mut answers = shared.scans.subscribe();
    answers.mark_unchanged();
    let token = crate::units::ids::random_u64().map_err(|e| VerifyError::Own(e.to_string()))?;
    if !shared.is_connected() {
        return Err(VerifyError::NoHub);
    }
    shared.session.scan(cp, token);
    let answer = async {
        loop {
            tokio::select! {
                changed = answers.changed() => if changed.is_err() { return None },
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    if !shared.is_connected() { return None; }
                }
            }
            let scanned = answers.borrow_and_update().clone();
            if let Some(scanned) = scanned.filter(|scanned| scanned.token == token) {
                return Some(scanned);
            }
        }
    };
    match tokio::time::timeout(ANSWER_MAX, answer).await {
        Ok(Some(scanned)) if scanned.volumes.is_empty() => {
            let said = scanned.problems.into_iter().next();
            Ok(Err(said.unwrap_or_else(|| "it has another CP by now".to_owned())))
        }
        Ok(Some(scanned)) => Ok(Ok(scanned)),
        Ok(None) => Err(VerifyError::NoHub),
        Err(_) => {
            let reason = format!("no answer within {} h", ANSWER_MAX.as_secs() / 3600);
            Err(VerifyError::NoAnswer { cp, reason })
        }
    }
}

fn compare(
    common: &Common,
    here: &[VolumeScan],
    there: &Scanned,
    mut problems: Vec<String>,
) -> Verification {
    problems.extend(there.problems.iter().map(|problem| format!("hub: {problem}")));
    let find =
        |volumes: &[VolumeScan], volume| volumes.iter().find(|scan| scan.volume == volume).copied();
    let volumes = common.roots.iter().map(|&(volume, announced)| VerifiedVolume {
        volume,
        announced,
        here: find(here, volume),
        hub: find(&there.volumes, volume),
    });
    Verification { cp: common.cp, volumes: volumes.collect(), problems }
}
