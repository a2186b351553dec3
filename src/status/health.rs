//! Health: one word with its reasons, as a person on call needs it.
//!
//! Each reason has a stable code (for alert rules and mutes), the object it is about, a sentence
//! and the next step. The word is the worst of its reasons.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::document::{NvramStatus, PoolStatus, RotStatus, SourceEntry, State};
use super::upkeep::ScrubStatus;

/// How bad it is, in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthWord {
    /// Nothing to do.
    Ok,
    /// Somebody should look today.
    Warning,
    /// Somebody should look now: data is, or may soon be, less safe than promised.
    Critical,
}

impl HealthWord {
    /// The word in JSON and on the terminal.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }

    /// 0, 1 or 2: exit code of `status --check` and value of the metric.
    pub const fn level(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Warning => 1,
            Self::Critical => 2,
        }
    }
}

impl fmt::Display for HealthWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One reason for a word that is not `ok`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthReason {
    /// Stable code, such as `source-offline` or `pool-nearly-full`.
    pub code: String,
    /// How bad this one is.
    pub word: HealthWord,
    /// What it is about: a source's name, `nvram` or `pool`.
    pub object: String,
    /// One sentence, lower case, no full stop.
    pub text: String,
    /// What to do; may be empty.
    pub next_step: String,
}

/// The word and its reasons, worst first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The worst word of the reasons, `ok` without any.
    pub word: HealthWord,
    /// Worst first; among equals in the order given.
    pub reasons: Vec<HealthReason>,
}

/// A ring this full is a warning: one more step and clients wait.
const NVRAM_WARNING_PERCENT: u64 = 90;
/// A pool with less free than this is a warning.
const POOL_WARNING_PERCENT_FREE: u64 = 10;
/// A pool with less free than this lives on its reserve (section 11): critical.
const POOL_CRITICAL_PERCENT_FREE: u64 = 5;

impl State {
    /// How bad the state is for the protection of the source.
    pub const fn word(self) -> HealthWord {
        match self {
            Self::InSync | Self::Retired => HealthWord::Ok,
            Self::Waiting | Self::Syncing | Self::Behind | Self::FailedOver => HealthWord::Warning,
            Self::Offline | Self::Fenced | Self::Faulted => HealthWord::Critical,
        }
    }
}

impl Health {
    /// From reasons in any order.
    pub fn from_reasons(mut reasons: Vec<HealthReason>) -> Self {
        reasons.sort_by_key(|reason| std::cmp::Reverse(reason.word));
        let word = reasons.first().map_or(HealthWord::Ok, |worst| worst.word);
        Self { word, reasons }
    }

    /// What the parts of a status document say together.
    pub fn derive(
        sources: &[SourceEntry],
        nvram: Option<&NvramStatus>,
        pool: Option<&PoolStatus>,
    ) -> Self {
        let mut reasons: Vec<HealthReason> = sources.iter().flat_map(of_source).collect();
        reasons.extend(nvram.and_then(of_nvram));
        reasons.extend(pool.and_then(of_pool));
        reasons.extend(pool.and_then(|pool| of_rot(pool.rot.as_ref()?)));
        reasons.extend(pool.into_iter().flat_map(of_devices));
        reasons.extend(pool.and_then(|pool| of_scrub(pool.scrub.as_ref()?)));
        Self::from_reasons(reasons)
    }

    /// What concerns one source: its own reasons, and those of the process that all share.
    #[must_use]
    pub fn only(&self, source: &str, all_sources: &[SourceEntry]) -> Self {
        let of_other = |object: &str| {
            object != source && all_sources.iter().any(|entry| entry.name.as_str() == object)
        };
        let reasons = self.reasons.iter().filter(|reason| !of_other(&reason.object));
        Self::from_reasons(reasons.cloned().collect())
    }
}

fn of_source(source: &SourceEntry) -> Vec<HealthReason> {
    let mut reasons = Vec::new();
    let word = source.state.word();
    if word > HealthWord::Ok {
        reasons.push(HealthReason {
            code: format!("source-{}", source.state),
            word,
            object: source.name.to_string(),
            text: format!("{} is {}: {}", source.name, source.state, source.reason),
            next_step: source.next_step.clone(),
        });
    }
    if let Some(alone) = source.alone_since {
        reasons.push(HealthReason {
            code: "source-alone".into(),
            word: HealthWord::Warning,
            object: source.name.to_string(),
            text: format!(
                "{} acknowledges writes alone since sequence number {} of epoch {}",
                source.name, alone.sequence, alone.epoch
            ),
            next_step: "bring the hub back; the loss of this filer can lose writes".into(),
        });
    }
    reasons
}

