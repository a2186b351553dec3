//! Status for people: one row a source, worst first, then what is wrong and what to do.
//!
//! Pure: a document and a look in, text out.

use comfy_table::presets::NOTHING;
use comfy_table::{Attribute, Cell, CellAlignment, Color, Table};

use super::device::filling;
use super::scrub::how_far;
use super::terminal::Look;
use super::words::{count, percent, size, time};
use crate::config::sizing::is_thin;
use crate::metric::catalogue::STEPS;
use crate::status::document::{Policy, SourceEntry, State, StatusDocument, VolumeTrouble};
use crate::status::health::HealthWord;
use crate::status::seed::SeedStatus;
use crate::status::upkeep::ScrubStatus;
use crate::units::names::SourceName;
use crate::units::times::timestamp;

/// The whole view; with `only` that source in detail.
pub fn view(document: &StatusDocument, only: Option<&SourceName>, look: Look) -> String {
    let paint = Paint { look };
    let all = document.sources();
    let asked = |source: &&SourceEntry| only.is_none_or(|name| source.name == *name);
    let mut sources: Vec<&SourceEntry> = all.iter().filter(asked).collect();
    sources.sort_by(|a, b| b.state.word().cmp(&a.state.word()).then_with(|| a.name.cmp(&b.name)));
    let mut text = headline(document, &sources, &paint);
    text.push_str(&stores(document));
    if sources.is_empty() {
        text.push_str("\nno sources\n");
        return text;
    }
    text.push('\n');
    text.push_str(&ladder(&sources, &paint));
    text.push_str(&troubles(document, &sources, &paint));
    let own = matches!(document, StatusDocument::Source(_));
    if let (true, [source]) = (only.is_some() || own, sources.as_slice()) {
        text.push('\n');
        text.push_str(&details(source, &paint));
        return text;
    }
    // Of the others what has ended is only news.
    for source in sources {
        for seed in source.seeds.iter().filter(|seed| seed.ended_at_seconds.is_none()) {
            text.push_str(&seed_lines(seed, Some(&source.name), &paint));
        }
    }
    text
}

/// What the terminal is told for the colour of a word.
pub(super) const fn colour_of(word: HealthWord) -> &'static str {
    match word {
        HealthWord::Ok => "32",
        HealthWord::Warning => "33",
        HealthWord::Critical => "1;31",
    }
}

struct Paint {
    look: Look,
}

impl Paint {
    fn with(&self, code: &str, text: &str) -> String {
        if self.look.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn word(&self, word: HealthWord, text: &str) -> String {
        self.with(colour_of(word), text)
    }

    fn dim(&self, text: &str) -> String {
        self.with("2", text)
    }

    /// A sign that is told apart without colours too.
    fn sign(&self, word: HealthWord) -> &'static str {
        match (word, self.look.unicode) {
            (HealthWord::Ok, true) => "\u{25cf}",
            (HealthWord::Warning, true) => "\u{25b2}",
            (HealthWord::Critical, true) => "\u{2716}",
            (HealthWord::Ok, false) => "o",
            (HealthWord::Warning, false) => "!",
            (HealthWord::Critical, false) => "X",
        }
    }
}

/// `hub: warning   3 sources: 2 in-sync, 1 behind`
fn headline(document: &StatusDocument, sources: &[&SourceEntry], paint: &Paint) -> String {
    let word = document.health().word;
    let shown = paint.word(word, &format!("{} {word}", paint.sign(word)));
    match document {
        StatusDocument::Source(_) => format!("source  {shown}\n"),
        StatusDocument::Hub(_) => {
            let states: Vec<String> = State::ALL
                .into_iter()
                .filter_map(|state| {
                    let number = sources.iter().filter(|source| source.state == state).count();
                    (number > 0).then(|| format!("{number} {state}"))
                })
                .collect();
            let states =
                if states.is_empty() { String::new() } else { format!(": {}", states.join(", ")) };
            format!("hub  {shown}   {}{states}\n", count(sources.len(), "source"))
        }
    }
}

