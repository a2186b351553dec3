//! What a reload would change, key by key, and when it takes effect.
//!
//! Called by the running processes when they are told to read their file again, and by `config
//! diff`. Pure: two configurations in, differences out. A configuration that was refused never gets
//! here, so nothing is ever half applied; what only a restart can change stays as it runs, and is
//! named until then.

use std::collections::BTreeMap;

use super::quantity::{format_duration, format_size};
use super::schema::{
    HubConfig, HubSource, PoolConfig, ReplicationConfig, ScrubConfig, SourceConfig, TlsConfig,
    VolumeConfig,
};
use crate::hub::hooks::HookCommand;
use crate::link::shown::Fingerprint;
use crate::link::tls::TlsFiles;
use crate::units::numbers::ByteCount;
use crate::units::times::timestamp;
use crate::units::words::words;

words! {
    /// When a change takes effect.
    When {
        /// With the reload.
        Now = "now",
        /// Behind the next CP, which the reload asks for (R20).
        NextCp = "next-cp",
        /// When the source connects again; its other sessions go on.
        NextSession = "next-session",
        /// Not before a restart.
        Restart = "restart",
    }
}

/// One key that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key in full, such as `replication.mode`; of a source on a hub with its file before it.
    pub key: String,
    /// What runs; empty if it was not there.
    pub from: String,
    /// What the file says; empty if it is gone.
    pub to: String,
    /// When it takes effect.
    pub when: When,
}

/// Keys in the order of the file, with their value in words.
type Rows = Vec<(String, When, String)>;

/// What differs between the running source and its file.
pub fn source_changes(running: &SourceConfig, file: &SourceConfig) -> Vec<Change> {
    let mut all = changes(&source_rows(running), &source_rows(file));
    for (volume, _) in grown(running, file) {
        let key = volume_key(volume);
        all.iter_mut().filter(|c| c.key == key).for_each(|change| change.when = When::NextCp);
    }
    all
}

/// Volumes that have grown, and what they are now.
fn grown<'a>(
    running: &'a SourceConfig,
    file: &'a SourceConfig,
) -> impl Iterator<Item = (&'a VolumeConfig, ByteCount)> {
    running.volumes.iter().filter_map(|volume| {
        let new = file.volumes.iter().find(|new| new.name == volume.name)?;
        (new.size > volume.size).then_some((volume, new.size))
    })
}

fn volume_key(volume: &VolumeConfig) -> String {
    format!("volume {}", volume.name)
}

/// What runs after a reload: the file's, where that needs no restart.
pub fn reloaded_source(running: &SourceConfig, file: SourceConfig) -> SourceConfig {
    let resync_limit = running.replication.resync_limit;
    let mut volumes = running.volumes.clone();
    for (old, size) in grown(running, &file) {
        volumes.iter_mut().filter(|new| new.name == old.name).for_each(|new| new.size = size);
    }
    SourceConfig {
        volumes,
        checkpoint_interval: file.checkpoint_interval,
        replication: ReplicationConfig { resync_limit, ..file.replication },
        cache: file.cache,
        homes: file.homes,
        ..running.clone()
    }
}

/// What differs between the running hub and its files.
pub fn hub_changes(running: &HubConfig, file: &HubConfig) -> Vec<Change> {
    let mut all = changes(&hub_rows(running), &hub_rows(file));
    let sources = |config: &HubConfig| -> BTreeMap<String, Rows> {
        let rows = config.sources.iter().map(|one| (one.file.name.to_string(), rows_of(one)));
        rows.collect()
    };
    let (before, after) = (sources(running), sources(file));
    let (none, mut names) = (Vec::new(), Vec::from_iter(before.keys().chain(after.keys())));
    names.sort();
    names.dedup();
    for name in names {
        let of = |all: &BTreeMap<String, Rows>| all.get(name).unwrap_or(&none).clone();
        for mut change in changes(&of(&before), &of(&after)) {
            change.key = format!("sources.d/{name}.toml: {}", change.key);
            all.push(change);
        }
    }
    all
}

