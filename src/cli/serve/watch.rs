//! Watches the directory of source files: says when it has come to rest after a change.
//!
//! By inotify, read by a thread of its own. What the events say is not believed, only that
//! something happened: whoever is told reads the whole directory again, so a lost event costs
//! nothing. A file that somebody still has open for writing is named, so that half of it is not
//! taken for the whole; one that stays so is told of as a change of its own. Editors that rename
//! leave a moment without the file, which is shorter than the rest that is waited for. What symbolic
//! links lead to has no events in the directory: it is looked at every second. Where the kernel
//! gives no watch, so is the directory, and the log says so.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;
use tokio::sync::mpsc;

use crate::config::load::counts;

/// Nothing has happened for so long: what was being written is written.
const REST: Duration = Duration::from_millis(250);
/// Longest wait for that while changes go on.
const REST_MAX: Duration = Duration::from_millis(1200);
/// Between two looks where inotify tells nothing.
const LOOK: Duration = Duration::from_secs(1);
/// A file that is being written for so long is told of. Unit tests shrink it.
const HELD: Duration = Duration::from_millis(if cfg!(test) { 600 } else { 5000 });
/// Names of files being written that are remembered; of more, none is.
const WRITTEN_MAX: usize = 4096;
/// Bytes of events that are read at once.
const EVENT_BYTES: usize = 16 << 10;
/// Events between the thread that reads them and whoever waits.
const EVENTS_MAX: usize = 256;

/// What the kernel said of one file, or of the directory.
type Noticed = (ReadFlags, Option<OsString>);

/// A watched directory.
#[derive(Debug)]
pub struct Watch {
    directory: PathBuf,
    /// From the thread that reads them; none if the kernel gives none. Its end is their end.
    events: Option<mpsc::Receiver<Noticed>>,
    /// The log has said that there are none.
    told: bool,
    /// Files that were changed and not closed since.
    written: BTreeMap<OsString, Written>,
    /// As it was at the last look.
    elsewhere: Elsewhere,
}

/// Which file it is, and in which state: device, inode, time of the last change, bytes.
type Identity = (u64, u64, (i64, i64), u64);

/// What symbolic links lead to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Elsewhere {
    /// The watched directory: another one, if its name is a link that was changed.
    directory: Option<(u64, u64)>,
    /// Files of sources that are links; none where one leads nowhere.
    files: BTreeMap<OsString, Option<Identity>>,
}

impl Elsewhere {
    fn of(directory: &Path) -> Self {
        let identity = |path: &Path| std::fs::metadata(path).ok();
        let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let links = files.filter(|entry| {
            counts(&entry.file_name()) && entry.file_type().is_ok_and(|kind| kind.is_symlink())
        });
        let file = |met: std::fs::Metadata| {
            (met.dev(), met.ino(), (met.mtime(), met.mtime_nsec()), met.size())
        };
        let files = links.map(|entry| (entry.file_name(), identity(&entry.path()).map(file)));
        let directory = identity(directory).map(|met| (met.dev(), met.ino()));
        Self { directory, files: files.collect() }
    }
}

/// A file that is being written.
#[derive(Debug)]
struct Written {
    /// Noticed first.
    since: Instant,
    /// [`Watch::open`] has named it as one that stays so.
    told: bool,
}

/// Files of the directory that somebody is writing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Open {
    /// All of them: they are not to be read.
    pub written: BTreeSet<OsString>,
    /// Of these, files of sources that have been so for longer than any writer should take.
    pub held: BTreeSet<OsString>,
}

impl Watch {
    /// Watches from now on; called before the directory is read for the first time.
    pub fn new(directory: &Path) -> Self {
        let (directory, written) = (directory.to_owned(), BTreeMap::new());
        let elsewhere = Elsewhere::of(&directory);
        let mut watch = Self { directory, events: None, told: false, written, elsewhere };
        watch.begin();
        watch
    }

    /// Files that somebody is writing.
    pub fn open(&mut self) -> Open {
        let written = self.written.keys().cloned().collect();
        let held = self.written.iter_mut().filter(|(name, one)| one.is_held() && counts(name));
        let told = |(name, one): (&OsString, &mut Written)| {
            one.told = true;
            name.clone()
        };
        Open { written, held: held.map(told).collect() }
    }

    /// When a file that is being written has been so for too long.
    fn next_held(&self) -> Option<Instant> {
        let untold = self.written.iter().filter(|(name, one)| !one.told && counts(name));
        untold.map(|(_, one)| one.since + HELD).min()
    }

