//! The sizing rules of section 13, computed for one configuration: what `config check` prints, and
//! what `onboard` holds a new source to.
//!
//! Rates and times of CPs are not in any file, so a line says what the configured size carries, and
//! the administrator compares it with what the machine is meant to do.
//!
//! Three sums are known: the guaranteed shares of the ring, what the source logs may take, and the
//! volumes that the files name. [`fitting`] says which of them one more source would break. The room
//! of the logs is looked at where they lie, so it is what there is now.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use super::problem::Problem;
use super::quantity::format_size;
use super::schema::{HubConfig, SOURCE_NVRAM, SourceConfig, SourceFile, VolumeConfig};
use crate::limits::{GIB, MIB, NVRAM_SHARE_BYTES_MIN, SOURCES_MAX};
use crate::units::convert::to_u64;
use crate::units::numbers::ByteCount;

/// Memory of a source beside its NVRAM.
const SOURCE_MEMORY_BYTES: u64 = 64 * MIB;
/// NVRAM of a source over peak write rate times time of one CP.
const SOURCE_NVRAM_FACTOR: u64 = 4;
/// Seconds of the steady rate that the hub's ring holds beside the shares.
const HUB_RING_SECONDS: u64 = 4;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SizingLine {
    /// What it is about.
    pub what: &'static str,
    /// Its size in bytes.
    pub bytes: u64,
    /// What that carries, in words.
    pub carries: String,
}

/// The lines, and what an administrator may want to think over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sizing {
    /// One for each rule.
    pub lines: Vec<SizingLine>,
    /// Allowed, but rarely meant.
    pub notes: Vec<String>,
}

/// Of a hub.
pub fn of_hub(hub: &HubConfig) -> Sizing {
    let enabled = || hub.sources.iter().filter(|source| source.file.enabled);
    let shares = enabled().fold(0, |sum, source| sum + source.nvram_share.0);
    let rest = hub.nvram.size.0.saturating_sub(shares);
    let count = to_u64(enabled().count());
    let mut notes = Vec::new();
    if hub.sources.is_empty() {
        notes.push(format!("no source has a file in {}", hub.sources_dir.display()));
    }
    let ring = SizingLine {
        what: "ring",
        bytes: hub.nvram.size.0,
        carries: format!(
            "{} guaranteed to {count} {}; the rest takes {} MiB/s for {HUB_RING_SECONDS} s",
            format_size(ByteCount(shares)),
            if count == 1 { "source" } else { "sources" },
            rest / HUB_RING_SECONDS / MIB,
        ),
    };
    let room = log_room(&hub.log_dir).unwrap_or(0);
    let wanted = logs_of(enabled().map(|source| &source.file));
    let log = SizingLine {
        what: "log room",
        bytes: room,
        carries: format!(
            "free or in logs below {}; the sources may fill {}: log_limit, else {} of NVRAM each",
            hub.log_dir.display(),
            rounded_up(wanted),
            format_size(SOURCE_NVRAM),
        ),
    };
    if wanted > room {
        notes.push("the logs of the sources together may become larger than their room".into());
    }
    let volumes: Vec<&VolumeConfig> =
        hub.sources.iter().flat_map(|source| &source.file.volumes).collect();
    let pool = hub.pool.size_met();
    let mut lines = vec![ring, log, pool_line(pool)];
    lines.extend(volumes_line("pinned volumes", &volumes, pool, &mut notes));
    Sizing { lines, notes }
}

/// Of a source.
pub fn of_source(source: &SourceConfig) -> Sizing {
    let nvram = source.nvram.size.0;
    let ring = SizingLine {
        what: "NVRAM",
        bytes: nvram,
        carries: format!(
            "a peak of {} MiB/s if a CP takes 1 s, half of that at 2 s",
            nvram / SOURCE_NVRAM_FACTOR / MIB,
        ),
    };
    let memory = SizingLine {
        what: "memory",
        bytes: nvram.saturating_add(nvram / 2).saturating_add(SOURCE_MEMORY_BYTES),
        carries: "needed at most, beside what clients have under way: 1.5 x NVRAM and 64MiB".into(),
    };
    let mut notes = Vec::new();
    let volumes: Vec<&VolumeConfig> = source.volumes.iter().collect();
    let pool = source.pool.size_met();
    let mut lines = vec![ring, memory, pool_line(pool)];
    lines.extend(volumes_line("volumes", &volumes, pool, &mut notes));
    Sizing { lines, notes }
}

