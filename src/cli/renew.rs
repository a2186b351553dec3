//! `mirrorhub onboard NAME --renew`: a new certificate and bundle for a source that has a file.
//!
//! The file first, then the bundle. A cut in between leaves the SHA-256 of a certificate that nobody has, which does
//! no harm, and the command may be given again. So it is also what makes good a first onboarding that was cut
//! there. What an administrator wrote into the file stays as it is, comments among it.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use toml::de::DeTable;

use super::Done;
use super::bundle::BundleVolume;
use super::failure::{Failure, USAGE, print};
use super::new_file::replace;
use super::onboard::{bundle_of, make_bundle, own_authority, reachable};
use crate::config::around::load_around;
use crate::config::problem::Problems;
use crate::config::quantity::format_size;
use crate::config::schema::{HubConfig, SourceFile};
use crate::limits::CERTIFICATES_MAX;
use crate::link::shown::Fingerprint;
use crate::units::names::SourceName;
use crate::units::times::{time_of_day, timestamp};

/// Permissions of the file where it is not there as one: the hub's unit reads it.
const FILE_MODE: u32 = 0o644;

/// Runs it.
pub(super) fn renew(
    config: &HubConfig,
    name: &SourceName,
    (bundle, hub): (Option<&Path>, Option<SocketAddr>),
    times: Option<(i64, i64)>,
) -> Result<Done, Failure> {
    let refused = |what: String, next: &str| Failure::Message {
        code: USAGE,
        what: format!("onboard {name}: {what}"),
        next: next.to_owned(),
    };
    let (Some((authority, hub_name)), Some(times)) = (own_authority(config), times) else {
        let next = "have the authority of `tls.ca` sign a new one, put it there and reload";
        return Err(refused("this hub has no authority of its own".to_owned(), next));
    };
    let Some(source) = config.sources.iter().find(|source| source.file.name == *name) else {
        let what =
            format!("there is no right file {name}.toml in {}", config.sources_dir.display());
        return Err(refused(
            what,
            "`mirrorhub config check`; a new source has --volume, not --renew",
        ));
    };
    let SourceFile { file: target, certificates, volumes, .. } = &source.file;
    if certificates.len() >= CERTIFICATES_MAX {
        let what = format!("{} names {CERTIFICATES_MAX} certificates already", target.display());
        return Err(refused(what, "take those out of `certificates` that are not in use any more"));
    }
    let file = bundle.map_or_else(|| bundle_of(name), Path::to_owned);
    if file.try_exists().map_err(|error| refused(format!("{}: {error}", file.display()), ""))? {
        let next = "delete it if it was used, or name another one with --bundle";
        return Err(refused(format!("{} is there already", file.display()), next));
    }
    let hub = reachable(config, hub)?;
    let wanted = |volume: &crate::config::schema::VolumeConfig| BundleVolume {
        name: volume.name.clone(),
        size: format_size(volume.size),
    };
    let volumes = volumes.iter().map(wanted).collect();
    let (made, fingerprint) = make_bundle(authority, (hub, hub_name), (name, volumes), times)?;
    let failed = |error: std::io::Error| {
        Failure::failed(format!("onboard {name}: {}: {error}", target.display()), "")
    };
    let before = fs::read_to_string(target).map_err(failed)?;
    let edited = edited(&before, times.1, certificates, fingerprint).ok_or_else(|| {
        refused(
            format!("{} was changed in this moment", target.display()),
            "give the command again",
        )
    })?;
    replace(target, &edited, FILE_MODE).map_err(failed)?;
    let written = judged(config, target).and_then(|()| made.write(&file));
    if let Err(failure) = written {
        // Nobody was told of it as done.
        drop(replace(target, &before, FILE_MODE));
        return Err(failure);
    }
    print(&told(&source.file, &file, times.1))?;
    Ok(Done::WELL)
}

