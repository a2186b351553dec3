//! What a source can be asked to promise (section 9 of the design): one struct for the
//! configuration, the wire, both catalogs and both status documents.
//!
//! Pure. On the wire a value travels as its number, from 1 in the order of its words, and a later
//! version only appends words and fields. A number that is not known is an error, never a guess:
//! what a source promises decides what is said after its loss.
//!
//! In a catalog row, 24 bytes, little-endian:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 5 | the numbers of mode, ack, apply, on_hub_loss, cache |
//! | 5 | 3 | hub timeout in milliseconds; longer ones are cut |
//! | 8 | 8 | lag limit in bytes |
//! | 16 | 8 | lag limit in milliseconds |

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::convert::{low_u8, to_u64};
use super::numbers::{ByteCount, Epoch, SequenceNumber};
use super::words::words;

/// Default of `lag_limit.bytes`.
pub const LAG_BYTES: ByteCount = ByteCount(64 << 20);
/// Default of `lag_limit.time`.
pub const LAG_TIME: Duration = Duration::from_secs(5);
/// Default of `hub_timeout`.
pub const HUB_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a policy in a catalog row.
pub const POLICY_BYTES: usize = 24;

/// A number that is no word.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A value of a later version, or damage.
    #[error("{what} has no value of number {number}")]
    Unknown { what: &'static str, number: u8 },
}

/// Words that travel by number.
macro_rules! numbered {
    ($($name:ident $what:literal)*) => { $(
        impl From<$name> for u8 {
            fn from(value: $name) -> Self {
                let at = $name::WORDS.iter().position(|(_, known)| *known == value);
                low_u8(to_u64(at.unwrap_or_default())) + 1
            }
        }

        impl TryFrom<u8> for $name {
            type Error = PolicyError;

            fn try_from(number: u8) -> Result<Self, PolicyError> {
                let at = usize::from(number).checked_sub(1);
                let found = at.and_then(|at| Self::WORDS.get(at)).map(|(_, value)| *value);
                found.ok_or(PolicyError::Unknown { what: $what, number })
            }
        }
    )* };
}

words! {
    /// When a write is answered.
    #[derive(Default, Hash, Serialize, Deserialize)]
    #[serde(try_from = "u8", into = "u8")]
    Mode {
        /// Durable here and acknowledged by the hub.
        #[default]
        Sync = "sync",
        /// Durable here, the hub at most `lag_limit` behind.
        SemiSync = "semi-sync",
        /// Durable here.
        Async = "async",
        /// Durable here; the hub gets CPs only.
        CpOnly = "cp-only",
    }
}
words! {
    /// What the hub has done before it acknowledges a transfer.
    #[derive(Default, Hash, Serialize, Deserialize)]
    #[serde(try_from = "u8", into = "u8")]
    Ack {
        /// Synced it in the ring.
        #[default]
        Durable = "durable",
        /// Has it in memory.
        Received = "received",
        /// Synced it in the source log too.
        Filed = "filed",
    }
}
words! {
    /// How a CP travels.
    #[derive(Default, Hash, Serialize, Deserialize)]
    #[serde(try_from = "u8", into = "u8")]
    Apply {
        /// By reference wherever the log has the whole block.
        #[default]
        Reference = "reference",
        /// All changed blocks are sent again.
        Inline = "inline",
        /// The hub applies the log itself.
        Replay = "replay",
    }
}
words! {
    /// What happens to writes while the hub is lost.
    #[derive(Default, Hash, Serialize, Deserialize)]
    #[serde(try_from = "u8", into = "u8")]
    OnHubLoss {
        /// They are served alone and follow later.
        #[default]
        Continue = "continue",
        /// They are held.
        Stop = "stop",
    }
}
words! {
    /// What a write gets that has no room in the pool.
    #[derive(Default)]
    OnFull {
        /// It waits.
        #[default]
        Wait = "wait",
        /// It fails with ENOSPC.
        Enospc = "enospc",
    }
}
words! {
    /// When an NBD write is answered.
    #[derive(Default, Hash, Serialize, Deserialize)]
    #[serde(try_from = "u8", into = "u8")]
    Cache {
        /// Under the rule of `replication.mode`.
        #[default]
        Writethrough = "writethrough",
        /// Once ordered and buffered; flush and FUA wait.
        Writeback = "writeback",
    }
}

