//! Clients on the same host as the volumes that they use.
//!
//! When the kernel is short of memory it writes back a file system that lies on one of these volumes. If this
//! process waits for memory to take that write, and the kernel for the write to free some, nobody goes
//! on. Called by the `source` command before its first thread is made: threads inherit both.
//!
//! * PR_SET_IO_FLUSHER (prctl(2)), where a unix socket is served: what the kernel allocates for this process
//!   writes nothing back. It wants CAP_SYS_RESOURCE; without it is said what is missing.
//! * `lock_memory`: mlockall(2), of pages as they are touched. It wants CAP_IPC_LOCK, or no limit: below a
//!   limit an allocation would fail in the middle of the work.

use anyhow::{Context, Result, bail};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, configure_io_flusher_behavior, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::config::schema::{Listen, SourceConfig};

/// Does both, as far as the file asks for it.
///
/// # Errors
/// `lock_memory` cannot be held.
pub(super) fn prepare(config: &SourceConfig) -> Result<()> {
    if let Listen::Unix(_) = config.nbd_listen
        && let Err(error) = configure_io_flusher_behavior(true)
    {
        tracing::info!(
            %error,
            "no right to PR_SET_IO_FLUSHER (CAP_SYS_RESOURCE): a file system on this host that lies on \
             a volume may stand still when memory is short"
        );
    }
    if !config.lock_memory {
        return Ok(());
    }
    let limit = getrlimit(Resource::Memlock).current;
    let own = capabilities(None).context("cannot ask for the own rights")?;
    if !own.effective.contains(CapabilitySet::IPC_LOCK)
        && let Some(limit) = limit
    {
        bail!(
            "lock_memory wants CAP_IPC_LOCK or LimitMEMLOCK=infinity; the limit is {limit} bytes"
        );
    }
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    mlockall(all).context("lock_memory: mlockall")
}
