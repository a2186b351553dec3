//! Which certificates speak for a source.
//!
//! One of the authority with the source's name in it; if the source's file names certificates, only these. So a
//! key that was stolen is of no use once the file names another certificate. The list is in the order in which they
//! were made: once the source, known by its id, has come with one of them, those before it are refused, until this
//! process ends and from the first such connection of the next one on. Asked by [`super::connection`] for each Hello,
//! and by the source's actor when the files have changed: a session whose certificate is named no more ends.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::lane::lock;
use super::shared::SourceSetting;
use crate::link::shown::{Fingerprint, Shown};
use crate::units::names::SourceName;

/// What the administrator does then.
pub(super) const NEXT_STEP: &str = "bring it a bundle of `mirrorhub onboard NAME --renew`, or write the SHA-256 of its certificate into \
     `certificates` of the source's file on the hub";

/// With whose certificate a session was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spoken {
    /// The source whose certificate it is: another one's where this one lives on its filer.
    pub holder: SourceName,
    /// Which one.
    pub certificate: Fingerprint,
}

impl Spoken {
    /// Why it speaks for nobody by what the files say now. That a newer one has come ends no session: where it
    /// came, it took the place of the older one.
    pub fn taken_back(&self, settings: &BTreeMap<SourceName, SourceSetting>) -> Option<String> {
        let Self { holder, certificate } = self;
        match settings.get(holder) {
            Some(setting) => unnamed(setting, certificate),
            None => Some(no_file(holder)),
        }
    }
}

/// The source may not come.
pub(super) fn no_file(name: &SourceName) -> String {
    format!("no file for source {name} on this hub")
}

/// Why the file says nothing for that certificate.
fn unnamed(
    SourceSetting { name, certificates, .. }: &SourceSetting,
    of: &Fingerprint,
) -> Option<String> {
    let named = certificates.is_empty() || certificates.contains(of);
    (!named).then(|| format!("the file of source {name} does not name the certificate {of}"))
}

/// The certificate that each source came with last. Sources that have a file are bounded, and so is this.
#[derive(Debug, Default)]
pub struct Came(Mutex<BTreeMap<SourceName, Fingerprint>>);

impl Came {
    /// It came with that one, which was not refused.
    pub(super) fn with(&self, setting: &SourceSetting, shown: &Shown) {
        if !setting.certificates.is_empty() {
            lock(&self.0).insert(setting.name.clone(), shown.fingerprint);
        }
    }

    /// Why that certificate does not speak for the source whose name is in it.
    pub(super) fn refuses(&self, setting: &SourceSetting, shown: &Shown) -> Option<String> {
        let SourceSetting { name, certificates, .. } = setting;
        let of = &shown.fingerprint;
        if let Some(reason) = unnamed(setting, of) {
            return Some(reason);
        }
        let place = |wanted: &Fingerprint| certificates.iter().position(|one| one == wanted);
        let newest = lock(&self.0).get(name).and_then(place);
        (newest > place(of))
            .then(|| format!("source {name} has come with a newer certificate than {of}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Shown {
        let fingerprint = Fingerprint::of(text.as_bytes());
        Shown { names: vec!["filer-a".to_owned()], fingerprint, begins: 0, ends: 0 }
    }

    fn setting(certificates: &[&str]) -> SourceSetting {
        SourceSetting {
            name: "filer-a".parse().unwrap(),
            nvram_share: None,
            log_limit: None,
            space_limit: None,
            bandwidth_limit: None,
            join_by: None,
            certificates: certificates.iter().map(|one| shown(one).fingerprint).collect(),
            volumes: vec![],
            keep: None,
        }
    }

    /// Goal: a file that names certificates takes these only, and none before the one that came last; taking
    /// that out of the file brings the others back. Control: a file that names none takes any.
    #[test]
    fn a_certificate_counts_until_a_newer_one_has_come() {
        let came = Came::default();
        let (old, new, other) = (shown("old"), shown("new"), shown("other"));
        assert_eq!(came.refuses(&setting(&[]), &other), None);
        came.with(&setting(&[]), &other);
        let both = setting(&["old", "new"]);
        assert!(came.refuses(&both, &other).unwrap().contains("does not name"));
        assert_eq!((came.refuses(&both, &old), came.refuses(&both, &new)), (None, None));
        came.with(&both, &old);
        assert_eq!((came.refuses(&both, &old), came.refuses(&both, &new)), (None, None));
        came.with(&both, &new);
        assert!(came.refuses(&both, &old).unwrap().contains("newer certificate"));
        assert_eq!(came.refuses(&both, &new), None);
        // A session that the older one has begun goes on as long as the file names it.
        let files = |certificates: &[&str]| {
            BTreeMap::from([("filer-a".parse().unwrap(), setting(certificates))])
        };
        let session = |shown: &Shown| Spoken {
            holder: "filer-a".parse().unwrap(),
            certificate: shown.fingerprint,
        };
        assert_eq!(session(&old).taken_back(&files(&["old", "new"])), None);
        assert_eq!(session(&old).taken_back(&files(&[])), None);
        assert!(session(&old).taken_back(&files(&["new"])).unwrap().contains("does not name"));
        assert!(session(&old).taken_back(&BTreeMap::new()).unwrap().contains("no file"));
        assert_eq!(came.refuses(&setting(&["old"]), &old), None);
        assert!(came.refuses(&setting(&["new"]), &old).is_some());
    }
}
