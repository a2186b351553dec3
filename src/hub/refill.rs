//! Which sources have to send again what this hub has lost with its NVRAM or its logs.
//!
//! An import ([`super::import`]) that finds the ring or the logs gone marks every source of the pool, before
//! it makes new ones: an empty file `refill/SOURCEID` in the `data_dir`. Until the source has been here
//! and everything that it held then is durable again, its status says so, and a failover refuses to call
//! its image complete (R3, R20). Then the file goes. One that a power cut brings back costs a warning
//! that is not needed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::device::directory::create_durably;
use crate::units::ids::SourceId;

/// What the status of such a source says.
pub const LOST: &str = "what this hub held of its log was lost before an import: writes that were acknowledged \
     behind its image may be missing here; the source sends them again when it connects";

/// The marks of one hub.
#[derive(Debug, Clone)]
pub struct Refills(PathBuf);

impl Refills {
    /// In that `data_dir`.
    pub fn of(data_dir: &Path) -> Self {
        Self(data_dir.join("refill"))
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// Marks these, durably.
    pub fn mark(&self, sources: impl Iterator<Item = SourceId>) -> io::Result<()> {
        create_durably(&self.0)?;
        for source in sources {
            File::create(self.0.join(source.to_string()))?;
        }
        File::open(&self.0)?.sync_all()
    }

    /// Those that are marked, of these.
    pub fn marked(&self, of: impl Iterator<Item = SourceId>) -> io::Result<BTreeSet<SourceId>> {
        let mut marked = BTreeSet::new();
        for source in of {
            if self.0.join(source.to_string()).try_exists()? {
                marked.insert(source);
            }
        }
        Ok(marked)
    }

    /// Nobody waits for it any more. A mark that stays says so again after the next start.
    pub fn forget(&self, source: SourceId) {
        match fs::remove_file(self.0.join(source.to_string())) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(%error, %source, "the mark of what was lost stays");
            }
            Ok(()) | Err(_) => {}
        }
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
        refills.mark(all.into_iter()).unwrap();
        refills.mark(all.into_iter()).unwrap();
        refills.forget(all[0]);
        assert_eq!(refills.marked(all.into_iter()).unwrap(), BTreeSet::from([all[1]]));
    }
}