/// The ring and the pool, one line each.
fn stores(document: &StatusDocument) -> String {
    let mut text = String::new();
    if let Some(nvram) = document.nvram() {
        text.push_str(&format!(
            "  NVRAM  {} of {} in use ({}%), durable by {}\n",
            size(nvram.used_bytes),
            size(nvram.capacity_bytes),
            percent(nvram.used_bytes, nvram.capacity_bytes),
            nvram.durability,
        ));
    }
    if let Some(pool) = document.pool() {
        let part = |bytes, whose| match bytes {
            0 => String::new(),
            bytes => format!(", {} of it {whose}", size(bytes)),
        };
        let kept = part(pool.kept_bytes, "kept by name");
        let pinned = part(pool.pinned_bytes, "pinned by readers");
        let in_use = pool.used_bytes + pool.kept_bytes + pool.pinned_bytes;
        let reserve = match pool.reserve_bytes {
            0 => String::new(),
            bytes => format!(" ({} of it in reserve)", size(bytes)),
        };
        text.push_str(&format!(
            "  pool   {} of {} in use ({}%), {} free{reserve}{kept}{pinned}\n",
            size(in_use),
            size(pool.total_bytes),
            percent(in_use, pool.total_bytes),
            size(pool.free_bytes),
        ));
        if let Some(volumes) = pool.volumes_bytes.filter(|all| is_thin(*all, pool.total_bytes)) {
            let (all, ratio) = (size(volumes), percent(volumes, pool.total_bytes));
            text.push_str(&format!(
                "  thin   {all} of volumes in files of sources, {ratio}% of the pool\n"
            ));
        }
        if !pool.devices.is_empty() {
            let there = pool.devices.iter().filter(|device| device.state == "in").count();
            let all = pool.devices.len();
            let repaired = match pool.repaired_blocks {
                0 => String::new(),
                blocks => format!(", {blocks} blocks repaired"),
            };
            text.push_str(&format!("  disks  {there} of {all} in{repaired}\n"));
        }
        if !pool.pending_devices.is_empty() {
            let paths = pool.pending_devices.join(" ");
            text.push_str(&format!("  disks  {paths}: not added yet\n"));
        }
        if let Some(rebuild) = &pool.rebuild {
            text.push_str(&format!("  disks  {}\n", filling(rebuild)));
        }
        if let Some(scrub) = &pool.scrub {
            text.push_str(&format!("  scrub  {}\n", scrub_line(scrub)));
        }
    }
    text
}

/// How a scrub is, or when the last one was and how it ended.
fn scrub_line(scrub: &ScrubStatus) -> String {
    if scrub.running {
        return format!("running: {}", how_far(scrub));
    }
    let mended = scrub.repaired_blocks + scrub.repaired_copies + scrub.from_other_end_blocks;
    let found = match (mended, scrub.lost_blocks) {
        (0, 0) => String::new(),
        (mended, 0) => format!(", {mended} blocks mended"),
        (mended, lost) => format!(", {mended} blocks mended, {lost} lost"),
    };
    let when = match scrub.age_seconds {
        Some(age) => format!(", {} ago", time(age)),
        None => String::new(),
    };
    format!("{}{found}{when}", scrub.state)
}

/// Columns that are left out first on a narrow terminal.
const DISPENSABLE: &[&str] = &["APPLIED", "DRAINED", "IMAGE AGE", "CP"];

fn ladder(sources: &[&SourceEntry], paint: &Paint) -> String {
    let mut omitted = 0;
    loop {
        let omit = &DISPENSABLE[..omitted];
        let text = table(sources, omit, paint);
        // Measured without colours, which take no room.
        let plain = Paint { look: Look { colour: false, ..paint.look } };
        let widest = table(sources, omit, &plain).lines().map(|line| line.chars().count()).max();
        let fits = paint.look.width.is_none_or(|width| widest <= Some(usize::from(width)));
        if fits || omitted == DISPENSABLE.len() {
            let note = "the last columns: bytes that stand behind ACKNOWLEDGED";
            let lags =
                sources.iter().any(|source| source.acknowledged_bytes > source.visible_bytes);
            return if lags { format!("{text}{}\n", paint.dim(note)) } else { text };
        }
        omitted += 1;
    }
}

fn table(sources: &[&SourceEntry], omit: &[&str], paint: &Paint) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).force_no_tty();
    if paint.look.colour {
        table.enforce_styling();
    }
    let keep = |cells: Vec<(&'static str, Cell)>| -> Vec<Cell> {
        cells.into_iter().filter(|(name, _)| !omit.contains(name)).map(|(_, cell)| cell).collect()
    };
    let names = keep(row_cells_header().into_iter().map(|name| (name, heading(name))).collect());
    let last = names.len().saturating_sub(1);
    table.set_header(names);
    for source in sources {
        table.add_row(keep(row(source, paint)));
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if index == last { 0 } else { 2 }));
        if index >= 2 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn heading(name: &str) -> Cell {
    Cell::new(name).add_attribute(Attribute::Bold)
}