    /// Waits for a change, and until it has come to rest; or for a file that is being written for too
    /// long. Safe to drop and call again: the next reading of the directory sees what was noticed before.
    pub async fn changed(&mut self) {
        if self.events.is_none() {
            tokio::time::sleep(LOOK).await;
            self.begin();
            return;
        }
        let held = self.next_held();
        let held = async {
            match held {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let elsewhere = changed_elsewhere(self.directory.clone(), self.elsewhere.clone());
        tokio::select! {
            () = self.wait() => {}
            () = held => return,
            now = elsewhere => {
                if now.directory != self.elsewhere.directory {
                    self.begin();
                }
                self.elsewhere = now;
            }
        }
        let until = Instant::now() + REST_MAX;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let rests = tokio::time::timeout(REST.min(left), self.wait()).await.is_err();
            if rests || self.events.is_none() {
                return;
            }
        }
    }

    fn begin(&mut self) {
        self.written.clear();
        let watched = watch_of(&self.directory).and_then(|events| {
            let (sender, receiver) = mpsc::channel(EVENTS_MAX);
            let thread = std::thread::Builder::new().name("watch".to_owned());
            thread.spawn(move || read(events, &sender)).map(|_| receiver)
        });
        match watched {
            Ok(events) => (self.events, self.told) = (Some(events), false),
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    tracing::warn!(directory = %self.directory.display(), %error,
                        "cannot be watched: looked at every second instead");
                }
            }
        }
    }

    /// Waits for events and takes them.
    async fn wait(&mut self) {
        let Some(events) = &mut self.events else { return };
        let mut next = events.recv().await;
        while let Some((flags, name)) = next {
            take(&mut self.written, flags, name.as_deref());
            next = match events.try_recv() {
                Ok(more) => Some(more),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => None,
            };
        }
        // The directory is gone, or its watch.
        self.events = None;
    }
}

/// Looks until it is another one than `before`.
async fn changed_elsewhere(directory: PathBuf, before: Elsewhere) -> Elsewhere {
    loop {
        tokio::time::sleep(LOOK).await;
        let directory = directory.clone();
        let now = tokio::task::spawn_blocking(move || Elsewhere::of(&directory)).await;
        if let Ok(now) = now
            && now != before
        {
            return now;
        }
    }
}

fn watch_of(directory: &Path) -> std::io::Result<OwnedFd> {
    let events = init(CreateFlags::CLOEXEC)?;
    let wanted = WatchFlags::CREATE
        | WatchFlags::MODIFY
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE
        | WatchFlags::ATTRIB
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR;
    add_watch(&events, directory, wanted)?;
    Ok(events)
}

/// The thread that reads events until there are no more, or nobody wants them.
fn read(events: OwnedFd, sender: &mpsc::Sender<Noticed>) {
    let mut buffer = [MaybeUninit::uninit(); EVENT_BYTES];
    let mut reader = Reader::new(events, &mut buffer);
    loop {
        let (flags, name) = match reader.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                (event.events(), name.map(OsStr::to_owned))
            }
            Err(Errno::INTR) => continue,
            Err(error) => {
                tracing::warn!(%error, "the watch of the sources directory failed");
                return;
            }
        };
        let gone = ReadFlags::IGNORED | ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF;
        if sender.blocking_send((flags, name)).is_err() || flags.intersects(gone) {
            return;
        }
    }
}

/// Notes who is being written.
fn take(written: &mut BTreeMap<OsString, Written>, events: ReadFlags, name: Option<&OsStr>) {
    if events.intersects(ReadFlags::QUEUE_OVERFLOW) {
        // Which files it was is not known: all are read.
        written.clear();
    }
    if let Some(name) = name {
        let done = ReadFlags::CLOSE_WRITE
            | ReadFlags::MOVED_TO
            | ReadFlags::MOVED_FROM
            | ReadFlags::DELETE;
        if events.intersects(done) {
            written.remove(name);
        } else if events.intersects(ReadFlags::MODIFY) && written.len() < WRITTEN_MAX {
            let now = || Written { since: Instant::now(), told: false };
            written.entry(name.to_owned()).or_insert_with(now);
        }
    }
}

