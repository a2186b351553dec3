//! A database on a file system on the source; the source dies, the hub takes over, and the
//! database is found whole with every commit that was acknowledged.
//!
//! Commits are recorded outside the volume, after the database has said that each is done.
//! Needs what `filesystems` needs. PostgreSQL runs only under `MIRRORHUB_FULL`, which wants it installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::failover::{fail_over, failing, open};
use crate::filesystems::{Attached, Loop, Mount, nbdcopy, need_kernel};
use crate::harness::{Cluster, Process, is_full, run, wait_for};
use crate::outage::socket;

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(40);

/// Commits rows 1, 2, 3, ...; says each on standard output when it is committed. `full` alone does
/// not sync the directory from which a commit removes the journal: `extra` does.
const SQLITE_WRITER: &str = r"
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('pragma synchronous = extra')
db.execute('create table if not exists entries (n integer primary key, body blob)')
db.execute('create index if not exists bodies on entries (body)')
n = db.execute('select coalesce(max(n), 0) from entries').fetchone()[0]
while True:
    n += 1
    db.execute('begin')
    db.execute('insert into entries values (?, ?)', (n, bytes([n % 251]) * (n * 37 % 3000)))
    db.execute('update entries set body = body || x\'00\' where n = ?', (n // 2,))
    db.execute('commit')
    print(n, flush=True)
";

/// What the check found: `ok` and the rows there.
const SQLITE_CHECK: &str = r"
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
assert db.execute('pragma integrity_check').fetchall() == [('ok',)], 'integrity_check'
rows = [n for (n,) in db.execute('select n from entries order by n')]
assert rows == list(range(1, len(rows) + 1)), 'a gap in the rows'
print(len(rows))
";

/// The last commit that was acknowledged.
fn acknowledged(record: &Path) -> u64 {
    let text = fs::read_to_string(record).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().last().and_then(|line| line.trim().parse().ok()).unwrap_or(0)
}

fn wait_commits(writer: &mut Process, record: &Path, count: u64) {
    wait_for(&format!("{count} commits"), LIMIT, || {
        assert!(writer.runs(), "the writer ended:\n{}", writer.output());
        acknowledged(record) >= count
    });
}

/// Copies an export of the hub and makes its file system whole, as after a power cut.
fn copy(cluster: &Cluster, export: &str) -> PathBuf {
    let file = cluster.path(&format!("{}.img", export.replace(['/', '@'], "-")));
    let socket = cluster.path("hub").join("nbd.sock");
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    nbdcopy(&uri, &file);
    // Replays the journal; 0 and 1 are a file system that is whole now.
    let checked = Command::new("e2fsck").args(["-f", "-p"]).arg(&file).output().expect("e2fsck");
    assert!(matches!(checked.status.code(), Some(0 | 1)), "e2fsck: {checked:?}");
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&file));
    file
}

/// Rows of the database in that export of the hub; fails if it is not whole.
fn sqlite_rows(cluster: &Cluster, export: &str) -> u64 {
    let image = copy(cluster, export);
    let looped = Loop::over(&image);
    let mount = Mount::at(cluster.path("copy"), looped.device(), "noatime");
    let database = mount.dir().join("entries.db");
    let output = run(Command::new("python3").args(["-c", SQLITE_CHECK]).arg(&database));
    mount.close();
    let rows = String::from_utf8_lossy(&output.stdout).trim().parse();
    rows.expect("a number of rows")
}

/// SQLite on ext4: every acknowledged commit is on the hub; in an older CP some are missing.
#[test]
fn sqlite_is_whole_on_the_hub_when_its_filer_dies() {
    need_kernel();
    let settings = failing("stop").volumes(&[("vol0", "64MiB")]);
    let mut cluster = Cluster::start(&[settings]);
    let attached = Attached::new(&cluster, "vol0", &cluster.volume(NAME, "vol0"));
    run(Command::new("mkfs.ext4").arg("-q").arg(attached.device()));
    let mount = Mount::at(cluster.path("mnt"), attached.device(), "noatime");
    let record = cluster.path("commits");
    let database = mount.dir().join("entries.db");
    let mut start = Command::new("python3");
    start.args(["-c", SQLITE_WRITER]).arg(&database);
    let mut writer = Process::start("sqlite", record.clone(), &mut start);
    wait_commits(&mut writer, &record, if is_full() { 100 } else { 20 });
    cluster.checkpoint(NAME);
    let (stale, more) = (acknowledged(&record), if is_full() { 300 } else { 40 });
    wait_commits(&mut writer, &record, stale + more);
    cluster.kill_source(NAME);
    // Its file system has no disk any more: it fails, or is stuck until the device is gone.
    writer.kill();
    let committed = acknowledged(&record);
    drop(mount);
    drop(attached);
    let answer = fail_over(&cluster, NAME, &[]);
    assert_eq!(answer["may_be_lost"], false, "{answer}");
    let rows = sqlite_rows(&cluster, "filer-a/vol0");
    println!("sqlite: {committed} commits acknowledged, {rows} found after the failover");
    assert!(rows >= committed, "{rows} rows, {committed} commits were acknowledged");
    assert!(rows <= committed + 1, "{rows} rows: more than was written");
    // The negative control: an image made stale on purpose lacks commits, and the check sees it.
    let kept = format!("filer-a/vol0@before-failover-{}", answer["epoch"]);
    drop(open(&socket(&cluster, "hub"), &kept));
    let old = sqlite_rows(&cluster, &kept);
    println!("sqlite: {old} found in the CP before");
    assert!(old < committed, "an older CP has every commit: the check sees nothing");
}

