//! Reads and judges `hub.toml`, and the files of its `sources.d` together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeTable;

use super::common::{Far, apart, data_dir, listen, nvram, plain_networks, pool, tls};
use super::hooks::hooks;
use super::load::Kind;
use super::problem::Problem;
use super::quantity::format_size;
use super::reader::Reader;
use super::schema::{
    HUB_HTTP_LISTEN, HUB_LISTEN, HUB_NBD_LISTEN, HUB_NVRAM, HubConfig, HubSource, IMAGE_PIN,
    Listen, SOURCES_DIR,
};
use super::sizing::{log_bytes, rounded_up, share_of};
use super::source_file::Judged;
use super::text::Text;
use crate::limits::{IMAGE_PIN_MS, NVRAM_SHARE_BYTES_MIN, SOURCES_MAX};
use crate::units::convert::to_u64;
use crate::units::names::SourceName;
use crate::units::numbers::ByteCount;

/// `hub.toml` without its sources: `config` if all of it is right, and the directory of the sources
/// in any case, so that their problems are found in the same run.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) config: Option<HubConfig>,
    pub(super) sources_dir: PathBuf,
    pub(super) room: Room,
    pub(super) problems: Vec<Problem>,
}

/// What all sources together have to fit into, whatever comes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// The ring.
    pub(super) ring: ByteCount,
    /// The file system of the source logs, used or not; none if it cannot be looked at.
    pub(super) logs: Option<ByteCount>,
}

impl Room {
    /// Of a hub with that ring and those logs.
    pub(super) fn of(ring: ByteCount, log_dir: Option<&Path>) -> Self {
        Self { ring, logs: log_dir.and_then(log_bytes).map(ByteCount) }
    }
}

/// Reads a parsed file.
pub(super) fn judge(text: &Text, table: &DeTable<'_>) -> Own {
    let (mut reader, root) = Reader::new(Kind::Hub, text, table);
    let data_dir = data_dir(&mut reader, &root);
    let tls = tls(&mut reader, &root, data_dir.as_deref());
    let far = Far::of(root.has("tls"));
    let plain_networks = plain_networks(&mut reader, &root);
    let doors = ["nbd", "http"].map(|key| Far::door(&root, tls.as_ref(), key));
    let sources_listen = listen(&mut reader, &root, "listen", HUB_LISTEN, false, far);
    let nbd_listen = listen(&mut reader, &root, "nbd_listen", HUB_NBD_LISTEN, true, doors[0]);
    let http_listen = listen(&mut reader, &root, "http_listen", HUB_HTTP_LISTEN, true, doors[1]);
    let listeners = [&sources_listen, &nbd_listen, &http_listen];
    let listeners: Vec<_> = listeners.into_iter().flatten().collect();
    apart(&mut reader, &listeners);
    let sources_dir = reader.path(&root, "sources_dir").map(Spanned::into_inner);
    let sources_dir = sources_dir.unwrap_or_else(|| text.base.join(SOURCES_DIR));
    let image_pin = reader.duration(&root, "image_pin", IMAGE_PIN_MS);
    let (nvram, _) = nvram(&mut reader, &root, data_dir.as_deref(), HUB_NVRAM);
    let log = reader.section(&root, "log");
    let log_dir = reader.path(&log, "dir").map(Spanned::into_inner);
    let log_dir = log_dir.or_else(|| Some(data_dir.as_ref()?.join("logs")));
    let taken = [
        ("nvram.path", nvram.as_ref().map(|nvram| nvram.path.clone())),
        ("log.dir", log_dir.clone()),
        ("data_dir", data_dir.clone()),
    ];
    let (pool, _) = pool(&mut reader, &root, &taken);
    let hooks = hooks(&mut reader, &root);
    let ring = nvram.as_ref().map_or(HUB_NVRAM, |nvram| nvram.size);
    let room = Room::of(ring, log_dir.as_deref());
    let problems = reader.finish();
    let config = (|| {
        let Listen::Tcp(listen) = sources_listen?.listen else { return None };
        Some(HubConfig {
            file: text.file.clone(),
            data_dir: data_dir?,
            listen,
            nbd_listen: nbd_listen?.listen,
            http_listen: http_listen?.listen,
            plain_networks,
            sources_dir: sources_dir.clone(),
            tls,
            image_pin: image_pin.map_or(IMAGE_PIN, Spanned::into_inner),
            nvram: nvram?,
            log_dir: log_dir?,
            pool: pool?,
            hooks,
            sources: Vec::new(),
        })
    })();
    let config = config.filter(|_| problems.is_empty());
    Own { config, sources_dir, room, problems }
}

/// Judges the files of `sources.d` against each other and against the room.
pub(super) fn join(
    hub: &Text,
    room: Room,
    judged: Vec<(Text, Judged)>,
) -> (Vec<HubSource>, Vec<Problem>) {
    let mut problems = duplicates(&judged);
    if judged.len() > SOURCES_MAX {
        let met = format!("{} sources are more than {SOURCES_MAX}", judged.len());
        problems.push(Problem::of_file(&hub.file, met, "give the others to a second hub"));
    }
    problems.extend(shares_exceed(hub, room.ring, &judged));
    let default = default_share(room.ring, &judged);
    let mut sources = Vec::new();
    for (_, one) in judged {
        problems.extend(one.problems);
        if let Some(file) = one.file {
            let share = file.nvram_share.unwrap_or(default);
            let nvram_share = if file.enabled { share } else { ByteCount(0) };
            sources.push(HubSource { file, nvram_share });
        }
    }
    sources.sort_by(|a, b| a.file.name.cmp(&b.file.name));
    (sources, problems)
}

