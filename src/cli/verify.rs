//! `mirrorhub verify`: both ends read and hash the last common CP; equal or not.

use clap::Args;

use super::ask::{Asked, runtime};
use super::failure::{FAILED, Failure, print, print_json};
use super::locate::ConfigArgument;
use super::terminal::{Look, Terminal};
use super::{Done, words};
use crate::control::message::{Request, Target};
use crate::status::answers::{VerifyAnswer, VerifyOfEnd, VerifyOfVolume};

/// Read every block of the last common CP at both ends and compare the roots
///
/// Exit code 0: equal; 1: not.
#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// Only this source or volume
    #[arg(value_name = "SOURCE[/VOLUME]")]
    target: Option<Target>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &VerifyArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let request = Request::Verify { target: arguments.target.clone() };
    let what = match &arguments.target {
        Some(target) => format!("verify of {target}"),
        None => "verify".into(),
    };
    let answer: VerifyAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    if arguments.json {
        print_json(&answer)?
    } else {
        print(&view(&answer, terminal.out))?
    }
    Ok(if answer.equal { Done::WELL } else { Done(FAILED) })
}

fn view(answer: &VerifyAnswer, look: Look) -> String {
    let (green, red, plain) =
        if look.colour { ("\x1b[1;32m", "\x1b[1;31m", "\x1b[0m") } else { ("", "", "") };
    let mut text = String::new();
    for volume in &answer.volumes {
        let name = format!("{}/{}", volume.source, volume.volume);
        let verdict = if volume.equal {
            format!("{green}equal{plain}")
        } else {
            format!("{red}NOT EQUAL{plain}")
        };
        text.push_str(&format!("{name}: {verdict} at CP {}\n", volume.cp));
        text.push_str(&ends(volume));
    }
    let bad = answer.volumes.iter().filter(|volume| !volume.equal).count();
    let all = words::count(answer.volumes.len(), "volume");
    text.push_str(&match (answer.equal, bad) {
        (true, _) => format!("{all}: both ends are equal\n"),
        (false, 0) => format!("{all} compared, but not all that was asked for\n"),
        (false, bad) => format!(
            "{bad} of {all} differ\n  next: mirrorhub status says what is repaired; \
             a source that stays different is faulted\n"
        ),
    });
    text
}

/// One line if both ends say the same, else one for each.
fn ends(volume: &VerifyOfVolume) -> String {
    if volume.equal && volume.source_end == volume.hub_end {
        return end("both", &volume.hub_end);
    }
    end("source", &volume.source_end) + &end("hub", &volume.hub_end)
}

fn end(who: &str, found: &VerifyOfEnd) -> String {
    let root = match &found.root {
        Some(root) => root.to_string(),
        None => format!("{:<64}", "not known, since blocks could not be read"),
    };
    let bad = match found.bad_blocks {
        0 => String::new(),
        bad => format!(", {bad} bad"),
    };
    format!("  {who:<6}  {root}  {} blocks read{bad}\n", found.blocks_read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::hash::Root;

    fn found(byte: u8, bad_blocks: u64) -> VerifyOfEnd {
        let root = (bad_blocks == 0).then_some(Root([byte; 32]));
        VerifyOfEnd { root, blocks_read: 100, bad_blocks }
    }

    fn volume(source_end: VerifyOfEnd, hub_end: VerifyOfEnd) -> VerifyOfVolume {
        let equal = source_end == hub_end && hub_end.bad_blocks == 0;
        VerifyOfVolume {
            source: "filer-a".parse().unwrap(),
            volume: "vol0".parse().unwrap(),
            cp: 7,
            equal,
            source_end,
            hub_end,
        }
    }

    fn shown(volumes: Vec<VerifyOfVolume>) -> String {
        let equal = volumes.iter().all(|volume| volume.equal);
        view(&VerifyAnswer { schema: 1, equal, volumes }, Look::PLAIN)
    }

    #[test]
    fn equal_ends_are_one_line_and_different_ones_two() {
        let text = shown(vec![volume(found(1, 0), found(1, 0))]);
        assert!(text.starts_with("filer-a/vol0: equal at CP 7\n  both    0101"), "{text}");
        assert!(text.ends_with("1 volume: both ends are equal\n"), "{text}");
        let text = shown(vec![volume(found(1, 0), found(2, 3)), volume(found(1, 0), found(1, 0))]);
        assert!(text.contains("NOT EQUAL at CP 7\n  source  0101"), "{text}");
        assert!(text.contains("\n  hub     not known"), "{text}");
        assert!(text.contains("100 blocks read, 3 bad\n"), "{text}");
        assert!(text.contains("\n1 of 2 volumes differ\n"), "{text}");
    }
}
