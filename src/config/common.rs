//! What several files have in common: paths, listeners, NVRAM, pool, volumes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::Spanned;

use super::quantity::{Unfit, format_size};
use super::reader::{Reader, Section, entry, resolve};
use super::schema::{
    DeviceConfig, Door, Listen, NvramConfig, PoolConfig, Raid, SCRUB_EVERY, SCRUB_LIMIT,
    ScrubConfig, TlsConfig, VolumeConfig,
};
use crate::control::socket_path;
use crate::limits::{
    PLAIN_NETWORKS_MAX, POOL_DEVICE_BYTES_MAX, POOL_DEVICE_BYTES_MIN, RAID_MEMBERS_MAX,
    RING_BYTES_MAX, RING_BYTES_MIN, UNIX_PATH_BYTES_MAX, VOLUME_BYTES_MAX, VOLUMES_PER_SOURCE_MAX,
};
use crate::units::BLOCK_BYTES_U64;
use crate::units::names::{NameError, VolumeName};
use crate::units::networks::{Network, NetworkError, Networks};
use crate::units::numbers::ByteCount;

/// Bounds of what upkeep may read in a second.
const PACE_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 40;

/// A name of any kind.
pub(super) fn name<'d, T: FromStr<Err = NameError>>(
    reader: &mut Reader<'d>,
    section: &Section<'d>,
) -> Option<Spanned<T>> {
    let wanted = "a name: 1 to 63 of a-z 0-9 . _ -, first and last a letter or digit";
    reader.parsed(section, "name", wanted, |text| {
        text.parse().map_err(|error: NameError| {
            let fix = match proposal(text) {
                Some(proposal) => format!("write \"{proposal}\""),
                None => "choose another name".into(),
            };
            Unfit { met: format!("{text:?} is no name: {error}"), fix }
        })
    })
}

/// The text as a name: lower case, with `-` for what a name cannot have.
fn proposal(text: &str) -> Option<String> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mapped: String = text
        .to_ascii_lowercase()
        .chars()
        .map(|c| if inner(c) || matches!(c, '.' | '_' | '-') { c } else { '-' })
        .collect();
    let trimmed: String = mapped.trim_matches(|c| !inner(c)).chars().take(63).collect();
    let trimmed = trimmed.trim_end_matches(|c| !inner(c));
    (!trimmed.is_empty()).then(|| trimmed.to_owned())
}

/// `data_dir`, whose admin socket must fit the length of a socket path.
pub(super) fn data_dir<'d>(reader: &mut Reader<'d>, root: &Section<'d>) -> Option<PathBuf> {
    let found = reader.path(root, "data_dir");
    let span = found.as_ref().map_or(0..0, Spanned::span);
    let path =
        found.map_or_else(|| reader.text.base.join(reader.kind.data_dir()), Spanned::into_inner);
    let length = socket_path(&path).as_os_str().len();
    if length > UNIX_PATH_BYTES_MAX {
        let met = format!(
            "the path of admin.sock in it would have {length} bytes, \
             the kernel takes {UNIX_PATH_BYTES_MAX}"
        );
        reader.problem(span, "data_dir", met, "a shorter path", "choose a shorter directory");
        return None;
    }
    Some(path)
}

/// Who is served in the clear.
const PLAIN_NETWORKS: &str = "plain_networks";
/// One of them, for messages.
const NETWORK_EXAMPLE: &str = "10.1.0.0/16";

/// `plain_networks`; none if it is not there, or wrong.
pub(super) fn plain_networks<'d>(reader: &mut Reader<'d>, root: &Section<'d>) -> Networks {
    let what = ("a list of networks", NETWORK_EXAMPLE, PLAIN_NETWORKS_MAX);
    let parse = |text: &str| {
        text.parse::<Network>().map_err(|error| {
            let fix = match &error {
                NetworkError::Address(_) => format!("write one such as \"{NETWORK_EXAMPLE}\""),
                NetworkError::Prefix(_) => {
                    format!("write how many bits count, such as \"{NETWORK_EXAMPLE}\"")
                }
                NetworkError::TooLong { bits, .. } => format!("write 0 to {bits} behind the slash"),
                NetworkError::HostBits { address, network } => format!(
                    "write \"{network}\" for all of that network, or \"{address}\" for that address alone"
                ),
            };
            Unfit { met: error.to_string(), fix }
        })
    };
    Networks(reader.strings(root, PLAIN_NETWORKS, what, parse).unwrap_or_default())
}