/// Takes one file after the other as long as the guarantees hold; who does not fit is named. The first
/// `running` of them are there: a file system that was made smaller puts none of them out.
pub(super) fn fit(
    room: Room,
    running: usize,
    judged: Vec<(Text, Judged)>,
) -> (Vec<(Text, Judged)>, Vec<Problem>) {
    let (mut fit, mut problems, mut least) = (Vec::new(), Vec::new(), 0_u64);
    for (at, (text, one)) in judged.into_iter().enumerate() {
        let enabled = one.file.as_ref().filter(|file| file.enabled);
        let with = least.saturating_add(enabled.map_or(0, share_of));
        let logs = room.logs.filter(|logs| at >= running && enabled.is_some() && with > logs.0);
        let (met, fix) = if with > room.ring.0 || fit.len() == SOURCES_MAX {
            let met = format!(
                "the guaranteed shares of all sources would come to {} in {} of NVRAM, of at most \
                 {SOURCES_MAX} sources",
                format_size(ByteCount(with)),
                format_size(room.ring),
            );
            (met, "raise nvram.size in hub.toml, or lower nvram_share")
        } else if let Some(logs) = logs {
            let met = format!(
                "what all sources are guaranteed of NVRAM would come to {}, and must find room in \
                 their logs, whose file system has {}",
                format_size(ByteCount(with)),
                rounded_up(logs.0),
            );
            (met, "put log.dir of hub.toml on a larger file system, or lower nvram_share")
        } else {
            least = with;
            fit.push((text, one));
            continue;
        };
        let mut problem = Problem::of_file(&text.file, met, fix);
        problem.key = "nvram_share".into();
        problem.place = one.share.as_ref().map(|span| text.place(span));
        problems.push(problem);
    }
    (fit, problems)
}

/// What is guaranteed of the ring must be able to leave it: said of all together.
pub(super) fn logs_exceed(hub: &Text, room: Room, judged: &[(Text, Judged)]) -> Option<Problem> {
    let enabled = judged.iter().filter_map(|(_, one)| one.file.as_ref()).filter(|f| f.enabled);
    let least = enabled.fold(0_u64, |sum, file| sum.saturating_add(share_of(file)));
    let logs = room.logs.filter(|logs| least > logs.0)?;
    let met = format!(
        "what all sources are guaranteed of NVRAM comes to {}, and must find room in their logs, \
         whose file system has {}",
        format_size(ByteCount(least)),
        rounded_up(logs.0),
    );
    let fix = "put the logs on a larger file system, or lower nvram_share";
    Some(Problem { key: "log.dir".into(), ..Problem::of_file(&hub.file, met, fix) })
}

fn duplicates(judged: &[(Text, Judged)]) -> Vec<Problem> {
    let mut first: BTreeMap<&SourceName, &Text> = BTreeMap::new();
    let mut problems = Vec::new();
    for (text, one) in judged {
        let Some(name) = &one.name else { continue };
        if let Some(other) = first.insert(name.get_ref(), text) {
            let met = format!("{} is the name in {} as well", name.get_ref(), other.file.display());
            let mut problem = Problem::of_file(&text.file, met, "give each source its own name");
            problem.key = "name".into();
            problem.place = Some(text.place(&name.span()));
            problems.push(problem);
        }
    }
    problems
}

/// Sources that take part: how many leave their share to us, and what the others ask for.
fn asked(judged: &[(Text, Judged)]) -> (u64, u64) {
    let enabled = judged.iter().filter_map(|(_, one)| one.file.as_ref()).filter(|f| f.enabled);
    enabled.fold((0, 0), |(open, sum), file| match file.nvram_share {
        None => (open + 1, sum),
        Some(share) => (open, sum.saturating_add(share.0)),
    })
}

/// An equal part of half of what the files leave; the other half is there to burst into.
fn default_share(ring: ByteCount, judged: &[(Text, Judged)]) -> ByteCount {
    let (open, sum) = asked(judged);
    let part = ring.0.saturating_sub(sum) / 2 / open.max(1);
    // Whole KiB, so that it prints as one.
    ByteCount(part.max(NVRAM_SHARE_BYTES_MIN) / 1024 * 1024)
}

/// The guaranteed shares together must fit the ring, or the guarantee is none.
fn shares_exceed(hub: &Text, ring: ByteCount, judged: &[(Text, Judged)]) -> Vec<Problem> {
    let (open, sum) = asked(judged);
    let least = sum.saturating_add(open.saturating_mul(NVRAM_SHARE_BYTES_MIN));
    if least <= ring.0 {
        return Vec::new();
    }
    let enabled = judged.iter().filter_map(|(_, one)| one.file.as_ref()).filter(|f| f.enabled);
    let met = format!(
        "the guaranteed shares of {} sources, at least {} each, come to {}; nvram.size is {}",
        to_u64(enabled.count()),
        format_size(ByteCount(NVRAM_SHARE_BYTES_MIN)),
        format_size(ByteCount(least)),
        format_size(ring),
    );
    let needed = format_size(ByteCount(least));
    let fix = format!("raise nvram.size in hub.toml to {needed} or more, or lower nvram_share");
    let largest = judged
        .iter()
        .filter_map(|(text, one)| {
            Some((one.file.as_ref()?.nvram_share?, text, one.share.as_ref()?))
        })
        .max_by_key(|(share, _, _)| *share);
    let mut problem = match largest {
        Some((_, text, span)) => {
            let mut problem = Problem::of_file(&text.file, met, fix);
            problem.place = Some(text.place(span));
            problem
        }
        None => Problem::of_file(&hub.file, met, fix),
    };
    problem.key = "nvram_share and nvram.size".into();
    vec![problem]
}