numbered! {
    Mode "replication.mode"
    Ack "replication.ack"
    Apply "replication.apply"
    OnHubLoss "replication.on_hub_loss"
    Cache "nbd.cache"
}

/// How far the hub may be behind in `semi-sync`; the first that is reached counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LagLimit {
    /// Bytes of entries that the hub lacks.
    pub bytes: ByteCount,
    /// Age of the oldest entry that the hub lacks. Travels in whole milliseconds.
    #[serde(with = "milliseconds")]
    pub time: Duration,
}

impl Default for LagLimit {
    fn default() -> Self {
        Self { bytes: LAG_BYTES, time: LAG_TIME }
    }
}

/// What a source promises. The default is the design's, and says the least: a source that tells
/// nothing may have gone on alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// When a write is answered.
    pub mode: Mode,
    /// What the hub does before it acknowledges.
    pub ack: Ack,
    /// How a CP travels.
    pub apply: Apply,
    /// What happens while the hub is lost.
    pub on_hub_loss: OnHubLoss,
    /// When an NBD write is answered.
    pub cache: Cache,
    /// The limit of `semi-sync`; of no meaning in another mode.
    pub lag_limit: LagLimit,
    /// When the hub counts as lost; a failover waits as long. Travels in whole milliseconds.
    #[serde(with = "milliseconds")]
    pub hub_timeout: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            ack: Ack::default(),
            apply: Apply::default(),
            on_hub_loss: OnHubLoss::default(),
            cache: Cache::default(),
            lag_limit: LagLimit::default(),
            hub_timeout: HUB_TIMEOUT,
        }
    }
}

impl Policy {
    /// Whether the log travels, and not only CPs.
    pub fn forwards(&self) -> bool {
        self.mode != Mode::CpOnly
    }

    /// Whether no write is ever acknowledged that the hub does not hold (R12): after the source's
    /// loss nothing can be missing on the hub.
    pub fn never_alone(&self) -> bool {
        self.mode == Mode::Sync && self.on_hub_loss == OnHubLoss::Stop
    }

    /// What a source that is in sync has on its hub, which is `there` for who reads it ("on the hub", "here").
    pub fn in_sync(&self, there: &str) -> String {
        match (self.mode, self.ack) {
            (Mode::Sync, Ack::Durable | Ack::Filed) => {
                format!("every acknowledged write is durable {there}")
            }
            (Mode::Sync, Ack::Received) => {
                format!("every acknowledged write came {there}; the last ones may not be durable")
            }
            (Mode::SemiSync, _) => format!(
                "acknowledged writes are durable {there}; the last ones, up to lag_limit, may not be"
            ),
            (Mode::Async, _) => {
                format!("acknowledged writes follow {there}; the last ones may be missing")
            }
            (Mode::CpOnly, _) => {
                format!("the last checkpoint is {there}; what was acknowledged since is not")
            }
        }
    }

    /// The same, but usable without the hub: what holds until a new source and its hub were in step once,
    /// whatever its policy (R4).
    #[must_use]
    pub fn usable_at_once(self) -> Self {
        Self { on_hub_loss: OnHubLoss::Continue, ..self }
    }

    /// Whether `next` stops where this one goes on.
    pub fn would_stop(&self, next: &Self) -> bool {
        (self.on_hub_loss, next.on_hub_loss) == (OnHubLoss::Continue, OnHubLoss::Stop)
    }

    /// What keeps both promises at once: how a source behaves between two policies. How CPs travel
    /// and what the hub does before it acknowledges are taken from this one.
    pub fn strictest(&self, other: &Self) -> Self {
        let (lag, more) = (self.lag_limit, other.lag_limit);
        let lag_limit = match (self.mode, other.mode) {
            (Mode::SemiSync, Mode::SemiSync) => {
                LagLimit { bytes: lag.bytes.min(more.bytes), time: lag.time.min(more.time) }
            }
            (_, Mode::SemiSync) => more,
            _ => lag,
        };
        let stops = [self.on_hub_loss, other.on_hub_loss].contains(&OnHubLoss::Stop);
        let through = [self.cache, other.cache].contains(&Cache::Writethrough);
        Self {
            // The words stand in the order of their strength.
            mode: if u8::from(other.mode) < u8::from(self.mode) { other.mode } else { self.mode },
            on_hub_loss: if stops { OnHubLoss::Stop } else { OnHubLoss::Continue },
            cache: if through { Cache::Writethrough } else { Cache::Writeback },
            lag_limit,
            hub_timeout: self.hub_timeout.min(other.hub_timeout),
            ..*self
        }
    }