/// Something that listens, with the place where the file says so.
#[derive(Debug)]
pub(super) struct Listener {
    key: &'static str,
    span: Range<usize>,
    /// Where.
    pub(super) listen: Listen,
}

/// An address of our own: loopback, or a unix socket where `unix` allows one.
pub(super) fn listen<'d>(
    reader: &mut Reader<'d>,
    root: &Section<'d>,
    key: &'static str,
    default: &str,
    unix: bool,
    far: Far,
) -> Option<Listener> {
    let base = reader.text.base.clone();
    let wanted =
        if unix { "a loopback ADDRESS:PORT or unix:PATH" } else { "a loopback ADDRESS:PORT" };
    let parse = |text: &str| match text.strip_prefix("unix:") {
        Some(path) if unix => unix_path(&base, path).map(Listen::Unix),
        Some(_) => Err(Unfit {
            met: "sources do not connect by unix socket".into(),
            fix: format!("write \"{default}\""),
        }),
        None => reachable(text, default, far).map(Listen::Tcp),
    };
    let (span, listen) = match reader.parsed(root, key, wanted, parse) {
        Some(found) => (found.span(), found.into_inner()),
        None if root.has(key) => return None,
        None => (0..0, parse(default).ok()?),
    };
    Some(Listener { key, span, listen })
}

fn unix_path(base: &Path, text: &str) -> Result<PathBuf, Unfit> {
    let path = resolve(base, text)?;
    let length = path.as_os_str().len();
    if length > UNIX_PATH_BYTES_MAX {
        return Err(Unfit {
            met: format!("the path has {length} bytes, the kernel takes {UNIX_PATH_BYTES_MAX}"),
            fix: "choose a shorter path".into(),
        });
    }
    Ok(path)
}

/// Whether something is spoken to beyond this machine (section 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Far {
    /// Its traffic is behind TLS, or it takes the clients of known networks only.
    Yes,
    /// It would be, if there was a section `[tls]`.
    WithTls,
    /// It would be, if `[tls]` said so with this key, or `plain_networks` who may come.
    WithKey(&'static str),
}

impl Far {
    /// Sources and their hub.
    pub(super) fn of(tls: bool) -> Self {
        if tls { Self::Yes } else { Self::WithTls }
    }

    /// NBD or HTTP, by that key of `[tls]`. What is wrong in `plain_networks` is said there.
    pub(super) fn door(root: &Section<'_>, tls: Option<&TlsConfig>, key: &'static str) -> Self {
        let door = tls.map(|tls| if key == "nbd" { tls.nbd } else { tls.http });
        match door {
            Some(Door::Server | Door::Mutual) => Self::Yes,
            Some(Door::Off) | None if root.has(PLAIN_NETWORKS) => Self::Yes,
            Some(Door::Off) | None => Self::WithKey(key),
        }
    }

    fn needs(self) -> String {
        match self {
            Self::Yes | Self::WithTls => "which needs [tls]".to_owned(),
            Self::WithKey(key) => format!("which needs tls.{key} or {PLAIN_NETWORKS}"),
        }
    }
}

