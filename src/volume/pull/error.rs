//! Why a pull stops. Each error names the volume and, where there is one, level and index.

use crate::units::hash::{ContentHash, Root};
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::error::{TreePlace, VolumeError};
use crate::wire::pull::AnswerError;

/// Why a pull stops. What was yielded before is proven and may be kept.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// The peer answers something else than what is asked next: never asked, twice, out of order.
    #[error("volume {volume}: answer {met} came, {} is awaited", number(*wanted))]
    NotAsked { volume: VolumeNumber, wanted: Option<u64>, met: u64 },
    /// The peer answers about another CP or volume.
    #[error("volume {volume} of CP {cp}: answer about volume {met_volume} of CP {met_cp}")]
    OtherTarget { volume: VolumeNumber, cp: CpNumber, met_volume: VolumeNumber, met_cp: CpNumber },
    /// The peer answers with nodes what asked for blocks, or the other way round.
    #[error("volume {volume}: answer {number} is of another kind than its request")]
    OtherKind { volume: VolumeNumber, number: u64 },
    /// The payload is not what its kind asks for.
    #[error("{place}: {error}")]
    Malformed { place: TreePlace, error: AnswerError },
    /// Children that are not those the parent promised.
    #[error("{place}: children hash to {met}, promised was {wanted}")]
    NodeHash { place: TreePlace, wanted: ContentHash, met: ContentHash },
    /// A top that is not that of the announced root.
    #[error("{place}: top gives root {met}, announced was {wanted}")]
    TopHash { place: TreePlace, wanted: Root, met: Root },
    /// The target has something where no volume is.
    #[error("{place}: child {child} lies past the end and is no hole")]
    PastEnd { place: TreePlace, child: usize },
    /// A block that is not the one promised.
    #[error("{place}: block hashes to {met}, promised was {wanted}")]
    BlockHash { place: TreePlace, wanted: ContentHash, met: ContentHash },
    /// The peer cannot read it either.
    #[error("{place}: the other end cannot read it")]
    Unreadable { place: TreePlace },
    /// The peer has given the target up; a newer one is needed.
    #[error("volume {volume}: the other end does not hold CP {cp} any more")]
    Gone { volume: VolumeNumber, cp: CpNumber },
    /// The own tree cannot be compared.
    #[error("volume {volume}, own tree: {error}")]
    Own { volume: VolumeNumber, error: VolumeError },
}

fn number(wanted: Option<u64>) -> String {
    wanted.map_or_else(|| "none".to_owned(), |wanted| wanted.to_string())
}
