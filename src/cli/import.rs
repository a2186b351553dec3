//! `mirrorhub import`: a hub whose state directory is gone is found on its devices, and taken up.
//!
//! No process is asked: none can run before. Without an id nothing is written anywhere.

use clap::Args;
use serde::Serialize;

use super::failure::{Failure, print_answer};
use super::locate::ConfigArgument;
use super::{Done, serve, words};
use crate::hub::extension::State;
use crate::hub::import::{Found, FoundSource, Part, look, take};
use crate::status::SCHEMA;
use crate::status::document::PoolDeviceStatus;

/// Take up a hub whose state directory is gone, from the devices of its pool alone
///
/// Without HUB it shows whose pool is on the devices of the configuration, and writes nothing. With the
/// id that it shows it makes the state directory of that hub again; then start `mirrorhub hub`. Images,
/// kept CPs, epochs and who serves whom are in the pool. What was acknowledged behind the images was in
/// NVRAM and logs: if these are gone, each source sends it again when it connects, and a failover before
/// that wants --accept-gap.
#[derive(Debug, Args)]
pub struct ImportArguments {
    /// Id of the hub, as shown without it
    hub: Option<String>,
    /// Go on although missing devices of the pool may be newer than those that are there
    #[arg(long)]
    accept_missing_devices: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// What the command answers.
#[derive(Debug, Serialize)]
struct ImportAnswer {
    schema: u32,
    hub: String,
    pool: String,
    /// Whether it was done; else this is what would be taken up.
    imported: bool,
    nvram: &'static str,
    logs: &'static str,
    devices: Vec<PoolDeviceStatus>,
    /// Devices of the configuration that are not used, and why.
    left_out: Vec<String>,
    sources: Vec<SourceAnswer>,
    next_step: String,
}

#[derive(Debug, Serialize)]
struct SourceAnswer {
    name: String,
    id: String,
    state: &'static str,
    applied_cp: u32,
    volumes: Vec<VolumeAnswer>,
    kept: Vec<String>,
    /// What is to be known of it; empty if nothing.
    warning: String,
}

#[derive(Debug, Serialize)]
struct VolumeAnswer {
    name: String,
    size_bytes: u64,
    root: String,
}

/// Runs it.
pub fn run(arguments: &ImportArguments) -> Result<Done, Failure> {
    let file = arguments.config.file()?;
    let options = serve::hub_options(&file, arguments.accept_missing_devices)?;
    let failed = |error| serve::hub_failure(error, &file);
    let mut found = look(&options).map_err(failed)?;
    if let Some(wanted) = &arguments.hub {
        if found.hub.to_string() != *wanted {
            let what =
                format!("import {wanted}: the pool on these devices is of hub {}", found.hub);
            return Err(Failure::failed(what, "name that one, or the devices of the other"));
        }
        found = take(&options, found.hub).map_err(failed)?;
    }
    let flag = if arguments.accept_missing_devices { " --accept-missing-devices" } else { "" };
    print_answer(arguments.json, &answer(&found, arguments.hub.is_some(), (&file, flag)), view)?;
    Ok(Done::WELL)
}

fn part(part: Part) -> &'static str {
    match part {
        Part::Kept => "kept",
        Part::Gone => "gone",
    }
}

fn answer(found: &Found, imported: bool, (file, flag): (&std::path::Path, &str)) -> ImportAnswer {
    let file = file.display();
    let next_step = if imported {
        format!("`mirrorhub hub --config {file}{flag}` starts it")
    } else {
        format!("`mirrorhub import {} --config {file}{flag}` takes it up", found.hub)
    };
    ImportAnswer {
        schema: SCHEMA,
        hub: found.hub.to_string(),
        pool: found.pool.to_string(),
        imported,
        nvram: part(found.nvram),
        logs: part(found.logs),
        devices: found.devices.iter().zip(0..).map(serve::device_status).collect(),
        left_out: found
            .left_out
            .iter()
            .map(|out| format!("{}: {}", out.name, out.reason))
            .collect(),
        sources: found
            .sources
            .iter()
            .map(|source| source_of(source, found.log_is_lost()))
            .collect(),
        next_step,
    }
}