/// What was done, and what is to be done.
fn told(source: &SourceFile, bundle: &Path, ends: i64) -> String {
    let (target, file, ends) = (source.file.display(), bundle.display(), time_of_day(ends));
    let old = if source.certificates.is_empty() {
        "It names no `certificates`: every one of this authority with the source's name is taken."
    } else {
        "The old certificate is taken until the filer has come with the new one."
    };
    format!(
        "{target}: written, the running hub takes it within two seconds\n\
         {file}: written, bring it to the filer, give its certificates there and reload:\n\n  \
         mirrorhub source --join {file} --config FILE\n\n\
         FILE is the filer's own configuration file: /etc/mirrorhub/source.toml with the package, as root.\n\
         {old}\n\
         The bundle may be used until {ends} and holds the filer's key: delete it when that has been done.\n"
    )
}

/// Whether the file that was written is right, among all the others.
fn judged(config: &HubConfig, target: &Path) -> Result<(), Failure> {
    let around = load_around(&config.file, None, &BTreeSet::new()).map_err(Failure::Problems)?;
    let own = |path: &Path| path.file_name() == target.file_name();
    let wrong: Vec<_> = around.problems.into_iter().filter(|one| own(&one.file)).collect();
    if wrong.is_empty() { Ok(()) } else { Err(Failure::Problems(Problems(wrong))) }
}

/// The file with the new certificate behind the old ones; a file that names none goes on naming none, for the
/// old one is not known. `None` if it is no TOML with a name.
fn edited(text: &str, ends: i64, certificates: &[Fingerprint], new: Fingerprint) -> Option<String> {
    let text = with_key(text, "join_by", &format!("\"{}\"", timestamp(ends)))?;
    if certificates.is_empty() {
        return Some(text);
    }
    let all = certificates.iter().chain(std::iter::once(&new));
    let all: Vec<String> = all.map(|one| format!("\"{one}\"")).collect();
    with_key(&text, "certificates", &format!("[{}]", all.join(", ")))
}

/// The text with that value of a key of its root: in its place, or behind the name.
fn with_key(text: &str, key: &str, value: &str) -> Option<String> {
    let table = DeTable::parse(text).ok()?;
    let span = |key: &str| {
        let mut entries = table.get_ref().iter();
        entries.find(|(name, _)| name.get_ref() == key).map(|(_, value)| value.span())
    };
    let mut text = text.to_owned();
    if let Some(there) = span(key) {
        text.replace_range(there, value);
        return Some(text);
    }
    let name = span("name")?.end;
    let line = text.get(name..)?.find('\n').map_or(text.len(), |end| name + end);
    text.insert_str(line, &format!("\n{key} = {value}"));
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What somebody wrote stays, and the two keys are in the root, wherever tables and comments are.
    #[test]
    fn a_file_is_edited_and_nothing_else_in_it_changes() {
        let (old, new) = (Fingerprint::of(b"old"), Fingerprint::of(b"new"));
        let bare = "# mine\nname = \"a\" # its name\n\n[[volume]]\nname = \"v\"\nsize = \"1GiB\" # join_by\n";
        let by = timestamp(1_800_000_000);
        let named = edited(bare, 1_800_000_000, &[], new).unwrap();
        let head = format!("# mine\nname = \"a\" # its name\njoin_by = \"{by}\"\n\n[[volume]]");
        assert!(named.starts_with(&head) && named.ends_with("# join_by\n"), "{named}");
        assert!(!named.contains("certificates"), "the old one is shut out: {named}");
        let both = edited(&named, 1_800_000_001, &[old], new).unwrap();
        assert!(both.contains(&format!("\ncertificates = [\"{old}\", \"{new}\"]\n")), "{both}");
        assert!(!both.contains(&by) && both.contains(&timestamp(1_800_000_001)), "{both}");
        let again = edited(&both, 1_800_000_001, &[old], new).unwrap();
        assert_eq!(again, both);
        let spread = both.replace("[\"", "[\n  # the first\n  \"");
        assert_eq!(edited(&spread, 1_800_000_001, &[old], new), Some(both));
        assert!(edited("name = \"a\"", 0, &[old], new).unwrap().contains("\ncertificates = ["));
        assert_eq!(edited("enabled = true\n", 0, &[old], new), None);
    }
}
