//! The join bundle: what a new filer is given, in one file.
//!
//! Written by `mirrorhub onboard`, read by `mirrorhub source --join`. It holds the filer's private
//! key: it is made for its owner alone (mode 0600), and to be deleted when the filer has joined.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::exchange::{exchange, forget};
use super::failure::{CONFIGURATION, Failure, USAGE};
use super::new_file::{write_new, write_new_for};
use super::place::{Package, Place};
use crate::config::load::load_source;
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
const AGAIN: &str = "make another one on the hub with `mirrorhub onboard NAME --renew`";

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

/// What came of a bundle.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined {
    /// A new source: the configuration that was written.
    New(PathBuf),
    /// The source of that configuration has other certificates.
    Renewed(PathBuf),
}

/// Makes the configuration of a source from a bundle, certificates first: when the configuration is there, all of
/// it is. A filer that has joined already, under the same name and to the same hub, gets new certificates.
/// `starts`: this process goes on as the source.
pub fn join(
    bundle: &Path,
    config: Option<&Path>,
    package: &Package,
    starts: bool,
) -> Result<Joined, Failure> {
    join_at(bundle, config, machine::unix_seconds(), (package, starts))
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
    let here = time_of_day(now);
    if now.saturating_add(CLOCK_SECONDS) < made {
        let made = time_of_day(made);
        let what =
            format!("this bundle was made at {made}, and it is only {here} by the clock here");
        return Err(refused(file, what, "set the clock of this machine, then join again"));
    }
    if now > ends {
        let ends = time_of_day(ends);
        let what = format!("this bundle ended at {ends}, and it is {here} by the clock here");
        let next = format!("set the clock of this machine if it is wrong; else {AGAIN}");
        return Err(refused(file, what, &next));
    }
    Ok(())
}

fn join_at(
    bundle: &Path,
    config: Option<&Path>,
    now: i64,
    (package, starts): (&Package, bool),
) -> Result<Joined, Failure> {
    let read = read(bundle)?;
    in_time(&read, bundle, now)?;
    let file = config.map_or_else(|| PathBuf::from(SOURCE_FILE), Path::to_owned);
    let base = file.parent().unwrap_or(Path::new(".")).to_owned();
    let place = package.place(&base, &read.name).map_err(|error| refused(&file, error, ""))?;
    let source = source_text(&read, bundle, &place)?;
    let tls = base.join("tls");
    let pem = [
        ("ca-cert.pem", read.ca.as_str(), 0o644),
        ("client-cert.pem", read.cert.as_str(), 0o644),
        ("client-key.pem", read.key.as_str(), 0o600),
    ];
    if file.try_exists().map_err(|error| refused(&file, error, ""))? {
        same_source(&read, &file, pem.map(|(name, ..)| tls.join(name)))?;
        exchange(&tls, &pem).map_err(|error| refused(&tls, error, ""))?;
        return Ok(Joined::Renewed(file));
    }
    if starts && !place.may_start() {
        let what = "its unit could not open what this process made as root";
        let what = format!("{}: {what}", file.display());
        let next = "add --no-start, then `systemctl enable --now mirrorhub-source`".to_owned();
        return Err(Failure::Message { code: USAGE, what, next });
    }
    place.open_up();
    // What another filer's exchange left would be put over these files by the start.
    create_durably(&tls).and_then(|()| forget(&tls)).map_err(|error| refused(&tls, error, ""))?;
    for (name, text, mode) in pem {
        let target = tls.join(name);
        // Left by an attempt that was cut.
        match fs::remove_file(&target) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(refused(&target, error, ""));
            }
            Ok(()) | Err(_) => {}
        }
        write_new_for(place.owner(), &target, text, mode)
            .map_err(|error| refused(&target, error, ""))?;
    }
    write_new(&file, &source, 0o644).map_err(|error| refused(&file, error, ""))?;
    Ok(Joined::New(file))
}

