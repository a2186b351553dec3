//! A file system in memory for tests: it counts what is open, fails on demand, and forgets at a
//! power cut what was not synced.
//!
//! Each file has two contents: what the cache has and what the medium has. A sync copies the
//! first to the second. [`SimFiles::power_cut`] decides by a seed, sector by sector, name by name,
//! what of the difference reached the medium; in data also rubbish may be there instead. A failed
//! sync drops the dirty sectors as a kernel does: later syncs succeed without writing them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use super::files::{Files, LogFile};
use crate::device::sim::Chance;
use crate::units::convert::{to_u64, to_usize};

const SECTOR: usize = 512;
const HEADER: usize = 4096;

/// What may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Create,
    Write,
    /// Half of the bytes are written, then the error comes.
    ShortWrite,
    Allocate,
    Truncate,
    /// The file's dirty sectors do not reach the medium, whoever syncs.
    Writeback,
    SyncDir,
    Remove,
    MakeDir,
    List,
    Open,
    Rename,
    /// Of one file, and of the whole file system.
    Sync,
    SyncAll,
}

#[derive(Debug, Default)]
struct Inode {
    cache: Vec<u8>,
    medium: Vec<u8>,
    /// Sectors given up after a failed writeback, with the content they had then.
    lost: HashMap<usize, Vec<u8>>,
    /// A failed writeback that no fdatasync has reported yet.
    error: bool,
}

#[derive(Debug, Default)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<PathBuf, usize>,
    medium_names: BTreeMap<PathBuf, usize>,
    dirs: BTreeSet<PathBuf>,
    medium_dirs: BTreeSet<PathBuf>,
    /// Names given up after a failed writeback of their directory.
    lost_names: BTreeSet<PathBuf>,
    /// Such directories that no fsync has reported yet, and whether a syncfs has.
    dir_errors: BTreeMap<PathBuf, bool>,
    rules: Vec<(Op, String, i32)>,
    open: usize,
    open_peak: usize,
    calls: u64,
    die_at: Option<u64>,
    /// The call that fails, and how.
    fail_at: Option<(u64, i32)>,
    /// What the call was that failed so, or died.
    struck: Option<Op>,
    no_allocate: bool,
    no_sync: bool,
    file_syncs: u64,
    writebacks: u64,
    system_syncs: u64,
    read_bytes: u64,
}

/// The whole file system.
#[derive(Debug, Clone, Default)]
pub(crate) struct SimFiles(Arc<Mutex<State>>, Arc<Gate>);

/// Paths on which calls stand still, and the bell that says that this has changed.
#[derive(Debug, Default)]
struct Gate {
    /// The path's part, and how many stand there.
    held: Mutex<(Option<String>, usize)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self, path: &Path) {
        let closed = |held: &(Option<String>, usize)| {
            held.0.as_ref().is_some_and(|part| path.to_string_lossy().contains(part))
        };
        let mut held = self.held.lock().unwrap();
        if closed(&held) {
            held.1 += 1;
            self.changed.notify_all();
        }
        while closed(&held) {
            held = self.changed.wait(held).unwrap();
        }
    }
}

#[derive(Debug)]
struct SimFile {
    files: SimFiles,
    path: PathBuf,
    inode: usize,
}

