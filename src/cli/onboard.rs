//! `mirrorhub onboard`: writes the file of a new source into the hub's sources directory.
//!
//! The running hub takes it by itself. On a hub with an authority of its own a join bundle is written
//! as well, with which `mirrorhub source --join` makes the filer's file and certificates; on others
//! that file is written by hand, as shown at the end.
//!
//! A source whose promises the hub cannot keep (its share of the ring, its log) is refused before
//! anything is written, with the sums: by [`crate::config::sizing`], against all that have a file.
//! Volumes beyond the pool are taken, and told as a ratio.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use super::Done;
use super::authority::{Authority, AuthorityError};
use super::bundle::{Bundle, BundleVolume};
use super::failure::{Failure, USAGE, print};
use super::locate::ConfigArgument;
use super::new_file::write_new;
use super::renew;
use super::serve::pool_in_use;
use crate::config::around::{Around, judge_new, load_around};
use crate::config::problem::Problems;
use crate::config::quantity::{parse_duration, parse_size};
use crate::config::schema::HubConfig;
use crate::config::sizing::{Fitting, fitting};
use crate::link::shown::Fingerprint;
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::times::{time_of_day, timestamp};

/// Write the file of a new source for the hub of that configuration
///
/// The running hub takes it within two seconds. A source is refused, with exit code 78 and the sums, if the
/// hub's ring or the file system of its logs cannot take what is promised beside those that are onboarded. With a
/// section tls in the hub's file a join bundle is written too: bring it to the filer and start `mirrorhub source --join` with it there.
/// A hub that is just being started is waited for, up to 30 s, until it has made its authority.
#[derive(Debug, Args)]
pub struct OnboardArguments {
    /// Name of the source
    name: SourceName,
    /// A volume that it may announce, such as vol0=100GiB; several are given by several --volume
    #[arg(long, value_name = "VOLUME=SIZE", required_unless_present = "renew")]
    volume: Vec<Wanted>,
    /// Most that its log on the hub may take, such as 1GiB: give it what the filer's NVRAM has, where that is not
    /// the default of 512MiB, which is counted otherwise
    #[arg(long, value_name = "SIZE", conflicts_with = "renew", value_parser = a_size)]
    log_limit: Option<String>,
    /// Make a new certificate and bundle for a source that has a file: the old certificate is taken until the
    /// filer has come with the new one
    #[arg(long, conflicts_with = "volume")]
    renew: bool,
    /// Where the join bundle is written [default: NAME.join.toml]
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// The hub's address as the filer reaches it [default: `listen` of the hub]
    #[arg(long, value_name = "ADDRESS:PORT")]
    hub: Option<SocketAddr>,
    /// How long the join bundle may be used, such as 24h or 14d [default: 7d]
    #[arg(long, value_name = "TIME")]
    valid: Option<Valid>,
    #[command(flatten)]
    config: ConfigArgument,
}

/// How long a bundle may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Valid(Duration);

const DAY: Duration = Duration::from_secs(86_400);
/// Without `--valid`.
const VALID: Valid = Valid(DAY.saturating_mul(7));
const VALID_MAX: Duration = DAY.saturating_mul(365);
/// How long the authority of a hub is waited for that was started just now.
const AUTHORITY_WAIT: Duration = Duration::from_secs(30);

impl FromStr for Valid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
        let time = match days {
            Some(days) => DAY.checked_mul(days).unwrap_or(Duration::MAX),
            None => {
                parse_duration(text).map_err(|_| format!("{text} is no time: write 24h or 14d"))?
            }
        };
        if time < Duration::from_secs(1) || time > VALID_MAX {
            return Err(format!("{text} is not between 1s and 365d"));
        }
        Ok(Self(time))
    }
}

/// `VOLUME=SIZE`, as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    name: VolumeName,
    size: String,
}

fn a_size(text: &str) -> Result<String, String> {
    match parse_size(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(format!("{text} is no size: write one such as 100GiB")),
    }
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, size) = text.split_once('=').ok_or("a volume is given as VOLUME=SIZE")?;
        let name = name.parse().map_err(|error| format!("{error}"))?;
        Ok(Self { name, size: a_size(size)? })
    }
}