fn pool_line(ByteCount(bytes): ByteCount) -> SizingLine {
    // Used bytes x 1.1 have to fit.
    let used = rounded_down(bytes / 11 * 10);
    SizingLine {
        what: "pool",
        bytes,
        carries: format!("{used} in use (used bytes x 1.1), less what kept CPs hold"),
    }
}

/// Whole GiB or, below ten of them, whole MiB.
fn rounded_down(bytes: u64) -> String {
    let unit = if bytes >= 10 * GIB { GIB } else { MIB };
    format_size(ByteCount(bytes / unit * unit))
}

fn volumes_line(
    what: &'static str,
    volumes: &[&VolumeConfig],
    pool: ByteCount,
    notes: &mut Vec<String>,
) -> Option<SizingLine> {
    let bytes = volumes.iter().fold(0_u64, |sum, volume| sum.saturating_add(volume.size.0));
    let percent = percent_of(bytes, pool.0);
    if is_thin(bytes, pool.0) {
        notes.push("thin: the volumes together, and a tenth more, are larger than the pool".into());
    }
    (!volumes.is_empty()).then(|| SizingLine {
        what,
        bytes,
        carries: format!("{percent}% of the pool if all of it were written"),
    })
}

fn percent_of(volumes: u64, pool: u64) -> u128 {
    u128::from(volumes) * 100 / u128::from(pool.max(1))
}

/// Whether volumes of so many bytes, all of them written, find no room in a pool of that size.
pub fn is_thin(volumes: u64, pool: u64) -> bool {
    with_a_tenth(volumes) > pool
}

/// Used bytes x 1.1.
fn with_a_tenth(bytes: u64) -> u64 {
    bytes.saturating_add(bytes / 10)
}

/// The volumes that the files of a hub name, in bytes. Those that are not enabled have images too.
pub fn volumes_of<'a>(files: impl Iterator<Item = &'a SourceFile>) -> u64 {
    files.flat_map(|file| &file.volumes).fold(0, |sum, volume| sum.saturating_add(volume.size.0))
}

fn sum<'a>(files: impl Iterator<Item = &'a SourceFile>, of: impl Fn(&SourceFile) -> u64) -> u64 {
    files.fold(0, |sum, file| sum.saturating_add(of(file)))
}

/// The least share of the ring that a source is guaranteed; its log has to take as much.
pub(super) fn share_of(file: &SourceFile) -> u64 {
    file.nvram_share.map_or(NVRAM_SHARE_BYTES_MIN, |share| share.0)
}

/// What the logs may become: `log_limit`, or the NVRAM of a source whose file does not name it.
fn logs_of<'a>(files: impl Iterator<Item = &'a SourceFile>) -> u64 {
    sum(files, |file| file.log_limit.unwrap_or(SOURCE_NVRAM).0)
}

/// What the files promise of the logs: `log_limit`, or as much as a source is guaranteed of the ring.
fn promised_of<'a>(files: impl Iterator<Item = &'a SourceFile>) -> u64 {
    sum(files, |file| file.log_limit.map_or_else(|| share_of(file), |limit| limit.0))
}

/// What holds of a hub if `new` is a source of it beside the others.
#[derive(Debug, Default)]
pub struct Fitting {
    /// Promises that cannot be kept.
    pub misfits: Vec<Problem>,
    /// What is allowed and may turn out to be too much: sentences.
    pub notes: Vec<String>,
}