/// An address that only this machine reaches, or one behind TLS.
pub(super) fn reachable(text: &str, example: &str, far: Far) -> Result<SocketAddr, Unfit> {
    let unfit = |met: String, fix: String| Err(Unfit { met, fix });
    if let Some(port) = text.strip_prefix("localhost:") {
        let met = format!("{text:?} is a name, not an address");
        return unfit(met, format!("write \"127.0.0.1:{port}\""));
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if far == Far::Yes || address.ip().is_loopback() => Ok(address),
        Ok(address) => unfit(
            format!("{text} is not loopback, {}", far.needs()),
            match far {
                Far::Yes | Far::WithTls => {
                    format!("write \"127.0.0.1:{}\", or add a section [tls]", address.port())
                }
                Far::WithKey(key) => format!(
                    "write \"127.0.0.1:{}\", or {key} = \"mutual\" in [tls], or \
                     {PLAIN_NETWORKS} = [\"{NETWORK_EXAMPLE}\"] with those who may come in the clear",
                    address.port()
                ),
            },
        ),
        Err(_) if text.parse::<std::net::IpAddr>().is_ok() => {
            let port = example.rsplit(':').next().unwrap_or("7420");
            let address = if text.contains(':') { format!("[{text}]") } else { text.to_owned() };
            unfit(format!("{text:?} has no port"), format!("write \"{address}:{port}\""))
        }
        Err(_) if is_host_and_port(text) => {
            unfit(format!("{text:?} is a name, not an address"), format!("write \"{example}\""))
        }
        Err(_) => unfit(
            format!("{text:?} is no address and port"),
            format!("write one such as \"{example}\""),
        ),
    }
}

fn is_host_and_port(text: &str) -> bool {
    let host = |host: &str| {
        !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c))
    };
    text.split_once(':').is_some_and(|(name, port)| host(name) && port.parse::<u16>().is_ok())
}

/// `[tls]`. `own`: where a hub's own authority is, which a source has not.
pub(super) fn tls<'d>(
    reader: &mut Reader<'d>,
    root: &Section<'d>,
    own: Option<&Path>,
) -> Option<TlsConfig> {
    let section = reader.section(root, "tls");
    let mut path = |key| reader.path(&section, key).map(Spanned::into_inner);
    let (ca, cert, key) = (path("ca"), path("cert"), path("key"));
    let hub_name = reader.parsed(&section, "hub_name", "a DNS name", |text| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !text.is_empty() && text.len() < 254 && text.chars().all(fits) {
            return Ok(text.to_owned());
        }
        Err(Unfit { met: format!("{text:?} is none"), fix: format!("write \"{HUB_NAME}\"") })
    });
    let doors = ["nbd", "http"].map(|key| reader.choice(&section, key, Door::WORDS));
    let [nbd, http] = doors.map(|door| door.map_or(Door::Off, Spanned::into_inner));
    let mut path = |key| reader.path(&section, key).map(Spanned::into_inner);
    let (client_ca, shown) = (path("client_ca"), (path("served_cert"), path("served_key")));
    if let (Some(_), None) | (None, Some(_)) = &shown {
        let key = if shown.0.is_some() { "served_key" } else { "served_cert" };
        reader.missing(&section, key, "name both: certificate and key of NBD and HTTP");
    }
    let shown = shown.0.zip(shown.1);
    section.table?;
    let hub_name = hub_name.map_or_else(|| HUB_NAME.to_owned(), Spanned::into_inner);
    let given = ["ca", "cert", "key"].map(|key| section.has(key));
    if let (Some(own), [false, false, false]) = (own, given) {
        let authority = own.join("tls");
        let file = |name: &str| authority.join(name);
        let (ca, cert) = (file("ca-cert.pem"), file("server-cert.pem"));
        let key = file("server-key.pem");
        let served = shown.unwrap_or_else(|| (file("served-cert.pem"), file("served-key.pem")));
        let authority = Some(authority);
        return Some(TlsConfig {
            ca,
            cert,
            key,
            hub_name,
            authority,
            nbd,
            http,
            served,
            client_ca,
        });
    }
    for (key, given) in ["ca", "cert", "key"].into_iter().zip(given) {
        if !given {
            let fix = "name ca, cert and key, the PEM files of authority, certificate and key";
            reader.missing(&section, key, fix);
        }
    }
    let (cert, key) = (cert?, key?);
    let served = shown.unwrap_or_else(|| (cert.clone(), key.clone()));
    let authority = None;
    Some(TlsConfig { ca: ca?, cert, key, hub_name, authority, nbd, http, served, client_ca })
}

/// The name in a hub's certificate, if nothing else is said.
const HUB_NAME: &str = "mirrorhub-hub";

