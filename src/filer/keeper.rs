//! Whose catalog row an engine runs on: how its own bytes there are read and written.
//!
//! A source that runs on its filer has the row of its own pool ([`FilerKeeper`], `identity`). A
//! source that runs elsewhere (an image promoted on a hub) has a row of that pool's owner, who
//! keeps things of his own beside the place: he brings a keeper that leaves them as they are.

use super::identity::Extension;
use crate::pool::rows::SourceRow;
use crate::units::ids::HubId;
use crate::units::numbers::{Epoch, TransferId};
use crate::units::policy::{AloneMark, Policy};

/// Why the bytes of a row cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeeperError(pub String);

/// What an engine keeps in the extension of its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    /// Whether an NVRAM was made: if it is gone then, that is a loss and no first start.
    pub nvram_made: bool,
    /// The hub the source belongs to.
    pub hub: Option<HubId>,
    /// Last transfer of the published CP.
    pub transfer: TransferId,
    /// From where on, in which epoch, the hub may lack acknowledged writes (R4).
    pub alone: Option<AloneMark>,
    /// The epoch in which somebody else is primary (R12).
    pub fenced: Option<Epoch>,
    /// The policy in force, once the hub has heard of one.
    pub policy: Option<Policy>,
    /// The one that the hub is told of next, and may know already (R20).
    pub next: Option<Policy>,
    /// What it promises, of a source that lives on this filer by its hub's wish.
    pub guest: Option<Policy>,
    /// The last transfer that it held when it began to serve without having asked its hub (R1).
    pub unasked: Option<TransferId>,
}

/// Reads and writes the extension of a source's row.
pub trait Keeper: std::fmt::Debug + Send + Sync {
    /// What the row says.
    fn read(&self, row: &SourceRow) -> Result<Kept, KeeperError>;
    /// The extension that says `kept` and, of everything else, what the row says.
    fn write(&self, row: &SourceRow, kept: &Kept) -> Result<Vec<u8>, KeeperError>;
}

/// The rows of a filer's pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct FilerKeeper;

impl FilerKeeper {
    fn decode(row: &SourceRow) -> Result<Extension, KeeperError> {
        Extension::decode(&row.extension).map_err(|error| KeeperError(error.to_string()))
    }
}

impl Keeper for FilerKeeper {
    fn read(&self, row: &SourceRow) -> Result<Kept, KeeperError> {
        let Extension { nvram_made, hub, transfer, alone, fenced, policy, next, guest, unasked } =
            Self::decode(row)?;
        Ok(Kept { nvram_made, hub, transfer, alone, fenced, policy, next, guest, unasked })
    }

    fn write(&self, row: &SourceRow, kept: &Kept) -> Result<Vec<u8>, KeeperError> {
        // What is not understood is not replaced.
        Self::decode(row)?;
        let Kept { nvram_made, hub, transfer, alone, fenced, policy, next, guest, unasked } = *kept;
        let extension =
            Extension { nvram_made, hub, transfer, alone, fenced, policy, next, guest, unasked };
        Ok(extension.encode().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ids::SourceId;
    use crate::units::numbers::SequenceNumber;

    #[test]
    fn a_filers_row_is_read_and_written() {
        let mut row = SourceRow::new(SourceId([1; 16]), "filer-a".parse().unwrap());
        assert_eq!(FilerKeeper.read(&row), Ok(Kept::default()));
        let transfer = TransferId { generation: 2, counter: 3 };
        let alone = Some((Epoch { number: 1, id: 2 }, SequenceNumber(4)));
        let fenced = Some(Epoch { number: 2, id: 9 });
        let hub = Some(HubId([7; 16]));
        let (policy, next) = (Some(Policy::default()), None);
        let guest = Some(Policy::default());
        let unasked = Some(transfer);
        let kept =
            Kept { nvram_made: true, hub, transfer, alone, fenced, policy, next, guest, unasked };
        row.extension = FilerKeeper.write(&row, &kept).unwrap();
        assert_eq!(FilerKeeper.read(&row), Ok(kept));
        row.extension[0] = b'X';
        assert!(FilerKeeper.read(&row).is_err());
        assert!(FilerKeeper.write(&row, &kept).is_err(), "what is not understood is not replaced");
    }
}
