//! `mirrorhub scrub`: reads everything that the pool holds, proves it and mends it.

use clap::Args;

use super::ask::{Asked, runtime};
use super::failure::{FAILED, Failure, print_answer};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use super::{Done, words};
use crate::control::message::Request;
use crate::status::upkeep::{ScrubAnswer, ScrubStatus};

/// Read everything that the pool holds, prove it, and mend it from the other copies
///
/// Of a hub or of a source. Every block of every image and kept CP is compared with its full hash,
/// and on an array every copy and parity. Without --wait it goes on in the background; `status`
/// shows how far it is. A restart does not end it. Exit code 0: nothing was wrong, or all of it is
/// mended; 1: something has no right copy, it is named.
#[derive(Debug, Args)]
pub struct ScrubArguments {
    /// Return when it has ended, and say what it found
    #[arg(long, conflicts_with = "stop")]
    wait: bool,
    /// End the scrub under way
    #[arg(long)]
    stop: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &ScrubArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let request = Request::Scrub { wait: arguments.wait, stop: arguments.stop };
    let answer: ScrubAnswer =
        runtime()?.block_on(asked.ask(&request, "scrub", None, terminal.error))?;
    print_answer(arguments.json, &answer, view)?;
    let damaged = !answer.scrub.running && answer.scrub.state == "damaged";
    Ok(if arguments.wait && damaged { Done(FAILED) } else { Done::WELL })
}

fn view(answer: &ScrubAnswer) -> String {
    let scrub = &answer.scrub;
    if scrub.running {
        let word = if answer.began { "scrub began" } else { "a scrub is under way" };
        let next = "`mirrorhub status` shows how far it is, --wait waits for its end";
        return format!("{word}: {}\n  next: {next}\n", how_far(scrub));
    }
    outcome(scrub)
}

/// `1.0 GiB of 2.0 GiB read (50%), 12 s left`.
pub(super) fn how_far(scrub: &ScrubStatus) -> String {
    let left = match scrub.seconds_left {
        Some(seconds) => format!(", {} left", words::time(seconds)),
        None => String::new(),
    };
    format!(
        "{} of {} read ({}%){left}",
        words::size(scrub.done_bytes),
        words::size(scrub.total_bytes),
        words::percent(scrub.done_bytes, scrub.total_bytes)
    )
}

fn outcome(scrub: &ScrubStatus) -> String {
    let ScrubStatus {
        repaired_blocks, repaired_copies, from_other_end_blocks, lost_blocks, ..
    } = scrub;
    let mut text = match scrub.state.as_str() {
        "stopped" => format!("scrub stopped: {}\n", how_far(scrub)),
        "clean" => format!("scrub: {} read, all of it right\n", words::size(scrub.done_bytes)),
        _ => format!(
            "scrub: {} read, {repaired_blocks} blocks and {repaired_copies} copies repaired, \
             {from_other_end_blocks} got from the other end, {lost_blocks} without a right copy\n",
            words::size(scrub.done_bytes)
        ),
    };
    let widths = scrub.devices.iter().map(|device| device.name.len());
    let width = widths.max().unwrap_or(0);
    for device in &scrub.devices {
        let (name, errors) = (&device.name, device.read_errors);
        let repaired = device.repaired_blocks;
        text.push_str(&format!("  {name:<width$}  {errors} read errors, {repaired} rewritten\n"));
    }
    for place in &scrub.lost {
        text.push_str(&format!("  lost: {place}\n"));
    }
    if *lost_blocks > 0 {
        text.push_str(
            "  next: bring the other end back and scrub again; or write the named blocks anew\n",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::upkeep::ScrubbedDevice;

    #[test]
    fn what_was_found_is_said_device_by_device_and_block_by_block() {
        let scrub = ScrubStatus {
            state: "damaged".into(),
            done_bytes: 3 << 20,
            repaired_blocks: 4,
            repaired_copies: 5,
            lost_blocks: 1,
            lost: vec!["filer-a/vol0: block 17 at CP 3: block 99 is corrupt".into()],
            devices: vec![ScrubbedDevice {
                name: "disk0".into(),
                read_errors: 1,
                repaired_blocks: 9,
            }],
            ..ScrubStatus::default()
        };
        let text = outcome(&scrub);
        assert!(text.starts_with("scrub: 3.0 MiB read, 4 blocks and 5 copies repaired"), "{text}");
        assert!(text.contains("  disk0  1 read errors, 9 rewritten\n"), "{text}");
        assert!(text.contains("  lost: filer-a/vol0: block 17 at CP 3"), "{text}");
        let scrub = ScrubStatus { state: "clean".into(), ..scrub };
        assert!(outcome(&scrub).starts_with("scrub: 3.0 MiB read, all of it right\n"));
        let running = ScrubStatus { running: true, seconds_left: Some(12.0), ..scrub };
        let answer = ScrubAnswer { schema: 1, began: true, scrub: running };
        assert!(view(&answer).starts_with("scrub began: 3.0 MiB of 0 B read"));
    }
}