fn source_of(source: &FoundSource, log_is_lost: bool) -> SourceAnswer {
    let warning = match source.state {
        State::Promoted | State::FailingOver if source.nvram_gone => {
            "it is served here, and the NVRAM with what its clients wrote last is gone: put the \
             file back into `promoted` of the data_dir, or it is not served"
        }
        State::Mirror | State::FailingOver if log_is_lost => {
            "what was acknowledged behind this CP is not here: the source sends it again"
        }
        State::Mirror | State::FailingOver | State::Promoted | State::HandedOver => "",
    };
    let volume = |row: &crate::pool::rows::VolumeRow| VolumeAnswer {
        name: row.name.to_string(),
        size_bytes: row.tree.size.0,
        root: row.tree.root().to_string(),
    };
    SourceAnswer {
        name: source.name.to_string(),
        id: source.id.to_string(),
        state: source.state.word(),
        applied_cp: source.applied.0,
        volumes: source.volumes.iter().map(volume).collect(),
        kept: source.kept.iter().map(ToString::to_string).collect(),
        warning: warning.to_owned(),
    }
}

fn view(answer: &ImportAnswer) -> String {
    let said = if answer.imported { "imported" } else { "can be imported" };
    let mut text = format!("hub {}: {said}, pool {}\n", answer.hub, answer.pool);
    for device in &answer.devices {
        let PoolDeviceStatus { place, name, state, .. } = device;
        let reason = device.reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
        text.push_str(&format!("  {place:>2}  {name}  {state}{reason}\n"));
    }
    for out in &answer.left_out {
        text.push_str(&format!("  not used: {out}\n"));
    }
    text.push_str(&format!("NVRAM: {}, source logs: {}\n", answer.nvram, answer.logs));
    for source in &answer.sources {
        let SourceAnswer { name, state, applied_cp, volumes, kept, warning, .. } = source;
        let volumes = words::count(volumes.len(), "volume");
        text.push_str(&format!("{name}: {state}, CP {applied_cp}, {volumes}"));
        if !kept.is_empty() {
            text.push_str(&format!(", kept: {}", kept.join(" ")));
        }
        text.push('\n');
        if !warning.is_empty() {
            text.push_str(&format!("  {warning}\n"));
        }
    }
    text.push_str(&format!("  next: {}\n", answer.next_step));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::MemberState;

    #[test]
    fn what_is_found_is_shown_line_by_line() {
        let device = |place, state: MemberState| PoolDeviceStatus {
            name: format!("/disks/{place}"),
            state: if state == MemberState::In { "in" } else { "failed" }.to_owned(),
            place,
            ..PoolDeviceStatus::default()
        };
        let source = SourceAnswer {
            name: "filer-a".into(),
            id: "00".into(),
            state: "mirror",
            applied_cp: 7,
            volumes: vec![VolumeAnswer { name: "vol0".into(), size_bytes: 4096, root: "0".into() }],
            kept: vec!["monday".into()],
            warning: "it sends again".into(),
        };
        let text = view(&ImportAnswer {
            schema: SCHEMA,
            hub: "abcd".into(),
            pool: "ef".into(),
            imported: false,
            nvram: part(Part::Gone),
            logs: part(Part::Kept),
            devices: vec![device(0, MemberState::In), device(1, MemberState::Failed)],
            left_out: vec!["/disks/1: is stale".into()],
            sources: vec![source],
            next_step: "do it".into(),
        });
        let wanted = "hub abcd: can be imported, pool ef\n   0  /disks/0  in\n   1  /disks/1  failed\n  \
                      not used: /disks/1: is stale\nNVRAM: gone, source logs: kept\nfiler-a: mirror, \
                      CP 7, 1 volume, kept: monday\n  it sends again\n  next: do it\n";
        assert_eq!(text, wanted);
    }
}