/// Whether a filer that has joined is the one that a bundle is for, and has its certificates where they are put.
fn same_source(bundle: &Bundle, file: &Path, pem: [PathBuf; 3]) -> Result<(), Failure> {
    let own = load_source(file).map_err(Failure::Problems)?;
    let differs = |key: &str, own: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
        let what = format!("is there already, with {key} {own}, and the bundle is for {theirs}");
        Err(refused(
            file,
            what,
            "bring the bundle of this source, made with its `--hub` if need be",
        ))
    };
    if own.name != bundle.name {
        return differs("name", &own.name, &bundle.name);
    }
    if own.hub != bundle.hub {
        return differs("hub", &own.hub, &bundle.hub);
    }
    let Some(tls) = own.tls else { return differs("no", &"tls", &"a source with it") };
    if tls.hub_name != bundle.hub_name {
        return differs("tls.hub_name", &tls.hub_name, &bundle.hub_name);
    }
    let absolute = |path: &PathBuf| std::path::absolute(path).ok();
    if [&tls.ca, &tls.cert, &tls.key].map(absolute) != pem.each_ref().map(absolute) {
        let what = "is there already, with certificates elsewhere than `--join` puts them";
        let next = "put ca, cert and key of the bundle there by hand, then reload";
        return Err(refused(file, what, next));
    }
    Ok(())
}

