//! The join bundle: what a new filer is given, in one file.
//!
//! Written by `mirrorhub onboard`, read by `mirrorhub source --join`. It holds the filer's private
//! key: it is made for its owner alone (mode 0600), and to be deleted when the filer has joined.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failure::{CONFIGURATION, Failure};
use super::new_file::write_new;
use crate::config::quantity::parse_size;
use crate::device::directory::create_durably;
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::times::{parse_timestamp, time_of_day, timestamp};

/// The bundle's format.
const SCHEMA: u32 = 2;
/// A clock that differs from the hub's by less than this does no harm: certificates begin so much earlier.
const CLOCK_SECONDS: i64 = 86_400;
/// Where a source's configuration is that nobody names.
const SOURCE_FILE: &str = "/etc/mirrorhub/source.toml";
const MIB: u64 = 1 << 20;
/// What is done about a bundle that is of no use.
const AGAIN: &str =
    "remove the source's file on the hub and make another one with `mirrorhub onboard` there";

/// The bundle.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    schema: u32,
    /// When it was made, by the hub's clock.
    made: String,
    /// When it ends: the hub's file of the source says so as well.
    ends: String,
    /// The source.
    pub name: SourceName,
    /// Where its hub listens.
    pub hub: SocketAddr,
    /// The name in the hub's certificate.
    pub hub_name: String,
    /// PEM: the authority's certificate.
    pub ca: String,
    /// PEM: the source's certificate.
    pub cert: String,
    /// PEM: its key.
    pub key: String,
    /// Its volumes.
    pub volume: Vec<BundleVolume>,
}

/// A volume of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleVolume {
    /// Its name.
    pub name: VolumeName,
    /// Its size, such as `100GiB`.
    pub size: String,
}

impl Bundle {
    /// A bundle of this version, made and ending then, in seconds since 1970; volumes and certificates
    /// are to be put in.
    pub fn new(
        name: SourceName,
        (hub, hub_name): (SocketAddr, String),
        (made, ends): (i64, i64),
    ) -> Self {
        let (ca, cert, key, volume) = Default::default();
        let (made, ends) = (timestamp(made), timestamp(ends));
        Self { schema: SCHEMA, made, ends, name, hub, hub_name, ca, cert, key, volume }
    }

    /// Writes it to a new file that its owner alone reads.
    pub fn write(&self, file: &Path) -> Result<(), Failure> {
        let failed =
            |error: String| Failure::failed(format!("join bundle {}: {error}", file.display()), "");
        let text = toml::to_string(self).map_err(|error| failed(error.to_string()))?;
        let head = "# Join bundle: holds a private key. Delete it once the filer has joined.\n";
        write_new(file, &format!("{head}{text}"), 0o600).map_err(|error| failed(error.to_string()))
    }
}

fn refused(file: &Path, what: impl std::fmt::Display, next: &str) -> Failure {
    let what = format!("{}: {what}", file.display());
    Failure::Message { code: CONFIGURATION, what, next: next.to_owned() }
}

/// What a bundle of any version has.
#[derive(Debug, Deserialize)]
struct Version {
    schema: u32,
}

/// Makes the configuration of a source from a bundle; the file that was written. Certificates
/// first: when the configuration is there, all of it is.
pub fn join(bundle: &Path, config: Option<&Path>) -> Result<PathBuf, Failure> {
    join_at(bundle, config, machine::unix_seconds())
}

fn read(bundle: &Path) -> Result<Bundle, Failure> {
    let unread = |error: &dyn std::fmt::Display| refused(bundle, error, AGAIN);
    let text = fs::read_to_string(bundle).map_err(|error| unread(&error))?;
    let Version { schema } = toml::from_str(&text).map_err(|error| unread(&error))?;
    if schema != SCHEMA {
        let what = format!("a join bundle of version {schema}, this is {SCHEMA}");
        return Err(refused(bundle, what, "use the mirrorhub that the hub runs"));
    }
    toml::from_str(&text).map_err(|error| unread(&error))
}