impl SimFiles {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap())
    }

    /// From now on `op` fails with that errno on paths that contain `text`.
    pub(crate) fn fail(&self, op: Op, text: &str, errno: i32) {
        self.with(|s| s.rules.push((op, text.to_owned(), errno)));
    }

    /// Opening a file whose path contains `text` and writing to it stand still.
    pub(crate) fn hold(&self, text: &str) {
        *self.1.held.lock().unwrap() = (Some(text.to_owned()), 0);
    }

    /// Waits until somebody stands still.
    pub(crate) fn until_held(&self) {
        let mut held = self.1.held.lock().unwrap();
        while held.1 == 0 {
            held = self.1.changed.wait(held).unwrap();
        }
    }

    pub(crate) fn let_go(&self) {
        self.1.held.lock().unwrap().0 = None;
        self.1.changed.notify_all();
    }

    pub(crate) fn heal(&self) {
        self.with(|s| s.rules.clear());
    }

    /// Every call from the `n`-th on fails: the process is as good as dead.
    pub(crate) fn die_at(&self, call: u64) {
        self.with(|s| s.die_at = Some(call));
    }

    /// The `n`-th call from now fails with that errno, counted from 0.
    pub(crate) fn fail_call(&self, n: u64, errno: i32) {
        self.with(|s| s.fail_at = Some((s.calls + n + 1, errno)));
    }

    /// Whether such a call is still to come.
    pub(crate) fn will_fail(&self) -> bool {
        self.with(|s| {
            let fails = s.fail_at.is_some_and(|(at, _)| s.calls < at);
            fails || s.die_at.is_some_and(|at| s.calls < at)
        })
    }

    /// The call that failed by its number, or at which the process died.
    pub(crate) fn struck(&self) -> Option<Op> {
        self.with(|s| s.struck)
    }

    /// Whether the process is as good as dead.
    pub(crate) fn is_dead(&self) -> bool {
        self.with(|s| s.die_at.is_some_and(|at| s.calls >= at))
    }

    pub(crate) fn calls(&self) -> u64 {
        self.with(|s| s.calls)
    }

    pub(crate) fn without_allocate(&self) {
        self.with(|s| s.no_allocate = true);
    }

    /// Syncs report success and do nothing: the negative control.
    pub(crate) fn without_sync(&self) {
        self.with(|s| s.no_sync = true);
    }

    /// Descriptors open now, and the most that ever were.
    pub(crate) fn open_now_and_peak(&self) -> (usize, usize) {
        self.with(|s| (s.open, s.open_peak))
    }

    /// Calls of fdatasync and of syncfs.
    pub(crate) fn syncs(&self) -> (u64, u64) {
        self.with(|s| (s.file_syncs, s.system_syncs))
    }

    /// Writebacks that were begun early.
    pub(crate) fn writebacks(&self) -> u64 {
        self.with(|s| s.writebacks)
    }

    /// Bytes read so far.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.with(|s| s.read_bytes)
    }

    pub(crate) fn content(&self, path: &Path) -> Option<Vec<u8>> {
        self.with(|s| Some(s.inodes[*s.names.get(path)?].cache.clone()))
    }

    /// Puts a file there, on the medium as well.
    pub(crate) fn put(&self, path: &Path, content: &[u8]) {
        self.with(|s| {
            let (cache, medium) = (content.to_vec(), content.to_vec());
            s.inodes.push(Inode { cache, medium, ..Inode::default() });
            s.names.insert(path.to_owned(), s.inodes.len() - 1);
            s.medium_names.insert(path.to_owned(), s.inodes.len() - 1);
            let dir = path.parent().unwrap().to_owned();
            s.dirs.insert(dir.clone());
            s.medium_dirs.insert(dir);
        });
    }

    /// A byte of a file rots, on the medium as well.
    pub(crate) fn rot(&self, path: &Path, at: usize) {
        self.with(|s| {
            let Some(inode) = s.names.get(path).copied() else { return };
            let Inode { cache, medium, .. } = &mut s.inodes[inode];
            for bytes in [cache, medium] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 0x11;
                }
            }
        });
    }

    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.with(|s| s.names.keys().cloned().collect())
    }

    /// The kernel drops clean pages, those it could not write among them: reads show the medium.
    pub(crate) fn evict(&self) {
        self.with(|s| {
            for inode in &mut s.inodes {
                for number in std::mem::take(&mut inode.lost).into_keys() {
                    let old = sector(&inode.medium, number);
                    put_sector(&mut inode.cache, number, &old);
                }
            }
        });
    }

    /// Nobody was told yet of the writebacks that failed.
    pub(crate) fn forget_told(&self) {
        self.with(|s| {
            for inode in &mut s.inodes {
                inode.error |= !inode.lost.is_empty();
            }
        });
    }

    /// A separate copy of everything, as after a mere kill.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self::default();
        self.with(|from| {
            copy.with(|to| {
                to.names = from.names.clone();
                to.medium_names = from.medium_names.clone();
                to.dirs = from.dirs.clone();
                to.medium_dirs = from.medium_dirs.clone();
                to.inodes = from.inodes.iter().map(Inode::copy).collect();
            });
        });
        copy
    }

    /// What a power cut leaves; `rubbish` lets unsynced data sectors hold anything.
    pub(crate) fn power_cut(&self, chance: &mut Chance, rubbish: bool) -> Self {
        let after = self.copy();
        after.with(|s| {
            for inode in &mut s.inodes {
                inode.power_cut(chance, rubbish);
            }
            s.lose_dirs(chance);
            let mut paths: Vec<PathBuf> = s.names.keys().cloned().collect();
            paths.extend(s.medium_names.keys().cloned());
            paths.sort();
            paths.dedup();
            for path in paths {
                let from = if chance.below(2) == 0 { &s.names } else { &s.medium_names };
                match from.get(&path).copied() {
                    Some(inode) => {
                        s.names.insert(path.clone(), inode);
                        s.medium_names.insert(path, inode);
                    }
                    None => {
                        s.names.remove(&path);
                        s.medium_names.remove(&path);
                    }
                }
            }
        });
        after
    }
}

