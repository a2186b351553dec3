//! Files as a whole: shares, odd files, and texts that nobody meant. The examples and the messages
//! of wrong files are held by `tests/examples.rs`, with the bounds that users meet.

use std::path::{Path, PathBuf};

use super::load::{Kind, load, load_data_dir, load_hub, load_source};
use super::reload::{Change, When, hub_changes, reloaded_hub, reloaded_source, source_changes};
use super::sizing;
use crate::units::numbers::ByteCount;
use crate::units::policy::Mode;
use crate::units::retention::Retention;

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn shares_are_as_written_or_an_equal_part_of_half_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path();
    std::fs::create_dir(base.join("sources.d")).unwrap();
    let write = |file: &str, text: &str| std::fs::write(base.join(file), text).unwrap();
    write(
        "hub.toml",
        "[nvram]\nsize = \"96MiB\"\n[pool]\ndevices = [{ path = \"d\", size = \"1GiB\" }]",
    );
    write("sources.d/a.toml", "name = \"a\"\nnvram_share = \"32MiB\"");
    write("sources.d/b.toml", "name = \"b\"\nkeep = { last = 6, daily = 7 }");
    write("sources.d/c.toml", "name = \"c\"");
    write("sources.d/d.toml", "name = \"d\"\nenabled = false\nnvram_share = \"64MiB\"");
    write("sources.d/.e.toml.swp", "not TOML");
    write("sources.d/.f.toml", "not TOML");
    write("sources.d/g.toml~", "not TOML");
    let hub = load_hub(&base.join("hub.toml")).unwrap();
    let shares: Vec<u64> = hub.sources.iter().map(|source| source.nvram_share.0 >> 20).collect();
    assert_eq!(shares, [32, 16, 16, 0]);
    let keep: Vec<_> = hub.sources.iter().map(|source| source.file.keep).collect();
    let kept = Retention { last: 6, hourly: 0, daily: 7, drop_when_full: false };
    assert_eq!(keep, [None, Some(kept), None, None]);
    for (wrong, said) in [
        ("keep = { last = 65 }", "65 is no such number"),
        ("keep = { hourly = -1 }", "-1 is no such number"),
        ("keep = { daily = \"7\" }", "\"7\" is no such number"),
        ("keep = { weekly = 1 }", "unknown key"),
        ("keep = 7", "keep"),
    ] {
        write("sources.d/b.toml", &format!("name = \"b\"\n{wrong}"));
        let problems = load_hub(&base.join("hub.toml")).unwrap_err().render(false);
        assert!(problems.contains(said), "{wrong}: {problems}");
    }
    assert_eq!(
        sizing::of_hub(&hub).lines[0].carries,
        "64MiB guaranteed to 3 sources; the rest takes 8 MiB/s for 4 s"
    );
}

#[test]
fn the_data_dir_is_found_in_a_file_that_has_other_problems() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("hub.toml");
    std::fs::write(&file, "data_dir = \"here\"\nnonsense = 1\n").unwrap();
    let here = directory.path().join("here");
    assert_eq!(load_data_dir(&file).unwrap(), (Kind::Hub, here.clone()));
    std::fs::write(&file, "data_dir = \"here\"\nhub = 5\n").unwrap();
    assert_eq!(load_data_dir(&file).unwrap(), (Kind::Source, here));
    std::fs::write(&file, "name = \"a\"\nenabled = true\n").unwrap();
    let said = load_data_dir(&file).unwrap_err().render(false);
    assert!(said.contains("no process runs with it"), "{said}");
    std::fs::write(&file, "data_dir = 1\n").unwrap();
    assert!(load_data_dir(&file).is_err());
}