/// Holds `new` to the sizing of that hub; a file of the same name is taken for the one that it replaces.
/// What the files promise must fit. Volumes may go beyond the pool, which is shown as a ratio.
pub fn fitting(hub: &HubConfig, new: &SourceFile) -> Fitting {
    let others = || hub.sources.iter().map(|source| &source.file).filter(|f| f.name != new.name);
    let all = || others().chain(std::iter::once(new));
    let promised = || all().filter(|file| file.enabled);
    let problem = |key: &str, met: String, fix: String| Problem {
        key: key.into(),
        ..Problem::of_file(&hub.file, met, fix)
    };
    let mut fitting = Fitting::default();
    let count = all().count();
    if count > SOURCES_MAX {
        let met = format!("{count} sources are more than {SOURCES_MAX}");
        fitting.misfits.push(problem("sources_dir", met, "give the others to a second hub".into()));
    }
    let shares = sum(promised(), share_of);
    if shares > hub.nvram.size.0 {
        let met = format!(
            "with {} the guaranteed shares of {count} sources come to {}, and the ring has {}",
            new.name,
            rounded_up(shares),
            format_size(hub.nvram.size),
        );
        let fix = format!(
            "raise nvram.size to {} or more and restart the hub, or lower nvram_share of others",
            rounded_up(shares)
        );
        fitting.misfits.push(problem("nvram.size", met, fix));
    }
    let logs = Logs { promised: promised_of(promised()), wanted: logs_of(promised()) };
    logs.fit(hub, new, &mut fitting);
    let (volumes, pool) = (volumes_of(all()), hub.pool.size_met().0);
    if is_thin(volumes, pool) {
        fitting.notes.push(format!(
            "thin: the volumes of all sources come to {}, {}% of the pool; written in full, they need a tenth \
             more than they have: `mirrorhub device add` gives it more",
            rounded_up(volumes),
            percent_of(volumes, pool),
        ));
    }
    fitting
}

/// Bytes of the logs of all sources together.
struct Logs {
    promised: u64,
    wanted: u64,
}

impl Logs {
    /// Holds them to the room that there is.
    fn fit(&self, hub: &HubConfig, new: &SourceFile, fitting: &mut Fitting) {
        let Self { promised, wanted } = *self;
        let problem = |met: String, fix: &str| Problem {
            key: "log.dir".into(),
            ..Problem::of_file(&hub.file, met, fix)
        };
        let directory = hub.log_dir.display();
        let Some(room) = log_room(&hub.log_dir) else {
            let met = format!("the room of {directory} cannot be read");
            fitting.misfits.push(problem(met, "look at path and mode"));
            return;
        };
        if promised > room {
            let met = format!(
                "with {} the logs of all sources are promised {} (log_limit, else nvram_share); \
                 {directory} has room for {}",
                new.name,
                rounded_up(promised),
                rounded_down(room),
            );
            let fix = "make room there, or lower log_limit of others";
            fitting.misfits.push(problem(met, fix));
        } else if wanted > room {
            fitting.notes.push(format!(
                "the logs of all sources may come to {} (log_limit, else {} of NVRAM each); \
                 {directory} has room for {}",
                rounded_up(wanted),
                format_size(SOURCE_NVRAM),
                rounded_down(room),
            ));
        }
    }
}

/// Whole MiB or, from ten of them, whole GiB, that are enough.
pub(super) fn rounded_up(bytes: u64) -> String {
    let unit = if bytes > 10 * GIB { GIB } else { MIB };
    format_size(ByteCount(bytes.div_ceil(unit).saturating_mul(unit)))
}

/// Bytes that logs below `directory` have or may still take: what is free on its file system, or on
/// that of its nearest parent that is there, and what the logs have.
fn log_room(directory: &Path) -> Option<u64> {
    let found = directory.ancestors().find_map(|path| rustix::fs::statvfs(path).ok())?;
    let free = found.f_bavail.checked_mul(found.f_frsize)?;
    // A directory that is not there yet, or may not be read, has no logs for us.
    Some(free.saturating_add(held_below(directory)))
}

/// What logs have of the medium: files of directories of sources.
fn held_below(directory: &Path) -> u64 {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let files = entries(directory).flat_map(|source| entries(&source.path()).collect::<Vec<_>>());
    let logs = files.filter(|file| file.path().extension().is_some_and(|ending| ending == "log"));
    let held = logs.filter_map(|file| Some(file.metadata().ok()?.blocks().saturating_mul(512)));
    held.fold(0, u64::saturating_add)
}