impl State {
    fn step(&mut self, op: Op, path: &Path) -> io::Result<()> {
        self.calls += 1;
        if self.die_at.is_some_and(|at| self.calls >= at) {
            self.struck.get_or_insert(op);
            return Err(io::Error::other("the process is dead"));
        }
        if let Some((at, errno)) = self.fail_at
            && at == self.calls
        {
            self.struck = Some(op);
            return Err(io::Error::from_raw_os_error(errno));
        }
        let text = path.to_string_lossy();
        match self.rules.iter().find(|(rule, part, _)| *rule == op && text.contains(part)) {
            Some((_, _, errno)) => Err(io::Error::from_raw_os_error(*errno)),
            None => Ok(()),
        }
    }

    /// A directory whose own name was not durable takes all names in it with it.
    fn lose_dirs(&mut self, chance: &mut Chance) {
        let medium = self.medium_dirs.clone();
        self.dirs.retain(|dir| medium.contains(dir) || chance.below(2) == 0);
        self.medium_dirs = self.dirs.clone();
        let dirs = self.dirs.clone();
        let there = |path: &PathBuf| path.parent().is_some_and(|dir| dirs.contains(dir));
        self.names.retain(|path, _| there(path));
        self.medium_names.retain(|path, _| there(path));
    }

    /// Writes all names back, or gives those up whose directory cannot be written; says whether there is
    /// an error to tell that no syncfs has told.
    fn write_names_back(&mut self) -> bool {
        let fails = |dir: &Path| {
            let text = dir.to_string_lossy();
            self.rules
                .iter()
                .any(|(op, part, _)| *op == Op::SyncDir && text.contains(part.as_str()))
        };
        let new =
            self.names.iter().filter(|(path, inode)| self.medium_names.get(*path) != Some(*inode));
        let lost: Vec<PathBuf> = new
            .filter(|(path, _)| path.parent().is_some_and(fails))
            .map(|(path, _)| path.clone())
            .filter(|path| !self.lost_names.contains(path))
            .collect();
        for path in lost {
            self.dir_errors.extend(path.parent().map(|dir| (dir.to_owned(), false)));
            self.lost_names.insert(path);
        }
        if !self.no_sync {
            let kept = |(path, _): &(&PathBuf, &usize)| !self.lost_names.contains(*path);
            let names = self.names.iter().filter(kept);
            self.medium_names = names.map(|(path, inode)| (path.clone(), *inode)).collect();
            self.medium_dirs = self.dirs.clone();
        }
        let untold = self.dir_errors.values_mut().filter(|told| !**told);
        untold.map(|told| *told = true).count() > 0
    }

    /// Writes an inode back, or gives its dirty sectors up.
    fn write_back(&mut self, path: &Path, inode: usize) {
        let text = path.to_string_lossy();
        let fails = self
            .rules
            .iter()
            .any(|(op, part, _)| *op == Op::Writeback && text.contains(part.as_str()));
        if !self.no_sync {
            self.inodes[inode].write_back(fails);
        }
    }
}

