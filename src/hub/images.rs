//! The images of a hub, served over NBD.
//!
//! `SOURCE/VOLUME` is the CP published when the client connects, read-only: opening pins it, the
//! pin lives as long as the connection, and the image does not change under its reader. It is not
//! multi-conn: two connections could pin two CPs (R17). `SOURCE/VOLUME@NAME` is a kept CP: always
//! the same, with multi-conn and for any time; as long as it is open, it cannot be dropped.
//!
//! Of a promoted source it is the volume itself, read-write and multi-conn, through the engine
//! that runs it here; who opened it before stays on his pin. While a source fails over and is not
//! yet served over its log, its volumes are neither the one nor the other, and are refused.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::extension::{Extension, State};
use super::lane::Lane;
use super::mending::Reading;
use super::promoted::Engine;
use super::shared::Shared;
use crate::filer::Filer;
use crate::filer::image::Image;
use crate::nbd::export::{Export, ExportInfo, Exports, Listed, OpenError, OpenFuture};
use crate::pool::error::PoolError;
use crate::units::names::{KeptName, SourceName, VolumeName};
use crate::volume::mend::Mends;

/// All images of a hub.
#[derive(Debug)]
pub struct Images {
    shared: Arc<Shared>,
}

impl Images {
    /// Serves the images of `shared`.
    pub fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self { shared })
    }

    /// The only image there is: what clients mean that send the empty name.
    fn only(&self) -> Result<String, OpenError> {
        match &self.list()[..] {
            [only] => Ok(only.name.clone()),
            _ => Err(OpenError::Unknown),
        }
    }

    /// The source and volume that a name says, and the kept CP if it says one.
    fn find(&self, name: &str) -> Result<(Arc<Lane>, VolumeName, Option<KeptName>), OpenError> {
        let unknown = || OpenError::Unknown;
        let (source, volume) = name.split_once('/').ok_or_else(unknown)?;
        let source: SourceName = source.parse().map_err(|_| unknown())?;
        let (volume, kept) = match volume.split_once('@') {
            Some((volume, kept)) => (volume, Some(kept.parse().map_err(|_| unknown())?)),
            None => (volume, None),
        };
        let volume: VolumeName = volume.parse().map_err(|_| unknown())?;
        let lane = self.shared.lanes.get(&source).ok_or_else(unknown)?;
        Ok((lane, volume, kept))
    }

    /// The engine that serves a source here; `None` if it is only mirrored.
    fn engine(&self, lane: &Lane) -> Result<Option<Arc<Filer>>, OpenError> {
        let name = lane.name();
        let refused = |reason: String| Err(OpenError::Refused(reason.into()));
        let row = match self.shared.pool.catalog().source(lane.source()) {
            Ok(Some(row)) => row,
            Ok(None) => return Err(OpenError::Unknown),
            Err(error) => return refused(error.to_string()),
        };
        let extension = match Extension::of(&row) {
            Ok(extension) => extension,
            Err(reason) => return refused(reason),
        };
        match (extension.state, self.shared.promoted.engine(name)) {
            (State::Mirror | State::HandedOver, _) => Ok(None),
            (State::FailingOver, None) => {
                refused(format!("source {name} fails over: its log is being replayed; try again"))
            }
            // Over its log, as long as that is not applied.
            (State::FailingOver | State::Promoted, Some(Engine::Running(engine))) => {
                Ok(Some(engine))
            }
            (State::FailingOver, Some(Engine::Failed(reason))) => refused(format!(
                "source {name} fails over: its log is being replayed; before that it cannot be \
                 served: {reason}"
            )),
            (State::Promoted, Some(Engine::Failed(reason))) => {
                refused(format!("promoted source {name} is not served: {reason}"))
            }
            (State::Promoted, None) => {
                refused(format!("promoted source {name} is being started; try again"))
            }
        }
    }

    fn image(&self, name: &str, lane: &Arc<Lane>, volume: &VolumeName) -> Result<Image, OpenError> {
        let failed = |error: PoolError| OpenError::Refused(error.to_string().into());
        let rows = self.shared.pool.catalog().volumes(lane.source()).map_err(failed)?;
        let row = rows.into_iter().find(|row| row.name == *volume).ok_or(OpenError::Unknown)?;
        let pin = self.shared.pool.pin(lane.source(), row.key.volume).map_err(failed)?;
        let mut info = ExportInfo::new(name, row.tree.size);
        info.description =
            format!("image of {name} at CP {}, root {}", pin.cp(), pin.tree().root());
        info.read_only = true;
        info.multi_conn = false;
        let ended = CancellationToken::new();
        let unused = CancellationToken::new();
        let (over, gone, patience) = (ended.clone(), unused.clone(), self.shared.image_pin);
        // A pin lasts at most `image_pin`; the task ends with the reader.
        tokio::spawn(async move {
            tokio::select! {
                () = gone.cancelled() => {}
                () = tokio::time::sleep(patience) => over.cancel(),
            }
        });
        let mends = self.mends(lane);
        Ok(Image::new(info, pin, ended, unused.drop_guard()).mended_by(mends))
    }

    fn mends(&self, lane: &Arc<Lane>) -> Arc<dyn Mends> {
        Arc::new(Reading { shared: self.shared.clone(), lane: lane.clone() })
    }

    /// `SOURCE/VOLUME@KEPT`.
    fn find_kept(
        &self,
        name: &str,
        lane: &Arc<Lane>,
        volume: &VolumeName,
        kept: &KeptName,
    ) -> Result<Image, OpenError> {
        let unknown = || OpenError::Unknown;
        let failed = |error: PoolError| OpenError::Refused(error.to_string().into());
        let pool = &self.shared.pool;
        let all = pool.catalog().kept(lane.source()).map_err(failed)?;
        let row = all.into_iter().find(|other| other.row.name == *kept).ok_or_else(unknown)?.row;
        let number = row.volumes.iter().find(|other| other.name == *volume);
        let number = number.ok_or_else(unknown)?.number;
        let pin = match pool.pin_kept(lane.source(), kept, number) {
            // It was dropped a moment ago.
            Err(PoolError::UnknownKept { .. } | PoolError::UnknownVolume { .. }) => {
                return Err(unknown());
            }
            pin => pin.map_err(failed)?,
        };
        Ok(Image::kept(name, pin, CancellationToken::new()).mended_by(self.mends(lane)))
    }

    /// The kept CPs of a source; a pool that does not answer lists none.
    fn list_kept(&self, source: &SourceName) -> Vec<Listed> {
        let Some(lane) = self.shared.lanes.get(source) else { return Vec::new() };
        let all = match self.shared.pool.catalog().kept(lane.source()) {
            Ok(all) => all,
            Err(error) => {
                tracing::warn!(%source, %error, "the kept CPs cannot be listed");
                Vec::new()
            }
        };
        let mut listed = Vec::new();
        for row in all.iter().map(|kept| &kept.row) {
            for volume in &row.volumes {
                listed.push(Listed {
                    name: format!("{source}/{}@{}", volume.name, row.name),
                    description: format!("kept CP {}, read-only", row.cp),
                });
            }
        }
        listed
    }
}

