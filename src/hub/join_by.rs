//! Until when a source that was never here may come: `join_by` in its file, the end of its join bundle.
//!
//! Asked by [`super::connection`] for each Hello, before anything is kept of it. Once the source has its
//! id in the catalog its bundle is used up, and the end of it says nothing any more.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;

use super::lane::lock;
use super::shared::SourceSetting;
use crate::units::machine;
use crate::units::times::time_of_day;

/// Peers that are remembered, so that each is logged once; with more all are forgotten.
const TOLD_MAX: usize = 1024;

/// Who was told that it comes too late.
#[derive(Debug, Default)]
pub struct TooLate(Mutex<BTreeSet<(String, String)>>);

impl TooLate {
    /// Whether it is the first time that this source comes too late from there.
    pub(super) fn is_news(&self, name: &str, peer: &str) -> bool {
        // Each connection has another port.
        let host =
            peer.parse().map_or_else(|_| peer.to_owned(), |at: SocketAddr| at.ip().to_string());
        let mut told = lock(&self.0);
        if told.len() >= TOLD_MAX {
            told.clear();
        }
        told.insert((name.to_owned(), host))
    }
}

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
pub(super) const NEXT_STEP: &str = "set the hub's clock if it is wrong; else remove the source's file on the hub and make another bundle \
     with `mirrorhub onboard`, or write a later join_by there";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_is_news_once_and_the_memory_is_bounded() {
        let late = TooLate::default();
        assert!(late.is_news("filer-a", "192.0.2.7:1000"));
        assert!(!late.is_news("filer-a", "192.0.2.7:1001"), "another port is the same peer");
        assert!(
            late.is_news("filer-a", "192.0.2.8:1000") && late.is_news("filer-b", "192.0.2.7:1")
        );
        for port in 0..TOLD_MAX * 2 {
            late.is_news("filer-a", &format!("peer {port}"));
        }
        assert!(lock(&late.0).len() <= TOLD_MAX);
    }
}