    /// The bytes for a catalog row, little-endian: five numbers, the hub timeout in milliseconds
    /// (3; longer ones are cut), the lag limit in bytes (8) and in milliseconds (8).
    pub fn encode(&self) -> [u8; POLICY_BYTES] {
        let mut out = [0; POLICY_BYTES];
        out[0] = self.mode.into();
        out[1] = self.ack.into();
        out[2] = self.apply.into();
        out[3] = self.on_hub_loss.into();
        out[4] = self.cache.into();
        let timeout = whole_ms(self.hub_timeout).min(0xff_ffff);
        out[5..8].copy_from_slice(&timeout.to_le_bytes()[..3]);
        out[8..16].copy_from_slice(&self.lag_limit.bytes.0.to_le_bytes());
        out[16..24].copy_from_slice(&whole_ms(self.lag_limit.time).to_le_bytes());
        out
    }

    /// Reads and checks the bytes.
    pub fn decode(bytes: &[u8; POLICY_BYTES]) -> Result<Self, PolicyError> {
        let [mode, ack, apply, loss, cache, t0, t1, t2, limits @ ..] = *bytes;
        let timeout = u64::from(u32::from_le_bytes([t0, t1, t2, 0]));
        let (mut size, mut time) = ([0; 8], [0; 8]);
        size.copy_from_slice(&limits[..8]);
        time.copy_from_slice(&limits[8..]);
        Ok(Self {
            mode: mode.try_into()?,
            ack: ack.try_into()?,
            apply: apply.try_into()?,
            on_hub_loss: loss.try_into()?,
            cache: cache.try_into()?,
            lag_limit: LagLimit {
                bytes: ByteCount(u64::from_le_bytes(size)),
                time: Duration::from_millis(u64::from_le_bytes(time)),
            },
            hub_timeout: Duration::from_millis(timeout),
        })
    }
}

/// The durable mark of writes acknowledged without the hub (R4): in which epoch, and the first
/// sequence number that may have been.
pub type AloneMark = (Epoch, SequenceNumber);

/// Whether the mark has stood since the first write: both ends were never in step.
pub fn never_in_step((_, from): AloneMark) -> bool {
    from == SequenceNumber(0).next()
}