/// What runs after a reload: the file's, where that needs no restart.
pub fn reloaded_hub(running: &HubConfig, file: HubConfig) -> HubConfig {
    HubConfig { sources: file.sources, ..running.clone() }
}

fn changes(before: &Rows, after: &Rows) -> Vec<Change> {
    let find = |rows: &Rows, key: &str| {
        rows.iter().find(|(known, _, _)| known == key).map(|(_, _, value)| value.clone())
    };
    let gone = before.iter().filter(|(key, _, _)| find(after, key).is_none());
    let mut all = Vec::new();
    for (key, when, _) in after.iter().chain(gone) {
        let (from, to) = (find(before, key), find(after, key));
        if from != to {
            let (from, to) = (from.unwrap_or_default(), to.unwrap_or_default());
            all.push(Change { key: key.clone(), from, to, when: *when });
        }
    }
    all
}

fn source_rows(config: &SourceConfig) -> Rows {
    use When::{NextCp, Now, Restart};
    let row = |key: &str, when: When, value: String| (key.to_owned(), when, value);
    let resync_limit = config.replication.resync_limit;
    let mut rows = vec![
        row("name", Restart, config.name.to_string()),
        row("data_dir", Restart, config.data_dir.display().to_string()),
        row("hub", Restart, config.hub.to_string()),
        row("nbd_listen", Restart, config.nbd_listen.to_string()),
        row("http_listen", Restart, config.http_listen.to_string()),
        row("plain_networks", Restart, config.plain_networks.to_string()),
        row("lock_memory", Restart, config.lock_memory.to_string()),
        row("nvram.path", Restart, config.nvram.path.display().to_string()),
        row("nvram.size", Restart, format_size(config.nvram.size)),
        row("nvram.realtime", Restart, config.nvram.realtime.to_string()),
        row("checkpoint.interval", Now, format_duration(config.checkpoint_interval)),
    ];
    rows.extend(replication_rows("replication.", &config.replication));
    rows.extend([
        row("replication.resync_limit", Restart, resync_limit.map_or("none".into(), format_size)),
        row("nbd.cache", NextCp, config.cache.to_string()),
    ]);
    for home in &config.homes {
        let within = format!("home {}: ", home.name);
        if home.promises {
            rows.extend(replication_rows(&format!("{within}replication."), &home.replication));
            rows.push((format!("{within}cache"), NextCp, home.cache.to_string()));
        }
        for volume in &home.volumes {
            let key = format!("{within}{}", volume_key(volume));
            rows.push((key, NextCp, format_size(volume.size)));
        }
    }
    rows.extend(pool_rows(&config.pool));
    rows.push(row("tls", Restart, tls_row(config.tls.as_ref())));
    rows.push(row("pool.on_full", Restart, config.on_full.to_string()));
    for volume in &config.volumes {
        rows.push((volume_key(volume), Restart, format_size(volume.size)));
    }
    rows
}

/// What a source promises; of the filer itself, or of one that lives on it.
fn replication_rows(before: &str, replication: &ReplicationConfig) -> Rows {
    let ReplicationConfig { mode, lag_limit, ack, apply, on_hub_loss, hub_timeout, .. } =
        *replication;
    let lag = format!("{}, {}", format_size(lag_limit.bytes), format_duration(lag_limit.time));
    let rows = [
        ("mode", mode.to_string()),
        ("lag_limit", lag),
        ("ack", ack.to_string()),
        ("apply", apply.to_string()),
        ("on_hub_loss", on_hub_loss.to_string()),
        ("hub_timeout", format_duration(hub_timeout)),
    ];
    rows.map(|(key, value)| (format!("{before}{key}"), When::NextCp, value)).into()
}

/// Which files; what is in them is read again by any reload.
fn tls_row(tls: Option<&TlsConfig>) -> String {
    let Some(tls) = tls else { return "none".to_owned() };
    let TlsConfig { ca, cert, key, hub_name, nbd, http, .. } = tls;
    let (ca, cert, key, served) = (ca.display(), cert.display(), key.display(), tls.served());
    let TlsFiles { ca: clients, cert: shown, .. } = &served;
    let (clients, shown) = (clients.display(), shown.display());
    format!("{ca}, {cert}, {key}, hub {hub_name}, nbd {nbd}, http {http}, {shown}, {clients}")
}