/// source.toml. The pool has room for all of the volumes, and some more.
fn source_text(bundle: &Bundle, file: &Path, place: &Place) -> Result<String, Failure> {
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
    let state = place.state.display();
    Ok(format!(
        "name = \"{name}\"\ndata_dir = \"{state}\"\nhub = \"{hub}\"\n\n[tls]\n\
         ca = \"tls/ca-cert.pem\"\ncert = \"tls/client-cert.pem\"\nkey = \"tls/client-key.pem\"\n\
         hub_name = \"{hub_name}\"\n\n[pool]\n\
         devices = [{{ path = \"{state}/disk0\", size = \"{pool}MiB\" }}]\n{volumes}"
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn join(bundle: &Path, config: Option<&Path>) -> Result<Joined, Failure> {
        super::join(bundle, config, &Package::here(), true)
    }

    fn join_at(bundle: &Path, config: Option<&Path>, now: i64) -> Result<Joined, Failure> {
        super::join_at(bundle, config, now, (&Package::here(), true))
    }

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
        assert_eq!(join(&file, Some(&config)).unwrap(), Joined::New(config.clone()));
        let loaded = load_source(&config).unwrap();
        assert_eq!((loaded.name.as_str(), loaded.hub), ("filer-a", bundle().hub));
        let tls = loaded.tls.unwrap();
        assert_eq!(tls.hub_name, "the-hub");
        assert_eq!(fs::read_to_string(&tls.key).unwrap(), "KEY\n");
        assert_eq!(fs::metadata(&tls.key).unwrap().permissions().mode() & 0o777, 0o600);
        // One for another source or hub changes nothing; the next one of its own changes the three.
        let renewed = directory.path().join("b.join.toml");
        let other = |change: &dyn Fn(&mut Bundle)| {
            let mut other = bundle();
            (other.ca, other.cert, other.key) = ("CA2\n".into(), "CERT2\n".into(), "KEY2\n".into());
            change(&mut other);
            fs::write(&renewed, toml::to_string(&other).unwrap()).unwrap();
            join(&renewed, Some(&config))
        };
        let changes: [&dyn Fn(&mut Bundle); 3] = [
            &|other| other.name = "filer-b".parse().unwrap(),
            &|other| other.hub = "192.0.2.8:7420".parse().unwrap(),
            &|other| other.hub_name = "another-hub".to_owned(),
        ];
        for change in changes {
            let met = format!("{:?}", other(change).unwrap_err());
            assert!(met.contains("there already") && met.contains("the bundle is for"), "{met}");
            assert_eq!(fs::read_to_string(&tls.key).unwrap(), "KEY\n");
        }
        let before = fs::read_to_string(&config).unwrap();
        assert_eq!(other(&|_| {}).unwrap(), Joined::Renewed(config.clone()));
        let now = [&tls.ca, &tls.cert, &tls.key].map(|file| fs::read_to_string(file).unwrap());
        assert_eq!(now, ["CA2\n", "CERT2\n", "KEY2\n"]);
        assert_eq!(fs::metadata(&tls.key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(&config).unwrap(), before);
        fs::write(&config, before.replace("tls/client-key.pem", "elsewhere.pem")).unwrap();
        let met = format!("{:?}", other(&|_| {}).unwrap_err());
        assert!(met.contains("by hand"), "{met}");
        // Cut before the configuration was written: it is done again.
        fs::remove_file(&config).unwrap();
        join(&file, Some(&config)).unwrap();
        // What a cut exchange left there is not put over what is joined behind it.
        fs::remove_file(&config).unwrap();
        let staged = directory.path().join("a/tls/.joining");
        fs::create_dir(&staged).unwrap();
        fs::write(staged.join("client-key.pem"), "OLD\n").unwrap();
        join(&file, Some(&config)).unwrap();
        crate::cli::exchange::finish(staged.parent().unwrap()).unwrap();
        assert_eq!(fs::read_to_string(&tls.key).unwrap(), "KEY\n");
    }

    /// Goal: in the package's directory root writes what the unit's user can read, with a state where the unit may
    /// write, and does not start it. Control: where there is no such user, it may be started, and the key is root's.
    #[test]
    fn what_root_joins_for_the_package_is_its_units() {
        use std::os::unix::fs::MetadataExt;
        let home = tempfile::tempdir().unwrap();
        let (file, etc) = (home.path().join("a.join.toml"), home.path().join("etc"));
        let (config, key) = (etc.join("source.toml"), etc.join("tls/client-key.pem"));
        bundle().write(&file).unwrap();
        // Another user, where this process may give its files away.
        let own = fs::metadata(&file).unwrap().uid();
        let user = if own == 0 { 997 } else { own };
        fs::write(home.path().join("passwd"), format!("mirrorhub:x:{user}:{user}::/:\n")).unwrap();
        let package = Package::at(home.path(), true);
        if own == 0 {
            let met = super::join(&file, Some(&config), &package, true).unwrap_err();
            assert_eq!(met.code(), USAGE);
            assert!(format!("{met:?}").contains("--no-start"), "{met:?}");
            assert!(!etc.try_exists().unwrap(), "something was written");
            rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
            super::join(&file, Some(&config), &package, false).unwrap();
            let cert = etc.join("tls/client-cert.pem");
            for (path, mode) in [(&etc, 0o755), (&config, 0o644), (&key, 0o600), (&cert, 0o644)] {
                let met = fs::metadata(path).unwrap();
                assert_eq!(met.permissions().mode() & 0o777, mode, "{}", path.display());
            }
            assert_eq!(fs::metadata(&key).unwrap().uid(), user);
            // Another bundle for it, later: its files stay the unit's, and nothing is started.
            let renewed = super::join(&file, Some(&config), &package, true).unwrap();
            assert_eq!(renewed, Joined::Renewed(config.clone()));
            assert_eq!(fs::metadata(&key).unwrap().uid(), user);
        } else {
            super::join(&file, Some(&config), &package, false).unwrap();
        }
        let loaded = load_source(&config).unwrap();
        assert_eq!(loaded.data_dir, home.path().join("lib/filer-a"));
        assert!(fs::read_to_string(&config).unwrap().contains("lib/filer-a/disk0\""));
        fs::remove_file(home.path().join("passwd")).unwrap();
        fs::remove_file(&config).unwrap();
        super::join(&file, Some(&config), &package, true).unwrap();
        assert_eq!(fs::metadata(&key).unwrap().uid(), own);
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