/// Whether it may be used now. The hub judges for itself: this is so that nothing is written in vain, and
/// that a clock that is wrong is named before TLS fails for it.
fn in_time(bundle: &Bundle, file: &Path, now: i64) -> Result<(), Failure> {
    let time = |text: &str| {
        parse_timestamp(text).ok_or_else(|| refused(file, format!("{text:?} is no time"), AGAIN))
    };
    let (made, ends) = (time(&bundle.made)?, time(&bundle.ends)?);
    let (here, shown) = (time_of_day(now), time_of_day);
    if now.saturating_add(CLOCK_SECONDS) < made {
        let made = shown(made);
        let what =
            format!("this bundle was made at {made}, and it is only {here} by the clock here");
        return Err(refused(file, what, "set the clock of this machine, then join again"));
    }
    if now > ends {
        let ends = shown(ends);
        let what = format!("this bundle ended at {ends}, and it is {here} by the clock here");
        let next = format!("set the clock of this machine if it is wrong; else {AGAIN}");
        return Err(refused(file, what, &next));
    }
    Ok(())
}

fn join_at(bundle: &Path, config: Option<&Path>, now: i64) -> Result<PathBuf, Failure> {
    let read = read(bundle)?;
    in_time(&read, bundle, now)?;
    let file = config.map_or_else(|| PathBuf::from(SOURCE_FILE), Path::to_owned);
    let base = file.parent().unwrap_or(Path::new(".")).to_owned();
    let source = source_text(&read, bundle)?;
    if file.try_exists().map_err(|error| refused(&file, error, ""))? {
        let next = "this filer has joined already: start it without --join";
        return Err(refused(&file, "is there already", next));
    }
    let tls = base.join("tls");
    create_durably(&tls).map_err(|error| refused(&tls, error, ""))?;
    let pem = [
        ("ca-cert.pem", &read.ca, 0o644),
        ("client-cert.pem", &read.cert, 0o644),
        ("client-key.pem", &read.key, 0o600),
    ];
    for (name, text, mode) in pem {
        let target = tls.join(name);
        // Left by an attempt that was cut.
        match fs::remove_file(&target) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(refused(&target, error, ""));
            }
            Ok(()) | Err(_) => {}
        }
        write_new(&target, text, mode).map_err(|error| refused(&target, error, ""))?;
    }
    write_new(&file, &source, 0o644).map_err(|error| refused(&file, error, ""))?;
    Ok(file)
}

