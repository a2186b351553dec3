//! Goal: a first start that ends anywhere is taken up by the next one, with the same id, and
//! nothing of anybody else is ever written to.

use std::time::Duration;

use super::*;
use crate::raid::files::PoolFiles;
use crate::raid::layout::Level;

fn options(dir: &Path) -> HubOptions {
    HubOptions {
        data_dir: dir.join("deep/state"),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        nvram: (dir.join("deep/state/nvram"), ByteCount(16 << 20)),
        realtime: false,
        log_dir: dir.join("deep/logs"),
        pool: PoolFiles::plain(dir.join("deep/disks/disk0"), ByteCount(32 << 20)),
        sources: vec![],
        image_pin: Duration::from_secs(1),
        promoted: crate::hub::promoted::PromotedOptions::default(),
        hooks: crate::hub::hooks::HookOptions::default(),
        appliers: 1,
        arbiters: 1,
    }
}

fn opens(options: &HubOptions, hub: HubId) {
    let open = |path: &Path| -> Arc<dyn Device> {
        Arc::new(FileDevice::open(path, Access::Cached).unwrap())
    };
    let ring = open(&options.nvram.0);
    drop(Ring::open(ring, hub.0, RingOptions::default(), &mut |_| {}).unwrap());
    let pool = PoolOptions { owner: Some(hub.0), ..PoolOptions::default() };
    let device = match options.pool.as_plain() {
        Some((path, _)) => open(path),
        None => options.pool.open().unwrap().array,
    };
    drop(Pool::open(device, pool).unwrap());
    assert_eq!(identity(options).unwrap(), hub);
    own_logs(&options.log_dir, hub).unwrap();
}

fn saved(options: &HubOptions) -> Identity {
    let path = options.data_dir.join("identity.json");
    read(&path, &fs::read_to_string(&path).unwrap()).unwrap()
}

#[test]
fn a_first_start_ended_at_any_step_is_taken_up() {
    end_at_each_step(options);
}

/// The same with an array for a pool.
#[test]
fn a_first_start_with_an_array_is_taken_up() {
    end_at_each_step(|dir| {
        let device = |n| (dir.join(format!("disk{n}")), ByteCount(16 << 20));
        let devices = (0..3).map(device).collect();
        let pool = PoolFiles {
            level: Level::Parity1,
            devices,
            accept_missing: false,
            adding: vec![],
            plain: |_| None,
        };
        HubOptions { pool, ..options(dir) }
    });
}

fn end_at_each_step(options: impl Fn(&Path) -> HubOptions) {
    let mut steps = 0;
    loop {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        let done = identity_within(&options, &mut Steps(steps));
        let hub = saved(&options).hub;
        if done.is_err() {
            assert!(saved(&options).making.is_some());
            // Once more in the same place, then for good.
            assert!(identity_within(&options, &mut Steps(steps.saturating_sub(1))).is_err());
            assert_eq!(identity(&options).unwrap(), hub, "ended at step {steps}");
        }
        assert!(saved(&options).making.is_none());
        opens(&options, hub);
        if done.is_ok() {
            break;
        }
        steps += 1;
    }
    assert!(steps > 5, "{steps}");
}

/// A power cut may also tear a header or label that is being made, or leave the pool's catalog
/// without its label.
#[test]
fn a_torn_head_is_begun_anew() {
    for (torn, at) in [(0_u8, 0), (0, 600), (1, 0), (1, 600), (1, 8192)] {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        // Before the log directory, and before the list goes: both are made.
        assert!(identity_within(&options, &mut Steps(6)).is_err());
        let hub = saved(&options).hub;
        assert_eq!(saved(&options).making.unwrap().len(), 2);
        let path = if torn == 0 { &options.nvram.0 } else { &options.pool.devices[0].0 };
        let mut content = fs::read(path).unwrap();
        let head = content[..8192].to_vec();
        content[..8192].fill(0);
        content[..at].copy_from_slice(&head[..at]);
        fs::write(path, &content).unwrap();
        assert_eq!(identity(&options).unwrap(), hub);
        opens(&options, hub);
    }
}

/// What holds anything, at its beginning or behind it, is refused and stays as it was.
#[test]
fn a_foreign_file_is_refused_and_not_touched() {
    let theirs = tempfile::tempdir().unwrap();
    let other = options(theirs.path());
    identity(&other).unwrap();
    let mut file_system = vec![0; 8 << 20];
    file_system[(64 << 10) + 64] = 0x5f;
    let contents = [
        fs::read(&other.nvram.0).unwrap(),
        fs::read(&other.pool.devices[0].0).unwrap(),
        b"text ".repeat(1 << 20),
        file_system,
    ];
    for content in &contents {
        for which in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let options = options(dir.path());
            let path = if which == 0 { &options.nvram.0 } else { &options.pool.devices[0].0 };
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
            for _ in 0..2 {
                let error = identity(&options).unwrap_err().to_string();
                assert!(error.contains("holds something"), "{error}");
                assert!(fs::read(path).unwrap() == *content, "it was written to");
            }
            // Out of the way, the start goes on.
            fs::remove_file(path).unwrap();
            opens(&options, identity(&options).unwrap());
        }
    }
}

/// A log directory that names another hub is refused, at the first start as at any other, and one
/// that names none at any other: it may hide a loss (R20).
#[test]
fn a_foreign_log_directory_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let path = options.log_dir.join(OWNER_FILE);
    let other = HubId([7; 16]).to_string();
    fs::create_dir_all(&options.log_dir).unwrap();
    fs::write(&path, &other).unwrap();
    for _ in 0..2 {
        let error = identity(&options).unwrap_err().to_string();
        assert!(error.contains(&other), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), other);
        assert!(saved(&options).making.is_some());
    }
    fs::remove_file(&path).unwrap();
    let hub = identity(&options).unwrap();
    opens(&options, hub);
    fs::remove_dir_all(&options.log_dir).unwrap();
    identity(&options).unwrap();
    let error = own_logs(&options.log_dir, hub).unwrap_err().to_string();
    assert!(error.contains(OWNER_FILE) && error.contains(&hub.to_string()), "{error}");
    assert!(!options.log_dir.try_exists().unwrap(), "a lost log directory was replaced in silence");
}

/// A blank file of the right kind is taken as it is: so is a block device.
#[test]
fn blank_files_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    for (path, size) in [&options.nvram, &options.pool.devices[0]] {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::File::create(path).unwrap().set_len(size.0).unwrap();
    }
    opens(&options, identity(&options).unwrap());
}

/// Behind the first start nothing is made in place of what is gone (R20).
#[test]
fn a_lost_ring_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    identity(&options).unwrap();
    fs::remove_file(&options.nvram.0).unwrap();
    identity(&options).unwrap();
    assert!(!options.nvram.0.is_file(), "a lost ring was replaced in silence");
}

/// The file of a hub made before the list existed.
#[test]
fn an_identity_without_a_list_is_a_whole_hub() {
    let text = r#"{"schema":1,"hub":"07070707070707070707070707070707"}"#;
    let identity = read(Path::new("identity.json"), text).unwrap();
    assert_eq!((identity.hub, identity.making), (HubId([7; 16]), None));
    let newer = r#"{"schema":2,"hub":"07070707070707070707070707070707","more":[]}"#;
    let met = read(Path::new("identity.json"), newer).unwrap_err().to_string();
    assert_eq!(met, "identity.json: has schema 2, this program reads 1");
    let odd = newer.replace("\"schema\":2", "\"schema\":1");
    assert!(
        read(Path::new("identity.json"), &odd).is_err_and(|odd| odd.to_string().contains("more"))
    );
}
