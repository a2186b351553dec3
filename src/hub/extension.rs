//! The hub's own bytes in a source's catalog row: the transfer id of the published place.
//!
//! The row has sequence number and stream hash; with the transfer id they make the place at which
//! the source's log goes on. 16 bytes: version 1 (`u32`), generation (`u32`), counter (`u64`),
//! little-endian.

use crate::pool::rows::SourceRow;
use crate::record::marks::Place;
use crate::units::numbers::TransferId;

const VERSION: u32 = 1;

/// The bytes for a place.
pub fn encode(place: &Place) -> Vec<u8> {
    let mut bytes = VERSION.to_le_bytes().to_vec();
    bytes.extend_from_slice(&place.transfer.generation.to_le_bytes());
    bytes.extend_from_slice(&place.transfer.counter.to_le_bytes());
    bytes
}

/// The published place of a source; an error names bytes that a later version wrote.
pub fn place(row: &SourceRow) -> Result<Place, String> {
    if row.extension.is_empty() && row.sequence.0 == 0 {
        return Ok(Place::default());
    }
    let unknown = || format!("source {}: catalog row has an unknown extension", row.name);
    let bytes: [u8; 16] = row.extension.as_slice().try_into().map_err(|_| unknown())?;
    let [v0, v1, v2, v3, g0, g1, g2, g3, counter @ ..] = bytes;
    if u32::from_le_bytes([v0, v1, v2, v3]) != VERSION {
        return Err(unknown());
    }
    let generation = u32::from_le_bytes([g0, g1, g2, g3]);
    let transfer = TransferId { generation, counter: u64::from_le_bytes(counter) };
    Ok(Place { transfer, sequence: row.sequence, hash: row.stream_hash })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::hash::StreamHash;
    use crate::units::ids::SourceId;
    use crate::units::numbers::SequenceNumber;

    #[test]
    fn a_place_comes_back_and_unknown_bytes_are_refused() {
        let mut row = SourceRow::new(SourceId([1; 16]), "filer-a".parse().unwrap());
        assert_eq!(place(&row), Ok(Place::default()));
        let transfer = TransferId { generation: 3, counter: 9 };
        let there = Place { transfer, sequence: SequenceNumber(7), hash: StreamHash([2; 16]) };
        row.sequence = there.sequence;
        row.stream_hash = there.hash;
        assert!(place(&row).is_err(), "a place without its transfer");
        row.extension = encode(&there);
        assert_eq!(row.extension, [1, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(place(&row), Ok(there));
        row.extension[0] = 2;
        assert!(place(&row).is_err());
    }
}
