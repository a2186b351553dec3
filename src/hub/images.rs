//! The images of a hub, served read-only over NBD.
//!
//! `SOURCE/VOLUME` is the CP published when the client connects: opening pins it, the pin lives
//! as long as the connection, and the image does not change under its reader. It is not
//! multi-conn: two connections could pin two CPs (R17). `SOURCE/VOLUME@NAME` is a kept CP: always
//! the same, with multi-conn and for any time; as long as it is open, it cannot be dropped.

use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::shared::Shared;
use crate::nbd::export::{
    ErrorCode, Export, ExportError, ExportFuture, ExportInfo, Exports, Extent, Listed, OpenError,
    OpenFuture, Segment,
};
use crate::pool::error::PoolError;
use crate::units::names::{KeptName, SourceName, VolumeName};
use crate::volume::reader;

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

    /// The image of that name; of the empty name, which clients send that name none, the only one.
    fn find(&self, name: &str) -> Result<Image, OpenError> {
        let unknown = || OpenError::Unknown;
        if name.is_empty() {
            return match &self.list()[..] {
                [only] => self.find(&only.name),
                _ => Err(unknown()),
            };
        }
        let (source, volume) = name.split_once('/').ok_or_else(unknown)?;
        let source: SourceName = source.parse().map_err(|_| unknown())?;
        if let Some((volume, kept)) = volume.split_once('@') {
            return self.find_kept(name, &source, volume, kept);
        }
        let volume: VolumeName = volume.parse().map_err(|_| unknown())?;
        let lane = self.shared.lanes.get(&source).ok_or_else(unknown)?;
        let failed = |error: PoolError| OpenError::Refused(error.to_string().into());
        let rows = self.shared.pool.catalog().volumes(lane.source()).map_err(failed)?;
        let row = rows.into_iter().find(|row| row.name == volume).ok_or_else(unknown)?;
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
        let image = Arc::new(reader::Image::new(pin));
        Ok(Image { info, image, ended, _unused: unused.drop_guard() })
    }

    /// `SOURCE/VOLUME@KEPT`.
    fn find_kept(
        &self,
        name: &str,
        source: &SourceName,
        volume: &str,
        kept: &str,
    ) -> Result<Image, OpenError> {
        let unknown = || OpenError::Unknown;
        let volume: VolumeName = volume.parse().map_err(|_| unknown())?;
        let kept: KeptName = kept.parse().map_err(|_| unknown())?;
        let lane = self.shared.lanes.get(source).ok_or_else(unknown)?;
        let failed = |error: PoolError| OpenError::Refused(error.to_string().into());
        let pool = &self.shared.pool;
        let all = pool.catalog().kept(lane.source()).map_err(failed)?;
        let row = all.into_iter().find(|other| other.row.name == kept).ok_or_else(unknown)?.row;
        let number = row.volumes.iter().find(|other| other.name == volume);
        let number = number.ok_or_else(unknown)?.number;
        let pin = match pool.pin_kept(lane.source(), &kept, number) {
            // It was dropped a moment ago.
            Err(PoolError::UnknownKept { .. } | PoolError::UnknownVolume { .. }) => {
                return Err(unknown());
            }
            pin => pin.map_err(failed)?,
        };
        let mut info = ExportInfo::new(name, pin.tree().size);
        info.description = format!("kept CP {} of {name}, root {}", pin.cp(), pin.tree().root());
        info.read_only = true;
        info.multi_conn = true;
        let (image, ended) = (Arc::new(reader::Image::new(pin)), CancellationToken::new());
        Ok(Image { info, image, ended, _unused: CancellationToken::new().drop_guard() })
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
            let image = self.find(name)?;
            let export: Arc<dyn Export> = Arc::new(image);
            Ok(export)
        })
    }
}

/// One image at one CP.
#[derive(Debug)]
struct Image {
    info: ExportInfo,
    image: Arc<reader::Image>,
    ended: CancellationToken,
    _unused: DropGuard,
}

fn failed(error: &dyn std::fmt::Display) -> ExportError {
    ExportError::new(ErrorCode::Io, error.to_string())
}

fn read_only<'a>() -> ExportFuture<'a, ()> {
    let error = ExportError::new(ErrorCode::Perm, "an image is read-only");
    Box::pin(async move { Err(error) })
}

impl Export for Image {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    fn ended(&self) -> Option<CancellationToken> {
        Some(self.ended.clone())
    }

    fn read(&self, offset: u64, length: u32) -> ExportFuture<'_, Vec<Segment>> {
        let image = self.image.clone();
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || image.read(offset, u64::from(length)));
            let segments = read.await.map_err(|error| failed(&error))?;
            let segments = segments.map_err(|error| failed(&error))?;
            Ok(segments
                .into_iter()
                .map(|segment| match segment.content {
                    reader::SegmentContent::Data(data) => Segment::Data(Bytes::from(data)),
                    reader::SegmentContent::Hole => Segment::Hole(segment.length),
                })
                .collect())
        })
    }

    fn write(&self, _: u64, _: Bytes, _: bool) -> ExportFuture<'_, ()> {
        read_only()
    }

    fn flush(&self) -> ExportFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn trim(&self, _: u64, _: u32, _: bool) -> ExportFuture<'_, ()> {
        read_only()
    }

    fn write_zeroes(&self, _: u64, _: u32, _: bool, _: bool) -> ExportFuture<'_, ()> {
        read_only()
    }

    fn cache(&self, _: u64, _: u32) -> ExportFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, offset: u64, length: u32, at_most: usize) -> ExportFuture<'_, Vec<Extent>> {
        let image = self.image.clone();
        Box::pin(async move {
            let found = tokio::task::spawn_blocking(move || {
                image.extents(offset, u64::from(length), at_most)
            });
            let extents = found.await.map_err(|error| failed(&error))?;
            let extents = extents.map_err(|error| failed(&error))?;
            Ok(extents
                .into_iter()
                .map(|extent| Extent {
                    length: extent.length,
                    hole: extent.hole,
                    zero: extent.hole,
                })
                .collect())
        })
    }
}