const fn row_cells_header() -> [&'static str; 10] {
    [
        "SOURCE",
        "STATE",
        "CP",
        "LAG",
        "IMAGE AGE",
        "ACKNOWLEDGED",
        "STAGED",
        "DRAINED",
        "APPLIED",
        "VISIBLE",
    ]
}

fn row(source: &SourceEntry, paint: &Paint) -> Vec<(&'static str, Cell)> {
    let word = source.state.word();
    let state = Cell::new(format!("{} {}", paint.sign(word), source.state)).fg(match word {
        HealthWord::Ok => Color::DarkGreen,
        HealthWord::Warning => Color::DarkYellow,
        HealthWord::Critical => Color::Red,
    });
    let age = source.image_age_seconds.map_or_else(|| "-".to_owned(), time);
    let behind = |bytes: u64| match source.acknowledged_bytes.saturating_sub(bytes) {
        0 => "=".to_owned(),
        lag => format!("-{}", size(lag)),
    };
    let unknown = || "-".to_owned();
    let cells = [
        Cell::new(&source.name),
        state,
        Cell::new(source.applied_cp.map_or_else(unknown, |cp| cp.to_string())),
        Cell::new(source.lag_seconds.map_or_else(unknown, time)),
        Cell::new(age),
        Cell::new(size(source.acknowledged_bytes)),
        Cell::new(behind(source.staged_bytes)),
        Cell::new(source.drained_bytes.map_or_else(unknown, behind)),
        Cell::new(source.applied_bytes.map_or_else(unknown, behind)),
        Cell::new(behind(source.visible_bytes)),
    ];
    row_cells_header().into_iter().zip(cells).collect()
}

/// Every source that is not in order, and what of the process is not, with the next step.
fn troubles(document: &StatusDocument, sources: &[&SourceEntry], paint: &Paint) -> String {
    let mut text = String::new();
    for reason in &document.health().reasons {
        let known = document.sources().iter().any(|source| source.name.as_str() == reason.object);
        let shown = sources.iter().any(|source| source.name.as_str() == reason.object);
        if known && !shown {
            continue;
        }
        let sign = paint.word(reason.word, paint.sign(reason.word));
        text.push_str(&format!("\n{sign} {}\n", reason.text));
        if !reason.next_step.is_empty() {
            text.push_str(&format!("  {} {}\n", paint.dim("next:"), reason.next_step));
        }
    }
    text
}

/// All that is known of one source.
fn details(source: &SourceEntry, paint: &Paint) -> String {
    let mut lines = vec![("reason", source.reason.clone())];
    // What is not in order is told with its next step above.
    if source.state.word() == HealthWord::Ok && !source.next_step.is_empty() {
        lines.push(("next", source.next_step.clone()));
    }
    if let Some(policy) = &source.policy {
        lines.push(("policy", promise(policy)));
    }
    if let Some(next) = &source.policy_next {
        lines.push(("next", format!("{}; behind a CP that the hub has", promise(next))));
    }
    if let Some(used) = source.pool_used_bytes {
        let limit = source.pool_limit_bytes;
        let most =
            limit.map_or_else(String::new, |limit| format!(" of {} that it may", size(limit)));
        lines.push(("space", format!("its CPs have {} of the pool{most}", size(used))));
    }
    if let Some(waits) = oldest_waits(source) {
        lines.push(("waits", waits));
    }
    let id = source.id.map_or_else(|| "not known yet".to_owned(), |id| id.to_string());
    lines.push(("id", id));
    lines.push(("epoch", format!("{}, generation {}", source.epoch, source.generation)));
    let mut text = String::new();
    for (name, value) in lines {
        text.push_str(&format!("  {} {value}\n", paint.dim(&format!("{name:<7}"))));
    }
    if !source.volumes.is_empty() {
        text.push_str(&volumes(source, paint));
    }
    for seed in &source.seeds {
        text.push_str(&seed_lines(seed, None, paint));
    }
    text
}

