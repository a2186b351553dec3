//! The status documents of hub and source.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::SCHEMA;
use super::config::ConfigStatus;
use super::health::{Health, HealthReason};
use super::seed::SeedStatus;
use super::upkeep::{RebuildStatus, ScrubStatus};
use crate::units::hash::Root;
use crate::units::ids::SourceId;
use crate::units::names::{SourceName, VolumeName};
use crate::units::policy::{self, AloneMark, Mode};

/// The state of a source, as section 13 names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Known, but never heard from since the hub started; or, on a source, before the hub answered.
    Waiting,
    /// The image is being brought up to the source; entries do not yet count as protection.
    Syncing,
    /// Every acknowledged write is safe as the policy promises.
    InSync,
    /// Connected, but the image cannot follow.
    Behind,
    /// Not connected.
    Offline,
    /// The hub serves the volumes.
    FailedOver,
    /// A higher epoch exists: this side may not serve writes.
    Fenced,
    /// An error latched; an operator must act.
    Faulted,
    /// It has no file on the hub any more; its images stay.
    Retired,
}

impl State {
    /// All of them, in the order of section 13; `retired` is the hub's alone.
    pub const ALL: [Self; 9] = [
        Self::Waiting,
        Self::Syncing,
        Self::InSync,
        Self::Behind,
        Self::Offline,
        Self::FailedOver,
        Self::Fenced,
        Self::Faulted,
        Self::Retired,
    ];

    /// The word in JSON, in metrics and on the terminal.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Syncing => "syncing",
            Self::InSync => "in-sync",
            Self::Behind => "behind",
            Self::Offline => "offline",
            Self::FailedOver => "failed-over",
            Self::Fenced => "fenced",
            Self::Faulted => "faulted",
            Self::Retired => "retired",
        }
    }
}

impl State {
    /// Whether whoever reads of it is told what to do: all but what ends by itself, and what is in order.
    pub const fn wants_a_next_step(self) -> bool {
        match self {
            Self::Waiting
            | Self::Behind
            | Self::Offline
            | Self::FailedOver
            | Self::Fenced
            | Self::Faulted
            | Self::Retired => true,
            Self::Syncing | Self::InSync => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a source promises (section 9), in the words of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// `sync`, `semi-sync`, `async` or `cp-only`.
    pub mode: String,
    /// `durable`, `received` or `filed`.
    pub ack: String,
    /// `reference`, `inline` or `replay`.
    pub apply: String,
    /// `continue` or `stop`.
    pub on_hub_loss: String,
    /// `writethrough` or `writeback`.
    pub cache: String,
    /// The limit of `semi-sync`; not there in another mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_limit: Option<LagLimit>,
}

impl From<&policy::Policy> for Policy {
    fn from(policy: &policy::Policy) -> Self {
        let limit = policy.lag_limit;
        let limited = policy.mode == Mode::SemiSync;
        Self {
            mode: policy.mode.to_string(),
            ack: policy.ack.to_string(),
            apply: policy.apply.to_string(),
            on_hub_loss: policy.on_hub_loss.to_string(),
            cache: policy.cache.to_string(),
            lag_limit: limited
                .then_some(LagLimit { bytes: limit.bytes.0, seconds: limit.time.as_secs_f64() }),
        }
    }
}

/// How far the hub may be behind in `semi-sync`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LagLimit {
    /// Bytes that it may lack.
    pub bytes: u64,
    /// Age of the oldest write that it may lack.
    pub seconds: f64,
}

/// Since when a source acknowledges writes without the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AloneSince {
    /// Epoch of the durable mark.
    pub epoch: u32,
    /// First sequence number acknowledged alone.
    pub sequence: u64,
}

impl From<AloneMark> for AloneSince {
    fn from((epoch, sequence): AloneMark) -> Self {
        Self { epoch: epoch.number, sequence: sequence.0 }
    }
}

/// A pass that brings the hub's image up to the source, as the source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// The CP of the image.
    pub from_cp: u32,
    /// The CP that it is brought to.
    pub to_cp: u32,
    /// How much of the volumes was looked at, changed or not.
    pub percent: u32,
    /// Bytes sent for it on this connection.
    pub sent_bytes: u64,
    /// Seconds that it will take if it goes on like this; null before that can be said.
    pub seconds_left: Option<f64>,
}

