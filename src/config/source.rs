//! Reads and judges `source.toml`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeTable;

use super::common::{
    Far, apart, data_dir, listen, name, nvram, plain_networks, pool, reachable, tls, volumes,
};
use super::load::Kind;
use super::problem::Problem;
use super::quantity::Unfit;
use super::reader::{Reader, Section};
use super::schema::{
    CHECKPOINT_INTERVAL, HUB_LISTEN, HUB_TIMEOUT, HomeConfig, ReplicationConfig,
    SOURCE_HTTP_LISTEN, SOURCE_NBD_LISTEN, SOURCE_NVRAM, SourceConfig,
};
use super::text::Text;
use crate::limits::{
    CHECKPOINT_INTERVAL_MS, HUB_TIMEOUT_MS, LAG_BYTES, LAG_TIME_MS, RESYNC_LIMIT_BYTES,
};
use crate::units::names::SourceName;
use crate::units::policy::{Ack, Apply, Cache, LagLimit, Mode, OnFull, OnHubLoss};

/// Reads a parsed file.
pub(super) fn judge(text: &Text, table: &DeTable<'_>) -> Result<SourceConfig, Vec<Problem>> {
    let (mut reader, root) = Reader::new(Kind::Source, text, table);
    let name = name::<SourceName>(&mut reader, &root);
    let data_dir = data_dir(&mut reader, &root);
    let tls = tls(&mut reader, &root, None);
    let hub = hub(&mut reader, &root, Far::of(root.has("tls")));
    let plain_networks = plain_networks(&mut reader, &root);
    let doors = ["nbd", "http"].map(|key| Far::door(&root, tls.as_ref(), key));
    wanted(&mut reader, &root);
    let nbd_listen = listen(&mut reader, &root, "nbd_listen", SOURCE_NBD_LISTEN, true, doors[0]);
    let http_listen = listen(&mut reader, &root, "http_listen", SOURCE_HTTP_LISTEN, true, doors[1]);
    if let (Some(nbd), Some(http)) = (&nbd_listen, &http_listen) {
        apart(&mut reader, &[nbd, http]);
    }
    let lock_memory = reader.boolean(&root, "lock_memory").unwrap_or(false);
    let (nvram, _) = nvram(&mut reader, &root, data_dir.as_deref(), SOURCE_NVRAM);
    let checkpoint_interval = interval(&mut reader, &root);
    let section = reader.section(&root, "replication");
    let resync_limit = reader.size(&section, "resync_limit", RESYNC_LIMIT_BYTES);
    let resync_limit = resync_limit.map(Spanned::into_inner);
    let replication = ReplicationConfig { resync_limit, ..replication(&mut reader, &section) };
    let nbd = reader.section(&root, "nbd");
    let cache = reader.choice(&nbd, "cache", Cache::WORDS);
    let ring = nvram.as_ref().map(|nvram| nvram.path.clone());
    let (pool, pool_section) = pool(&mut reader, &root, &[("nvram.path", ring)]);
    let on_full = reader.choice(&pool_section, "on_full", OnFull::WORDS);
    let before = reader.problems.len();
    let volumes = volumes(&mut reader, &root);
    if volumes.is_empty() && reader.problems.len() == before {
        let fix = "write [[volume]] and below it name = \"vol0\" and size = \"1GiB\"";
        reader.missing(&root, "volume", fix);
    }
    let own = name.as_ref().map(|name| name.get_ref().clone());
    let homes = homes(&mut reader, &root, own.as_ref());
    let problems = reader.finish();
    let config = (|| {
        Some(SourceConfig {
            file: text.file.clone(),
            name: name?.into_inner(),
            data_dir: data_dir?,
            hub: hub?,
            nbd_listen: nbd_listen?.listen,
            http_listen: http_listen?.listen,
            plain_networks,
            lock_memory,
            nvram: nvram?,
            checkpoint_interval,
            replication,
            cache: cache.map_or(Cache::Writethrough, Spanned::into_inner),
            pool: pool?,
            tls,
            on_full: on_full.map_or(OnFull::Wait, Spanned::into_inner),
            volumes,
            homes,
        })
    })();
    super::load::whole(config, problems, text)
}