impl Written {
    fn is_held(&self) -> bool {
        self.since.elapsed() >= HELD
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    async fn told(watch: &mut Watch) {
        tokio::time::timeout(Duration::from_secs(10), watch.changed()).await.expect("a change");
    }

    #[tokio::test]
    async fn a_file_is_told_of_when_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(directory.path());
        let file = directory.path().join("a.toml");
        std::fs::write(&file, "name = \"a\"\n").unwrap();
        told(&mut watch).await;
        assert!(watch.open().written.is_empty(), "it was closed");
        let mut open = std::fs::File::options().append(true).open(&file).unwrap();
        open.write_all(b"enabled").unwrap();
        told(&mut watch).await;
        assert_eq!(Vec::from_iter(watch.open().written), ["a.toml"], "somebody writes on");
        open.write_all(b" = true\n").unwrap();
        drop(open);
        told(&mut watch).await;
        assert!(watch.open().written.is_empty());
        std::fs::rename(&file, directory.path().join("a.toml~")).unwrap();
        std::fs::write(&file, "name = \"a\"\n").unwrap();
        told(&mut watch).await;
        assert!(watch.open().written.is_empty());
        std::fs::remove_file(&file).unwrap();
        told(&mut watch).await;
        let quiet = tokio::time::timeout(Duration::from_millis(600), watch.changed()).await;
        assert!(quiet.is_err(), "nothing happened");
    }

    /// Goal: who keeps a file open is told of once, when that has lasted; closed, it is no more. Control: a
    /// file that is none of a source's, and the time before.
    #[tokio::test]
    async fn a_file_that_is_kept_open_is_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(directory.path());
        let open = |name: &str| {
            let mut file = std::fs::File::create(directory.path().join(name)).unwrap();
            file.write_all(b"name = ").unwrap();
            file
        };
        let (begin, kept) = (Instant::now(), open("a.toml"));
        let _other = open(".a.toml.draft");
        told(&mut watch).await;
        let now = watch.open();
        assert_eq!((now.written.len(), now.held.len()), (2, 0), "it has just begun");
        told(&mut watch).await;
        assert!(begin.elapsed() >= HELD);
        assert_eq!(Vec::from_iter(watch.open().held), ["a.toml"]);
        let again = tokio::time::timeout(HELD * 2, watch.changed()).await;
        assert!(again.is_err(), "it was told of twice");
        drop(kept);
        told(&mut watch).await;
        let now = watch.open();
        assert_eq!((now.written.len(), now.held.len()), (1, 0));
    }

    /// Goal: what a link leads to is watched like a file of the directory, and the directory that a link names
    /// likewise. Control: a link that is no file of a source.
    #[tokio::test]
    async fn what_links_lead_to_is_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        for place in [&one, &two] {
            std::fs::create_dir(place).unwrap();
        }
        let store = directory.path().join("store");
        std::fs::write(&store, "name = \"a\"\n").unwrap();
        let other = directory.path().join("other");
        std::fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&store, one.join("a.toml")).unwrap();
        std::os::unix::fs::symlink(&other, one.join("a.toml~")).unwrap();
        let watched = directory.path().join("sources.d");
        std::os::unix::fs::symlink(&one, &watched).unwrap();
        let mut watch = Watch::new(&watched);
        std::fs::write(&other, "another text").unwrap();
        let quiet = tokio::time::timeout(LOOK * 2, watch.changed()).await;
        assert!(quiet.is_err(), "no file of a source has changed");
        std::fs::write(&store, "name = \"a\"\nenabled = false\n").unwrap();
        told(&mut watch).await;
        let next = directory.path().join("next");
        std::os::unix::fs::symlink(&two, &next).unwrap();
        std::fs::rename(&next, &watched).unwrap();
        told(&mut watch).await;
        // The new one is watched, by its events.
        std::fs::write(two.join("b.toml"), "name = \"b\"\n").unwrap();
        let begin = Instant::now();
        told(&mut watch).await;
        assert!(begin.elapsed() < LOOK, "it is not watched: {:?}", begin.elapsed());
    }

    /// A directory that is replaced is found again.
    #[tokio::test]
    async fn a_directory_that_comes_back_is_watched_again() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("sources.d");
        std::fs::create_dir(&directory).unwrap();
        let mut watch = Watch::new(&directory);
        std::fs::remove_dir(&directory).unwrap();
        told(&mut watch).await;
        std::fs::create_dir(&directory).unwrap();
        while watch.events.is_none() {
            told(&mut watch).await;
        }
        std::fs::write(directory.join("a.toml"), "").unwrap();
        told(&mut watch).await;
        assert!(watch.events.is_some());
    }
}