/// One volume of a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Name within its source.
    pub name: VolumeName,
    /// Size as clients see it.
    pub size_bytes: u64,
    /// Root on a hub at `applied_cp`, on a source at its newest own CP; null where none is known.
    pub root: Option<Root>,
    /// What keeps this volume, and no other, from being mirrored; not there if nothing does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<VolumeTrouble>,
}

/// A volume that both ends do not agree on, while they do on others (R20).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTrouble {
    /// `refused`: it is not mirrored; `behind`: its image is being brought up.
    pub state: String,
    /// Why: one sentence, lower case, no full stop.
    pub reason: String,
    /// What the administrator can do; empty when nothing is to be done.
    pub next_step: String,
    /// The CP that its image is of; null where that is not known, 0 if there is no image.
    pub image_cp: Option<u32>,
}

/// One source, as the hub or the source itself sees it.
///
/// The five `*_bytes` of the ladder count bytes of entries since the same moment, so that their
/// differences say what is under way; each is at most the one before. The two that only the hub
/// knows are null on a source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceEntry {
    /// Name.
    pub name: SourceName,
    /// Id; null until the source was heard once.
    pub id: Option<SourceId>,
    /// State.
    pub state: State,
    /// Why it is in that state: one sentence, lower case, no full stop.
    pub reason: String,
    /// What the administrator can do; empty when nothing is to be done.
    pub next_step: String,
    /// Policy in force; null until known.
    pub policy: Option<Policy>,
    /// Durable mark of writes acknowledged alone; null when there is none.
    pub alone_since: Option<AloneSince>,
    /// The pass under way; not there if there is none, and on a hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync: Option<ResyncStatus>,
    /// Epoch number; 0 until known.
    pub epoch: u32,
    /// Generation number; 0 until known.
    pub generation: u32,
    /// Number of the CP that the image shows; 0 is the empty beginning. Null on a source that has
    /// not met its hub since its start.
    pub applied_cp: Option<u32>,
    /// Seconds since the image was last known equal to the source, at least: after a restart counted
    /// from there. Null until both ends have met.
    pub image_age_seconds: Option<f64>,
    /// Bytes acknowledged and not visible. Null where it cannot be known: on a hub that the source
    /// may go on or has gone on without, on a source for what it acknowledged alone before a restart.
    pub lag_bytes: Option<u64>,
    /// Age of the oldest acknowledged write that the image does not show yet; 0 if none. Null on a
    /// hub that cannot know it.
    pub lag_seconds: Option<f64>,
    /// Answered to clients.
    pub acknowledged_bytes: u64,
    /// Durable in the hub's ring.
    pub staged_bytes: u64,
    /// In the source log; null on a source.
    pub drained_bytes: Option<u64>,
    /// In the image's new tree; null on a source.
    pub applied_bytes: Option<u64>,
    /// In the published CP.
    pub visible_bytes: u64,
    /// What its published CP and its kept ones have of the hub's pool; not there on a source, and as long
    /// as nobody has counted it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_used_bytes: Option<u64>,
    /// What it may have there, by `space_limit` in its file; not there without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_limit_bytes: Option<u64>,
    /// Volumes, by name.
    pub volumes: Vec<VolumeStatus>,
    /// Seeds of its volumes, by name; a hub's alone, and not there without one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<SeedStatus>,
    /// What the source's file asks for, until it is in force; only a source knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_next: Option<Policy>,
    /// How long the oldest write waits for each step of the ladder.
    #[serde(default)]
    pub waits: WaitsStatus,
}

/// Age of the oldest write that waits for a step of the ladder; 0 if none does, null where it cannot be
/// known. On a source the steps of the hub alone are null.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct WaitsStatus {
    /// To be durable in the hub's ring.
    pub staged_seconds: Option<f64>,
    /// To lie in the source log.
    pub drained_seconds: Option<f64>,
    /// To be in the image's new tree.
    pub applied_seconds: Option<f64>,
    /// To be in the published CP.
    pub visible_seconds: Option<f64>,
}