/// `[[home]]`: what those promise that live on a filer, and what a reload says of it.
#[test]
fn a_filer_says_what_its_guests_promise() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("source.toml");
    let read = |more: &str| {
        let own = "name = \"b\"\nhub = \"127.0.0.1:7420\"\n[pool]\ndevices = [{ path = \"d\", \
                   size = \"1GiB\" }]\n[[volume]]\nname = \"v\"\nsize = \"1MiB\"\n";
        std::fs::write(&file, format!("{own}{more}")).unwrap();
        load_source(&file)
    };
    let home = "[[home]]\nname = \"a\"\n[home.replication]\n";
    let (none, lazy) = (read("").unwrap(), read(&format!("{home}mode = \"async\"")).unwrap());
    assert!(none.home_policies().is_empty());
    let a = "a".parse().unwrap();
    assert_eq!(lazy.home_policies()[&a].mode, Mode::Async);
    assert_eq!(lazy.policy(), none.policy(), "the filer's own is not touched");
    let strict = read(&format!("{home}on_hub_loss = \"stop\"")).unwrap();
    let changes = source_changes(&lazy, &strict);
    let keys: Vec<&str> = changes.iter().map(|change| change.key.as_str()).collect();
    assert_eq!(keys, ["home a: replication.mode", "home a: replication.on_hub_loss"]);
    assert!(changes.iter().all(|change| change.when == When::NextCp), "{changes:?}");
    assert_eq!(reloaded_source(&lazy, strict.clone()).home_policies(), strict.home_policies());
    // One that only says how large a volume is says nothing of a promise.
    let volume = "[[home.volume]]\nname = \"v\"\nsize = \"8MiB\"\n";
    let sized = read(&format!("[[home]]\nname = \"a\"\n{volume}")).unwrap();
    assert!(sized.home_policies().is_empty());
    assert_eq!(sized.home_sizes()[&a], [("v".parse().unwrap(), ByteCount(8 << 20))]);
    let both = read(&format!("{home}mode = \"async\"\n{volume}")).unwrap();
    assert_eq!(both.home_policies(), lazy.home_policies());
    let changes = source_changes(&lazy, &both);
    assert_eq!((changes.len(), &changes[0].key[..]), (1, "home a: volume v"), "{changes:?}");
    assert_eq!((changes[0].when, &changes[0].to[..]), (When::NextCp, "8MiB"));
    for (wrong, said) in [
        ("[[home]]\nname = \"b\"".to_owned(), "is this filer itself"),
        ("[[home]]\ncache = \"writeback\"".to_owned(), "the source that lives here"),
        (format!("{home}mode = \"sync\"\n{home}"), "two homes are called a"),
        (format!("{home}mode = \"async\"\non_hub_loss = \"stop\""), "replication.on_hub_loss"),
        (format!("{home}resync_limit = \"1MiB\""), "resync_limit"),
        (format!("{home}modus = \"sync\""), "modus"),
        (format!("{home}{volume}{volume}"), "two volumes are called v"),
        (format!("{home}[[home.volume]]\nname = \"v\"\nsize = \"8\""), "volume.size"),
    ] {
        let problems = read(&wrong).unwrap_err().render(false);
        assert!(problems.contains(said), "{wrong}: {problems}");
    }
}

