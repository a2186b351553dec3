//! `mirrorhub verify`: both ends read and hash the last common CP; equal or not.

use clap::Args;

use super::ask::{Asked, runtime};
use super::failure::{FAILED, Failure, print_answer};
use super::locate::ConfigArgument;
use super::terminal::{Look, Terminal};
use super::{Done, words};
use crate::control::message::{Request, Target};
use crate::status::answers::{Unproven, Verdict, VerifyAnswer, VerifyOfEnd, VerifyOfVolume};

/// Read every block of the last common CP at both ends and compare the roots
///
/// Exit code 0: equal; 1: they differ, or an end could not be read: then nothing is proven.
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
    print_answer(arguments.json, &answer, |answer| view(answer, terminal.out))?;
    Ok(if answer.equal { Done::WELL } else { Done(FAILED) })
}

fn view(answer: &VerifyAnswer, look: Look) -> String {
    let (green, red, plain) =
        if look.colour { ("\x1b[1;32m", "\x1b[1;31m", "\x1b[0m") } else { ("", "", "") };
    let mut text = String::new();
    for volume in &answer.volumes {
        let name = format!("{}/{}", volume.source, volume.volume);
        let verdict = match volume.verdict {
            Verdict::Equal => format!("{green}equal{plain}"),
            Verdict::Differ => format!("{red}NOT EQUAL{plain}"),
            Verdict::Unproven => format!("{red}unproven{plain}"),
        };
        text.push_str(&format!("{name}: {verdict} at CP {}\n", volume.cp));
        text.push_str(&ends(volume));
    }
    for Unproven { source, reason } in &answer.unproven {
        text.push_str(&format!("{source}: {red}unproven{plain}: {reason}\n"));
    }
    text + &summary(answer)
}

fn summary(answer: &VerifyAnswer) -> String {
    let count = |verdict| answer.volumes.iter().filter(|volume| volume.verdict == verdict).count();
    let all = words::count(answer.volumes.len(), "volume");
    match answer.verdict {
        Verdict::Equal => format!("{all}: both ends are equal\n"),
        Verdict::Differ => format!(
            "{} of {all} differ\n  next: mirrorhub status says what is repaired; \
             a source that stays different is faulted\n",
            count(Verdict::Differ)
        ),
        Verdict::Unproven => format!(
            "unproven: {} of {all} read and equal, the rest was not read; no difference was found\n  \
             next: mirrorhub status says what is away; then try again\n",
            count(Verdict::Equal)
        ),
    }
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
        None if found.bad_blocks == 0 => format!("{:<64}", "not read"),
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
        let verdict = Verdict::of(&source_end, &hub_end);
        VerifyOfVolume {
            source: "filer-a".parse().unwrap(),
            volume: "vol0".parse().unwrap(),
            cp: 7,
            verdict,
            equal: verdict == Verdict::Equal,
            source_end,
            hub_end,
        }
    }

    fn shown(volumes: Vec<VerifyOfVolume>) -> String {
        view(&VerifyAnswer::of(volumes, Vec::new()), Look::PLAIN)
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

    /// A source that was away is no alarm of damage, and no proof either.
    #[test]
    fn what_was_not_read_is_unproven_and_not_different() {
        let unread = VerifyOfEnd { root: None, blocks_read: 0, bad_blocks: 0 };
        let text = shown(vec![volume(unread, found(1, 0)), volume(found(1, 0), found(1, 0))]);
        assert!(text.contains("filer-a/vol0: unproven at CP 7\n  source  not read"), "{text}");
        assert!(text.contains("\nunproven: 1 of 2 volumes read and equal"), "{text}");
        let away = Unproven { source: "filer-b".parse().unwrap(), reason: "it is away".into() };
        let text = view(&VerifyAnswer::of(Vec::new(), vec![away]), Look::PLAIN);
        assert!(text.starts_with("filer-b: unproven: it is away\nunproven: 0 of 0 volumes"));
        let nothing = shown(Vec::new());
        assert!(nothing.starts_with("unproven: 0 of 0 volumes"), "{nothing}");
        for text in [text, nothing] {
            assert!(!text.contains("NOT EQUAL") && !text.contains("ends are equal"), "{text}");
        }
    }
}