/// `seed of vol0: waiting, 40.3 MiB of 64.0 MiB, taken 2026-11-22T06:00:00Z`, and why.
fn seed_lines(seed: &SeedStatus, of_source: Option<&SourceName>, paint: &Paint) -> String {
    let SeedStatus { volume, state, reason, next_step, .. } = seed;
    let (has, of) = (size(seed.pool_bytes), size(seed.size_bytes));
    let when = |what: &str, at: Option<i64>| {
        at.map_or_else(String::new, |at| format!(", {what} {}", timestamp(at)))
    };
    let (taken, ended) = (when("taken", seed.taken_at_seconds), when(state, seed.ended_at_seconds));
    let volume = of_source.map_or_else(|| volume.to_string(), |name| format!("{name}/{volume}"));
    let line = format!("seed of {volume}: {state}, {has} of {of}{taken}{ended}");
    let mut text = format!("\n{line}\n  {} {reason}\n", paint.dim("reason:"));
    if !next_step.is_empty() {
        text.push_str(&format!("  {} {next_step}\n", paint.dim("next:")));
    }
    text
}

/// How long the oldest write waits for each step; nothing where none is known to wait.
fn oldest_waits(source: &SourceEntry) -> Option<String> {
    let steps = STEPS.iter().zip(source.waits.by_step());
    let known = steps.filter_map(|(step, age)| Some((step, age?)));
    let waits = known.filter(|(_, age)| *age > 0.0);
    let waits: Vec<_> = waits.map(|(step, age)| format!("{} to be {step}", time(age))).collect();
    match waits.is_empty() {
        true => source.waits.visible_seconds.map(|_| "no write waits".to_owned()),
        false => Some(format!("the oldest write {}", waits.join(", "))),
    }
}

fn promise(policy: &Policy) -> String {
    format!(
        "{}, acknowledged when {}, CPs by {}, {} when the hub is lost, {}",
        policy.mode, policy.ack, policy.apply, policy.on_hub_loss, policy.cache
    )
}