/// Whole percent of `part` in `whole`; 0 of nothing.
fn percent(part: u64, whole: u64) -> u64 {
    let exact = u128::from(part) * 100 / u128::from(whole.max(1));
    u64::try_from(exact).unwrap_or(u64::MAX)
}

fn of_nvram(nvram: &NvramStatus) -> Option<HealthReason> {
    let used = percent(nvram.used_bytes, nvram.capacity_bytes);
    (used >= NVRAM_WARNING_PERCENT).then(|| HealthReason {
        code: "nvram-nearly-full".into(),
        word: HealthWord::Warning,
        object: "nvram".into(),
        text: format!("the NVRAM ring is {used}% full; clients wait when it is full"),
        next_step: "look for a source that is behind or faulted; raise nvram.size".into(),
    })
}

fn of_rot(rot: &RotStatus) -> Option<HealthReason> {
    let (first, others) = rot.lost.split_first()?;
    let also =
        if others.is_empty() { String::new() } else { format!(" (and {} more)", others.len()) };
    Some(HealthReason {
        code: "pool-rot".into(),
        word: HealthWord::Critical,
        object: "pool".into(),
        text: format!("a block cannot be read and was not got from the other end: {first}{also}"),
        next_step: "bring the other end back and read it again; or write the block anew; replace \
                    the device if more follow"
            .into(),
    })
}

fn of_pool(pool: &PoolStatus) -> Option<HealthReason> {
    let free = percent(pool.free_bytes, pool.total_bytes);
    let (code, word) = if free < POOL_CRITICAL_PERCENT_FREE {
        ("pool-full", HealthWord::Critical)
    } else if free < POOL_WARNING_PERCENT_FREE {
        ("pool-nearly-full", HealthWord::Warning)
    } else {
        return None;
    };
    Some(HealthReason {
        code: code.into(),
        word,
        object: "pool".into(),
        text: format!("{free}% of the pool is free"),
        next_step:
            "trim unused space in the volumes, or `mirrorhub device add` makes the pool larger"
                .into(),
    })
}

/// An array without one of its devices bears less, or nothing more.
fn of_devices(pool: &PoolStatus) -> Vec<HealthReason> {
    let out = pool.devices.iter().filter(|device| device.state != "in");
    let mut reasons: Vec<HealthReason> = out
        .map(|device| HealthReason {
            code: format!("pool-device-{}", device.state),
            word: HealthWord::Warning,
            object: "pool".into(),
            text: format!(
                "device {} of the pool is {}: {}",
                device.name,
                device.state,
                match &device.reason {
                    Some(reason) => reason.as_str(),
                    None if device.state == "rebuilding" => "it is being filled from the others",
                    None => "no reason is known",
                }
            ),
            next_step: match device.state.as_str() {
                "rebuilding" => "wait: `mirrorhub device list` shows how far it is".into(),
                _ => "nothing is lost yet: `mirrorhub device replace OLD NEW` fills another one"
                    .into(),
            },
        })
        .collect();
    if let Some(lost) = pool.rebuild.as_ref().map(|rebuild| rebuild.lost_blocks).filter(|n| *n > 0)
    {
        reasons.push(HealthReason {
            code: "rebuild-lost".into(),
            word: HealthWord::Critical,
            object: "pool".into(),
            text: format!("{lost} blocks of a new device could not be had from the others"),
            next_step: "`mirrorhub scrub --wait` names what is lost, and asks the other end".into(),
        });
    }
    if !pool.pending_devices.is_empty() {
        let paths = pool.pending_devices.join(" ");
        reasons.push(HealthReason {
            code: "pool-addition-pending".into(),
            word: HealthWord::Warning,
            object: "pool".into(),
            text: format!("the addition of {paths} to the pool has not come to its end"),
            next_step: format!(
                "the log says why; mend that, then `mirrorhub device add {paths}` or a restart goes on"
            ),
        });
    }
    if pool.damaged_blocks > 0 {
        reasons.push(HealthReason {
            code: "pool-damaged".into(),
            word: HealthWord::Warning,
            object: "pool".into(),
            text: format!("{} reads met a block without a right copy", pool.damaged_blocks),
            next_step: "`mirrorhub verify` names the volumes; the log names the blocks".into(),
        });
    }
    reasons
}

