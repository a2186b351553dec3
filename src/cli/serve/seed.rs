//! Seeds of a hub, for its admin socket.

use serde_json::Value;
use tokio::sync::mpsc;

use super::source::bytes_of;
use super::{answer, failed};
use crate::control::feed::{self, Feed};
use crate::control::message::{AdminError, Progress, ProgressSender, ProgressUnit, Target, code};
use crate::hub::Hub;
use crate::hub::failover::Refusal;
use crate::hub::seed::book::{Fate, Shown};
use crate::hub::seed::{Order, Piece, lines};
use crate::hub::shared::Shared;
use crate::hub::status::Snapshot;
use crate::limits::SEED_PIECES_WAITING;
use crate::observe::server::News;
use crate::status::SCHEMA;
use crate::status::answers::{SeedAnswer, SeedEntry, SeedsAnswer};
use crate::status::seed::SeedStatus;
use crate::units::names::VolumeName;
use crate::units::numbers::ByteCount;

fn refused(refusal: Refusal) -> AdminError {
    AdminError::new(code::REFUSED, refusal.reason, refusal.next_step)
}

fn volume_of(target: &Target) -> Result<VolumeName, AdminError> {
    let message = format!("a seed is of one volume, and {target} is a source");
    let next = format!("name it as {target}/VOLUME");
    target.volume.clone().ok_or_else(|| AdminError::new(code::BAD_REQUEST, message, next))
}

/// Fills one with what follows.
pub(super) async fn fill(
    hub: &Hub,
    (target, size, has_file): (Target, Option<u64>, bool),
    mut feed: Feed,
    progress: ProgressSender,
) -> Result<Value, AdminError> {
    let volume = volume_of(&target)?;
    let (sender, pieces) = mpsc::channel(SEED_PIECES_WAITING);
    let object = target.to_string();
    let report = move |done, size: ByteCount| {
        let (what, object, total) = ("seeding".to_owned(), object.clone(), Some(size.0));
        progress.send(Progress { what, object, done, total, unit: ProgressUnit::Bytes });
    };
    let source = target.source.clone();
    let (size, volume_of_it) = (size.map(ByteCount), volume.clone());
    let order = Order { source: source.clone(), volume: volume_of_it, size, has_file };
    let filled = hub.seed(order, pieces, report);
    let fed = async {
        while let Some(piece) = feed.next().await? {
            let (piece, ends) = match piece {
                feed::Piece::Data { offset, bytes } => (Piece::Data { offset, bytes }, false),
                feed::Piece::End(size) => (Piece::End(size), true),
            };
            // Who fills it says himself why he takes no more.
            if sender.send(piece).await.is_err() || ends {
                break;
            }
        }
        drop(sender);
        Ok::<_, AdminError>(())
    };
    let (seeded, fed) = tokio::join!(filled, fed);
    fed?;
    let seeded = seeded.map_err(refused)?;
    let next_step = format!(
        "connect {source}: what differs is sent then (`enabled = true` in {source}.toml, if it was held off)"
    );
    answer(&SeedAnswer {
        schema: SCHEMA,
        source,
        volume,
        size_bytes: seeded.size.0,
        root: seeded.root,
        pool_bytes: bytes_of(seeded.blocks),
        next_step,
    })
}

/// Gives one up.
pub(super) async fn discard(hub: &Hub, target: Target) -> Result<Value, AdminError> {
    let volume = volume_of(&target)?;
    let gone = hub.discard_seed(target.source.clone(), volume.clone()).await.map_err(refused)?;
    let entry = SeedEntry {
        source: target.source,
        volume,
        size_bytes: None,
        pool_bytes: bytes_of(gone),
        state: "given up".to_owned(),
    };
    answer(&SeedsAnswer { schema: SCHEMA, seeds: vec![entry] })
}

/// Those that wait for their sources.
pub(super) fn list(hub: &Hub) -> Result<Value, AdminError> {
    let lines = lines(&hub.shared().pool).map_err(|error| failed(error.to_string()))?;
    let seeds = lines.into_iter().map(|(seed, size, blocks)| SeedEntry {
        source: seed.source,
        volume: seed.volume,
        size_bytes: Some(size.0),
        pool_bytes: bytes_of(blocks),
        state: if seed.finished { "finished" } else { "unfinished" }.to_owned(),
    });
    answer(&SeedsAnswer { schema: SCHEMA, seeds: seeds.collect() })
}

/// What has become of seeds since the last call.
pub(super) fn news(shared: &Shared) -> Vec<News> {
    let of = |one: crate::hub::seed::book::News| News {
        object: one.source.to_string(),
        what: one.what,
        result: one.result,
    };
    shared.seeds.news().into_iter().map(of).collect()
}

/// The seeds of a source, for status.
pub(super) fn shown(shared: &Shared, snapshot: &Snapshot) -> Vec<SeedStatus> {
    let has_image = snapshot.applied_cp.0 > 0;
    let seeds = shared.seeds.of_source(&snapshot.name).into_iter();
    seeds
        .map(|(volume, shown)| {
            status(&format!("{}/{volume}", snapshot.name), volume, shown, has_image)
        })
        .collect()
}

fn status(target: &str, volume: VolumeName, shown: Shown, has_image: bool) -> SeedStatus {
    let discard = format!("`mirrorhub seed {target} --discard` gives it up");
    let (state, reason, next_step) = match shown.fate {
        Fate::Filling => ("filling", "it is being filled; its source is held off", String::new()),
        Fate::Unfinished => (
            "unfinished",
            "it was not filled to its end; its source is held off",
            format!("`mirrorhub seed {target} FILE` goes on with it, {discard}"),
        ),
        Fate::Waiting if has_image => {
            ("unused", "its source has an image here that began without it", discard)
        }
        Fate::Waiting => (
            "waiting",
            "its source has not come since; what differs is sent then",
            "connect the source".to_owned(),
        ),
        Fate::Adopted => ("adopted", "the image begins with it", String::new()),
        Fate::Discarded => {
            ("given-up", "a command has discarded it; its blocks are free", String::new())
        }
    };
    SeedStatus {
        volume,
        state: state.to_owned(),
        reason: reason.to_owned(),
        next_step,
        taken_at_seconds: shown.taken_at,
        ended_at_seconds: shown.ended_at,
        size_bytes: shown.size.0,
        pool_bytes: bytes_of(shown.blocks),
    }
}
