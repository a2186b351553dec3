//! `mirrorhub device`: lists, fails, replaces and adds the devices of a pool.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::ask::{Asked, confirm, runtime};
use super::failure::{FAILED, Failure, print_answer};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use super::{Done, words};
use crate::control::message::Request;
use crate::status::document::PoolDeviceStatus;
use crate::status::upkeep::{DevicesAnswer, RebuildStatus};

/// List, fail, replace and add devices of the pool of a hub or of a source
#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    List(ListArguments),
    Fail(FailArguments),
    Replace(ReplaceArguments),
    Add(AddArguments),
}

/// Show each device: its place, state, size, errors and what was written to it
#[derive(Debug, Args)]
pub struct ListArguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Take a device out, for good: it is not read or written any more
///
/// Refused if the others do not bear it. `device replace` fills another one in its place.
#[derive(Debug, Args)]
pub struct FailArguments {
    /// Its path, or its place in the list
    device: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Put a new device in the place of one, and fill it from the others
///
/// A device that is still in is failed first, if the others bear that. NEW is a block device or file
/// that begins with 1 MiB of zeros; a file that is not there is made. Only what is in use is filled. Of a
/// larger one the part is used that the array has of each: `device add` makes a pool larger.
/// Clients are served on, and a restart goes on with it. Change the path in the configuration file
/// afterwards: `config diff` names it until that is done.
#[derive(Debug, Args)]
pub struct ReplaceArguments {
    /// Path of the old one, or its place in the list
    old: String,
    /// Path of the new one
    new: PathBuf,
    /// Return when it is filled
    #[arg(long)]
    wait: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Make the pool larger: as many devices more as it has, of the same level
///
/// Each is a block device or file that begins with 1 MiB of zeros; a file that is not there is made, as
/// large as the others. They make an array of their own behind the one that is there, and it bears the loss
/// of as many devices; a pool on one plain device grows by one at a time. The pool is larger when this
/// returns, and clients are served on meanwhile. Write the new paths into pool.devices, behind the others:
/// `config diff` names them until that is done. Devices that were added cannot be taken away again.
#[derive(Debug, Args)]
pub struct AddArguments {
    /// Paths of the new ones
    #[arg(required = true)]
    devices: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(command: &DeviceCommand, terminal: &Terminal) -> Result<Done, Failure> {
    let (config, json, request, what) = match command {
        DeviceCommand::List(list) => {
            (&list.config, list.json, Request::DeviceList {}, "device list".to_owned())
        }
        DeviceCommand::Fail(fail) => {
            let what = format!("device fail {}", fail.device);
            if !fail.yes {
                let warning = format!("{} is taken out of the pool for good.", fail.device);
                confirm(&what, &warning, &fail.device)?;
            }
            let request = Request::DeviceFail { device: named(&fail.device) };
            (&fail.config, fail.json, request, what)
        }
        DeviceCommand::Add(add) => {
            let path = |device: &PathBuf| absolute(&device.display().to_string());
            let devices: Vec<String> = add.devices.iter().map(path).collect();
            let what = format!("device add {}", devices.join(" "));
            (&add.config, add.json, Request::DeviceAdd { devices }, what)
        }
        DeviceCommand::Replace(replace) => {
            let new = replace.new.display().to_string();
            let what = format!("device replace {} {new}", replace.old);
            let (old, new, wait) = (named(&replace.old), absolute(&new), replace.wait);
            (&replace.config, replace.json, Request::DeviceReplace { old, new, wait }, what)
        }
    };
    let asked = Asked::of(config)?;
    let patience: Option<Duration> = None;
    let answer: DevicesAnswer =
        runtime()?.block_on(asked.ask(&request, &what, patience, terminal.error))?;
    print_answer(json, &answer, view)?;
    let lost = answer.rebuild.as_ref().is_some_and(|rebuild| rebuild.lost_blocks > 0);
    Ok(if lost { Done(FAILED) } else { Done::WELL })
}

/// A place or an id as it is, a path as the process knows it.
fn named(device: &str) -> String {
    if device.contains('/') || PathBuf::from(device).is_file() {
        absolute(device)
    } else {
        device.to_owned()
    }
}

fn absolute(path: &str) -> String {
    std::path::absolute(path).map_or_else(|_| path.to_owned(), |path| path.display().to_string())
}

fn view(answer: &DevicesAnswer) -> String {
    let all = words::count(answer.devices.len(), "device");
    let mut text = format!("{} of {all}\n", answer.raid);
    let widths = answer.devices.iter().map(|device| device.name.len());
    let width = widths.max().unwrap_or(0);
    for device in &answer.devices {
        text.push_str(&line(device, width));
    }
    if let Some(rebuild) = &answer.rebuild {
        text.push_str(&format!("{}\n", filling(rebuild)));
    }
    if !answer.next_step.is_empty() {
        text.push_str(&format!("  next: {}\n", answer.next_step));
    }
    text
}

fn line(device: &PoolDeviceStatus, width: usize) -> String {
    let PoolDeviceStatus { name, state, place, read_errors, repaired_blocks, .. } = device;
    let reason = match &device.reason {
        Some(reason) => format!(": {reason}"),
        None => String::new(),
    };
    let slow = match device.slow_answers {
        0 => String::new(),
        slow => format!(", {slow} slow answers"),
    };
    format!(
        "  {place:>2}  {name:<width$}  {state:<10}  {size:>9}  {written} written, {read_errors} read \
         errors, {repaired_blocks} blocks repaired{slow}{reason}\n",
        size = words::size(device.size_bytes),
        written = words::size(device.written_bytes),
    )
}

/// `filling 1 device: 1.0 GiB of 2.0 GiB (50%), 12 s left`.
pub(super) fn filling(rebuild: &RebuildStatus) -> String {
    let left = match rebuild.seconds_left {
        Some(seconds) if rebuild.devices > 0 => format!(", {} left", words::time(seconds)),
        _ => String::new(),
    };
    let lost = match rebuild.lost_blocks {
        0 => String::new(),
        lost => format!(", {lost} blocks could not be had"),
    };
    let problem = match &rebuild.problem {
        Some(problem) => format!("; it cannot go on: {problem}"),
        None => String::new(),
    };
    let devices = usize::try_from(rebuild.devices).unwrap_or(usize::MAX);
    format!(
        "filling {}: {} of {} ({}%){left}{lost}{problem}",
        words::count(devices, "device"),
        words::size(rebuild.done_bytes),
        words::size(rebuild.total_bytes),
        words::percent(rebuild.done_bytes, rebuild.total_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_how_each_device_is_and_what_is_filled() {
        let device = |place: u64, state: &str, reason: Option<&str>| PoolDeviceStatus {
            name: format!("/disks/{place}"),
            state: state.into(),
            reason: reason.map(ToOwned::to_owned),
            place,
            size_bytes: 8 << 30,
            ..PoolDeviceStatus::default()
        };
        let devices = vec![
            device(0, "in", None),
            device(1, "failed", Some("Input/output error")),
            device(2, "rebuilding", None),
        ];
        let rebuild = RebuildStatus {
            devices: 1,
            done_bytes: 1 << 30,
            total_bytes: 4 << 30,
            seconds_left: Some(30.0),
            ..RebuildStatus::default()
        };
        let next_step = "write it".to_owned();
        let (raid, rebuild) = ("parity2".to_owned(), Some(rebuild));
        let text = view(&DevicesAnswer { schema: 1, raid, devices, rebuild, next_step });
        assert!(text.starts_with("parity2 of 3 devices\n   0  /disks/0  in "), "{text}");
        assert!(text.contains("blocks repaired: Input/output error\n"), "{text}");
        assert!(text.contains("filling 1 device: 1.0 GiB of 4.0 GiB (25%), 30 s left\n"), "{text}");
        assert!(text.ends_with("  next: write it\n"), "{text}");
        assert_eq!(named("3"), "3");
        assert!(named("./x").starts_with('/'));
    }
}