fn of_scrub(scrub: &ScrubStatus) -> Option<HealthReason> {
    let reason = |code: &str, word, text, next: &str| HealthReason {
        code: code.into(),
        word,
        object: "pool".into(),
        text,
        next_step: next.into(),
    };
    if let Some(first) = scrub.lost.first() {
        let text =
            format!("a scrub found {} blocks without a right copy: {first}", scrub.lost_blocks);
        let next = "bring the other end back and scrub again; or write the named blocks anew";
        return Some(reason("scrub-lost", HealthWord::Critical, text, next));
    }
    let problem = scrub.problem.as_ref()?;
    let text = format!("the scrub could not go on: {problem}");
    Some(reason("scrub-failed", HealthWord::Warning, text, "`mirrorhub scrub` begins it again"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::document::WaitsStatus;

    fn source(name: &str, state: State) -> SourceEntry {
        SourceEntry {
            name: name.parse().unwrap(),
            id: None,
            state,
            reason: "because".into(),
            next_step: "do this".into(),
            policy: None,
            policy_next: None,
            alone_since: None,
            resync: None,
            epoch: 0,
            generation: 0,
            applied_cp: Some(0),
            image_age_seconds: None,
            lag_bytes: Some(0),
            lag_seconds: Some(0.0),
            acknowledged_bytes: 0,
            staged_bytes: 0,
            drained_bytes: Some(0),
            applied_bytes: Some(0),
            visible_bytes: 0,
            pool_used_bytes: None,
            pool_limit_bytes: None,
            seeds: Vec::new(),
            volumes: Vec::new(),
            waits: WaitsStatus::default(),
        }
    }

    fn pool(free_bytes: u64) -> PoolStatus {
        PoolStatus {
            total_bytes: 100,
            free_bytes,
            used_bytes: 100 - free_bytes,
            kept_bytes: 0,
            pinned_bytes: 0,
            ..PoolStatus::default()
        }
    }

    fn codes(health: &Health) -> Vec<&str> {
        health.reasons.iter().map(|reason| reason.code.as_str()).collect()
    }

    #[test]
    fn the_word_is_the_worst_reason_and_reasons_come_worst_first() {
        let sources =
            [source("a", State::InSync), source("b", State::Behind), source("c", State::Faulted)];
        let health = Health::derive(&sources, None, Some(&pool(9)));
        assert_eq!(health.word, HealthWord::Critical);
        assert_eq!(codes(&health), ["source-faulted", "source-behind", "pool-nearly-full"]);
        assert_eq!(health.reasons[0].text, "c is faulted: because");
        assert_eq!(Health::derive(&sources[..1], None, None).word, HealthWord::Ok);
    }

    #[test]
    fn one_source_is_judged_by_itself_and_by_what_all_share() {
        let sources = [source("a", State::InSync), source("b", State::Offline)];
        let health = Health::derive(&sources, None, Some(&pool(1)));
        assert_eq!(codes(&health.only("a", &sources)), ["pool-full"]);
        assert_eq!(codes(&health.only("b", &sources)), ["source-offline", "pool-full"]);
    }

    #[test]
    fn devices_that_are_out_and_lost_blocks_are_warnings() {
        let device = |state: &str| super::super::document::PoolDeviceStatus {
            name: "disk1".into(),
            state: state.into(),
            reason: Some("write failed".into()),
            ..Default::default()
        };
        let devices = vec![device("in"), device("failed")];
        let pool = PoolStatus { devices, ..pool(50) };
        let health = Health::derive(&[], None, Some(&pool));
        assert_eq!(
            (health.word, codes(&health)),
            (HealthWord::Warning, vec!["pool-device-failed"])
        );
        let pool = PoolStatus { damaged_blocks: 1, devices: Vec::new(), ..pool };
        assert_eq!(codes(&Health::derive(&[], None, Some(&pool))), ["pool-damaged"]);
    }

    #[test]
    fn limits_of_ring_and_pool_are_where_they_are_said_to_be() {
        let ring = |used_bytes| NvramStatus {
            used_bytes,
            capacity_bytes: 100,
            durability: "simulated".into(),
        };
        assert_eq!(of_nvram(&ring(89)), None);
        assert!(of_nvram(&ring(90)).is_some());
        assert_eq!(of_pool(&pool(10)), None);
        assert_eq!(of_pool(&pool(9)).unwrap().word, HealthWord::Warning);
        assert_eq!(of_pool(&pool(5)).unwrap().word, HealthWord::Warning);
        assert_eq!(of_pool(&pool(4)).unwrap().word, HealthWord::Critical);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
        assert_eq!(percent(5, 0), 500, "a pool of no size does not divide by zero");
    }

    #[test]
    fn an_alone_mark_is_a_warning_of_its_own() {
        let mut alone = source("a", State::InSync);
        alone.alone_since = Some(super::super::document::AloneSince { epoch: 2, sequence: 77 });
        let health = Health::derive(&[alone], None, None);
        assert_eq!(codes(&health), ["source-alone"]);
        assert!(health.reasons[0].text.contains("77 of epoch 2"));
    }
}
