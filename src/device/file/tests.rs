//! Real files: on the file system of the temporary directory and, where there is one, on tmpfs.

use std::os::unix::fs::symlink;

use super::super::conformance;
use super::*;

const SIZE: ByteCount = ByteCount(1 << 20);

/// Every place and way a test should pass in.
fn everywhere(test: impl Fn(&Path, Access)) {
    let mut roots = vec![std::env::temp_dir()];
    let tmpfs = PathBuf::from("/dev/shm");
    if tmpfs.is_dir() {
        roots.push(tmpfs);
    }
    for root in roots {
        for access in [Access::Direct, Access::Cached] {
            let dir = tempfile::tempdir_in(&root).unwrap();
            test(&dir.path().join("device"), access);
        }
    }
}

#[test]
fn passes_the_suite_created_and_opened() {
    everywhere(|path, access| {
        conformance::suite(|| {
            if path.try_exists().unwrap() {
                std::fs::remove_file(path).unwrap();
            }
            Box::new(FileDevice::create(path, SIZE, access).unwrap())
        });
        conformance::suite(|| Box::new(FileDevice::open(path, access).unwrap()));
    });
}

/// The bounce buffer of a device that wants more than this file system does.
#[test]
fn passes_the_suite_with_wider_alignment() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    drop(FileDevice::create(&path, SIZE, Access::Direct).unwrap());
    conformance::suite(|| {
        let mut device = FileDevice::open(&path, Access::Direct).unwrap();
        if let Some(direct) = &mut device.direct {
            direct.align = 4096;
        }
        Box::new(device)
    });
}

#[test]
fn a_created_file_is_allocated_written_and_whole() {
    everywhere(|path, access| {
        let device = FileDevice::create(path, SIZE, access).unwrap();
        assert_eq!(device.size(), SIZE);
        let metadata = std::fs::metadata(path).unwrap();
        assert_eq!(metadata.len(), SIZE.0);
        assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512 >= SIZE.0);
        let mut bytes = vec![1; to_usize(SIZE.0)];
        device.read_at(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        let names: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 1, "no draft is left");
    });
}

#[test]
fn what_was_written_is_there_after_reopening_the_other_way() {
    everywhere(|path, access| {
        let device = FileDevice::create_unwritten(path, SIZE, access).unwrap();
        device.write_durable_at(1000, &[7; 5000]).unwrap();
        device.write_at(100_000, &[8; 100]).unwrap();
        device.flush().unwrap();
        drop(device);
        for access in [Access::Cached, Access::Direct] {
            let device = FileDevice::open(path, access).unwrap();
            let mut bytes = [0; 5000];
            device.read_at(1000, &mut bytes).unwrap();
            assert_eq!(bytes, [7; 5000]);
            device.read_at(100_000, &mut bytes[..100]).unwrap();
            assert_eq!(bytes[..100], [8; 100]);
        }
    });
}

#[test]
fn durability_is_what_the_way_allows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    let device = FileDevice::create(&path, SIZE, Access::Cached).unwrap();
    assert_eq!(device.durability(), Durability::Fdatasync);
    assert_eq!(device.alignment(), ByteCount(1));
    drop(device);
    let device = FileDevice::open(&path, Access::Direct).unwrap();
    match device.durability() {
        Durability::DirectDsync => assert!(device.alignment().0 >= 512),
        Durability::Fdatasync => assert_eq!(device.alignment(), ByteCount(1)),
        Durability::Simulated => panic!("a file is not simulated"),
    }
}

#[test]
fn one_process_at_a_time() {
    everywhere(|path, access| {
        let first = FileDevice::create(path, SIZE, access).unwrap();
        let second = FileDevice::open(path, access);
        assert!(matches!(second, Err(FileError::Busy(_))), "{second:?}");
        drop(first);
        let first = FileDevice::open(path, access).unwrap();
        assert!(matches!(FileDevice::open(path, access), Err(FileError::Busy(_))));
        drop(first);
        assert!(FileDevice::open(path, access).is_ok());
    });
}