impl Inode {
    fn copy(&self) -> Self {
        let (cache, medium) = (self.cache.clone(), self.medium.clone());
        Self { cache, medium, lost: self.lost.clone(), error: false }
    }

    fn dirty(&self) -> Vec<usize> {
        let sectors = self.cache.len().max(self.medium.len()).div_ceil(SECTOR);
        let differs = |n: &usize| match (whole(&self.cache, *n), whole(&self.medium, *n)) {
            (Some(cache), Some(medium)) => cache != medium,
            _ => sector(&self.cache, *n) != sector(&self.medium, *n),
        };
        (0..sectors).filter(differs).collect()
    }

    fn write_back(&mut self, fails: bool) {
        let dirty = self.dirty();
        let mut clean = dirty.is_empty();
        for number in dirty {
            let now = sector(&self.cache, number);
            if self.lost.get(&number) == Some(&now) {
                continue;
            }
            clean = false;
            if fails {
                self.lost.insert(number, now);
            } else {
                self.lost.remove(&number);
                put_sector(&mut self.medium, number, &now);
            }
        }
        if fails {
            self.error |= !clean;
        } else {
            self.medium.resize(self.cache.len(), 0);
        }
    }

    fn power_cut(&mut self, chance: &mut Chance, rubbish: bool) {
        let (old, new) = (self.medium.len(), self.cache.len());
        let mut left = self.medium.clone();
        for number in self.dirty() {
            let in_header = number * SECTOR < HEADER;
            let choice = chance.below(if rubbish && !in_header { 4 } else { 2 });
            // What was given up is clean to the kernel: it is not on its way.
            let given_up = self.lost.get(&number) == Some(&sector(&self.cache, number));
            let bytes = match choice {
                _ if given_up => sector(&self.medium, number),
                0 => sector(&self.medium, number),
                3 => (0..SECTOR).map(|_| chance.next_u64().to_le_bytes()[0]).collect(),
                _ => sector(&self.cache, number),
            };
            put_sector(&mut left, number, &bytes);
        }
        // The length is the old one, the new one, or that of some pages in between.
        let between =
            old.min(new) + to_usize(chance.below(to_u64(old.abs_diff(new)) / 4096 + 1)) * 4096;
        let lengths = [old, new, between];
        left.resize(lengths[to_usize(chance.below(3))], 0);
        self.cache = left.clone();
        self.medium = left;
        self.lost.clear();
    }
}

/// A sector that lies within the content.
fn whole(content: &[u8], number: usize) -> Option<&[u8]> {
    content.get(number * SECTOR..(number + 1) * SECTOR)
}

fn sector(content: &[u8], number: usize) -> Vec<u8> {
    let start = (number * SECTOR).min(content.len());
    let end = (start + SECTOR).min(content.len());
    let mut bytes = content[start..end].to_vec();
    bytes.resize(SECTOR, 0);
    bytes
}

fn put_sector(content: &mut Vec<u8>, number: usize, bytes: &[u8]) {
    let end = (number + 1) * SECTOR;
    if content.len() < end {
        content.resize(end, 0);
    }
    content[end - SECTOR..end].copy_from_slice(bytes);
}