/// Milliseconds, as far as they fit.
fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        super::whole_ms(*time).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Policy {
        Policy {
            mode: Mode::SemiSync,
            ack: Ack::Filed,
            apply: Apply::Inline,
            on_hub_loss: OnHubLoss::Stop,
            cache: Cache::Writeback,
            lag_limit: LagLimit { bytes: ByteCount(0x0102), time: Duration::from_millis(0x0304) },
            hub_timeout: Duration::from_millis(0x0506),
        }
    }

    #[test]
    fn only_what_is_promised_is_said_of_a_source_in_sync() {
        let policy = Policy::default();
        assert_eq!(policy.in_sync("here"), "every acknowledged write is durable here");
        let received = Policy { ack: Ack::Received, ..policy };
        let others =
            [Mode::SemiSync, Mode::Async, Mode::CpOnly].map(|mode| Policy { mode, ..policy });
        for weaker in others.into_iter().chain([received]) {
            let said = weaker.in_sync("here");
            assert!(!said.starts_with("every acknowledged write is durable"), "{said}");
            assert!(
                said.contains("here") && said.contains("not") | said.contains("missing"),
                "{said}"
            );
        }
    }

    #[test]
    fn golden_bytes_and_back() {
        let bytes = sample().encode();
        let golden = [2, 3, 2, 2, 2, 6, 5, 0, 2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes, golden);
        assert_eq!(Policy::decode(&bytes), Ok(sample()));
        let largest = LagLimit { bytes: ByteCount(u64::MAX), time: Duration::MAX };
        let read = Policy::decode(&Policy { lag_limit: largest, ..sample() }.encode()).unwrap();
        assert_eq!(read.lag_limit.time, Duration::from_millis(u64::MAX));
    }

    #[test]
    fn each_bad_byte_is_named() {
        for (at, wrong) in [(0, 5), (0, 0), (1, 4), (2, 4), (3, 3), (4, 3), (4, 255)] {
            let mut bytes = sample().encode();
            bytes[at] = wrong;
            let error = Policy::decode(&bytes).unwrap_err();
            assert!(matches!(error, PolicyError::Unknown { number, .. } if number == wrong));
        }
    }

    /// What an older program sent has fewer fields, what a newer one knows has more words.
    #[test]
    fn on_the_wire_a_policy_is_an_array_of_numbers_that_grows_at_its_end() {
        let bytes = rmp_serde::to_vec(&sample()).unwrap();
        assert_eq!(bytes, [0x97, 2, 3, 2, 2, 2, 0x92, 0xcd, 1, 2, 0xcd, 3, 4, 0xcd, 5, 6]);
        assert_eq!(rmp_serde::from_slice::<Policy>(&bytes).unwrap(), sample());
        let shorter: Policy = rmp_serde::from_slice(&[0x91, 3]).unwrap();
        assert_eq!(shorter, Policy { mode: Mode::Async, ..Policy::default() });
        assert!(rmp_serde::from_slice::<Policy>(&[0x91, 5]).is_err(), "a mode nobody knows");
        assert!(rmp_serde::from_slice::<Policy>(&[0x91, 0]).is_err());
    }

    /// Goal: behaving by the strictest of two keeps either promise. Method: all pairs of modes,
    /// losses and caches.
    #[test]
    fn the_strictest_of_two_keeps_both() {
        let all = || {
            Mode::WORDS.iter().flat_map(|&(_, mode)| {
                let losses = OnHubLoss::WORDS.iter();
                losses.flat_map(move |&(_, on_hub_loss)| {
                    Cache::WORDS.iter().map(move |&(_, cache)| Policy {
                        mode,
                        on_hub_loss,
                        cache,
                        ..Policy::default()
                    })
                })
            })
        };
        for (one, other) in all().flat_map(|one| all().map(move |other| (one, other))) {
            let both = one.strictest(&other);
            assert_eq!(both, Policy { ..other.strictest(&one) }, "it does not matter who asks");
            for policy in [one, other] {
                assert!(u8::from(both.mode) <= u8::from(policy.mode));
                assert!(both.never_alone() || !policy.never_alone());
                assert!(
                    both.on_hub_loss == policy.on_hub_loss || both.on_hub_loss == OnHubLoss::Stop
                );
                assert!(both.cache == policy.cache || both.cache == Cache::Writethrough);
            }
            assert!(both.mode == one.mode || both.mode == other.mode, "and no stricter");
        }
        let short = LagLimit { bytes: ByteCount(1), time: Duration::from_secs(9) };
        let quick = LagLimit { bytes: ByteCount(2), time: Duration::from_secs(3) };
        let semi = |lag_limit| Policy { mode: Mode::SemiSync, lag_limit, ..Policy::default() };
        let both = semi(short).strictest(&semi(quick)).lag_limit;
        assert_eq!(both, LagLimit { bytes: ByteCount(1), time: Duration::from_secs(3) });
        let alone = Policy { mode: Mode::Async, lag_limit: short, ..Policy::default() };
        assert_eq!(alone.strictest(&semi(quick)).lag_limit, quick);
    }

    #[test]
    fn only_sync_with_stop_is_never_alone() {
        for &(_, mode) in Mode::WORDS {
            for &(_, on_hub_loss) in OnHubLoss::WORDS {
                let policy = Policy { mode, on_hub_loss, ..Policy::default() };
                let never = mode == Mode::Sync && on_hub_loss == OnHubLoss::Stop;
                assert_eq!(policy.never_alone(), never);
                assert_eq!(policy.forwards(), mode != Mode::CpOnly);
            }
        }
        assert!(!Policy::default().never_alone(), "what tells nothing promises nothing");
    }
}
