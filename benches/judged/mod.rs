//! The targets that figures of the bench `fleet` decide: met or not.

use comfy_table::Table;

use crate::{Runs, median, table};

/// What is held against a bound.
struct Target {
    what: String,
    met: Option<f64>,
    bound: f64,
    at_least: bool,
}

/// All of them that can be judged, of this build.
pub fn targets(runs: &Runs, rate: f64) -> Table {
    let of = |count: usize, mix: &str, name: &str| {
        runs.get(&(count, 0, mix.to_owned())).and_then(|runs| median(runs, name))
    };
    let over = |name: &str, (many, mix): (usize, &str), (few, other): (usize, &str)| {
        Some(of(many, mix, name)? / of(few, other, name)?)
    };
    let mut all = Vec::new();
    let mut most = |what: String, met: Option<f64>, bound: f64| {
        all.push(Target { what, met, bound, at_least: false });
    };
    let few = (100, "flat");
    let many = (1000, "flat");
    most("p99 of 1000 over 100, flat".into(), over("p99 µs", many, few), 2.0);
    for (count, bound) in [(100, 0.25), (1000, 0.05)] {
        let syncs = ["nvram syncs", "log syncs", "pool syncs"].map(|name| of(count, "flat", name));
        let syncs = syncs.into_iter().sum();
        most(format!("syncs a write of {count}, flat"), syncs, bound);
    }
    let mut counts: Vec<usize> = runs.keys().map(|(count, _, _)| *count).collect();
    counts.dedup();
    for &count in &counts {
        let steady = (count, "steady");
        let what = |what: &str| format!("{what}, {count} sources");
        let quiet = over("p99 µs", (count, "noisy"), steady);
        most(what("p99 beside a loud one over p99 alone"), quiet, 1.5);
        let together = over("p99 µs", (count, "cps"), steady);
        most(what("p99 with all CPs at once over p99 before"), together, 2.0);
        let sources = f64::from(u32::try_from(count).unwrap_or(u32::MAX));
        let idle = of(count, "idle", "MiB most");
        most(what("idle memory, MiB"), idle, 64.0 + sources * 40.0 / 1024.0);
        let busy = of(count, "steady", "MiB most");
        let what_busy = what(&format!("memory at {rate} writes/s each, MiB, beside the ring"));
        most(what_busy, busy, 64.0 + sources / 4.0);
        let written = ["ring B/B", "other B/B"].map(|name| of(count, "flat", name));
        let written = written.into_iter().sum::<Option<f64>>();
        let written = written.zip(of(count, "flat", "dropped B/B")).map(|(all, never)| all - never);
        most(what("bytes written per byte, flat"), written, 2.2);
    }
    for (word, name, bound) in [("first", "first s", 2.0), ("last", "last s", 10.0)] {
        let what = format!("kill -9 to the {word} acknowledging of 1000, s");
        most(what, of(1000, "restart", name), bound);
    }
    most("all of 10000 in sync after the start, s".into(), of(10_000, "start", "last s"), 120.0);
    most("p99 of 10000, µs".into(), of(10_000, "steady", "p99 µs"), 200_000.0);
    most("descriptors with 10000".into(), of(10_000, "steady", "files"), 12_000.0);
    all.push(Target {
        what: "writes/s of 1000 over 100, flat".into(),
        met: over("writes/s", many, few),
        bound: 0.9,
        at_least: true,
    });
    shown(all)
}

fn shown(all: Vec<Target>) -> Table {
    let mut table = table(&["target", "wanted", "measured", ""], 1);
    for Target { what, met, bound, at_least } in all {
        let Some(met) = met else { continue };
        let (sign, holds) = if at_least { (">=", met >= bound) } else { ("<=", met <= bound) };
        let word = if holds { "met" } else { "not met" };
        table.add_row([what, format!("{sign} {bound:.2}"), format!("{met:.2}"), word.to_owned()]);
    }
    table
}
