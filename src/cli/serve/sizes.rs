//! Volumes whose file wants another size than they can have here: named in status and by `config diff` as
//! long as it is so. Nothing else of the file waits for it.

use crate::config::quantity::format_size;
use crate::config::schema::HubSource;
use crate::filer::homes::Unfit;
use crate::hub::status::{Snapshot, SourceState};
use crate::status::config::ConfigProblem;

fn problem(file: String, key: &str, met: String, fix: String) -> ConfigProblem {
    ConfigProblem { file, line: None, key: key.to_owned(), met, fix }
}

/// A volume of a source that lives on this filer.
pub(super) fn of_home(unfit: &Unfit) -> ConfigProblem {
    let (file, key) = ("source.toml".to_owned(), "home.volume");
    match unfit {
        Unfit::NoVolume { source, volume } => {
            let fix = "`mirrorhub status` names the volumes it has".to_owned();
            problem(file, key, format!("{source} has no volume {volume}"), fix)
        }
        Unfit::Larger { source, volume, met, wanted } => {
            let (met, wanted) = (format_size(*met), format_size(*wanted));
            let what = format!(
                "volume {volume} of {source} has {met}, and is {wanted} here: a volume does not become smaller"
            );
            problem(file, key, what, format!("write size = \"{met}\", or a larger one"))
        }
    }
}

/// The volumes of a source that this hub serves: they keep their size until a filer has them again.
pub(super) fn of_served(source: &HubSource, snapshot: &Snapshot) -> Vec<ConfigProblem> {
    let name = &source.file.name;
    if snapshot.state != SourceState::FailedOver {
        return Vec::new();
    }
    let mut all = Vec::new();
    for wanted in &source.file.volumes {
        let known = snapshot.volumes.iter().find(|known| known.name == wanted.name);
        let Some(known) = known.filter(|known| known.size != wanted.size) else { continue };
        let (volume, has, size) = (&wanted.name, format_size(known.size), format_size(wanted.size));
        let (met, fix) = if wanted.size > known.size {
            let met = format!(
                "volume {volume} has {has} and is served by this hub, where it does not grow to {size}"
            );
            let fix = format!(
                "`mirrorhub failback {name}` gives it to a filer: there it grows by a larger size and a reload"
            );
            (met, fix)
        } else {
            let met = format!(
                "volume {volume} has {has}, and is {size} here: a volume does not become smaller"
            );
            (met, format!("write size = \"{has}\", or a larger one"))
        };
        all.push(problem(format!("{name}.toml"), "volume.size", met, fix));
    }
    all
}