/// Refuses two listeners in one place.
pub(super) fn apart(reader: &mut Reader<'_>, listeners: &[&Listener]) {
    for (index, later) in listeners.iter().enumerate() {
        let free = matches!(later.listen, Listen::Tcp(address) if address.port() == 0);
        let same = listeners.iter().take(index).find(|other| other.listen == later.listen);
        if let (false, Some(earlier)) = (free, same) {
            // The one that the file names is shown; the other may be a default.
            let (shown, hidden) =
                if later.span.is_empty() { (*earlier, *later) } else { (*later, *earlier) };
            let mut met = format!("both are {}", later.listen);
            if hidden.span.is_empty() {
                met.push_str(&format!(", which is the default of {}", hidden.key));
            }
            let fix = format!("give {} an address of its own", shown.key);
            let keys = (shown.key, hidden.key);
            if hidden.span.is_empty() {
                let name = format!("{} and {}", keys.0, keys.1);
                reader.problem(shown.span.clone(), name, met, "", fix);
            } else {
                let spans = (shown.span.clone(), hidden.span.clone());
                reader.contradiction(keys, spans, met, fix);
            }
        }
    }
}

/// `[nvram]`. The least size gives each of a source's two partitions room for two largest
/// transfers (R16; asserted in `limits`).
pub(super) fn nvram<'d>(
    reader: &mut Reader<'d>,
    root: &Section<'d>,
    data_dir: Option<&Path>,
    default: ByteCount,
) -> (Option<NvramConfig>, Option<Range<usize>>) {
    let section = reader.section(root, "nvram");
    let path = reader.path(&section, "path");
    let size = reader.size(&section, "size", RING_BYTES_MIN..=RING_BYTES_MAX);
    let span = path.as_ref().map(Spanned::span);
    let path = path.map(Spanned::into_inner).or_else(|| Some(data_dir?.join("nvram")));
    let size = size.map_or(default, Spanned::into_inner);
    let realtime = reader.boolean(&section, "realtime").unwrap_or(false);
    (path.map(|path| NvramConfig { path, size, realtime }), span)
}

/// `[pool]` and the section, for keys that only one kind of file has.
pub(super) fn pool<'d>(
    reader: &mut Reader<'d>,
    root: &Section<'d>,
    taken: &[(&'static str, Option<PathBuf>)],
) -> (Option<PoolConfig>, Section<'d>) {
    let section = reader.section(root, "pool");
    let raid = reader.choice(&section, "raid", Raid::WORDS).map_or(Raid::None, Spanned::into_inner);
    let before = reader.problems.len();
    let members = reader.list(&section, "devices");
    let mut seen: BTreeMap<PathBuf, String> =
        taken.iter().filter_map(|(key, path)| Some((path.clone()?, (*key).to_owned()))).collect();
    let devices: Vec<DeviceConfig> =
        members.iter().filter_map(|member| device(reader, member, &mut seen)).collect();
    if devices.is_empty() && reader.problems.len() == before {
        let fix = format!("write [pool] and below it devices = [{}]", example_device(reader));
        reader.missing(&section, "devices", &fix);
    }
    let complete = !devices.is_empty() && devices.len() == members.len();
    let inner = reader.section(&section, "scrub");
    let every = reader.duration(&inner, "every", (1000, 8760 * 60 * 60 * 1000));
    let limit = reader.size(&inner, "limit", PACE_BYTES);
    let scrub = ScrubConfig {
        every: every.map_or(SCRUB_EVERY, Spanned::into_inner),
        limit: limit.map_or(SCRUB_LIMIT, Spanned::into_inner),
    };
    let rebuild_limit = reader.size(&section, "rebuild_limit", PACE_BYTES).map(Spanned::into_inner);
    let config = complete.then_some(PoolConfig { raid, devices, scrub, rebuild_limit });
    check_array(reader, &section, raid, (members.len(), config.as_ref()));
    (config, section)
}

/// A level needs its number of devices, and they the size of a pool together.
fn check_array<'d>(
    reader: &mut Reader<'d>,
    section: &Section<'d>,
    raid: Raid,
    (devices, config): (usize, Option<&PoolConfig>),
) {
    let (least, most) = (raid.level().members_min(), RAID_MEMBERS_MAX);
    let key = section.table.and_then(|table| entry(table, "devices"));
    let span = key.map_or_else(|| section.span.clone(), |(key, _)| key.span());
    let (met, fix) = if devices == 0 {
        return;
    } else if !(least..=most).contains(&devices) {
        let met = format!("raid = \"{raid}\" takes {least} to {most} devices, not {devices}");
        (met, "name more devices, or write another level")
    } else if let Some(size) =
        config.map(PoolConfig::size).filter(|size| size.0 < POOL_DEVICE_BYTES_MIN)
    {
        let least = format_size(ByteCount(POOL_DEVICE_BYTES_MIN));
        (format!("hold {} together, a pool needs {least}", format_size(size)), "write larger sizes")
    } else {
        return;
    };
    reader.problem(span, "pool.devices", met, "", fix);
}