#[test]
fn each_bad_path_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name| dir.path().join(name);
    let open = |name| FileDevice::open(&path(name), Access::Direct).map(drop);
    let create =
        |name, size| FileDevice::create(&path(name), ByteCount(size), Access::Direct).map(drop);
    assert!(matches!(open("missing"), Err(FileError::Missing(_))));
    assert!(matches!(open("."), Err(FileError::Kind(_))));
    std::fs::write(path("small"), [0; 4095]).unwrap();
    assert!(matches!(open("small"), Err(FileError::Size { size: 0, .. })));
    assert!(matches!(create("a", 0), Err(FileError::Size { .. })));
    assert!(matches!(create("a", 4097), Err(FileError::Size { .. })));
    assert!(matches!(create("small", 8192), Err(FileError::Exists(_))));
    symlink("nowhere", path("link")).unwrap();
    assert!(matches!(create("link", 8192), Err(FileError::Exists(_))));
    assert!(matches!(create("no/such/directory", 8192), Err(FileError::Io { .. })));
    assert_eq!(std::fs::read(path("small")).unwrap().len(), 4095);
}

/// More than the disk has: refused, and nothing is left behind.
#[test]
fn a_file_that_does_not_fit_is_refused_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    let made = FileDevice::create(&path, ByteCount(1 << 50), Access::Direct);
    assert!(matches!(made, Err(FileError::Io { operation: "allocate", .. })), "{made:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A draft that a crash left is replaced; one that somebody is writing is not.
#[test]
fn drafts_are_told_apart_by_their_lock() {
    let dir = tempfile::tempdir().unwrap();
    let (path, draft) = (dir.path().join("device"), dir.path().join("device.draft"));
    std::fs::write(&draft, b"half").unwrap();
    let holder = File::open(&draft).unwrap();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let made = FileDevice::create(&path, SIZE, Access::Cached);
    assert!(matches!(made, Err(FileError::Busy(_))), "{made:?}");
    assert_eq!(std::fs::read(&draft).unwrap(), b"half");
    drop(holder);
    assert!(FileDevice::create(&path, SIZE, Access::Cached).is_ok());
    assert!(!draft.try_exists().unwrap());
}

#[test]
fn a_file_that_shrank_is_an_error_and_not_zeros() {
    everywhere(|path, access| {
        let device = FileDevice::create(path, SIZE, access).unwrap();
        File::options().write(true).open(path).unwrap().set_len(4096).unwrap();
        let error = device.read_at(8192, &mut [0; 512]).unwrap_err();
        let DeviceError::Io { error, operation, .. } = error else { panic!("{error}") };
        assert_eq!((error.kind(), operation), (io::ErrorKind::UnexpectedEof, "read"));
    });
}

/// Goal: short transfers are continued at a block border, EINTR is retried, and neither a stuck
/// call nor an error loops. Method: a scripted kernel.
#[test]
fn short_transfers_are_continued_or_reported() {
    let run = |length, align, script: &[Result<usize, i32>]| {
        let mut script = script.iter();
        let mut asked = Vec::new();
        let result = transfer(length, align, io::ErrorKind::WriteZero, |done| {
            asked.push(done);
            let answer = *script.next().expect("no call beyond the script");
            answer.map_err(io::Error::from_raw_os_error)
        });
        (result.map_err(|error| error.kind()), asked)
    };
    const EINTR: i32 = 4;
    assert_eq!(run(0, 512, &[]), (Ok(()), vec![]));
    assert_eq!(run(1024, 512, &[Ok(512), Ok(512)]), (Ok(()), vec![0, 512]));
    assert_eq!(run(2048, 512, &[Ok(700), Ok(1536)]), (Ok(()), vec![0, 512]));
    assert_eq!(run(10, 1, &[Err(EINTR), Ok(3), Err(EINTR), Ok(7)]), (Ok(()), vec![0, 0, 3, 3]));
    assert_eq!(run(1024, 512, &[Ok(100)]), (Err(io::ErrorKind::WriteZero), vec![0]));
    assert_eq!(run(1024, 512, &[Ok(512), Ok(0)]), (Err(io::ErrorKind::WriteZero), vec![0, 512]));
    let full = io::ErrorKind::StorageFull;
    assert_eq!(run(1024, 512, &[Ok(512), Err(28)]), (Err(full), vec![0, 512]));
}

/// ENOSPC of a real kernel reaches the caller as what it is.
#[test]
fn a_full_device_is_reported() {
    let file = File::options().write(true).open("/dev/full").unwrap();
    let error = write_fully(&file, 0, &[1; 512], 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

/// A block device that may be overwritten, where the environment names one (a loop device over a
/// file will do): `MIRRORHUB_TEST_BLOCK_DEVICE=/dev/loop7`. Says so when there is none.
#[test]
fn a_block_device_passes_the_suite() {
    let Some(path) = std::env::var_os("MIRRORHUB_TEST_BLOCK_DEVICE").map(PathBuf::from) else {
        eprintln!("MIRRORHUB_TEST_BLOCK_DEVICE is not set: no block device was tried");
        return;
    };
    for access in [Access::Direct, Access::Cached] {
        conformance::suite(|| Box::new(FileDevice::open(&path, access).unwrap()));
    }
    let first = FileDevice::open(&path, Access::Direct).unwrap();
    assert_eq!(first.durability(), Durability::DirectDsync);
    assert!(matches!(FileDevice::open(&path, Access::Direct), Err(FileError::Busy(_))));
    let made = FileDevice::create(&path, SIZE, Access::Direct);
    assert!(matches!(made, Err(FileError::Exists(_))));
}

/// Whatever fails, nothing is left under the name, and the next attempt succeeds.
#[test]
fn a_file_that_cannot_be_opened_is_not_published() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    let met = prepare::create_with(&path, SIZE.0, prepare::Fill::Allocated, |draft, _| {
        assert!(!path.try_exists().unwrap(), "it has its name before it is open");
        let error = io::Error::from_raw_os_error(24);
        Err(FileError::Io { path: draft.into(), operation: "open with O_DIRECT", error })
    });
    assert!(matches!(met, Err(FileError::Io { .. })), "{met:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something is left");
    let device = FileDevice::create(&path, SIZE, Access::Direct).unwrap();
    assert_eq!(&*device.name(), path.to_str().unwrap());
    assert!(matches!(FileDevice::open(&path, Access::Direct), Err(FileError::Busy(_))));
}

/// Through the page cache or past it: each sees what the other wrote, also after a reopening.
#[test]
fn large_and_small_writes_of_a_cached_device_see_each_other() {
    everywhere(|path, access| {
        let mut device = FileDevice::create(path, SIZE, access).unwrap();
        if access == Access::Cached {
            let direct = FileDevice::open(path, Access::Direct);
            assert!(matches!(direct, Err(FileError::Busy(_))));
            drop(device);
            let takes = FileDevice::open(path, Access::Direct).unwrap().direct.is_some();
            device = FileDevice::open(path, access).unwrap();
            assert_eq!(device.past.is_some(), takes, "large writes go past the cache if they can");
        }
        let mut model = vec![0; to_usize(SIZE.0)];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            to_usize(state % to_u64(below))
        };
        for round in 0_u8..200 {
            let blocks = if round % 2 == 0 { LARGE_BYTES_MIN / 4096 + next(64) } else { 1 };
            let at = next(model.len() / 4096 - blocks) * 4096;
            let at = if round % 3 == 0 { at + next(4096) } else { at };
            let mut bytes = AlignedBuffer::new(blocks * 4096);
            bytes.fill(round);
            device.write_at(to_u64(at), &bytes).unwrap();
            model[at..at + bytes.len()].copy_from_slice(&bytes);
            let length = 1 + next(128 << 10);
            let from = next(model.len() - length);
            let mut read = vec![0; length];
            device.read_at(to_u64(from), &mut read).unwrap();
            assert!(read == model[from..from + length], "round {round}");
        }
        device.flush().unwrap();
        drop(device);
        let mut read = vec![0; model.len()];
        FileDevice::open(path, access).unwrap().read_at(0, &mut read).unwrap();
        assert!(read == model);
    });
}
