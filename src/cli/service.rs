//! Word for the service manager that started the process, as sd_notify(3) has it: ready, reloading,
//! stopping. Where nobody listens (no `NOTIFY_SOCKET`) nothing is said.
//!
//! A manager that cannot be told does not keep a mirror from running: that is logged, and no more.

use sd_notify::{NotifyState, notify};

/// Everything is open and answers. `status` is shown by `systemctl status`.
pub fn ready(status: &str) {
    say(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The files are being read again; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => say(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "the service manager is not told of the reload"),
    }
}

/// A clean stop has begun.
pub fn stopping() {
    say(&[NotifyState::Stopping]);
}

fn say(word: &[NotifyState<'_>]) {
    if let Err(error) = notify(word) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}