fn pool_rows(pool: &PoolConfig) -> Rows {
    let mut rows = vec![("pool.raid".to_owned(), When::Restart, pool.raid.to_string())];
    for (at, device) in pool.devices.iter().enumerate() {
        let value = format!("{}, {}", device.path.display(), format_size(device.size));
        rows.push((format!("pool.devices[{at}]"), When::Restart, value));
    }
    let ScrubConfig { every, limit } = pool.scrub;
    rows.push(("pool.scrub.every".to_owned(), When::Restart, format_duration(every)));
    rows.push(("pool.scrub.limit".to_owned(), When::Restart, format_size(limit)));
    let rebuild = pool.rebuild_limit.map_or("none".into(), format_size);
    rows.push(("pool.rebuild_limit".to_owned(), When::Restart, rebuild));
    rows
}

fn hub_rows(config: &HubConfig) -> Rows {
    use When::Restart;
    let row = |key: &str, when: When, value: String| (key.to_owned(), when, value);
    let mut rows = vec![
        row("data_dir", Restart, config.data_dir.display().to_string()),
        row("listen", Restart, config.listen.to_string()),
        row("nbd_listen", Restart, config.nbd_listen.to_string()),
        row("http_listen", Restart, config.http_listen.to_string()),
        row("plain_networks", Restart, config.plain_networks.to_string()),
        row("sources_dir", Restart, config.sources_dir.display().to_string()),
        row("image_pin", Restart, format_duration(config.image_pin)),
        row("nvram.path", Restart, config.nvram.path.display().to_string()),
        row("nvram.size", Restart, format_size(config.nvram.size)),
        row("nvram.realtime", Restart, config.nvram.realtime.to_string()),
        row("log.dir", Restart, config.log_dir.display().to_string()),
        row("hooks.promoted", Restart, command(config.hooks.promoted.as_ref())),
        row("hooks.failed_back", Restart, command(config.hooks.failed_back.as_ref())),
        row("hooks.timeout", Restart, format_duration(config.hooks.timeout)),
    ];
    rows.push(row("tls", Restart, tls_row(config.tls.as_ref())));
    rows.extend(pool_rows(&config.pool));
    rows
}

fn fingerprints(certificates: &[Fingerprint]) -> String {
    if certificates.is_empty() {
        return "any".to_owned();
    }
    certificates.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn command(command: Option<&HookCommand>) -> String {
    let Some(HookCommand { program, arguments }) = command else { return "none".to_owned() };
    let words = arguments.iter().map(|argument| format!(" {argument}"));
    format!("{}{}", program.display(), words.collect::<String>())
}

/// The file of one source on the hub.
fn rows_of(source: &HubSource) -> Rows {
    use When::{NextSession, Now};
    let row = |key: &str, when: When, value: String| (key.to_owned(), when, value);
    let file = &source.file;
    let limit = file.log_limit.map_or("none".to_owned(), format_size);
    let mut rows = vec![
        row("enabled", Now, file.enabled.to_string()),
        row("nvram_share", Now, file.nvram_share.map_or("an equal part".to_owned(), format_size)),
        row("log_limit", Now, limit),
        row("space_limit", Now, file.space_limit.map_or("none".to_owned(), format_size)),
        row("bandwidth_limit", Now, file.bandwidth_limit.map_or("none".to_owned(), format_size)),
        row("join_by", Now, file.join_by.map_or("none".to_owned(), timestamp)),
        row("certificates", Now, fingerprints(&file.certificates)),
        row("keep", Now, file.keep.map_or("none".to_owned(), |keep| keep.to_string())),
    ];
    for volume in &file.volumes {
        rows.push((format!("volume {}", volume.name), NextSession, format_size(volume.size)));
    }
    rows
}