/// What no file may lack.
fn wanted<'d>(reader: &mut Reader<'d>, root: &Section<'d>) {
    for (key, fix) in [
        ("name", "write name = \"filer-a\", the name of its file on the hub"),
        ("hub", "write hub = \"127.0.0.1:7420\", the hub's `listen`"),
    ] {
        if !root.has(key) {
            reader.missing(root, key, fix);
        }
    }
}

/// The hub's address. Without TLS a source dials loopback only.
fn hub<'d>(reader: &mut Reader<'d>, root: &Section<'d>, far: Far) -> Option<std::net::SocketAddr> {
    let wanted = if far == Far::Yes { "an ADDRESS:PORT" } else { "a loopback ADDRESS:PORT" };
    let found = reader.parsed(root, "hub", wanted, |text| {
        let address = reachable(text, HUB_LISTEN, far)?;
        if address.port() == 0 {
            let fix = format!("write the port that the hub listens on, such as \"{HUB_LISTEN}\"");
            return Err(Unfit { met: "nobody listens on port 0".into(), fix });
        }
        Ok(address)
    });
    found.map(Spanned::into_inner)
}

fn interval<'d>(reader: &mut Reader<'d>, root: &Section<'d>) -> Duration {
    let section = reader.section(root, "checkpoint");
    let interval = reader.duration(&section, "interval", CHECKPOINT_INTERVAL_MS);
    interval.map_or(CHECKPOINT_INTERVAL, Spanned::into_inner)
}

/// What sources promise that live here.
fn homes<'d>(
    reader: &mut Reader<'d>,
    root: &Section<'d>,
    own: Option<&SourceName>,
) -> Vec<HomeConfig> {
    let sections = reader.list(root, "home");
    let mut names = BTreeMap::new();
    sections.iter().filter_map(|section| home(reader, section, own, &mut names)).collect()
}

/// One of them; `names` has those before it and where they stand.
fn home<'d>(
    reader: &mut Reader<'d>,
    section: &Section<'d>,
    own: Option<&SourceName>,
    names: &mut BTreeMap<SourceName, Range<usize>>,
) -> Option<HomeConfig> {
    let name = name::<SourceName>(reader, section);
    let within = reader.section(section, "replication");
    let replication = replication(reader, &within);
    let cache = reader.choice(section, "cache", Cache::WORDS);
    let volumes = volumes(reader, section);
    let promises = volumes.is_empty() || section.has("replication") || section.has("cache");
    if !section.has("name") {
        reader.missing(section, "name", "write name = \"filer-a\", the source that lives here");
    }
    let name = name?;
    if own == Some(name.get_ref()) {
        let met = format!("{} is this filer itself", name.get_ref());
        let fix = "write what it promises into [replication]";
        reader.problem(name.span(), "home.name", met, "another source", fix);
    }
    if let Some(first) = names.insert(name.get_ref().clone(), name.span()) {
        let met = format!("two homes are called {}", name.get_ref());
        let keys = ("home.name", "home.name");
        reader.contradiction(keys, (name.span(), first), met, "take one of them out");
    }
    let cache = cache.map_or(Cache::Writethrough, Spanned::into_inner);
    Some(HomeConfig { name: name.into_inner(), replication, cache, promises, volumes })
}

