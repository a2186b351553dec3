//! Asks a running process over its admin socket.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::mpsc;

use super::failure::{Failure, UNREACHABLE, USAGE};
use super::locate::{ConfigArgument, Located};
use super::progress::ProgressShow;
use super::terminal::Look;
use crate::control::client::{CallError, call, call_feeding};
use crate::control::feed::Piece;
use crate::control::message::{Request, code};

/// A process that can be asked.
#[derive(Debug)]
pub struct Asked(Located);

/// How long `status` may take: it is answered from published copies.
pub const STATUS_PATIENCE: Duration = Duration::from_secs(10);

/// A runtime for one command.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start the async runtime: {error}"), ""))
}

/// Has `name`, which `warning` is about, typed once more before `command` takes what cannot be had
/// back. Without somebody at a terminal nothing is done.
pub fn confirm(command: &str, warning: &str, name: &str) -> Result<(), Failure> {
    if !io::stdin().is_terminal() {
        let what = format!("{command}: nobody is there to confirm it");
        let next = "run it in a terminal, or add --yes".into();
        return Err(Failure::Message { code: USAGE, what, next });
    }
    let unread = |error: io::Error| {
        Failure::failed(format!("{command}: no confirmation can be read: {error}"), "")
    };
    let mut out = io::stderr();
    write!(out, "{warning} Type its name to confirm: ").map_err(unread)?;
    out.flush().map_err(unread)?;
    let mut line = String::new();
    io::stdin().read_line(&mut line).map_err(unread)?;
    is_confirmed(command, name, &line)
}

fn is_confirmed(command: &str, name: &str, line: &str) -> Result<(), Failure> {
    if line.trim() == name {
        return Ok(());
    }
    Err(Failure::failed(format!("{command}: not confirmed, nothing is done"), ""))
}

fn understood<T: DeserializeOwned>(what: &str, value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|error| {
        let next = "is it of another version? see `mirrorhub --version` on both ends";
        Failure::failed(format!("{what}: the answer is not understood: {error}"), next)
    })
}

impl Asked {
    /// The process of that configuration.
    pub fn of(config: &ConfigArgument) -> Result<Self, Failure> {
        config.process().map(Self)
    }

    /// Sends `request`, shows progress on stderr, and reads the answer as a `T`. `what` names the
    /// command and its object in errors, such as `checkpoint of filer-a`.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        request: &Request,
        what: &str,
        patience: Option<Duration>,
        error_look: Look,
    ) -> Result<T, Failure> {
        let mut show = ProgressShow::new(error_look);
        let value = call(&self.0.socket, request, patience, &mut |progress| show.update(&progress))
            .await
            .map_err(|error| self.failure(what, error))?;
        show.end();
        understood(what, value)
    }

    /// As [`Asked::ask`], without progress; `None` if the process is too busy for it now.
    pub async fn ask_unless_busy<T: DeserializeOwned>(
        &self,
        request: &Request,
        what: &str,
        patience: Option<Duration>,
    ) -> Result<Option<T>, Failure> {
        match call(&self.0.socket, request, patience, &mut |_| {}).await {
            Ok(value) => understood(what, value).map(Some),
            Err(CallError::Refused(refused)) if refused.code == code::BUSY => Ok(None),
            Err(error) => Err(self.failure(what, error)),
        }
    }

    /// As [`Asked::ask`], with a file behind the request.
    pub async fn feed<T: DeserializeOwned>(
        &self,
        request: &Request,
        what: &str,
        pieces: mpsc::Receiver<io::Result<Piece>>,
        error_look: Look,
    ) -> Result<T, Failure> {
        let mut show = ProgressShow::new(error_look);
        let mut shown = |progress| show.update(&progress);
        let value = call_feeding(&self.0.socket, request, pieces, &mut shown)
            .await
            .map_err(|error| self.failure(what, error))?;
        show.end();
        understood(what, value)
    }

    fn failure(&self, what: &str, error: CallError) -> Failure {
        match error {
            CallError::Unread(error) => Failure::failed(format!("{what}: {error}"), ""),
            CallError::Unreachable { socket, error } => {
                let next = self.way_to(&socket, error.kind());
                let what = format!("{what}: no process answers at {}: {error}", socket.display());
                Failure::Message { code: UNREACHABLE, what, next }
            }
            CallError::Broken { socket, what: how } => Failure::Message {
                code: UNREACHABLE,
                what: format!("{what}: {}: {how}", socket.display()),
                next: "look at the log of the process, then try again".into(),
            },
            CallError::Refused(refused) => {
                Failure::failed(format!("{what}: {}", refused.message), refused.next_step)
            }
        }
    }

    fn way_to(&self, socket: &Path, kind: ErrorKind) -> String {
        if kind == ErrorKind::PermissionDenied {
            return format!("run it as the owner of {}, or as root", socket.display());
        }
        format!("start it: {}", self.0.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_name_confirms() {
        let name = "filer-a@mon";
        assert!(is_confirmed("drop", name, "filer-a@mon\n").is_ok());
        for other in ["", "\n", "y\n", "yes\n", "mon\n", "filer-a@mo\n", "filer-a@mon x\n"] {
            assert!(is_confirmed("drop", name, other).is_err(), "{other:?}");
        }
    }
}