/// source.toml. The pool has room for all of the volumes, and some more.
fn source_text(bundle: &Bundle, file: &Path) -> Result<String, Failure> {
    let Bundle { name, hub, hub_name, volume, .. } = bundle;
    let mut bytes = 0_u64;
    let mut volumes = String::new();
    for BundleVolume { name, size } in volume {
        let parsed = parse_size(size).map_err(|unfit| refused(file, unfit.met, ""))?;
        bytes = bytes.saturating_add(parsed.0);
        volumes.push_str(&format!("\n[[volume]]\nname = \"{name}\"\nsize = \"{size}\"\n"));
    }
    let pool = (bytes.saturating_add(bytes / 10) / MIB).saturating_add(320);
    if !hub_name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) {
        return Err(refused(file, "its hub_name is no DNS name", ""));
    }
    Ok(format!(
        "name = \"{name}\"\ndata_dir = \"state\"\nhub = \"{hub}\"\n\n[tls]\n\
         ca = \"tls/ca-cert.pem\"\ncert = \"tls/client-cert.pem\"\nkey = \"tls/client-key.pem\"\n\
         hub_name = \"{hub_name}\"\n\n[pool]\n\
         devices = [{{ path = \"state/disk0\", size = \"{pool}MiB\" }}]\n{volumes}"
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn bundle() -> Bundle {
        let hub = "192.0.2.7:7420".parse().unwrap();
        let now = machine::unix_seconds();
        let at = (hub, "the-hub".to_owned());
        let mut bundle = Bundle::new("filer-a".parse().unwrap(), at, (now, now + 3600));
        bundle.volume = vec![BundleVolume { name: "vol0".parse().unwrap(), size: "10GiB".into() }];
        (bundle.ca, bundle.cert, bundle.key) = ("CA\n".into(), "CERT\n".into(), "KEY\n".into());
        bundle
    }

    #[test]
    fn a_bundle_becomes_a_configuration_that_is_right() {
        let directory = tempfile::tempdir().unwrap();
        let (file, config) =
            (directory.path().join("a.join.toml"), directory.path().join("a/source.toml"));
        bundle().write(&file).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(bundle().write(&file).is_err(), "a bundle is written over nothing");
        assert_eq!(join(&file, Some(&config)).unwrap(), config);
        let loaded = crate::config::load::load_source(&config).unwrap();
        assert_eq!((loaded.name.as_str(), loaded.hub), ("filer-a", bundle().hub));
        let tls = loaded.tls.unwrap();
        assert_eq!(tls.hub_name, "the-hub");
        assert_eq!(fs::read_to_string(&tls.key).unwrap(), "KEY\n");
        assert_eq!(fs::metadata(&tls.key).unwrap().permissions().mode() & 0o777, 0o600);
        let met = join(&file, Some(&config)).unwrap_err();
        assert!(format!("{met:?}").contains("there already"), "{met:?}");
        // Cut before the configuration was written: it is done again.
        fs::remove_file(&config).unwrap();
        join(&file, Some(&config)).unwrap();
    }

    /// Goal: a bundle is refused once it has ended, and where the clock is behind, with both dates and
    /// before anything is written. Control: the same one in time, and with a clock a little wrong.
    #[test]
    fn a_bundle_ends_and_says_so_with_both_dates() {
        let directory = tempfile::tempdir().unwrap();
        let (file, config) =
            (directory.path().join("a.join.toml"), directory.path().join("a/source.toml"));
        bundle().write(&file).unwrap();
        let made = parse_timestamp(&bundle().made).unwrap();
        let ends = parse_timestamp(&read(&file).unwrap().ends).unwrap();
        for (now, said) in [
            (ends + 1, "ended at"),
            (ends + 400 * CLOCK_SECONDS, "set the clock"),
            (made - CLOCK_SECONDS - 60, "was made at"),
            (0, "set the clock"),
        ] {
            let met = format!("{:?}", join_at(&file, Some(&config), now).unwrap_err());
            let dates = [time_of_day(now), time_of_day(if now > ends { ends } else { made })];
            assert!(met.contains(said), "{met}");
            assert!(now == 0 || dates.iter().all(|date| met.contains(date)), "{dates:?}: {met}");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "{met}");
        }
        for now in [ends, made - CLOCK_SECONDS / 2] {
            join_at(&file, Some(&config), now).unwrap();
            fs::remove_file(&config).unwrap();
        }
    }

    #[test]
    fn what_is_no_bundle_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (file, config) =
            (directory.path().join("a.join.toml"), directory.path().join("source.toml"));
        let good = toml::to_string(&bundle()).unwrap();
        for bad in [
            String::new(),
            "not TOML [".to_owned(),
            good.replace("schema = 2", "schema = 3"),
            good.replace("ends = \"", "ends = \"x"),
            good.replace("filer-a", "../filer"),
            good.replace("10GiB", "10GB"),
            good.replace("the-hub", "the hub\\\"\\nname = \\\"x"),
            format!("more = 1\n{good}"),
        ] {
            fs::write(&file, &bad).unwrap();
            assert!(join(&file, Some(&config)).is_err(), "{bad}");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "{bad}");
        }
        assert!(join(&directory.path().join("none"), Some(&config)).is_err());
    }
}
