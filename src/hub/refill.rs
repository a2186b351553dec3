//! Which sources have to send again what this hub has lost with its NVRAM or its logs.
//!
//! An import ([`super::import`]) that finds the ring or the logs gone marks every source of the pool, before
//! it makes new ones; a start that finds the log of a source damaged, and the ring without what it lacks,
//! marks that source before it cuts the log where it is sound ([`super::recover`]). A mark is a file
//! `refill/SOURCEID` in the `data_dir`, which says what was lost and which boot of the source was the last
//! that was known then. Until the source has been here and everything that it held then is durable again,
//! its status says so, and a failover refuses to call its image complete (R3, R20). Then the file goes.
//!
//! What a source holds in its NVRAM is of the boots that ran with it: one that comes with the marked boot
//! has it still. Another boot may have been started without its NVRAM. What was lost with both nobody can
//! send, and it is named until a CP of that boot is published: from then on the image is what the source
//! is. A file that a power cut brings back, or has emptied, costs a warning that is not needed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::device::directory::{create_durably, replace_durably};
use crate::units::ids::SourceId;
use crate::units::numbers::Generation;

/// What the status of such a source says.
pub const LOST: &str = "what this hub held of its log was lost before an import: writes that were acknowledged \
     behind its image may be missing here; the source sends them again when it connects";

/// What is said when the source has come with another boot than the marked one.
pub const LOST_THERE_TOO: &str = "the source was started anew since: what it held in its own NVRAM may be lost as \
     well; this is said until its next CP";

/// A mark is no longer than this.
const MARK_BYTES_MAX: u64 = 16 << 10;

/// What a mark says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The last boot of the source that was known; 0 if none is.
    pub generation: Generation,
    /// What was lost; nothing said is [`LOST`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub what: Option<String>,
}

impl Mark {
    /// What was lost.
    pub fn what(&self) -> &str {
        self.what.as_deref().unwrap_or(LOST)
    }
}

/// The marks of one hub.
#[derive(Debug, Clone)]
pub struct Refills {
    directory: PathBuf,
    /// In a simulation there is no directory.
    #[cfg(test)]
    simulated: Option<std::sync::Arc<std::sync::Mutex<BTreeMap<SourceId, Mark>>>>,
}

impl Refills {
    /// In that `data_dir`.
    pub fn of(data_dir: &Path) -> Self {
        Self {
            directory: data_dir.join("refill"),
            #[cfg(test)]
            simulated: None,
        }
    }

    /// Those of a simulated hub, which survive its processes.
    #[cfg(test)]
    pub(super) fn simulated() -> Self {
        Self { directory: PathBuf::new(), simulated: Some(Default::default()) }
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Marks these, durably. One that stands already stays: it is of an older boot.
    pub fn mark(&self, sources: impl Iterator<Item = (SourceId, Mark)>) -> io::Result<()> {
        #[cfg(test)]
        if let Some(all) = &self.simulated {
            let mut all = all.lock().unwrap();
            for (source, mark) in sources {
                all.entry(source).or_insert(mark);
            }
            return Ok(());
        }
        let mut sources = sources.peekable();
        if sources.peek().is_none() {
            return Ok(());
        }
        create_durably(&self.directory)?;
        for (source, mark) in sources {
            let path = self.directory.join(source.to_string());
            let standing = read(&path)?.unwrap_or_default();
            let mark = if standing == Mark::default() { mark } else { standing };
            replace_durably(&path, &serde_json::to_vec_pretty(&mark)?)?;
        }
        Ok(())
    }

    /// Those that are marked, of these.
    pub fn marked(
        &self,
        of: impl Iterator<Item = SourceId>,
    ) -> io::Result<BTreeMap<SourceId, Mark>> {
        #[cfg(test)]
        if let Some(all) = &self.simulated {
            return Ok(all.lock().unwrap().clone());
        }
        let mut marked = BTreeMap::new();
        for source in of {
            if let Some(mark) = read(&self.directory.join(source.to_string()))? {
                marked.insert(source, mark);
            }
        }
        Ok(marked)
    }

    /// Nobody waits for it any more. A mark that stays says so again after the next start.
    pub fn forget(&self, source: SourceId) {
        #[cfg(test)]
        if let Some(all) = &self.simulated {
            all.lock().unwrap().remove(&source);
            return;
        }
        match fs::remove_file(self.directory.join(source.to_string())) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(%error, %source, "the mark of what was lost stays");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

/// A mark, if there is one. What cannot be understood is a mark all the same.
fn read(path: &Path) -> io::Result<Option<Mark>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(found) if found.len() > MARK_BYTES_MAX => Ok(Some(Mark::default())),
        Ok(_) => Ok(Some(serde_json::from_slice(&fs::read(path)?).unwrap_or_default())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_stands_until_it_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let refills = Refills::of(dir.path());
        let all = [SourceId([1; 16]), SourceId([2; 16])];
        assert!(refills.marked(all.into_iter()).unwrap().is_empty());
        refills.forget(all[0]);
        refills.mark(std::iter::empty()).unwrap();
        assert!(!refills.directory().is_dir(), "nothing is marked, and something was made");
        let of = |number| Mark { generation: Generation { number, id: 7 }, what: None };
        refills.mark(all.map(|id| (id, of(3))).into_iter()).unwrap();
        refills.mark(all.map(|id| (id, of(4))).into_iter()).unwrap();
        assert_eq!(refills.marked(all.into_iter()).unwrap()[&all[1]], of(3), "the older one stays");
        refills.forget(all[0]);
        assert_eq!(refills.marked(all.into_iter()).unwrap(), BTreeMap::from([(all[1], of(3))]));
        // Of an older version, or emptied by a power cut: a mark, of a boot that nobody knows.
        fs::write(refills.directory().join(all[1].to_string()), "").unwrap();
        let left = refills.marked(all.into_iter()).unwrap();
        assert_eq!((left.len(), left[&all[1]].what()), (1, LOST));
        refills.mark([(all[1], of(5))].into_iter()).unwrap();
        assert_eq!(refills.marked(all.into_iter()).unwrap()[&all[1]], of(5));
    }
}
