//! Tests of the source logs: what they share. Each file below names its goal.

mod behind;
mod chain;
mod faults;
mod model;
mod reading;
mod recovery;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::sim::SimFiles;
use super::{Appended, LogError, LogOptions, LogReader, LogStore};
use crate::device::sim::Chance;
use crate::record::entry::{Entry, EntryKind};
use crate::record::marks::Place;
use crate::record::transfer::{Builder, Transfer, TransferHeader};
use crate::units::convert::to_u64;
use crate::units::hash::crc32c;
use crate::units::ids::{HubId, SourceId};
use crate::units::numbers::{CpNumber, Epoch, SequenceNumber, TransferId, VolumeNumber};

const HUB: HubId = HubId([7; 16]);
const EPOCH: Epoch = Epoch { number: 1, id: 99 };
const ROOT: &str = "/logs";

fn source(n: u8) -> SourceId {
    SourceId([n; 16])
}

fn log_path(source: SourceId, cp: u32) -> PathBuf {
    Path::new(ROOT).join(source.to_string()).join(format!("cp-{cp:010}.log"))
}

fn options() -> LogOptions {
    LogOptions { files_open_max: 4, step_bytes: 64 << 10, limit_bytes_per_source: 64 << 20 }
}

fn store_with(files: &SimFiles, options: LogOptions) -> LogStore {
    LogStore::open_with(Arc::new(files.clone()), Path::new(ROOT), HUB, options).unwrap()
}

/// A store over what is there, with nothing recovered yet.
fn reopen(files: &SimFiles) -> LogStore {
    store_with(files, options())
}

/// A store with these sources recovered as new.
fn store_of(files: &SimFiles, sources: &[SourceId]) -> LogStore {
    let store = reopen(files);
    for source in sources {
        store.recover(*source, CpNumber(0)).unwrap();
    }
    store
}

/// The history of one source: forms transfers that join each other.
#[derive(Debug, Clone)]
struct Line {
    place: Place,
    generation: u32,
    chance: Chance,
}

impl Line {
    fn new(seed: u64) -> Self {
        Self { place: Place::default(), generation: 1, chance: Chance::new(seed) }
    }

    /// A transfer with one write of that many bytes at that offset.
    fn write(&mut self, cp: u32, offset: u64, length: usize) -> Transfer {
        self.transfer(cp, &[(EntryKind::Write, offset, length)])
    }

    /// A small transfer: one sector of data.
    fn small(&mut self, cp: u32) -> Transfer {
        let offset = self.chance.below(1 << 20);
        self.write(cp, offset, 100)
    }

    fn transfer(&mut self, cp: u32, entries: &[(EntryKind, u64, usize)]) -> Transfer {
        let mut builder = Builder::default();
        for (kind, offset, length) in entries {
            let mut data = vec![0; if *kind == EntryKind::Write { *length } else { 0 }];
            for chunk in data.chunks_mut(8) {
                chunk.copy_from_slice(&self.chance.next_u64().to_le_bytes()[..chunk.len()]);
            }
            let entry = Entry {
                kind: *kind,
                volume: VolumeNumber(0),
                offset: *offset,
                length: u32::try_from(*length).unwrap(),
                crc: if data.is_empty() { 0 } else { crc32c(&data) },
            };
            builder.push(entry, Bytes::from(data));
        }
        let counter = if self.place.transfer.generation == self.generation {
            self.place.transfer.counter + 1
        } else {
            1
        };
        let transfer = builder.finish(TransferHeader {
            id: TransferId { generation: self.generation, counter },
            cp: CpNumber(cp),
            partition: 0,
            first_sequence: SequenceNumber(self.place.sequence.0 + 1),
            previous: self.place.transfer,
            hash_before: self.place.hash,
            own_durable: TransferId::NONE,
        });
        self.place = place(&transfer);
        transfer
    }
}

/// Place behind a transfer.
fn place(transfer: &Transfer) -> Place {
    let (transfer, sequence, hash) =
        (transfer.id(), transfer.last_sequence(), transfer.hash_after());
    Place { transfer, sequence, hash }
}

fn append(store: &LogStore, source: SourceId, transfer: &Transfer) {
    let done = store.append(source, EPOCH, transfer).unwrap();
    assert!(matches!(done, Appended::Written { .. }));
}

fn sync(store: &LogStore, source: SourceId) -> Result<Place, LogError> {
    let mut results = store.sync(&[source]);
    assert_eq!((results.len(), results[0].0), (1, source));
    results.remove(0).1
}

/// Ids of all transfers, or the error after how many.
fn ids(reader: &LogReader) -> Result<Vec<TransferId>, (usize, LogError)> {
    let mut ids = Vec::new();
    for transfer in reader.transfers() {
        match transfer {
            Ok(transfer) => ids.push(transfer.id()),
            Err(error) => return Err((ids.len(), error)),
        }
    }
    Ok(ids)
}

fn file_offset(transfers: &[Transfer]) -> u64 {
    let records =
        transfers.iter().map(|t| crate::record::envelope::record_bytes(to_u64(t.bytes().len())));
    4096 + records.sum::<u64>()
}

/// Replaces the content of one file in a copy of the file system.
fn with_content(files: &SimFiles, path: &Path, content: &[u8]) -> SimFiles {
    let copy = files.copy();
    copy.put(path, content);
    copy
}