/// Runs it.
pub fn run(arguments: &OnboardArguments) -> Result<Done, Failure> {
    let file = arguments.config.file()?;
    let nothing = BTreeSet::new();
    let Around { config, .. } = load_around(&file, None, &nothing).map_err(Failure::Problems)?;
    let OnboardArguments { name, volume, bundle, hub, .. } = arguments;
    let target = config.sources_dir.join(format!("{name}.toml"));
    let times = own_authority(&config).map(|_| times(arguments.valid.unwrap_or(VALID)));
    if arguments.valid.is_some() && times.is_none() {
        let what =
            format!("onboard {name}: without an authority of the hub there is no bundle to end");
        let next = "leave --valid away, or write a section [tls] in hub.toml".into();
        return Err(Failure::Message { code: USAGE, what, next });
    }
    if arguments.renew {
        return renew::renew(&config, name, (bundle.as_deref(), *hub), times);
    }
    if target.try_exists().is_ok_and(|there| there) {
        return Err(there_already(name, &target));
    }
    // Before anything is written: it may fail.
    let limit = arguments.log_limit.as_deref();
    let drafted = text(name, limit, volume, None);
    let notes = judged(&config, &target, &drafted)?;
    let made = match (own_authority(&config), times) {
        (Some((authority, hub_name)), Some(times)) => {
            let hub = reachable(&config, *hub)?;
            await_authority(authority, name)?;
            let volumes = volume.iter().map(BundleVolume::from).collect();
            Some((make_bundle(authority, (hub, hub_name), (name, volumes), times)?, times.1))
        }
        _ => None,
    };
    let of_bundle = made.as_ref().map(|((_, fingerprint), ends)| (*ends, *fingerprint));
    let written = text(name, limit, volume, of_bundle);
    place(&file, (name, &target), &written)?;
    for note in notes {
        eprintln!("note: {note}");
    }
    let Some(((made, _), ends)) = made else {
        print(&view(name, volume, &target, &config))?;
        return Ok(Done::WELL);
    };
    let file = bundle.clone().unwrap_or_else(|| bundle_of(name));
    if let Err(failure) = made.write(&file) {
        // Nobody was told of it as done.
        drop(std::fs::remove_file(&target));
        return Err(failure);
    }
    let (target, file, ends) = (target.display(), file.display(), time_of_day(ends));
    print(&format!(
        "{target}: written, the running hub takes it within two seconds\n\
         {file}: written, bring it to the filer and start there:\n\n  \
         mirrorhub source --join {file} --config source.toml\n\n\
         With the package join as root with `--no-start --config /etc/mirrorhub/source.toml`: it says how to start the unit.\n\
         It may be used until {ends}, once, and holds the filer's key: delete it when that has been done.\n"
    ))?;
    Ok(Done::WELL)
}

/// Writes the file; if it does not fit any more with what was written meanwhile, it is taken away again.
fn place(hub: &Path, (name, target): (&SourceName, &Path), text: &str) -> Result<(), Failure> {
    write_new(target, text, 0o644).map_err(|error| {
        if error.kind() == ErrorKind::AlreadyExists {
            return there_already(name, target);
        }
        Failure::failed(format!("onboard {name}: {}: {error}", target.display()), "")
    })?;
    let around = load_around(hub, None, &BTreeSet::new()).map_err(Failure::Problems);
    around.and_then(|Around { config, .. }| judged(&config, target, text)).inspect_err(|_| {
        // Nobody was told of it as done.
        drop(std::fs::remove_file(target));
    })?;
    Ok(())
}

/// Whether the hub has room for what that file says, beside all others, and what is to be said of it.
fn judged(config: &HubConfig, target: &Path, text: &str) -> Result<Vec<String>, Failure> {
    let new = judge_new(target, text.to_owned()).map_err(Failure::Problems)?;
    let mut config = config.clone();
    // What was added or replaced by a command counts, though the file does not name it yet.
    pool_in_use(&mut config)?;
    let Fitting { misfits, notes } = fitting(&config, &new);
    if misfits.is_empty() { Ok(notes) } else { Err(Failure::Problems(Problems(misfits))) }
}

fn there_already(name: &SourceName, target: &Path) -> Failure {
    Failure::Message {
        code: USAGE,
        what: format!("onboard {name}: {} is there already", target.display()),
        next: "edit that file, or take another name; --renew makes a new certificate".into(),
    }
}

/// Where a bundle is written that nobody names.
pub(super) fn bundle_of(name: &SourceName) -> PathBuf {
    PathBuf::from(format!("{name}.join.toml"))
}

/// The authority of that hub, if it has one of its own, and the name in its certificate.
pub(super) fn own_authority(config: &HubConfig) -> Option<(&Path, &str)> {
    let tls = config.tls.as_ref()?;
    Some((tls.authority.as_deref()?, &tls.hub_name))
}

