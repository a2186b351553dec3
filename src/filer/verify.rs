//! Proof on demand: reads every block of a CP that both ends have, and compares the roots.
//!
//! `mirrorhub verify` on the source asks here; the hub may ask as well. The blocks are read from
//! the device, by a pin that keeps the CP while newer ones are published. A CP that is not here
//! any more is answered with no roots: the asker takes the newer one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::shared::{Common, Pins, Shared};
use crate::units::hash::Root;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::scan::{Scanned as Scan, scan};
use crate::wire::message::{Scanned, VolumeScan};

/// How long the hub may read before the answer is given up.
const ANSWER_MAX: Duration = Duration::from_secs(24 * 3600);
/// Tries, when the hub has moved on to a newer CP meanwhile.
const TRIES: usize = 4;

/// Why nothing was proven.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// No CP is known to be on both ends.
    #[error("no checkpoint is published at both ends yet")]
    NoCommon,
    /// One at a time.
    #[error("another verification is under way")]
    Busy,
    /// The hub cannot be asked.
    #[error("the hub is not connected")]
    NoHub,
    /// It did not answer, or newer CPs were published faster than it could read.
    #[error("the hub gave no roots of CP {0}")]
    NoAnswer(CpNumber),
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

/// Reads every block that the pins keep. Blocks.
fn scan_pins(pins: &Pins) -> (Vec<VolumeScan>, Vec<String>) {
    let mut volumes = Vec::new();
    let mut problems = Vec::new();
    for (&volume, pin) in pins.iter() {
        let scanned = scan(pin.pool(), &pin.tree(), |_| {})
            .and_then(|scanned| Ok(pin.check().map(|()| scanned)?));
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
    drop(tokio::task::spawn_blocking(move || {
        let (volumes, problems) = pins.map_or_else(Default::default, |pins| scan_pins(&pins));
        shared.answering.store(false, Ordering::Release);
        shared.session.scanned(Scanned { cp, token, volumes, problems }.bounded());
    }));
}

/// Ends the turn of one verification.
struct Turn<'a>(&'a Shared);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.scanning.store(false, Ordering::Release);
    }
}

/// Reads the newest common CP at both ends.
pub async fn verify(shared: &Arc<Shared>) -> Result<Verification, VerifyError> {
    if shared.scanning.swap(true, Ordering::AcqRel) {
        return Err(VerifyError::Busy);
    }
    let _turn = Turn(shared);
    let mut last = CpNumber(0);
    for _ in 0..TRIES {
        let common = shared.common.borrow().clone().ok_or(VerifyError::NoCommon)?;
        last = common.cp;
        let own = common.pins.clone();
        let here = tokio::task::spawn_blocking(move || scan_pins(&own));
        let there = ask_hub(shared, common.cp).await?;
        let (here, problems) = here.await.map_err(|error| VerifyError::Own(error.to_string()))?;
        if let Some(there) = there {
            return Ok(compare(&common, &here, &there, problems));
        }
    }
    Err(VerifyError::NoAnswer(last))
}

async fn ask_hub(shared: &Arc<Shared>, cp: CpNumber) -> Result<Option<Scanned>, VerifyError> {
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
        Ok(Some(scanned)) if scanned.volumes.is_empty() && scanned.problems.is_empty() => Ok(None),
        Ok(Some(scanned)) => Ok(Some(scanned)),
        Ok(None) => Err(VerifyError::NoHub),
        Err(_) => Err(VerifyError::NoAnswer(cp)),
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