fn volumes(source: &SourceEntry, paint: &Paint) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).force_no_tty();
    if paint.look.colour {
        table.enforce_styling();
    }
    // A source that has not met its hub yet shows its own newest CP.
    let root =
        source.applied_cp.map_or_else(|| "ROOT HERE".into(), |cp| format!("ROOT AT CP {cp}"));
    table.set_header(["VOLUME", "SIZE", &root].map(heading));
    for volume in &source.volumes {
        let root = volume.root.map_or_else(|| "-".to_owned(), |root| root.to_string());
        table.add_row([volume.name.to_string(), size(volume.size_bytes), root]);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if index == 2 { 0 } else { 2 }));
        if index == 1 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    let mut text = format!("\n{}\n", lines.join("\n"));
    for volume in &source.volumes {
        let Some(VolumeTrouble { state, reason, next_step, image_cp }) = &volume.trouble else {
            continue;
        };
        let sign = paint.word(HealthWord::Warning, paint.sign(HealthWord::Warning));
        let image = match image_cp {
            Some(0) => "; it has no image".to_owned(),
            Some(cp) => format!("; its image is of CP {cp}"),
            None => String::new(),
        };
        text.push_str(&format!("\n{sign} {} is {state}: {reason}{image}\n", volume.name));
        if !next_step.is_empty() {
            text.push_str(&format!("  {} {next_step}\n", paint.dim("next:")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::document::{AloneSince, NvramStatus, PoolStatus, VolumeStatus, WaitsStatus};
    use crate::units::hash::Root;
    use crate::units::ids::SourceId;

    const MIB: u64 = 1 << 20;

    fn waits([acknowledged, .., applied, visible]: [u64; 5]) -> WaitsStatus {
        WaitsStatus {
            staged_seconds: Some(0.0),
            drained_seconds: Some(0.0),
            applied_seconds: Some(if acknowledged == applied { 0.0 } else { 11.0 }),
            visible_seconds: Some(if acknowledged == visible { 0.0 } else { 12.0 }),
        }
    }

    fn source(name: &str, state: State, ladder: [u64; 5]) -> SourceEntry {
        let (reason, next_step) = match state {
            State::InSync => ("every acknowledged write is durable on the hub", ""),
            State::Behind => ("the pool has no room for CP 18", "give the pool a larger device"),
            State::Waiting
            | State::Syncing
            | State::Offline
            | State::FailedOver
            | State::Fenced
            | State::Faulted
            | State::Retired => ("not heard for 3h 4m", "start the filer, or look at the network"),
        };
        SourceEntry {
            name: name.parse().unwrap(),
            id: Some(SourceId([0x5a; 16])),
            state,
            reason: reason.into(),
            next_step: next_step.into(),
            policy: Some(Policy {
                mode: "sync".into(),
                ack: "durable".into(),
                apply: "reference".into(),
                on_hub_loss: "stop".into(),
                cache: "writethrough".into(),
                lag_limit: None,
            }),
            policy_next: None,
            alone_since: None,
            resync: None,
            epoch: 1,
            generation: 4,
            applied_cp: Some(1817),
            image_age_seconds: Some(if state == State::InSync { 0.0 } else { 11_040.0 }),
            lag_bytes: Some(ladder[0] - ladder[4]),
            lag_seconds: Some(if ladder[0] == ladder[4] { 0.0 } else { 12.0 }),
            acknowledged_bytes: ladder[0],
            staged_bytes: ladder[1],
            drained_bytes: Some(ladder[2]),
            applied_bytes: Some(ladder[3]),
            visible_bytes: ladder[4],
            pool_used_bytes: None,
            pool_limit_bytes: None,
            seeds: Vec::new(),
            waits: waits(ladder),
            volumes: vec![
                VolumeStatus {
                    name: "vol0".parse().unwrap(),
                    size_bytes: 1 << 30,
                    root: Some(Root([0xcd; 32])),
                    trouble: None,
                },
                VolumeStatus {
                    name: "new".parse().unwrap(),
                    size_bytes: 8 * MIB,
                    root: None,
                    trouble: None,
                },
            ],
        }
    }

    fn hub() -> StatusDocument {
        let mut alone = source("filer-a", State::InSync, [512 * MIB; 5]);
        alone.alone_since = Some(AloneSince { epoch: 1, sequence: 90_210 });
        let behind = [900 * MIB, 900 * MIB, 880 * MIB, 640 * MIB, 512 * MIB];
        StatusDocument::hub(
            vec![
                alone,
                source("filer-b", State::Behind, behind),
                source("filer-c", State::Offline, [4096; 5]),
            ],
            Some(NvramStatus {
                used_bytes: 20 * MIB,
                capacity_bytes: 1 << 30,
                durability: "O_DIRECT|O_DSYNC".into(),
            }),
            Some(PoolStatus {
                total_bytes: 8 << 30,
                free_bytes: 5 << 30,
                used_bytes: (3 << 30) - 96 * MIB,
                kept_bytes: 32 * MIB,
                pinned_bytes: 64 * MIB,
                ..PoolStatus::default()
            }),
        )
    }

    #[test]
    fn volumes_beyond_the_pool_are_shown_as_a_ratio() {
        let shown = |bytes: Option<u64>| {
            let mut document = hub();
            let StatusDocument::Hub(shown) = &mut document else { panic!("a hub") };
            shown.pool.as_mut().unwrap().volumes_bytes = bytes;
            let text = view(&document, None, Look::PLAIN);
            text.lines().find(|line| line.starts_with("  thin")).map(str::to_owned)
        };
        assert_eq!(shown(None), None);
        assert_eq!(shown(Some(7 << 30)), None, "with a tenth more it is still smaller");
        let wanted = "  thin   12.0 GiB of volumes in files of sources, 150% of the pool";
        assert_eq!(shown(Some(12 << 30)).as_deref(), Some(wanted));
    }

    #[test]
    fn the_worst_source_comes_first_with_what_to_do() {
        let wanted = "\
hub  \u{2716} critical   3 sources: 1 in-sync, 1 behind, 1 offline
  NVRAM  20.0 MiB of 1.0 GiB in use (1%), durable by O_DIRECT|O_DSYNC
  pool   3.0 GiB of 8.0 GiB in use (37%), 5.0 GiB free, 32.0 MiB of it kept by name, 64.0 MiB of it pinned by readers

SOURCE   STATE        CP   LAG  IMAGE AGE  ACKNOWLEDGED  STAGED    DRAINED     APPLIED     VISIBLE
filer-c  \u{2716} offline  1817   0 s      3h 4m       4.0 KiB       =          =           =           =
filer-b  \u{25b2} behind   1817  12 s      3h 4m     900.0 MiB       =  -20.0 MiB  -260.0 MiB  -388.0 MiB
filer-a  \u{25cf} in-sync  1817   0 s        0 s     512.0 MiB       =          =           =           =
the last columns: bytes that stand behind ACKNOWLEDGED

\u{2716} filer-c is offline: not heard for 3h 4m
  next: start the filer, or look at the network

\u{25b2} filer-a acknowledges writes alone since sequence number 90210 of epoch 1
  next: bring the hub back; the loss of this filer can lose writes

\u{25b2} filer-b is behind: the pool has no room for CP 18
  next: give the pool a larger device
";
        assert_eq!(view(&hub(), None, Look::PLAIN), wanted);
    }

    #[test]
    fn one_source_is_shown_with_policy_and_roots_and_without_the_troubles_of_others() {
        let only = "filer-a".parse().unwrap();
        let text = view(&hub(), Some(&only), Look::PLAIN);
        let wanted = format!(
            "
  reason  every acknowledged write is durable on the hub
  policy  sync, acknowledged when durable, CPs by reference, stop when the hub is lost, writethrough
  waits   no write waits
  id      {}
  epoch   1, generation 4

VOLUME     SIZE  ROOT AT CP 1817
vol0    1.0 GiB  {}
new     8.0 MiB  -
",
            "5a".repeat(16),
            "cd".repeat(32)
        );
        assert!(text.ends_with(&wanted), "{text}");
        assert!(text.contains("alone since sequence number 90210"), "{text}");
        assert!(!text.contains("filer-b") && !text.contains("filer-c"), "{text}");
        let text = view(&hub(), Some(&"filer-b".parse().unwrap()), Look::PLAIN);
        let waits = "  waits   the oldest write 11 s to be applied, 12 s to be visible\n";
        assert!(text.contains(waits), "{text}");
    }

    /// One that waits is shown among all, one that has ended only with its source.
    #[test]
    fn seeds_are_shown_with_what_they_wait_for() {
        let seed = |volume: &str, state: &str, ended| SeedStatus {
            volume: volume.parse().unwrap(),
            state: state.to_owned(),
            reason: "because".to_owned(),
            next_step: if ended { String::new() } else { "connect it".to_owned() },
            taken_at_seconds: Some(0),
            ended_at_seconds: ended.then_some(60),
            size_bytes: 8 * MIB,
            pool_bytes: MIB,
        };
        let mut own = source("filer-a", State::Waiting, [0; 5]);
        own.seeds = vec![seed("vol0", "waiting", false), seed("vol1", "adopted", true)];
        let others = source("filer-b", State::InSync, [0; 5]);
        let document = StatusDocument::hub(vec![own, others], None, None);
        let waits = "1.0 MiB of 8.0 MiB, taken 1970-01-01T00:00:00Z\n  reason: because\n  next: connect it\n";
        let all = view(&document, None, Look::PLAIN);
        assert!(all.ends_with(&format!("\nseed of filer-a/vol0: waiting, {waits}")), "{all}");
        let ended = "\nseed of vol1: adopted, 1.0 MiB of 8.0 MiB, taken 1970-01-01T00:00:00Z, adopted \
                     1970-01-01T00:01:00Z\n  reason: because\n";
        let one = view(&document, Some(&"filer-a".parse().unwrap()), Look::PLAIN);
        assert!(one.ends_with(&format!("\nseed of vol0: waiting, {waits}{ended}")), "{one}");
        let other = view(&document, Some(&"filer-b".parse().unwrap()), Look::PLAIN);
        assert!(!other.contains("seed of"), "{other}");
    }

    #[test]
    fn a_source_shows_itself_in_detail_and_an_empty_hub_says_so() {
        let own = StatusDocument::source(source("filer-a", State::InSync, [0; 5]), None, None);
        let text = view(&own, None, Look::PLAIN);
        assert!(text.starts_with("source  \u{25cf} ok\n\nSOURCE"), "{text}");
        assert!(text.contains("ROOT AT CP 1817"), "{text}");
        assert!(!text.contains("the last columns"), "nothing lags: {text}");
        let empty = view(&StatusDocument::hub(Vec::new(), None, None), None, Look::PLAIN);
        assert_eq!(empty, "hub  \u{25cf} ok   0 sources\n\nno sources\n");
    }

    #[test]
    fn a_narrow_terminal_loses_columns_not_lines() {
        for width in [100, 80, 72] {
            let text = view(&hub(), None, Look { width: Some(width), ..Look::PLAIN });
            let table = text.lines().skip(4).take(4);
            for line in table {
                assert!(line.chars().count() <= usize::from(width), "{width}: {line}");
                assert!(!line.trim().is_empty());
            }
            assert!(text.contains("VISIBLE"), "{text}");
        }
    }

    #[test]
    fn colours_and_signs_only_where_they_can_be_shown() {
        let colour = view(&hub(), None, Look { colour: true, ..Look::PLAIN });
        assert!(colour.contains("\u{1b}["), "{colour}");
        let plain = view(&hub(), None, Look { unicode: false, ..Look::PLAIN });
        assert!(plain.is_ascii(), "{plain}");
    }
}