impl WaitsStatus {
    /// In the order of the ladder.
    pub fn by_step(&self) -> [Option<f64>; 4] {
        let Self { staged_seconds, drained_seconds, applied_seconds, visible_seconds } = *self;
        [staged_seconds, drained_seconds, applied_seconds, visible_seconds]
    }
}

/// The ring of the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NvramStatus {
    /// Bytes not released.
    pub used_bytes: u64,
    /// Bytes of the ring.
    pub capacity_bytes: u64,
    /// How a write is made durable: `O_DIRECT|O_DSYNC` or `fdatasync`.
    pub durability: String,
}

/// The pool of the process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Size.
    pub total_bytes: u64,
    /// Free.
    pub free_bytes: u64,
    /// What the published images take.
    pub used_bytes: u64,
    /// What only CPs kept by name take.
    #[serde(default)]
    pub kept_bytes: u64,
    /// In use only because a reader pins an older CP.
    pub pinned_bytes: u64,
    /// Free, and kept back so that a CP and a drop always fit (R18).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reserve_bytes: u64,
    /// What the volumes that files of sources name would take if all of it were written; only on a hub, and not
    /// there if no file names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes_bytes: Option<u64>,
    /// Blocks and nodes that failed their check; not there if none ever did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rot: Option<RotStatus>,
    /// Blocks that were not right and were rewritten from another copy.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub repaired_blocks: u64,
    /// Reads of blocks of which no copy was right.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub damaged_blocks: u64,
    /// The devices of the array, by place; none if the pool is one plain device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<PoolDeviceStatus>,
    /// Devices whose addition has not come to its end, by path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending_devices: Vec<String>,
    /// The scrub under way, or the last one; not there if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubStatus>,
    /// The filling of devices; not there if none is being filled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuild: Option<RebuildStatus>,
}

/// What rotted on the pool's device since the process was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotStatus {
    /// Blocks and nodes that failed their check.
    pub found: u64,
    /// Of these, got from the other end and written to a new place.
    pub repaired: u64,
    /// Got from the other end, and not yet written.
    pub waiting: u64,
    /// What cannot be read and could not be got: the place and the reason, each a sentence.
    pub lost: Vec<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// One device of the pool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolDeviceStatus {
    /// Its path, or its id if it is not there.
    pub name: String,
    /// `in`, `failed` or `rebuilding`.
    pub state: String,
    /// Why it is not in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Reads that failed and were answered from the others.
    pub read_errors: u64,
    /// Blocks that were rewritten on it.
    pub repaired_blocks: u64,
    /// Its place in the array.
    #[serde(default)]
    pub place: u64,
    /// Its size; 0 if it is not there.
    #[serde(default)]
    pub size_bytes: u64,
    /// Bytes written to it since the process was started.
    #[serde(default)]
    pub written_bytes: u64,
    /// Answers that took too long since the process was started.
    #[serde(default)]
    pub slow_answers: u64,
}

/// What `status --json` prints on a hub.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HubStatus {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Every source of the hub, by name.
    pub sources: Vec<SourceEntry>,
    /// The shared ring.
    pub nvram: Option<NvramStatus>,
    /// The pool of the images.
    pub pool: Option<PoolStatus>,
    /// One word and its reasons.
    pub health: Health,
    /// Its files against what runs; not there if all of them runs.
    #[serde(default, skip_serializing_if = "ConfigStatus::is_empty")]
    pub config: ConfigStatus,
}

/// What `status --json` prints on a source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The source itself.
    pub source: SourceEntry,
    /// Other sources that live on the same filer because their hub has asked for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub homes: Vec<SourceEntry>,
    /// Its NVRAM.
    pub nvram: Option<NvramStatus>,
    /// Its pool.
    pub pool: Option<PoolStatus>,
    /// One word and its reasons.
    pub health: Health,
    /// Its files against what runs; not there if all of them runs.
    #[serde(default, skip_serializing_if = "ConfigStatus::is_empty")]
    pub config: ConfigStatus,
}

/// Either document; told apart by `sources` or `source`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StatusDocument {
    /// Of a hub.
    Hub(Box<HubStatus>),
    /// Of a source.
    Source(Box<SourceStatus>),
}