/// A server of PostgreSQL in a directory, stopped hard when dropped.
struct Postgres {
    bin: PathBuf,
    data: PathBuf,
    sockets: PathBuf,
}

impl Postgres {
    /// Where its programs are, if it is installed.
    fn installed() -> Option<PathBuf> {
        let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
        let mut bins: Vec<PathBuf> = versions.flatten().map(|e| e.path().join("bin")).collect();
        bins.sort();
        bins.into_iter().rfind(|bin| fs::metadata(bin.join("initdb")).is_ok())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> std::process::Output {
        run(self.command(program).args(arguments))
    }

    /// As its own user: it refuses to run as root.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]);
        command.arg(self.bin.join(program)).env("PGDATA", &self.data).current_dir("/");
        command
    }

    fn start(&self) {
        let options = format!("-c listen_addresses='' -k {}", self.sockets.display());
        let log = self.sockets.join("log");
        let log = log.to_str().expect("a plain path");
        self.run("pg_ctl", &["start", "-w", "-l", log, "-o", &options]);
    }

    fn psql(&self) -> Command {
        let mut psql = self.command("psql");
        psql.args(["-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-h"]);
        psql.arg(&self.sockets);
        psql
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        drop(self.command("pg_ctl").args(["stop", "-m", "immediate"]).output());
    }
}

fn of_postgres(dir: &Path) {
    fs::create_dir_all(dir).expect("directory");
    run(Command::new("chown").arg("postgres").arg(dir));
    run(Command::new("chmod").arg("700").arg(dir));
}

/// Rows of the database in that export of the hub; fails if it does not start or is not whole.
fn postgres_rows(cluster: &Cluster, export: &str, bin: &Path, sockets: &Path) -> u64 {
    let image = copy(cluster, export);
    let looped = Loop::over(&image);
    let mount = Mount::at(cluster.path("copy"), looped.device(), "noatime");
    let data = mount.dir().join("data");
    // Its number may be another process's by now.
    drop(fs::remove_file(data.join("postmaster.pid")));
    let postgres = Postgres { bin: bin.to_owned(), data, sockets: sockets.to_owned() };
    postgres.start();
    let check = "select count(*) || ' ' || max(n) from entries";
    let output = run(postgres.psql().args(["-c", check]));
    postgres.run("pg_ctl", &["stop", "-w", "-m", "fast"]);
    postgres.run("pg_checksums", &["--check"]);
    drop(postgres);
    mount.close();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let (count, last) = text.split_once(' ').expect("two numbers");
    assert_eq!(count, last, "a gap in the rows");
    count.parse().expect("a number of rows")
}

/// The same with PostgreSQL, in the long form, which installs it.
#[test]
fn postgresql_starts_on_the_hub_when_its_filer_dies() {
    if !is_full() {
        println!("SKIPPED postgresql_starts_on_the_hub: wants MIRRORHUB_FULL");
        return;
    }
    let bin = Postgres::installed().expect("postgresql is installed: apt-get install postgresql");
    need_kernel();
    let settings = failing("stop").volumes(&[("vol0", "512MiB")]).pool("2GiB").nvram("256MiB");
    let mut cluster = Cluster::start(&[settings]);
    run(Command::new("chmod").arg("755").arg(cluster.dir.path()));
    let attached = Attached::new(&cluster, "vol0", &cluster.volume(NAME, "vol0"));
    run(Command::new("mkfs.ext4").arg("-q").arg(attached.device()));
    let mount = Mount::at(cluster.path("mnt"), attached.device(), "noatime");
    let sockets = cluster.path("postgres");
    of_postgres(&sockets);
    let data = mount.dir().join("data");
    of_postgres(&data);
    let postgres = Postgres { bin: bin.clone(), data, sockets: sockets.clone() };
    postgres.run("initdb", &["-A", "trust", "--data-checksums"]);
    postgres.start();
    run(postgres.psql().args(["-c", "create table entries (n bigint primary key, body text)"]));
    let record = cluster.path("commits");
    let mut start = postgres.psql();
    let sql = "insert into entries values (:n, repeat('x', 900)) returning n;\n";
    let script: String = (1..200_000).map(|n| sql.replace(":n", &n.to_string())).collect();
    fs::write(sockets.join("script.sql"), script).expect("script");
    start.arg("-f").arg(sockets.join("script.sql"));
    let mut writer = Process::start("psql", record.clone(), &mut start);
    wait_commits(&mut writer, &record, 100);
    cluster.checkpoint(NAME);
    let stale = acknowledged(&record);
    wait_commits(&mut writer, &record, stale + 300);
    cluster.kill_source(NAME);
    writer.kill();
    let committed = acknowledged(&record);
    drop(postgres);
    drop(mount);
    drop(attached);
    let answer = fail_over(&cluster, NAME, &[]);
    let met = postgres_rows(&cluster, "filer-a/vol0", &bin, &sockets);
    let kept = format!("filer-a/vol0@before-failover-{}", answer["epoch"]);
    drop(open(&socket(&cluster, "hub"), &kept));
    let old = postgres_rows(&cluster, &kept, &bin, &sockets);
    println!("postgresql: {committed} commits acknowledged, {met} found, {old} in the CP before");
    assert!(met >= committed, "{met} rows, {committed} commits were acknowledged");
    assert!(old < committed, "an older CP has every commit: the check sees nothing");
}
