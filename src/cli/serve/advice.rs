//! Why a process did not start, with file, key and fix.
//!
//! What contradicts the configuration ends with 78, so that a service manager does not try for
//! ever; what may be different the next time, or is nobody's fault, ends with 1.

use std::io::ErrorKind;
use std::path::Path;

use crate::cli::failure::{CONFIGURATION, FAILED, Failure};
use crate::config::shrink;
use crate::control::server::BindError;
use crate::device::file::FileError;
use crate::filer::StartError;
use crate::filer::recover::RecoverError;
use crate::hub::HubError;
use crate::nbd;
use crate::observe;
use crate::pool::error::PoolError;

/// The failure of a process that was started with that configuration file.
pub(super) fn failure(error: &anyhow::Error, config: &Path) -> Failure {
    let what = format!("{error:#}");
    let found = error.chain().find_map(known);
    let (code, fix) =
        found.unwrap_or((FAILED, "mend the cause named above and start again".into()));
    let next = match (code, error.chain().find_map(|cause| line(cause, config))) {
        (CONFIGURATION, Some(line)) => format!("{}:{line}: {fix}", config.display()),
        (CONFIGURATION, None) => format!("{}: {fix}", config.display()),
        _ => fix,
    };
    Failure::Message { code, what, next }
}

type Advice = (u8, String);

fn wrong(fix: impl Into<String>) -> Advice {
    (CONFIGURATION, fix.into())
}

fn later(fix: impl Into<String>) -> Advice {
    (FAILED, fix.into())
}

