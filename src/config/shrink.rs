//! A file that makes a volume smaller than it is: refused, with its place.
//!
//! Called by a running source when it reads its file again, and by `config diff`; the file by itself
//! does not say how large its volumes are.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::problem::{Place, Problem, Problems};
use super::quantity::format_size;
use super::reader::entry;
use super::schema::{SourceConfig, VolumeConfig};
use super::text::Text;
use crate::units::names::VolumeName;

/// Every volume that `file` makes smaller than it is in `running`.
pub fn refuse(running: &SourceConfig, file: &SourceConfig) -> Result<(), Problems> {
    let size_in = |config: &SourceConfig, name: &VolumeName| {
        config.volumes.iter().find(|volume| volume.name == *name).map(|volume| volume.size)
    };
    let smaller = |volume: &VolumeConfig| {
        let met = size_in(running, &volume.name)?;
        (volume.size < met).then(|| Problem {
            place: place(&file.file, &volume.name),
            key: "volume.size".into(),
            wanted: format!("{} or more", format_size(met)),
            ..Problem::of_file(
                &file.file,
                format!(
                    "volume {} has {}, and is {} here: a volume does not become smaller",
                    volume.name,
                    format_size(met),
                    format_size(volume.size)
                ),
                format!("write size = \"{}\", or a larger one", format_size(met)),
            )
        })
    };
    let problems: Vec<Problem> = file.volumes.iter().filter_map(smaller).collect();
    if problems.is_empty() { Ok(()) } else { Err(Problems::sorted(problems)) }
}

/// Where the size of that volume stands. The file is read once more: if it was changed in between,
/// the problem is one of the file as a whole.
pub fn place(file: &Path, name: &VolumeName) -> Option<Place> {
    let text = Text::read(file).ok()?;
    let (table, _) = DeTable::parse_recoverable(&text.text);
    let (_, volumes) = entry(table.get_ref(), "volume")?;
    let DeValue::Array(volumes) = volumes.get_ref() else { return None };
    volumes.iter().find_map(|volume| {
        let DeValue::Table(volume) = volume.get_ref() else { return None };
        let DeValue::String(called) = entry(volume, "name")?.1.get_ref() else { return None };
        let (_, size) = entry(volume, "size").filter(|_| *called == name.as_str())?;
        Some(text.place(&size.span()))
    })
}
