//! `mirrorhub kept`: lists the CPs that a hub keeps by name.

use clap::Args;

use super::ask::{Asked, STATUS_PATIENCE, runtime};
use super::failure::{Failure, print_answer};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use super::{Done, words};
use crate::control::message::Request;
use crate::status::answers::KeptAnswer;
use crate::units::names::SourceName;
use crate::units::times::time_of_day;

/// List the CPs that are kept by name
///
/// Each is served read-only as SOURCE/VOLUME@NAME.
#[derive(Debug, Args)]
pub struct KeptArguments {
    /// Only this source
    source: Option<SourceName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &KeptArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let request = Request::Kept { source: arguments.source.clone() };
    let patience = Some(STATUS_PATIENCE);
    let answer: KeptAnswer =
        runtime()?.block_on(asked.ask(&request, "kept", patience, terminal.error))?;
    print_answer(arguments.json, &answer, view)?;
    Ok(Done::WELL)
}

fn view(answer: &KeptAnswer) -> String {
    let mut lines = Vec::new();
    for source in &answer.sources {
        for kept in &source.kept {
            lines.push((format!("{}@{}", source.name, kept.name), kept));
        }
    }
    if lines.is_empty() {
        return "nothing is kept: a mirror alone repeats every deletion; see `keep` in the \
                sources' files and `mirrorhub checkpoint --keep NAME`\n"
            .into();
    }
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, kept) in lines {
        let held = words::size(kept.held_bytes);
        let at = time_of_day(kept.kept_at);
        text.push_str(&format!("{name:<width$}  CP {}  {at}  holds {held}\n", kept.cp));
        for volume in &kept.volumes {
            text.push_str(&format!("  {}  {}\n", volume.name, volume.root));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::answers::{KeptCp, KeptOfSource, VolumeRoot};
    use crate::units::hash::Root;

    #[test]
    fn names_and_roots_are_shown_and_nothing_says_what_that_means() {
        let volumes = vec![VolumeRoot { name: "v".parse().unwrap(), root: Root([0xab; 32]) }];
        let kept = KeptCp {
            name: "mon".parse().unwrap(),
            cp: 4,
            held_bytes: 4096,
            kept_at: 1_795_273_400,
            volumes,
        };
        let source = KeptOfSource { name: "filer-a".parse().unwrap(), kept: vec![kept] };
        let text = view(&KeptAnswer { schema: 1, sources: vec![source] });
        assert!(text.starts_with("filer-a@mon  CP 4  2026-11-21 15:03:20 UTC  holds 4"), "{text}");
        assert!(text.ends_with(&format!("\n  v  {}\n", "ab".repeat(32))), "{text}");
        let text = view(&KeptAnswer { schema: 1, sources: Vec::new() });
        assert!(text.starts_with("nothing is kept"), "{text}");
    }
}