impl Files for SimFiles {
    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.with(|s| {
            s.step(Op::MakeDir, path)?;
            Ok(s.dirs.insert(path.to_owned()))
        })
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        self.with(|s| {
            s.step(Op::List, path)?;
            let inside = s.names.keys().filter(|name| name.parent() == Some(path));
            Ok(inside.filter_map(|name| name.file_name()).map(OsString::from).collect())
        })
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        self.with(|s| {
            s.step(Op::Create, path)?;
            if s.names.contains_key(path) {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists));
            }
            s.inodes.push(Inode::default());
            s.names.insert(path.to_owned(), s.inodes.len() - 1);
            Ok(())
        })?;
        self.open(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        self.1.pass(path);
        let inode = self.with(|s| {
            s.step(Op::Open, path)?;
            let inode = s.names.get(path).copied().ok_or(io::ErrorKind::NotFound)?;
            s.open += 1;
            s.open_peak = s.open_peak.max(s.open);
            Ok::<_, io::Error>(inode)
        })?;
        Ok(Arc::new(SimFile { files: self.clone(), path: path.to_owned(), inode }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.with(|s| {
            s.step(Op::Rename, to)?;
            let inode = s.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            s.names.insert(to.to_owned(), inode);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.with(|s| {
            s.step(Op::Remove, path)?;
            s.names.remove(path).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.with(|s| {
            s.step(Op::SyncDir, path)?;
            if s.dir_errors.remove(path).is_some() {
                return Err(io::Error::from_raw_os_error(5));
            }
            if s.no_sync {
                return Ok(());
            }
            s.medium_names.retain(|name, _| name.parent() != Some(path));
            let inside = s.names.iter().filter(|(name, _)| name.parent() == Some(path));
            let inside: Vec<_> = inside.map(|(name, inode)| (name.clone(), *inode)).collect();
            s.medium_names.extend(inside);
            let dirs = s.dirs.iter().filter(|dir| dir.parent() == Some(path)).cloned();
            s.medium_dirs.extend(dirs.collect::<Vec<_>>());
            Ok(())
        })
    }

    fn sync_file_system(&self) -> io::Result<()> {
        self.with(|s| {
            s.system_syncs += 1;
            s.step(Op::SyncAll, Path::new(""))?;
            for (path, inode) in s.names.clone() {
                s.write_back(&path, inode);
            }
            // Told once, and told again by each directory's own fsync.
            let names_failed = s.write_names_back();
            // Told once, and told again by each file's own fdatasync.
            let failed = names_failed || s.inodes.iter().any(|inode| inode.error);
            if failed { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
        })
    }
}

impl LogFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        self.files.with(|s| Ok(to_u64(s.inodes[self.inode].cache.len())))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.files.with(|s| {
            let cache = &s.inodes[self.inode].cache;
            let start = to_usize(offset).min(cache.len());
            let count = buffer.len().min(cache.len() - start);
            buffer[..count].copy_from_slice(&cache[start..start + count]);
            s.read_bytes += to_u64(count);
            Ok(count)
        })
    }

    fn write_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.files.1.pass(&self.path);
        self.files.with(|s| {
            let bytes = parts.concat();
            s.step(Op::Write, &self.path)?;
            let short = s.step(Op::ShortWrite, &self.path);
            let written = if short.is_ok() { bytes.len() } else { bytes.len() / 2 };
            let inode = &mut s.inodes[self.inode];
            let end = to_usize(offset) + written;
            // What is written again is dirty again, whatever it holds.
            let touched = (end - written) / SECTOR..end.div_ceil(SECTOR);
            inode.lost.retain(|number, _| !touched.contains(number));
            let cache = &mut inode.cache;
            if cache.len() < end {
                cache.resize(end, 0);
            }
            cache[end - written..end].copy_from_slice(&bytes[..written]);
            short
        })
    }

    fn allocate(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        self.files.with(|s| {
            if s.no_allocate {
                return Err(io::ErrorKind::Unsupported.into());
            }
            s.step(Op::Allocate, &self.path)
        })
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.files.with(|s| {
            s.step(Op::Truncate, &self.path)?;
            let inode = &mut s.inodes[self.inode];
            inode.cache.resize(to_usize(length), 0);
            inode.lost.retain(|number, _| *number < to_usize(length) / SECTOR);
            Ok(())
        })
    }

    fn begin_writeback(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        self.files.with(|s| {
            s.writebacks += 1;
            s.write_back(&self.path, self.inode);
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.files.with(|s| {
            s.file_syncs += 1;
            s.step(Op::Sync, &self.path)?;
            s.write_back(&self.path, self.inode);
            // The kernel reports a failed writeback once to a descriptor.
            if std::mem::take(&mut s.inodes[self.inode].error) {
                return Err(io::Error::from_raw_os_error(5));
            }
            Ok(())
        })
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.files.with(|s| s.open -= 1);
    }
}
