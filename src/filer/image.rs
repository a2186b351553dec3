//! One CP of a volume as a read-only NBD export: an image of a hub, or a kept CP of either end.
//!
//! Called by `export` and by the hub's images. The pin lives as long as the export does.

use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::nbd::export::{
    ErrorCode, Export, ExportError, ExportFuture, ExportInfo, Extent, Segment,
};
use crate::pool::Pin;
use crate::volume::error::VolumeError;
use crate::volume::mend::{Mends, blocks_of, is_rot};
use crate::volume::reader;

/// One image at one CP.
#[derive(Debug)]
pub struct Image {
    info: ExportInfo,
    image: Arc<reader::Image>,
    ended: CancellationToken,
    mends: Option<Arc<dyn Mends>>,
    _unused: DropGuard,
}

fn failed(error: &dyn std::fmt::Display) -> ExportError {
    ExportError::new(ErrorCode::Io, error.to_string())
}

fn read_only<'a>() -> ExportFuture<'a, ()> {
    let error = ExportError::new(ErrorCode::Perm, "an image is read-only");
    Box::pin(async move { Err(error) })
}

impl Image {
    /// What `pin` shows, until `ended`. It goes when `unused` is cancelled by its end.
    pub fn new(info: ExportInfo, pin: Pin, ended: CancellationToken, unused: DropGuard) -> Self {
        let image = Arc::new(reader::Image::new(pin));
        Self { info, image, ended, mends: None, _unused: unused }
    }

    /// With somebody who may have what rotted here.
    #[must_use]
    pub fn mended_by(self, mends: Arc<dyn Mends>) -> Self {
        Self { mends: Some(mends), ..self }
    }

    /// Reads, and once more if what was met could be mended; blocks, so in a thread of its own.
    async fn reading<T: Send + 'static>(
        &self,
        (offset, length): (u64, u64),
        read: impl Fn(&reader::Image) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, ExportError> {
        let (image, mends) = (self.image.clone(), self.mends.clone());
        let read = tokio::task::spawn_blocking(move || match (read(&image), mends) {
            (Err(error), Some(mends))
                if is_rot(&error) && mends.mend(image.pin(), blocks_of(offset, length)) =>
            {
                read(&image)
            }
            (answer, _) => answer,
        });
        read.await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
    }

    /// A kept CP of `name`: always the same, to any number of readers at once.
    pub fn kept(name: &str, pin: Pin, ended: CancellationToken) -> Self {
        let mut info = ExportInfo::new(name, pin.tree().size);
        info.description = format!("kept CP {} of {name}, root {}", pin.cp(), pin.tree().root());
        info.read_only = true;
        info.multi_conn = true;
        Self::new(info, pin, ended, CancellationToken::new().drop_guard())
    }
}

impl Export for Image {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    fn ended(&self) -> Option<CancellationToken> {
        Some(self.ended.clone())
    }

    fn read(&self, offset: u64, length: u32) -> ExportFuture<'_, Vec<Segment>> {
        let length = u64::from(length);
        Box::pin(async move {
            let read = move |image: &reader::Image| image.read(offset, length);
            let segments = self.reading((offset, length), read).await?;
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
        let length = u64::from(length);
        Box::pin(async move {
            let find = move |image: &reader::Image| image.extents(offset, length, at_most);
            let extents = self.reading((offset, length), find).await?;
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