/// The line of the file that is to be changed, where one is known.
fn line(cause: &(dyn std::error::Error + 'static), config: &Path) -> Option<usize> {
    let recover = match cause.downcast_ref::<StartError>() {
        Some(StartError::Recover(error)) => Some(error),
        _ => cause.downcast_ref::<RecoverError>(),
    };
    let Some(RecoverError::VolumeSize { name, .. }) = recover else { return None };
    Some(shrink::place(config, name)?.line)
}

fn known(cause: &(dyn std::error::Error + 'static)) -> Option<Advice> {
    let (start, recover) =
        (cause.downcast_ref::<StartError>(), cause.downcast_ref::<RecoverError>());
    let file = cause.downcast_ref::<FileError>().and_then(of_file);
    let pool = cause.downcast_ref::<PoolError>().and_then(of_pool);
    let bind = cause.downcast_ref::<BindError>().map(of_admin);
    let nbd = cause.downcast_ref::<nbd::listen::ListenError>().map(of_nbd);
    let http = cause.downcast_ref::<observe::server::ListenError>();
    let http = http.map(|error| of_socket("http_listen", error.error.kind()));
    let hub = cause.downcast_ref::<HubError>().and_then(of_hub);
    let start = start.and_then(of_start).or_else(|| recover.and_then(of_recovery));
    start.or(file).or(pool).or(bind).or(nbd).or(http).or(hub)
}

fn of_start(error: &StartError) -> Option<Advice> {
    match error {
        StartError::File(error) => of_file(error),
        StartError::Recover(error) => of_recovery(error),
        StartError::Size { key, met, .. } => {
            let met = size(*met);
            Some(wrong(format!("key `{key}`: size = \"{met}\", as it was made; it cannot change")))
        }
        StartError::NotLoopback(_) => {
            Some(wrong("key `hub`: an address of this machine, or a section [tls]"))
        }
        StartError::Volumes { max, .. } => {
            Some(wrong(format!("key `[[volume]]`: between 1 and {max} of them")))
        }
        // What is wrong with an array says what to do itself.
        StartError::Array(_) | StartError::Random(_) | StartError::Thread(_) => None,
    }
}

fn of_recovery(error: &RecoverError) -> Option<Advice> {
    match error {
        RecoverError::Pool(error) => of_pool(error),
        RecoverError::Name { met, .. } => Some(wrong(format!(
            "key `name`: \"{met}\", or give this source a `data_dir` and `pool.devices` of its own"
        ))),
        RecoverError::VolumeGone(name) => {
            Some(wrong(format!("key `[[volume]]`: put name = \"{name}\" back, with its size")))
        }
        RecoverError::VolumeSize { name, met, .. } => {
            let met = size(met.0);
            let key = format!("key `size` of [[volume]] {name}");
            Some(wrong(format!("{key}: \"{met}\" or more; a volume does not become smaller")))
        }
        RecoverError::Sources(_) | RecoverError::Unknown(_) => {
            Some(wrong("key `pool.devices`: the device of this source"))
        }
        // They say what to do themselves, or nobody knows it.
        RecoverError::NvramLost { .. }
        | RecoverError::NvramDamaged { .. }
        | RecoverError::SoleLost { .. }
        | RecoverError::SoleDamaged { .. }
        | RecoverError::Mismatch { .. } => Some(later("do as the reason says, then start again")),
        RecoverError::Ring(_)
        | RecoverError::Random(_)
        | RecoverError::Volume(_)
        | RecoverError::Keeper(_)
        | RecoverError::Adopt(_)
        | RecoverError::Kind { .. }
        | RecoverError::Transfer { .. }
        | RecoverError::Freeze { .. }
        | RecoverError::Chain { .. } => None,
    }
}

fn of_file(error: &FileError) -> Option<Advice> {
    const KEYS: &str = "keys `nvram.path`, `pool.devices`";
    match error {
        FileError::Busy(_) => {
            Some(later("another process uses it: stop that one, or name another path"))
        }
        FileError::Kind(_) => Some(wrong(format!("{KEYS}: a regular file or a block device"))),
        FileError::Size { .. } => Some(wrong(format!("{KEYS}: sizes in multiples of 4KiB"))),
        FileError::Io { error, .. } if error.kind() == ErrorKind::StorageFull => Some(later(
            "make room on its file system, or give it less with keys `nvram.size`, `pool.devices`",
        )),
        FileError::Io { error, .. } if error.kind() == ErrorKind::PermissionDenied => {
            Some(later("let this user read and write it, or name another path"))
        }
        FileError::Exists(_) | FileError::Missing(_) | FileError::Io { .. } => None,
    }
}

fn of_pool(error: &PoolError) -> Option<Advice> {
    let key = "key `pool.devices`";
    if let PoolError::TooSmall { wanted, .. } = error {
        let mib = wanted.div_ceil(1 << 20);
        return Some(wrong(format!("{key}: at least size = \"{mib}MiB\"")));
    }
    let foreign = matches!(
        error,
        PoolError::NotAPool { .. }
            | PoolError::NotBlank { .. }
            | PoolError::AlreadyAPool { .. }
            | PoolError::WrongOwner { .. }
    );
    if foreign {
        return Some(wrong(format!("{key}: the device of this pool, or an empty one for a new")));
    }
    if matches!(error, PoolError::Shrunk { .. }) {
        return Some(later("give the device its size back"));
    }
    let version =
        matches!(error, PoolError::LabelVersion { .. } | PoolError::CatalogVersion { .. });
    version.then(|| later("start the version of mirrorhub that has written it"))
}

fn of_admin(error: &BindError) -> Advice {
    match error {
        BindError::AlreadyRunning { .. } => {
            later("stop the other process, or give this one a `data_dir` of its own")
        }
        BindError::NotASocket { .. } => wrong("key `data_dir`: a directory of its own"),
        BindError::Io { error, .. } => of_socket("data_dir", error.kind()),
    }
}

fn of_nbd(error: &nbd::listen::ListenError) -> Advice {
    let key = "nbd_listen";
    match error {
        nbd::listen::ListenError::Io { error, .. } => of_socket(key, error.kind()),
        nbd::listen::ListenError::InUse { .. } => of_socket(key, ErrorKind::AddrInUse),
        nbd::listen::ListenError::NoSocket { .. } => {
            wrong(format!("key `{key}`: another path, or remove that file"))
        }
    }
}

fn of_hub(error: &HubError) -> Option<Advice> {
    match error {
        HubError::Listen { error, .. } => Some(of_socket("listen", error.kind())),
        HubError::State { .. } => None,
    }
}

/// A socket that cannot be opened.
fn of_socket(key: &str, kind: ErrorKind) -> Advice {
    let contradictions = [
        (ErrorKind::NotFound, "a path in a directory that exists"),
        (ErrorKind::InvalidInput, "a shorter path, that of a socket has at most 107 bytes"),
        (ErrorKind::AddrNotAvailable, "an address of this machine"),
    ];
    let met = contradictions.into_iter().find(|(known, _)| *known == kind);
    if let Some((_, fix)) = met {
        return wrong(format!("key `{key}`: {fix}"));
    }
    let fix = if kind == ErrorKind::AddrInUse {
        "stop the process that listens there"
    } else {
        "mend the cause named above"
    };
    later(format!("{fix}, or change key `{key}`"))
}

/// A size as it is written in a configuration.
fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let whole = units.iter().find(|(_, shift)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    whole.map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_they_are_typed() {
        assert_eq!(size(64 << 20), "64MiB");
        assert_eq!(size(3 << 30), "3GiB");
        assert_eq!(size(4096), "4KiB");
        assert_eq!(size(4097), "4097");
    }

    /// A contradiction names file and key and is not tried again; anything else may be.
    #[test]
    fn only_a_contradiction_is_a_matter_of_the_configuration() {
        let config = Path::new("/etc/mirrorhub/source.toml");
        let met = |error: anyhow::Error| {
            let failure = failure(&error, config);
            (failure.code(), failure.render(false))
        };
        let name = "vol0".parse().unwrap();
        let (wanted, met_size) = (crate::units::numbers::ByteCount(2 << 20), 1 << 20);
        let size = RecoverError::VolumeSize {
            name,
            wanted,
            met: crate::units::numbers::ByteCount(met_size),
        };
        let (code, text) = met(StartError::Recover(size).into());
        assert_eq!(code, CONFIGURATION);
        assert!(text.contains(
            "/etc/mirrorhub/source.toml: key `size` of [[volume]] vol0: \"1MiB\" or more"
        ));
        let full = FileError::Io {
            path: "/x".into(),
            operation: "allocate",
            error: std::io::Error::from(ErrorKind::StorageFull),
        };
        let (code, text) = met(StartError::File(full).into());
        assert!(code == FAILED && text.contains("make room") && text.contains("`nvram.size`"));
        let io = std::io::Error::from(ErrorKind::NotFound);
        let listen = nbd::listen::Listen::Unix("/nonexist/nbd.sock".into());
        let error = nbd::listen::ListenError::Io { listen, error: io };
        let (code, text) = met(anyhow::Error::new(error).context("nbd_listen"));
        assert!(code == CONFIGURATION && text.contains("key `nbd_listen`"), "{text}");
        let (code, text) = met(anyhow::anyhow!("who knows"));
        assert!(code == FAILED && text.contains("mend the cause"), "{text}");
    }
}