/// Where the filer finds the hub.
pub(super) fn reachable(
    config: &HubConfig,
    hub: Option<SocketAddr>,
) -> Result<SocketAddr, Failure> {
    let address = hub.unwrap_or(config.listen);
    if !address.ip().is_unspecified() && address.port() > 0 {
        return Ok(address);
    }
    let what = format!("the hub listens on {address}, which is no address to connect to");
    Err(Failure::Message { code: USAGE, what, next: "name one: --hub ADDRESS:PORT".into() })
}

/// A hub that was started in this moment may not have made its authority yet. What comes of one that does not come
/// is said by [`make_bundle`].
fn await_authority(authority: &Path, name: &SourceName) -> Result<(), Failure> {
    let told = |directory: &Path| {
        eprintln!(
            "onboard {name}: waiting up to {} s for the hub to make its authority in {}",
            AUTHORITY_WAIT.as_secs(),
            directory.display()
        );
    };
    let waited = Authority(authority).wait_made(AUTHORITY_WAIT, told);
    waited.map(drop).map_err(|error| Failure::failed(format!("onboard {name}: {error}"), ""))
}

/// A bundle with a new certificate, and which one that is.
pub(super) fn make_bundle(
    authority: &Path,
    (hub, hub_name): (SocketAddr, &str),
    (name, volumes): (&SourceName, Vec<BundleVolume>),
    times: (i64, i64),
) -> Result<(Bundle, Fingerprint), Failure> {
    let failed = |error: AuthorityError| {
        Failure::failed(
            format!("onboard {name}: {error}"),
            "start the hub: it makes them at its first start",
        )
    };
    let issued = Authority(authority).issue(name.as_str()).map_err(failed)?;
    let mut bundle = Bundle::new(name.clone(), (hub, hub_name.to_owned()), times);
    bundle.volume = volumes;
    (bundle.ca, bundle.cert, bundle.key) = (issued.ca, issued.cert, issued.key);
    Ok((bundle, issued.fingerprint))
}

impl From<&Wanted> for BundleVolume {
    fn from(Wanted { name, size }: &Wanted) -> Self {
        Self { name: name.clone(), size: size.clone() }
    }
}

/// When a bundle is made that is valid for so long, and when it ends; in seconds since 1970.
fn times(Valid(time): Valid) -> (i64, i64) {
    let now = machine::unix_seconds();
    (now, now.saturating_add(i64::try_from(time.as_secs()).unwrap_or(i64::MAX)))
}

fn text(
    name: &SourceName,
    log_limit: Option<&str>,
    volumes: &[Wanted],
    bundle: Option<(i64, Fingerprint)>,
) -> String {
    let mut text = format!("name = \"{name}\"\n");
    if let Some(limit) = log_limit {
        text.push_str(&format!("log_limit = \"{limit}\"\n"));
    }
    if let Some((ends, certificate)) = bundle {
        // Who comes for the first time later is refused, and who comes with another certificate.
        let ends = timestamp(ends);
        text.push_str(&format!("join_by = \"{ends}\"\ncertificates = [\"{certificate}\"]\n"));
    }
    for Wanted { name, size } in volumes {
        text.push_str(&format!("\n[[volume]]\nname = \"{name}\"\nsize = \"{size}\"\n"));
    }
    text
}

fn view(name: &SourceName, volumes: &[Wanted], target: &Path, hub: &HubConfig) -> String {
    let volumes: String = volumes
        .iter()
        .map(|volume| {
            let Wanted { name, size } = volume;
            format!("  [[volume]]\n  name = \"{name}\"\n  size = \"{size}\"\n")
        })
        .collect();
    format!(
        "{}: written, the running hub takes it within two seconds\n\n\
         On the filer write source.toml:\n\n  \
         name = \"{name}\"\n  hub = \"{}\"\n  [pool]\n  \
         devices = [{{ path = \"disk0\", size = \"..\" }}]\n{volumes}\n\
         and start it: mirrorhub source --config source.toml\n",
        target.display(),
        hub.listen,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_valid_for_a_bounded_time() {
        let hours = |hours: u64| Ok(Valid(Duration::from_secs(hours * 3600)));
        assert_eq!(["24h", "1d", "14d"].map(str::parse), [hours(24), hours(24), hours(336)]);
        for bad in ["", "0s", "0d", "366d", "5000000000d", "-1d", "7", "1w", "d"] {
            assert!(bad.parse::<Valid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_volume_is_a_name_and_a_size() {
        let wanted: Wanted = "vol0=100GiB".parse().unwrap();
        assert_eq!((wanted.name.as_str(), wanted.size.as_str()), ("vol0", "100GiB"));
        for bad in ["vol0", "vol0=", "=1GiB", "Vol0=1GiB", "vol0=1GB", "vol0=-1GiB"] {
            assert!(bad.parse::<Wanted>().is_err(), "{bad}");
        }
    }
}
