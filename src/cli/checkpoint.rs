//! `mirrorhub checkpoint`: makes a CP and waits until it is published on the hub.

use clap::Args;

use super::Done;
use super::ask::{Asked, runtime};
use super::failure::{FAILED, Failure, print_answer};
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use crate::control::message::Request;
use crate::status::answers::{CheckpointAnswer, CheckpointFailed};
use crate::units::names::{KeptName, SourceName};

/// Make a consistency point and wait until it is published on the hub
///
/// Prints its number and the roots of its volumes, which are then equal on both ends.
#[derive(Debug, Args)]
pub struct CheckpointArguments {
    /// Only this source
    source: Option<SourceName>,
    /// Keep it under this name, on the hub: it is then served as SOURCE/VOLUME@NAME
    #[arg(long, value_name = "NAME")]
    keep: Option<KeptName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &CheckpointArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let request =
        Request::Checkpoint { source: arguments.source.clone(), keep: arguments.keep.clone() };
    let what = match &arguments.source {
        Some(source) => format!("checkpoint of {source}"),
        None => "checkpoint".into(),
    };
    let answer: CheckpointAnswer =
        runtime()?.block_on(asked.ask(&request, &what, None, terminal.error))?;
    print_answer(arguments.json, &answer, |answer| view(answer, arguments.keep.as_ref()))?;
    match failure(&answer.failed) {
        None => Ok(Done::WELL),
        Some(_) if arguments.json => Ok(Done(FAILED)),
        Some(failure) => Err(failure),
    }
}

/// What failed, and what to do about each.
fn failure(failed: &[CheckpointFailed]) -> Option<Failure> {
    if failed.is_empty() {
        return None;
    }
    let what = |one: &CheckpointFailed| format!("{}: no CP: {}", one.name, one.reason);
    let what: Vec<String> = failed.iter().map(what).collect();
    let mut next: Vec<&str> = failed.iter().map(|one| one.next_step.as_str()).collect();
    next.retain(|step| !step.is_empty());
    next.sort_unstable();
    next.dedup();
    Some(Failure::failed(what.join("\n"), next.join("; ")))
}

fn view(answer: &CheckpointAnswer, keep: Option<&KeptName>) -> String {
    if answer.sources.is_empty() && answer.failed.is_empty() {
        return "no source to make a CP of\n".into();
    }
    let kept = keep.map(|name| format!(" and kept as {name}")).unwrap_or_default();
    let mut text = String::new();
    for source in &answer.sources {
        text.push_str(&format!("{}: CP {} is published{kept}\n", source.name, source.cp));
        let widths = source.volumes.iter().map(|volume| volume.name.as_str().len());
        let width = widths.max().unwrap_or(0);
        for volume in &source.volumes {
            text.push_str(&format!("  {:<width$}  {}\n", volume.name, volume.root));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::answers::{CheckpointOfSource, VolumeRoot};
    use crate::units::hash::Root;

    #[test]
    fn number_and_roots_are_shown() {
        let volume =
            |name: &str| VolumeRoot { name: name.parse().unwrap(), root: Root([0xab; 32]) };
        let volumes = vec![volume("v"), volume("vol0")];
        let source = CheckpointOfSource { name: "filer-a".parse().unwrap(), cp: 42, volumes };
        let root = "ab".repeat(32);
        let failed = Vec::new();
        let mut answer = CheckpointAnswer { schema: 1, sources: vec![source], failed };
        let shown = format!("filer-a: CP 42 is published\n  v     {root}\n  vol0  {root}\n");
        assert_eq!(view(&answer, None), shown);
        let name = "mon".parse().unwrap();
        let kept = shown.replace("published", "published and kept as mon");
        assert_eq!(view(&answer, Some(&name)), kept);
        let (reason, next_step) = ("it is not connected".to_owned(), "start it".to_owned());
        let name = "filer-b".parse().unwrap();
        answer.failed.push(CheckpointFailed { name, reason, next_step });
        assert_eq!(view(&answer, None), shown);
        let told = failure(&answer.failed).unwrap();
        let Failure::Message { what, next, .. } = &told else { panic!("{told:?}") };
        assert_eq!(
            (what.as_str(), next.as_str()),
            ("filer-b: no CP: it is not connected", "start it")
        );
        assert!(failure(&[]).is_none());
    }
}
