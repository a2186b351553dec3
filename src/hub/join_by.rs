//! Until when a source that was never here may come: `join_by` in its file, the end of its join bundle.
//!
//! Asked by [`super::connection`] for each Hello, before anything is kept of it. Once the source has its
//! id in the catalog its bundle is used up, and the end of it says nothing any more.

use super::shared::SourceSetting;
use crate::units::machine;
use crate::units::times::time_of_day;

/// Why a source that was never here does not become one.
pub(super) fn too_late(setting: &SourceSetting) -> Option<String> {
    let (ends, now) = (setting.join_by?, machine::unix_seconds());
    (now > ends).then(|| {
        format!(
            "the join bundle of source {} ended at {}, and it is {} by the clock of this hub",
            setting.name,
            time_of_day(ends),
            time_of_day(now)
        )
    })
}

/// What the administrator does then.
pub(super) const NEXT_STEP: &str = "set the hub's clock if it is wrong; else make another bundle with `mirrorhub onboard NAME --renew`, \
     or write a later join_by into the source's file";
