//! Mends the catalog of a pool on an array, of which one copy is not what it should be.
//!
//! No pointer leads to a block of the catalog from above; its database has checksums of its own, of
//! all pages up to the one at its front. So the whole is read through what each device less would
//! give: leave out one device, or two where two may fail, in those rows only whose copies differ.
//! What reads whole is right, and is rewritten where it lay.
//!
//! Called at each open before anything of the catalog is written again, since that would make what
//! rotted final, and by the scrub. If nothing reads whole, the first error is the answer, and
//! nothing was changed.

use std::sync::Arc;

use crate::device::Device;
use crate::device::overlay::Overlay;
use crate::raid::span::Span;
use crate::units::convert::to_usize;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::error::PoolError;
use super::label::Label;
use super::store::Store;

/// Verifies the catalog and mends it if it can; says how many blocks were rewritten.
pub(super) fn mend(
    device: &Arc<dyn Device>,
    array: &Span,
    label: &Label,
) -> Result<u64, PoolError> {
    let Err(first) = Store::verify(Arc::new(Overlay::new(Arc::clone(device))), label) else {
        return Ok(0);
    };
    // What is right and of another version is nothing to be looked for elsewhere.
    if matches!(first, PoolError::CatalogVersion { .. }) {
        return Err(first);
    }
    let suspects = suspects(array, label);
    tracing::warn!(error = %first, blocks = suspects.len(), "the catalog is looked for elsewhere");
    for places in array.losses() {
        let overlay = Overlay::new(Arc::clone(device));
        let mut changed = Vec::new();
        for block in &suspects {
            let mut seen = [0; BLOCK_BYTES];
            let read = device.read_at(block * BLOCK_BYTES_U64, &mut seen);
            let Some(good) = array.block_without(*block, &places) else { continue };
            if read.is_err() || seen != good {
                overlay.write_at(block * BLOCK_BYTES_U64, &good)?;
                changed.push((*block, seen, good));
            }
        }
        if changed.is_empty() || Store::verify(Arc::new(overlay), label).is_err() {
            continue;
        }
        let mut mended = 0;
        for (block, seen, good) in changed {
            mended += u64::from(device.repair_at(block * BLOCK_BYTES_U64, &seen, &good)?);
        }
        return Ok(mended);
    }
    Err(first)
}

/// Blocks of the catalog in rows whose copies differ.
fn suspects(array: &Span, label: &Label) -> Vec<u64> {
    let blocks = label.layout.catalog_start..label.layout.data_start;
    let stripe = array.stripe_bytes() / BLOCK_BYTES_U64;
    let stripes = blocks.start / stripe..blocks.end.div_ceil(stripe);
    let mut found = Vec::with_capacity(to_usize(stripe));
    for stripe in stripes {
        for row in array.check_stripe(stripe).unfit {
            found.extend(array.blocks_of(row).filter(|block| blocks.contains(block)));
        }
    }
    found
}
