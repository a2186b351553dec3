//! Memory that a device can take without a copy.
//!
//! O_DIRECT wants the address of a buffer aligned, not only its length. The committing thread
//! of a ring owns one for its whole life; [`super::file`] makes one for each unaligned call (the
//! bounce buffer). Invariant: the bytes begin at a page border and their number never changes.
//! Safe code: a little more is allocated than asked for, and the aligned part is lent out.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Alignment of every [`AlignedBuffer`]: a page, which is enough for every device.
pub const BUFFER_ALIGN_BYTES: usize = 4096;

/// A fixed number of page-aligned bytes, zero at the beginning.
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// `length` zero bytes. The caller has bounded `length`: this allocates it.
    pub fn new(length: usize) -> Self {
        let memory = vec![0; length + BUFFER_ALIGN_BYTES];
        let start = memory.as_ptr().align_offset(BUFFER_ALIGN_BYTES);
        assert!(start < BUFFER_ALIGN_BYTES, "a byte pointer can always be aligned");
        Self { memory, start, length }
    }

    /// All pieces, one behind the other. The caller has bounded what they are together.
    pub fn gathered(pieces: &[&[u8]]) -> Self {
        let mut gathered = Self::new(pieces.iter().map(|piece| piece.len()).sum());
        let mut rest: &mut [u8] = &mut gathered;
        for piece in pieces {
            let (own, others) = rest.split_at_mut(piece.len());
            own.copy_from_slice(piece);
            rest = others;
        }
        gathered
    }

    /// Whether `bytes` begins at a multiple of `align`, a power of two.
    pub fn is_aligned(bytes: &[u8], align: usize) -> bool {
        bytes.as_ptr().align_offset(align) == 0
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_aligned_and_zero_and_writable_to_the_end() {
        for length in [0, 1, 511, 4096, 4097, 1 << 20] {
            let mut buffer = AlignedBuffer::new(length);
            assert!(AlignedBuffer::is_aligned(&buffer, BUFFER_ALIGN_BYTES));
            assert_eq!(buffer.len(), length);
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7));
        }
        let buffer = AlignedBuffer::new(4096);
        assert!(!AlignedBuffer::is_aligned(&buffer[1..], 2));
    }
}