/// Goal: with `plain_networks` NBD and HTTP may listen anywhere, and nothing else may; a change is told for
/// a restart, and does not run before. Control: the same files without the key.
#[test]
fn plain_networks_open_the_doors_for_clients_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let pool = "[pool]\ndevices = [{ path = \"d\", size = \"1GiB\" }]\n";
    let clients = "nbd_listen = \"0.0.0.0:10810\"\nhttp_listen = \"[::]:7421\"\n";
    let key = "plain_networks = [\"10.1.0.0/16\", \"fd00:1::7\"]\n";
    std::fs::create_dir(directory.path().join("sources.d")).unwrap();
    let hub = |more: &str| {
        let file = directory.path().join("hub.toml");
        std::fs::write(&file, format!("{more}{pool}")).unwrap();
        load_hub(&file)
    };
    let filer = "[[volume]]\nname = \"v\"\nsize = \"1MiB\"\n";
    let source = |hub: &str, more: &str| {
        let file = directory.path().join("source.toml");
        let own = format!("name = \"a\"\nhub = \"{hub}:7420\"\n{more}{pool}{filer}");
        std::fs::write(&file, own).unwrap();
        load_source(&file)
    };
    let (near, far) = ("127.0.0.1", "192.0.2.7");
    for refused in [
        hub(clients).err(),
        source(near, clients).err(),
        // Between source and hub there is no exception.
        hub(&format!("{key}listen = \"0.0.0.0:7420\"\n")).err(),
        source(far, key).err(),
    ] {
        let refused = refused.expect("it is not on loopback").render(false);
        assert!(refused.contains("is not loopback, which needs"), "{refused}");
        let proposed = refused.contains("plain_networks");
        assert_eq!(proposed, !refused.contains("7420"), "{refused}");
    }
    let both = format!("{key}{clients}");
    let (open, own) = (hub(&both).unwrap(), source(near, &both).unwrap());
    assert_eq!(open.plain_networks.to_string(), "10.1.0.0/16, fd00:1::7/128");
    assert_eq!(own.plain_networks, open.plain_networks);

    let (less, only) = (hub("").unwrap(), source(near, "").unwrap());
    let told: Vec<Change> = hub_changes(&less, &hub(key).unwrap());
    let also = source_changes(&only, &source(near, key).unwrap());
    for told in [told, also] {
        let [change] = &told[..] else { panic!("{told:?}") };
        assert_eq!((&change.key[..], change.when), ("plain_networks", When::Restart));
        let values = (&change.from[..], &change.to[..]);
        assert_eq!(values, ("none", "10.1.0.0/16, fd00:1::7/128"));
    }
    assert!(reloaded_hub(&less, open).plain_networks.is_empty(), "it runs before the restart");
    assert!(reloaded_source(&only, own).plain_networks.is_empty(), "it runs before the restart");
}

#[test]
fn files_that_are_no_texts_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("hub.toml");
    let said = || load(&file).unwrap_err().render(false);
    assert!(said().contains("cannot be read: No such file"), "{}", said());
    std::fs::write(&file, b"a = 1\nb = \"\xff\"\n").unwrap();
    assert!(said().contains("line 2 is no UTF-8 text"), "{}", said());
    std::fs::write(&file, vec![b'#'; 2 << 20]).unwrap();
    assert!(said().contains("is longer than"), "{}", said());
    std::fs::write(&file, "a = ".to_owned() + &"[".repeat(100_000)).unwrap();
    assert!(said().contains("is not TOML"), "{}", said());
    assert!(load(directory.path()).is_err(), "a directory");
}

/// No text makes the reader panic, whatever it says: mutated examples, cut and mixed up.
#[test]
fn mutated_examples_never_panic() {
    use proptest::prelude::*;
    let texts = ["config/hub.toml", "config/source.toml", "config/sources.d/filer-a.toml"]
        .map(|file| std::fs::read_to_string(project(file)).unwrap());
    let directory = tempfile::tempdir().unwrap();
    let mutation =
        (0..3_usize, any::<prop::sample::Index>(), any::<prop::sample::Index>(), ".{0,8}");
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) };
    proptest!(config, |((which, from, to, insert) in mutation)| {
        let chars: Vec<char> = texts[which].chars().collect();
        let (from, to) = (from.index(chars.len()), to.index(chars.len()));
        let (from, to) = (from.min(to), from.max(to));
        let text: String = chars[..from]
            .iter()
            .copied()
            .chain(insert.chars())
            .chain(chars[to.min(from + 40)..].iter().copied())
            .collect();
        let file = directory.path().join("hub.toml");
        std::fs::write(&file, text).unwrap();
        for result in [load_hub(&file).map(drop), load_source(&file).map(drop), load(&file).map(drop)] {
            if let Err(problems) = result {
                prop_assert!(!problems.0.is_empty());
                prop_assert!(!problems.render(true).is_empty());
            }
        }
    });
}