impl Exports for Images {
    fn list(&self) -> Vec<Listed> {
        let mut listed = Vec::new();
        for (source, entry) in self.shared.registry.all() {
            if let Some(Engine::Running(engine)) = self.shared.promoted.engine(&source) {
                listed.append(&mut engine.exports().list());
                listed.extend(self.list_kept(&source));
                continue;
            }
            let snapshot = entry.snapshot.load();
            for volume in &snapshot.volumes {
                listed.push(Listed {
                    name: format!("{source}/{}", volume.name),
                    description: format!("image at CP {}, read-only", snapshot.applied_cp),
                });
            }
            listed.extend(self.list_kept(&source));
        }
        listed
    }

    fn open<'a>(&'a self, name: &'a str) -> OpenFuture<'a> {
        Box::pin(async move {
            let only;
            let name = if name.is_empty() {
                only = self.only()?;
                only.as_str()
            } else {
                name
            };
            let (lane, volume, kept) = self.find(name)?;
            if let Some(kept) = kept {
                let export: Arc<dyn Export> =
                    Arc::new(self.find_kept(name, &lane, &volume, &kept)?);
                return Ok(export);
            }
            if let Some(engine) = self.engine(&lane)? {
                return engine.exports().open(name).await;
            }
            let image = self.image(name, &lane, &volume)?;
            let export: Arc<dyn Export> = Arc::new(image);
            Ok(export)
        })
    }
}