/// The promises of a section, but for what is the filer's own affair.
fn replication<'d>(reader: &mut Reader<'d>, section: &Section<'d>) -> ReplicationConfig {
    let mode = reader.choice(section, "mode", Mode::WORDS);
    let ack = reader.choice(section, "ack", Ack::WORDS);
    let apply = reader.choice(section, "apply", Apply::WORDS);
    let on_hub_loss = reader.choice(section, "on_hub_loss", OnHubLoss::WORDS);
    let hub_timeout = reader.duration(section, "hub_timeout", HUB_TIMEOUT_MS);
    let limit = reader.section(section, "lag_limit");
    let lag_limit = lag_limit(reader, &limit);
    if let Some(mode) = &mode {
        contradictions(reader, mode, ack.as_ref(), apply.as_ref(), on_hub_loss.as_ref());
    }
    if limit.table.is_some() {
        unlimited(reader, section.has("mode"), mode.as_ref(), limit.span);
    }
    let mode = mode.map_or(Mode::Sync, Spanned::into_inner);
    ReplicationConfig {
        mode,
        lag_limit,
        ack: ack.map_or(Ack::Durable, Spanned::into_inner),
        apply: apply.map_or_else(|| apply_of(mode), Spanned::into_inner),
        on_hub_loss: on_hub_loss.map_or(OnHubLoss::Continue, Spanned::into_inner),
        resync_limit: None,
        hub_timeout: hub_timeout.map_or(HUB_TIMEOUT, Spanned::into_inner),
    }
}

/// A limit that no mode reads promises what nobody keeps. A mode that is no mode is reported
/// already.
fn unlimited(
    reader: &mut Reader<'_>,
    written: bool,
    mode: Option<&Spanned<Mode>>,
    limit: Range<usize>,
) {
    let fix = "take lag_limit out, or write mode = \"semi-sync\"";
    match mode {
        Some(mode) if *mode.get_ref() == Mode::SemiSync => {}
        Some(mode) => {
            let met = format!("{} knows no limit, only semi-sync does", mode.get_ref());
            let keys = ("replication.lag_limit", "replication.mode");
            reader.contradiction(keys, (limit, mode.span()), met, fix);
        }
        None if written => {}
        None => {
            let met = "mode is not written, and sync, its default, knows no limit";
            reader.problem(limit, "replication.lag_limit and replication.mode", met, "", fix);
        }
    }
}

/// What of it is not written is the default: each key alone says something.
fn lag_limit<'d>(reader: &mut Reader<'d>, section: &Section<'d>) -> LagLimit {
    let bytes = reader.size(section, "bytes", LAG_BYTES.0..=LAG_BYTES.1);
    let time = reader.duration(section, "time", LAG_TIME_MS);
    let default = LagLimit::default();
    LagLimit {
        bytes: bytes.map_or(default.bytes, Spanned::into_inner),
        time: time.map_or(default.time, Spanned::into_inner),
    }
}

/// Without a log there is nothing to refer to.
fn apply_of(mode: Mode) -> Apply {
    match mode {
        Mode::Sync | Mode::SemiSync | Mode::Async => Apply::Reference,
        Mode::CpOnly => Apply::Inline,
    }
}

/// Section 9: `cp-only` with reference, replay or `ack`; `async` or `cp-only` with `stop`.
fn contradictions(
    reader: &mut Reader<'_>,
    mode: &Spanned<Mode>,
    ack: Option<&Spanned<Ack>>,
    apply: Option<&Spanned<Apply>>,
    on_hub_loss: Option<&Spanned<OnHubLoss>>,
) {
    let mut clash = |key: &str, span: Range<usize>, met: String, fix: &str| {
        let keys = (key, "replication.mode");
        reader.contradiction(keys, (span, mode.span()), met, fix);
    };
    let forwards = *mode.get_ref() != Mode::CpOnly;
    if let Some(ack) = ack.filter(|_| !forwards) {
        let met = "cp-only forwards no log, so there is nothing to acknowledge";
        clash("replication.ack", ack.span(), met.into(), "take ack out");
    }
    if let Some(apply) = apply.filter(|apply| !forwards && *apply.get_ref() != Apply::Inline) {
        let met = format!("cp-only forwards no log, so {} has nothing to read", apply.get_ref());
        clash("replication.apply", apply.span(), met, "write apply = \"inline\"");
    }
    let waits = matches!(mode.get_ref(), Mode::Sync | Mode::SemiSync);
    if let Some(stop) = on_hub_loss.filter(|loss| !waits && *loss.get_ref() == OnHubLoss::Stop) {
        let met = format!("{} answers writes without the hub, stop holds them", mode.get_ref());
        let fix = "take on_hub_loss out, or write mode = \"sync\"";
        clash("replication.on_hub_loss", stop.span(), met, fix);
    }
}
