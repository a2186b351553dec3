//! What takes records away again: the end of a CP, a cut, a reset.
//!
//! Called by [`super::LogStore`] with the source's lock held. Each looks before it touches
//! anything. All but the end of a CP are durable when they return, newest file first, so that a
//! power cut between leaves a prefix; an error on the way latches the source.

use std::path::Path;
use std::sync::Arc;

use super::error::{FaultKind, LogError, io_error};
use super::open::{LogName, OpenFiles};
use super::source::{Shared, SourceLogs};
use super::table::find_place;
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, LogPosition};

impl SourceLogs {
    /// Removes the logs of applied CPs. The names are not made durable: see the module's head.
    pub(super) fn drop_through(&mut self, shared: &Shared, cp: CpNumber) -> Result<(), LogError> {
        let fault = Arc::clone(&self.fault);
        let had_damage = self.has_damage();
        while let Some((&oldest, log)) = self.logs.first_key_value().filter(|(at, _)| **at <= cp) {
            let name = Arc::clone(&log.name);
            fault.latching(remove(&shared.open, &name))?;
            self.logs.remove(&oldest);
        }
        while let Some((&oldest, file)) =
            self.unreadable.first_key_value().filter(|(at, _)| **at <= cp)
        {
            fault.latching(remove_path(&shared.open, &file.path))?;
            self.unreadable.remove(&oldest);
        }
        self.dropped = self.dropped.max(cp);
        if had_damage && !self.has_damage() {
            // What ended at the damage goes on behind it now.
            self.last = self.logs.last_key_value().map(|(_, log)| log.last);
            self.clear_damage_fault();
        }
        Ok(())
    }

    /// Drops everything behind `place`, durably (R1). Looks before it touches anything.
    pub(super) fn cut(&mut self, shared: &Shared, place: &Place) -> Result<(), LogError> {
        self.fault.check_io()?;
        let Some((cp, end)) = self.find(shared, place)? else {
            // Without logs nothing lies behind a place, known or not yet known.
            let empty = self.logs.is_empty() && self.unreadable.is_empty();
            if empty && self.last.is_none_or(|last| last == *place) {
                self.last = Some(*place);
                return Ok(());
            }
            let (source_id, id) = (self.source, place.transfer);
            let what = "no log has it with this sequence number and stream hash".into();
            return Err(LogError::NoPlace { source_id, id, what });
        };
        self.cuts += 1;
        let fault = Arc::clone(&self.fault);
        // An error after this point leaves the files between before and after: latched.
        fault.latching(self.remove_behind(shared, cp, end.is_none()))?;
        if let (Some(end), Some(log)) = (end, self.logs.get_mut(&cp)) {
            fault.latching(log.cut(&shared.open, end, *place))?;
        }
        self.last = Some(*place);
        if !self.has_damage() {
            self.clear_damage_fault();
        }
        Ok(())
    }

    /// Drops all logs, durably, and begins a new chain behind `base`; `None`: behind anything.
    pub(super) fn reset(&mut self, shared: &Shared, base: Option<Place>) -> Result<(), LogError> {
        self.fault.check_io()?;
        self.cuts += 1;
        let fault = Arc::clone(&self.fault);
        fault.latching(self.remove_behind(shared, CpNumber(0), true))?;
        self.last = base;
        self.clear_damage_fault();
        Ok(())
    }

    /// The log in which `place` lies and where; no position means that the log begins there.
    fn find(
        &self,
        shared: &Shared,
        place: &Place,
    ) -> Result<Option<(CpNumber, Option<LogPosition>)>, LogError> {
        for (cp, log) in &self.logs {
            // Behind damage there is no place to cut at.
            if self.unreadable.first_key_value().is_some_and(|(bad, _)| bad < cp) {
                break;
            }
            if log.name.identity.start == *place {
                return Ok(Some((*cp, None)));
            }
            if log.name.identity.start.transfer < place.transfer
                && place.transfer <= log.last.transfer
            {
                let end = find_place(&shared.open, &log.name, log.extent, place)?;
                return Ok(end.map(|end| (*cp, Some(end))));
            }
            if log.damage.is_some() {
                break;
            }
        }
        Ok(None)
    }

    /// Removes the files behind `cp`, newest first and each durably before the next, so that a power cut
    /// leaves a prefix; with `inclusive` also its own.
    fn remove_behind(
        &mut self,
        shared: &Shared,
        cp: CpNumber,
        inclusive: bool,
    ) -> Result<(), LogError> {
        let goes = |at: CpNumber| at > cp || (inclusive && at == cp);
        while let Some((&newest, file)) =
            self.unreadable.last_key_value().filter(|(at, _)| goes(**at))
        {
            remove_path(&shared.open, &file.path)?;
            shared.open.sync_dir(&self.dir)?;
            self.unreadable.remove(&newest);
        }
        while let Some((&newest, log)) = self.logs.last_key_value().filter(|(at, _)| goes(**at)) {
            let name = Arc::clone(&log.name);
            remove(&shared.open, &name)?;
            shared.open.sync_dir(&self.dir)?;
            self.logs.remove(&newest);
        }
        Ok(())
    }

    fn has_damage(&self) -> bool {
        !self.unreadable.is_empty() || self.logs.values().any(|log| log.damage.is_some())
    }

    fn clear_damage_fault(&self) {
        if matches!(self.fault.get(), Some((FaultKind::Damage, _))) {
            self.fault.clear();
        }
    }
}

pub(super) fn remove(open: &OpenFiles, name: &LogName) -> Result<(), LogError> {
    open.discard(name.identity.log);
    remove_path(open, &name.path)
}

pub(super) fn remove_path(open: &OpenFiles, path: &Path) -> Result<(), LogError> {
    match open.files().remove(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error(&path.to_string_lossy().into(), "remove")(error)),
    }
}