/// A device as a file would name it, in the data directory of its own process.
fn example_device(reader: &Reader<'_>) -> String {
    format!("{{ path = \"{}/disk0\", size = \"8GiB\" }}", reader.kind.data_dir())
}

/// One of `pool.devices`; `seen` has the paths that are taken and by what.
fn device<'d>(
    reader: &mut Reader<'d>,
    member: &Section<'d>,
    seen: &mut BTreeMap<PathBuf, String>,
) -> Option<DeviceConfig> {
    let path = reader.path(member, "path");
    let size = reader.size(member, "size", POOL_DEVICE_BYTES_MIN..=POOL_DEVICE_BYTES_MAX);
    for key in ["path", "size"] {
        if !member.has(key) {
            let fix = format!("write {}", example_device(reader));
            reader.missing(member, key, &fix);
        }
    }
    if let Some(path) = &path
        && let Some(other) = seen.insert(path.get_ref().clone(), "pool.devices.path".into())
    {
        let met = format!("is the path of {other} as well");
        reader.problem(path.span(), "pool.devices.path", met, "", "name another file");
    }
    Some(DeviceConfig { path: path?.into_inner(), size: size?.into_inner() })
}

/// `[[volume]]`.
pub(super) fn volumes<'d>(reader: &mut Reader<'d>, root: &Section<'d>) -> Vec<VolumeConfig> {
    let sections = reader.list(root, "volume");
    let mut names = BTreeMap::new();
    let volumes: Vec<VolumeConfig> =
        sections.iter().filter_map(|section| volume(reader, section, &mut names)).collect();
    if let Some(first_too_many) = sections.get(VOLUMES_PER_SOURCE_MAX) {
        let met = format!("{} volumes are more than {VOLUMES_PER_SOURCE_MAX}", sections.len());
        let fix = "give the others to a second source";
        reader.problem(first_too_many.span.clone(), "volume", met, "", fix);
    }
    volumes
}

/// One volume; `names` has those before it and where they stand.
fn volume<'d>(
    reader: &mut Reader<'d>,
    section: &Section<'d>,
    names: &mut BTreeMap<VolumeName, Range<usize>>,
) -> Option<VolumeConfig> {
    let name = name::<VolumeName>(reader, section);
    let size = reader.size(section, "size", BLOCK_BYTES_U64..=VOLUME_BYTES_MAX);
    for (key, fix) in [("name", "write name = \"vol0\""), ("size", "write size = \"1GiB\"")] {
        if !section.has(key) {
            reader.missing(section, key, fix);
        }
    }
    if let Some(size) = size.as_ref().filter(|size| !size.get_ref().is_whole_blocks()) {
        let whole = size.get_ref().0.next_multiple_of(BLOCK_BYTES_U64);
        let met = format!("{} is no multiple of 4KiB", format_size(*size.get_ref()));
        let fix = format!("write \"{}\"", format_size(ByteCount(whole)));
        reader.problem(size.span(), "volume.size", met, "a multiple of 4KiB", fix);
    }
    if let Some(name) = &name
        && let Some(first) = names.insert(name.get_ref().clone(), name.span())
    {
        let met = format!("two volumes are called {}", name.get_ref());
        let keys = ("volume.name", "volume.name");
        reader.contradiction(keys, (name.span(), first), met, "give each a name of its own");
    }
    Some(VolumeConfig { name: name?.into_inner(), size: size?.into_inner() })
}
