//! `[hooks]` of `hub.toml`: commands that are run when a source's volumes have moved.
//!
//! A command is a path, or a list of a path and its arguments. What cannot be run is refused at
//! load: the day it is needed is too late to learn of it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use toml::Spanned;
use toml::de::DeValue;

use super::quantity::Unfit;
use super::reader::{Reader, Section};
use super::schema::{HOOK_TIMEOUT, HooksConfig};
use crate::hub::hooks::HookCommand;
use crate::limits::{HOOK_ARGUMENTS_MAX, HOOK_TIMEOUT_MS};
use crate::units::convert::to_u64;

const WANTED: &str = "a path, or a list of a path and arguments";

/// Reads the section.
pub(super) fn hooks<'d>(reader: &mut Reader<'d>, root: &Section<'d>) -> HooksConfig {
    let section = reader.section(root, "hooks");
    let promoted = command(reader, &section, "promoted");
    let failed_back = command(reader, &section, "failed_back");
    let timeout = reader.duration(&section, "timeout", HOOK_TIMEOUT_MS);
    let timeout = timeout.map_or(HOOK_TIMEOUT, Spanned::into_inner);
    HooksConfig { promoted, failed_back, timeout }
}

fn command<'d>(
    reader: &mut Reader<'d>,
    section: &Section<'d>,
    key: &'static str,
) -> Option<HookCommand> {
    let base = reader.text.base.clone();
    reader.value_of(section, key, WANTED, |value| {
        let mut words = words(value)?.into_iter();
        let program = words.next().unwrap_or_default();
        if program.is_empty() {
            let fix = format!("write {key} = \"PATH\"");
            return Err(Unfit { met: "is empty".into(), fix });
        }
        let program = base.join(program);
        can_be_run(&program)?;
        Ok(HookCommand { program, arguments: words.collect() })
    })
}

/// The program and its arguments.
fn words(value: &DeValue<'_>) -> Result<Vec<String>, Unfit> {
    let fix = || "write [\"PATH\", \"ARGUMENT\"]".to_owned();
    let one = |value: &DeValue<'_>| match value.as_str() {
        Some(text) if !text.contains('\0') => Ok(text.to_owned()),
        Some(_) => Err(Unfit { met: "has a zero byte".into(), fix: fix() }),
        None => Err(Unfit { met: "is neither a string nor a list of strings".into(), fix: fix() }),
    };
    let DeValue::Array(list) = value else { return Ok(vec![one(value)?]) };
    if list.len() > HOOK_ARGUMENTS_MAX {
        let met = format!("{} words are more than {HOOK_ARGUMENTS_MAX}", to_u64(list.len()));
        return Err(Unfit { met, fix: "put them into a script".into() });
    }
    list.iter().map(|word| one(word.get_ref())).collect()
}

/// A file that somebody may execute. Whether this process may is seen when it does.
fn can_be_run(program: &Path) -> Result<(), Unfit> {
    let shown = program.display();
    let unfit = |met: String, fix: &str| Err(Unfit { met, fix: fix.to_owned() });
    match std::fs::metadata(program) {
        Err(error) => unfit(format!("{shown}: {error}"), "name a program that is there"),
        Ok(found) if !found.is_file() => {
            unfit(format!("{shown} is no file"), "name a program, not a directory")
        }
        Ok(found) if found.permissions().mode() & 0o111 == 0 => {
            unfit(format!("{shown} is not executable"), "make it executable with chmod +x")
        }
        Ok(_) => Ok(()),
    }
}