impl StatusDocument {
    /// The document of a hub, its health derived from the parts.
    pub fn hub(
        sources: Vec<SourceEntry>,
        nvram: Option<NvramStatus>,
        pool: Option<PoolStatus>,
    ) -> Self {
        let health = Health::derive(&sources, nvram.as_ref(), pool.as_ref());
        let config = ConfigStatus::default();
        Self::Hub(Box::new(HubStatus { schema: SCHEMA, sources, nvram, pool, config, health }))
    }

    /// The document of a source, its health derived from the parts.
    pub fn source(
        source: SourceEntry,
        nvram: Option<NvramStatus>,
        pool: Option<PoolStatus>,
    ) -> Self {
        Self::filer(source, Vec::new(), nvram, pool)
    }

    /// With what its files say; what is wrong there is a reason of health as well.
    #[must_use]
    pub fn with_config(mut self, status: ConfigStatus) -> Self {
        let (config, health) = match &mut self {
            Self::Hub(hub) => (&mut hub.config, &mut hub.health),
            Self::Source(own) => (&mut own.config, &mut own.health),
        };
        let mut reasons = std::mem::take(&mut health.reasons);
        reasons.extend(status.reasons());
        *health = Health::from_reasons(reasons);
        *config = status;
        self
    }

    /// With more reasons of health.
    #[must_use]
    pub fn with_reasons(mut self, more: Vec<HealthReason>) -> Self {
        let health = match &mut self {
            Self::Hub(hub) => &mut hub.health,
            Self::Source(own) => &mut own.health,
        };
        let mut reasons = std::mem::take(&mut health.reasons);
        reasons.extend(more);
        *health = Health::from_reasons(reasons);
        self
    }

    /// The document of a filer on which other sources live as well.
    pub fn filer(
        source: SourceEntry,
        homes: Vec<SourceEntry>,
        nvram: Option<NvramStatus>,
        pool: Option<PoolStatus>,
    ) -> Self {
        let all: Vec<_> = std::iter::once(&source).chain(&homes).cloned().collect();
        let health = Health::derive(&all, nvram.as_ref(), pool.as_ref());
        let (schema, config) = (SCHEMA, ConfigStatus::default());
        Self::Source(Box::new(SourceStatus { schema, source, homes, nvram, pool, config, health }))
    }