/// Bytes of the file system on which logs below `directory` lie, used or not.
pub(super) fn log_bytes(directory: &Path) -> Option<u64> {
    let found = directory.ancestors().find_map(|path| rustix::fs::statvfs(path).ok())?;
    // Some network file systems do not say.
    found.f_blocks.checked_mul(found.f_frsize).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::schema::{DeviceConfig, HubSource, PoolConfig, Raid, ScrubConfig};

    #[test]
    fn a_pool_carries_its_size_over_one_point_one() {
        let pool = ByteCount(1100 * MIB);
        assert!(pool_line(pool).carries.starts_with("1000MiB in use"));
        let mut notes = Vec::new();
        let volume = VolumeConfig { name: "v".parse().unwrap(), size: ByteCount(550 * MIB) };
        let line = volumes_line("volumes", &[&volume], pool, &mut notes).unwrap();
        assert_eq!(
            (line.carries.as_str(), notes.len()),
            ("50% of the pool if all of it were written", 0)
        );
        let three = [&volume, &volume, &volume];
        volumes_line("volumes", &three, pool, &mut notes).unwrap();
        assert_eq!(
            notes,
            ["thin: the volumes together, and a tenth more, are larger than the pool"]
        );
        assert_eq!(volumes_line("volumes", &[], pool, &mut notes), None);
    }

    /// Goal: of a pool that was grown the labels say what it has; the count of its devices does not.
    #[test]
    fn a_grown_pool_is_as_large_as_its_arrays() {
        use crate::raid::{assemble, layout::Level, span};
        let dir = tempfile::tempdir().unwrap();
        let device = |n: u64| DeviceConfig {
            path: dir.path().join(format!("disk{n}")),
            size: ByteCount(4 * MIB),
        };
        let mut pool = PoolConfig {
            raid: Raid::Parity2,
            devices: (0..4).map(device).collect(),
            scrub: ScrubConfig::default(),
            rebuild_limit: None,
        };
        let small = pool.size();
        assert_eq!(pool.size_met(), small, "nothing is there: as the file says");
        let open =
            |one: &DeviceConfig| crate::raid::files::new_device(&one.path, one.size).unwrap();
        let devices: Vec<_> = pool.devices.iter().map(open).collect();
        let home = assemble::create(Level::Parity2, &devices).unwrap();
        let more: Vec<DeviceConfig> = (4..8).map(device).collect();
        let added: Vec<_> = more.iter().map(open).collect();
        span::add(&home, crate::units::ids::ArrayId([3; 16]), &added).unwrap();
        pool.devices.extend(more);
        assert!(pool.size().0 > 2 * small.0, "the control: eight devices are taken for one array");
        assert_eq!(pool.size_met().0, 2 * small.0, "while a process has them");
        pool.devices.truncate(4);
        assert_eq!(pool.size_met(), small, "the file does not name the others yet");
    }

    #[test]
    fn room_is_that_of_the_nearest_parent_and_what_logs_have_counts() {
        let directory = tempfile::tempdir().unwrap();
        let logs = directory.path().join("not/yet/there");
        let free = log_room(&logs).unwrap();
        assert!(free > 0 && log_bytes(&logs).unwrap() >= free);
        std::fs::create_dir_all(logs.join("id")).unwrap();
        for (name, counts) in [("id/1.log", true), ("id/1.txt", false), ("1.log", false)] {
            std::fs::write(logs.join(name), vec![7; 1 << 20]).unwrap();
            std::fs::File::open(logs.join(name)).unwrap().sync_all().unwrap();
            let held = held_below(&logs);
            assert_eq!(held >= 1 << 20, counts, "{name}: {held}");
            std::fs::remove_file(logs.join(name)).unwrap();
        }
    }

    fn file(name: &str, more: &str) -> SourceFile {
        use crate::config::load::{Loaded, load};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(format!("{name}.toml"));
        std::fs::write(&path, format!("name = \"{name}\"\nenabled = true\n{more}")).unwrap();
        let Loaded::SourceFile(file) = load(&path).unwrap() else { panic!("{name} is a source") };
        *file
    }

    fn hub(sources: &[SourceFile]) -> (tempfile::TempDir, HubConfig) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hub.toml");
        let text =
            "[nvram]\nsize = \"32MiB\"\n[pool]\ndevices = [{ path = \"d\", size = \"1100MiB\" }]";
        std::fs::write(&path, text).unwrap();
        std::fs::create_dir(directory.path().join("sources.d")).unwrap();
        let mut hub = crate::config::load::load_hub(&path).unwrap();
        let of = |file: &SourceFile| HubSource { file: file.clone(), nvram_share: ByteCount(0) };
        hub.sources = sources.iter().map(of).collect();
        (directory, hub)
    }

    fn keys(hub: &HubConfig, new: &SourceFile) -> Vec<String> {
        fitting(hub, new).misfits.into_iter().map(|problem| problem.key).collect()
    }

    /// Goal: what just fits is taken, more of it is named by its key, and volumes beyond the pool are told.
    #[test]
    fn one_more_than_fits_is_named() {
        let limit = "log_limit = \"8MiB\"\n";
        let with = |name: &str, more: &str| file(name, &format!("{limit}{more}"));
        let volume = |mib: u64| format!("[[volume]]\nname = \"v\"\nsize = \"{mib}MiB\"\n");
        let shares = [with("a", "nvram_share = \"20MiB\"\n"), with("b", &volume(400))];
        let (_directory, hub) = hub(&shares);
        let none: [&str; 0] = [];
        assert_eq!(keys(&hub, &with("c", "nvram_share = \"8MiB\"\n")), none);
        assert_eq!(keys(&hub, &with("c", "nvram_share = \"8200KiB\"\n")), ["nvram.size"]);
        // Its own file is the one that it replaces, and who is not enabled is promised nothing.
        assert_eq!(keys(&hub, &with("a", "nvram_share = \"28MiB\"\n")), none);
        assert_eq!(keys(&hub, &with("a", "nvram_share = \"32MiB\"\n")), ["nvram.size"]);
        let mut off = hub.clone();
        off.sources[0].file.enabled = false;
        assert_eq!(keys(&off, &with("c", "nvram_share = \"28MiB\"\n")), none);
        // 1000 MiB with a tenth more are the pool's 1100 MiB. Images of who is not enabled stay.
        off.sources[1].file.enabled = false;
        for hub in [&hub, &off] {
            let of = |mib: u64| fitting(hub, &with("c", &volume(mib)));
            assert!(of(600).notes.is_empty() && of(601).misfits.is_empty());
            let [note] = &of(601).notes[..] else { panic!("one note") };
            assert!(note.contains("come to 1001MiB, 91% of the pool"), "{note}");
        }
    }

    /// What the logs are promised is held against the room that is there; what they may become is told.
    #[test]
    fn logs_that_find_no_room_are_named() {
        let (_directory, hub) = hub(&[file("a", "log_limit = \"8MiB\"\n")]);
        let room = log_room(&hub.log_dir).unwrap();
        let tib = (room >> 40) + 1;
        let (less, more) = (
            file("b", "log_limit = \"16MiB\"\n"),
            file("b", &format!("log_limit = \"{tib}TiB\"\n")),
        );
        assert!(keys(&hub, &less).is_empty() && fitting(&hub, &less).notes.is_empty());
        assert_eq!(keys(&hub, &more), ["log.dir"]);
        let unnamed = file("c", "");
        assert_eq!(logs_of([&less, &unnamed].into_iter()), (16 << 20) + SOURCE_NVRAM.0);
        assert_eq!(promised_of([&less, &unnamed].into_iter()), (16 << 20) + NVRAM_SHARE_BYTES_MIN);
        let unused = SourceFile { enabled: false, ..more };
        assert!(keys(&hub, &unused).is_empty());
        // Almost all of it is promised: what one more may take besides is no promise.
        let most = file("d", &format!("log_limit = \"{}MiB\"\n", room / MIB - 300));
        let full = HubConfig {
            sources: vec![HubSource { file: most, nvram_share: ByteCount(0) }],
            ..hub.clone()
        };
        let of = fitting(&full, &unnamed);
        assert!(of.misfits.is_empty() && of.notes.len() == 1, "{of:?}");
        assert!(of.notes[0].contains("the logs of all sources may come to"), "{of:?}");
    }
}
