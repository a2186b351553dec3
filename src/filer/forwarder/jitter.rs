//! Pauses between tries to reach the hub, each drawn a little longer than asked for, so that sources
//! do not come all at once. The forwarder's; its seed comes from the caller.

use std::time::Duration;

use crate::units::convert::low_u32;

/// Draws by a seed.
#[derive(Debug)]
pub(super) struct Jitter(u64);

impl Jitter {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The pause and up to half of it more.
    pub(super) fn on(&mut self, pause: Duration) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        pause + pause / 2 * low_u32(self.0 >> 56) / 256
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(seed: u64, pause: Duration) -> Vec<Duration> {
        let mut jitter = Jitter::new(seed);
        (0..300).map(|_| jitter.on(pause)).collect()
    }

    #[test]
    fn a_pause_is_no_shorter_than_asked_for_and_at_most_half_longer() {
        for seed in [0, 1, 7, u64::MAX, 0x5eed_5eed_5eed_5eed] {
            for pause in [50, 100, 1600, 2000].map(Duration::from_millis) {
                let all = drawn(seed, pause);
                let (least, most) = (all.iter().min().unwrap(), all.iter().max().unwrap());
                assert!(
                    *least >= pause && *most < pause * 3 / 2,
                    "{pause:?}: {least:?} to {most:?}"
                );
                assert!(
                    *most - *least > pause / 3,
                    "{pause:?}: all but equal, {least:?} to {most:?}"
                );
            }
        }
        assert!(drawn(3, Duration::ZERO).iter().all(Duration::is_zero));
    }

    /// Two sources that lose their hub in the same moment do not come back in the same moments.
    #[test]
    fn two_seeds_come_apart_and_one_seed_repeats() {
        let pause = Duration::from_secs(2);
        for seed in 0..20 {
            let (one, other) = (drawn(seed, pause), drawn(seed + 1, pause));
            let same = one.iter().zip(&other).filter(|(one, other)| one == other).count();
            assert!(same < 30, "seeds {seed} and {}: {same} of 300 pauses are equal", seed + 1);
            assert_ne!(one[0], other[0], "the first pause of seeds {seed} and {}", seed + 1);
            assert_eq!(one, drawn(seed, pause));
        }
    }
}
