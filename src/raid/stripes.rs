//! A set of stripes of an array: one bit each.

use crate::units::convert::to_usize;

/// The set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StripeSet {
    words: Vec<u64>,
    stripes: u64,
}

impl StripeSet {
    /// None of so many.
    pub fn new(stripes: u64) -> Self {
        Self { words: vec![0; to_usize(stripes.div_ceil(64))], stripes }
    }

    /// Adds one.
    pub fn insert(&mut self, stripe: u64) {
        assert!(stripe < self.stripes, "stripe {stripe} of {}", self.stripes);
        self.words[to_usize(stripe / 64)] |= 1 << (stripe % 64);
    }

    /// Takes one out; says whether it was in.
    pub fn remove(&mut self, stripe: u64) -> bool {
        let was = self.contains(stripe);
        if was {
            self.words[to_usize(stripe / 64)] &= !(1 << (stripe % 64));
        }
        was
    }

    /// Whether it is in.
    pub fn contains(&self, stripe: u64) -> bool {
        stripe < self.stripes && self.words[to_usize(stripe / 64)] >> (stripe % 64) & 1 == 1
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}