    /// The sources it tells of: all of a hub; the filer's own, then those that live on it.
    pub fn sources(&self) -> Cow<'_, [SourceEntry]> {
        match self {
            Self::Hub(hub) => Cow::Borrowed(&hub.sources),
            Self::Source(own) if own.homes.is_empty() => {
                Cow::Borrowed(std::slice::from_ref(&own.source))
            }
            Self::Source(own) => {
                Cow::Owned(std::iter::once(&own.source).chain(&own.homes).cloned().collect())
            }
        }
    }

    /// The ring.
    pub fn nvram(&self) -> Option<&NvramStatus> {
        match self {
            Self::Hub(hub) => hub.nvram.as_ref(),
            Self::Source(own) => own.nvram.as_ref(),
        }
    }

    /// The pool.
    pub fn pool(&self) -> Option<&PoolStatus> {
        match self {
            Self::Hub(hub) => hub.pool.as_ref(),
            Self::Source(own) => own.pool.as_ref(),
        }
    }

    /// The health word and its reasons.
    pub fn health(&self) -> &Health {
        match self {
            Self::Hub(hub) => &hub.health,
            Self::Source(own) => &own.health,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A source in sync, for tests of whoever shows it.
    pub(crate) fn entry() -> SourceEntry {
        SourceEntry {
            name: "filer-a".parse().unwrap(),
            id: Some(SourceId([0xab; 16])),
            state: State::InSync,
            reason: "every acknowledged write is durable on the hub".into(),
            next_step: String::new(),
            policy: Some(Policy {
                mode: "sync".into(),
                ack: "durable".into(),
                apply: "reference".into(),
                on_hub_loss: "stop".into(),
                cache: "writethrough".into(),
                lag_limit: None,
            }),
            policy_next: None,
            alone_since: None,
            resync: None,
            epoch: 1,
            generation: 3,
            applied_cp: Some(42),
            image_age_seconds: Some(1.5),
            lag_bytes: Some(4096),
            lag_seconds: Some(0.25),
            acknowledged_bytes: 16_384,
            staged_bytes: 16_384,
            drained_bytes: Some(12_288),
            applied_bytes: Some(12_288),
            visible_bytes: 12_288,
            pool_used_bytes: None,
            pool_limit_bytes: None,
            seeds: Vec::new(),
            volumes: vec![VolumeStatus {
                name: "vol0".parse().unwrap(),
                size_bytes: 1 << 30,
                root: Some(Root([0xcd; 32])),
                trouble: None,
            }],
            waits: WaitsStatus {
                staged_seconds: Some(0.0),
                drained_seconds: Some(0.125),
                applied_seconds: None,
                visible_seconds: Some(0.25),
            },
        }
    }

    /// Golden text: the field names, their order and their types are a contract with users.
    #[test]
    fn the_documents_have_the_shape_of_the_contract() {
        let source = format!(r#"{{"name":"filer-a","id":"{}","state":"in-sync","#, "ab".repeat(16))
            + r#""reason":"every acknowledged write is durable on the hub","next_step":"","#
            + r#""policy":{"mode":"sync","ack":"durable","apply":"reference","on_hub_loss":"stop","cache":"writethrough"},"#
            + r#""alone_since":null,"epoch":1,"generation":3,"applied_cp":42,"image_age_seconds":1.5,"#
            + r#""lag_bytes":4096,"lag_seconds":0.25,"acknowledged_bytes":16384,"staged_bytes":16384,"#
            + r#""drained_bytes":12288,"applied_bytes":12288,"visible_bytes":12288,"#
            + &format!(
                r#""volumes":[{{"name":"vol0","size_bytes":1073741824,"root":"{}"}}],"#,
                "cd".repeat(32)
            )
            + r#""waits":{"staged_seconds":0.0,"drained_seconds":0.125,"applied_seconds":null,"#
            + r#""visible_seconds":0.25}}"#;
        let rest = r#""nvram":{"used_bytes":1,"capacity_bytes":2,"durability":"fdatasync"},"#
            .to_owned()
            + r#""pool":{"total_bytes":4000,"free_bytes":3000,"used_bytes":1000,"kept_bytes":2,"pinned_bytes":1},"#
            + r#""health":{"word":"ok","reasons":[]}}"#;
        let nvram =
            NvramStatus { used_bytes: 1, capacity_bytes: 2, durability: "fdatasync".into() };
        let pool = PoolStatus {
            total_bytes: 4000,
            free_bytes: 3000,
            used_bytes: 1000,
            kept_bytes: 2,
            pinned_bytes: 1,
            ..PoolStatus::default()
        };
        let hub = StatusDocument::hub(vec![entry()], Some(nvram.clone()), Some(pool.clone()));
        let text = serde_json::to_string(&hub).unwrap();
        assert_eq!(text, format!(r#"{{"schema":1,"sources":[{source}],{rest}"#));
        assert_eq!(serde_json::from_str::<StatusDocument>(&text).unwrap(), hub);
        let own = StatusDocument::source(entry(), Some(nvram), Some(pool));
        let text = serde_json::to_string(&own).unwrap();
        assert_eq!(text, format!(r#"{{"schema":1,"source":{source},{rest}"#));
        assert_eq!(serde_json::from_str::<StatusDocument>(&text).unwrap(), own);
    }

    #[test]
    fn states_have_one_word_in_json_and_on_the_terminal() {
        for state in State::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.to_string());
        }
    }

    /// A newer program may add fields; an older one still reads the document.
    #[test]
    fn unknown_fields_are_passed_over() {
        let mut value =
            serde_json::to_value(StatusDocument::hub(vec![entry()], None, None)).unwrap();
        value["new"] = serde_json::json!({"a": 1});
        value["sources"][0]["new"] = serde_json::json!(true);
        assert!(matches!(serde_json::from_value(value).unwrap(), StatusDocument::Hub(_)));
    }
}
