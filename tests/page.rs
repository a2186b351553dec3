//! The page in a real browser: headless Chromium, driven by `tests/page/check.mjs`.
//!
//! Needs `chromium`, `node` and the packages of `tests/page` (`npm ci --prefix tests/page`), which
//! `tests/run` installs. The pictures lie in `target/page` to be looked at.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::{Cluster, SourceSettings, http_get, is_full};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs the check; `ready` is called when it says so. What it measured, or what is wrong.
fn check(mode: &str, place: &str, what: &str, mut ready: impl FnMut()) -> Result<Value, String> {
    let pictures = project("target/page");
    let mut node = Command::new("node")
        .arg(project("tests/page/check.mjs"))
        .args([mode, place, what])
        .arg(pictures)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("node");
    let mut last = String::new();
    for line in BufReader::new(node.stdout.take().expect("stdout")).lines() {
        last = line.expect("a line");
        if last == "ready" {
            ready();
        }
    }
    let output = node.wait_with_output().expect("node ends");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_str(&last).expect("what was measured"))
}

/// Until something is seen, in milliseconds.
const PAINT_MS_MAX: f64 = 1000.0;
/// The same of a thousand rows, beside all the other tests; alone, in the long form, that bound holds too.
const PAINT_MANY_MS_MAX: f64 = 4000.0;
/// Some twenty steps by keyboard, from the search to the details of a source, each driven from without: the
/// driver takes most of it.
const KEYS_MS_MAX: f64 = 6000.0;
/// The longest time in which the page does not answer.
const BUSY_MS_MAX: f64 = 500.0;
/// From a change to its being shown.
const CHANGE_MS_MAX: f64 = 2000.0;

fn within(figures: &Value, name: &str, most: f64) {
    let met = figures[name].as_f64().unwrap_or_else(|| panic!("{name} was not measured"));
    assert!(met < most, "{name}: {met} ms, at most {most}: {figures}");
}

/// Goal: the page shows what is, by keyboard and to everybody, from this port alone.
/// Method: light and dark; accessibility rules with the table, with details, with something wrong;
/// no request elsewhere, no error; a source is killed and the page shows it within 2 s of the API.
#[test]
fn a_browser_shows_the_fleet_and_its_changes() {
    let sources = [SourceSettings::new("filer-a"), SourceSettings::new("filer-b")];
    let mut cluster = Cluster::start(&sources);
    let url = cluster.hub_url("/");
    let figures = check("live", &url, "filer-b", || cluster.kill_source("filer-b"));
    let figures = figures.unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("page: {figures}");
    for scheme in ["light", "dark"] {
        within(&figures[scheme], "paint", PAINT_MS_MAX);
    }
    let shown = figures["shown"].as_f64().expect("milliseconds");
    assert!(shown < 2000.0, "a change was shown {shown} ms late");
    let (status, live) = http_get(&cluster.hub_url("/api/v1/history?source=filer-b"));
    assert_eq!(status, "HTTP/1.1 200 OK", "{live}");
    // Negative control: what is shown nowhere is missed.
    let missed = check("live", &url, "filer-z", || ());
    assert!(missed.expect_err("there is no filer-z").contains("the search leaves one"));
}

#[test]
fn a_thousand_sources_that_change_every_second_leave_the_page_usable() {
    let files = project("src/observe/page");
    let figures = check("many", &files.to_string_lossy(), "1000", || ());
    let figures = figures.unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("page: {figures}");
    within(&figures, "paint", if is_full() { PAINT_MS_MAX } else { PAINT_MANY_MS_MAX });
    within(&figures, "keys", KEYS_MS_MAX);
    within(&figures, "busy", BUSY_MS_MAX);
    within(&figures, "change", CHANGE_MS_MAX);
    // Negative control: what was not measured, or took too long, is noticed.
    let late = serde_json::json!({ "paint": PAINT_MS_MAX });
    assert!(std::panic::catch_unwind(|| within(&late, "paint", PAINT_MS_MAX)).is_err());
    assert!(std::panic::catch_unwind(|| within(&late, "busy", BUSY_MS_MAX)).is_err());
}
