//! The Debian package: what `Cargo.toml` says belongs to it is there, and nothing is forgotten.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{BINARY, is_full, run, try_run};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn manifest() -> toml::Table {
    fs::read_to_string(project("Cargo.toml")).expect("Cargo.toml").parse().expect("TOML")
}

fn deb(manifest: &toml::Table) -> &toml::Table {
    manifest["package"]["metadata"]["deb"].as_table().expect("the package")
}

/// From where, to where.
fn assets(deb: &toml::Table) -> Vec<(String, String)> {
    let text = |value: &toml::Value| value.as_str().expect("a path").to_owned();
    let rows = deb["assets"].as_array().expect("assets");
    rows.iter().map(|row| (text(&row[0]), text(&row[1]))).collect()
}

fn names(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(project(directory)).unwrap_or_else(|e| panic!("{directory}: {e}"));
    entries.map(|e| e.expect("a file").file_name().to_string_lossy().into_owned()).collect()
}

/// Whether a name is meant by the last part of a path, which may have one `*`.
fn is_meant(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        Some((front, back)) => name.starts_with(front) && name.ends_with(back),
        None => pattern == name,
    }
}

fn packs(assets: &[(String, String)], file: &str) -> bool {
    let (directory, name) = file.rsplit_once('/').unwrap_or(("", file));
    assets.iter().any(|(from, _)| {
        let (at, pattern) = from.rsplit_once('/').unwrap_or(("", from));
        at == directory && is_meant(pattern, name)
    })
}

/// Every file that is named exists, or is made by `config/deb/build`; every unit, example, dashboard and
/// document is in the package.
#[test]
fn the_package_has_what_it_names_and_forgets_nothing() {
    let manifest = manifest();
    let deb = deb(&manifest);
    let assets = assets(deb);
    let build = fs::read_to_string(project("config/deb/build")).expect("config/deb/build");
    for (from, to) in &assets {
        assert!(!to.starts_with('/') && !to.starts_with("etc/"), "{to}: nothing is below /etc");
        let (directory, pattern) = from.rsplit_once('/').unwrap_or(("", from));
        if from == "target/release/mirrorhub" {
            continue;
        }
        if directory.starts_with("config/deb/generated") {
            assert!(build.contains("generated=config/deb/generated"), "{from} is made by nobody");
            let shell = pattern.strip_prefix("mirrorhub.");
            let made = shell.map_or_else(|| build.contains(" man "), |shell| build.contains(shell));
            assert!(made, "{from} is made by nobody");
            continue;
        }
        assert!(names(directory).iter().any(|name| is_meant(pattern, name)), "{from} is not there");
    }
    for directory in ["config", "config/sources.d", "config/systemd/examples", "docs"] {
        for name in
            names(directory).iter().filter(|name| name.contains('.') && !name.ends_with(".d"))
        {
            let file = format!("{directory}/{name}");
            assert!(packs(&assets, &file), "{file} is not in the package");
        }
    }
    assert!(packs(&assets, "config/systemd/mirrorhub.sysusers"), "nobody makes the user");
    let units = deb["systemd-units"].as_array().expect("units");
    let named: Vec<&str> = units.iter().filter_map(|unit| unit["unit-name"].as_str()).collect();
    for name in names("config/systemd") {
        let Some(unit) = name.strip_suffix(".service") else { continue };
        assert!(named.contains(&unit), "{name} is not in the package");
    }
    // Negative controls of this test itself.
    assert!(!packs(&assets, "config/forgotten.toml") && !is_meant("*.json", "alerts.yml"));
    let scripts = project(deb["maintainer-scripts"].as_str().expect("a directory"));
    for script in ["postinst", "postrm"] {
        let text = fs::read_to_string(scripts.join(script)).expect("a script");
        assert!(text.contains("#DEBHELPER#") && text.contains("set -e"), "{script}");
        run(Command::new("sh").arg("-n").arg(scripts.join(script)));
    }
    for file in [&deb["license-file"][0], &deb["changelog"]] {
        let file = project(file.as_str().expect("a path"));
        assert!(fs::metadata(&file).is_ok(), "{} is not there", file.display());
    }
    let version = manifest["package"]["version"].as_str().expect("a version");
    let changelog = fs::read_to_string(project("config/deb/changelog")).expect("a changelog");
    assert!(
        changelog.starts_with(&format!("mirrorhub ({version}-")),
        "another version than {version}"
    );
}

/// What the package installs from the repository, below another root. Not the program, and not what
/// `config/deb/build` makes.
pub fn lay_out(root: &Path) {
    for (from, to) in assets(deb(&manifest())) {
        if from == "target/release/mirrorhub" || from.starts_with("config/deb/generated/") {
            continue;
        }
        let (directory, pattern) = from.rsplit_once('/').unwrap_or(("", &from));
        for name in names(directory).iter().filter(|name| is_meant(pattern, name)) {
            let to = if to.ends_with('/') { format!("{to}{name}") } else { to.clone() };
            let to = root.join(to);
            fs::create_dir_all(to.parent().expect("a directory")).expect("a directory");
            fs::copy(project(directory).join(name), to).expect("a copy");
        }
    }
}

/// Files below a directory.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("a file").path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

/// Paths of the package's own that a text names.
fn named_in(text: &str) -> Vec<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "/_.@-".contains(c)));
    let own = ["/usr/share/mirrorhub", "/usr/share/doc/mirrorhub"];
    let words = words.map(|word| word.trim_end_matches('.'));
    words.filter(|word| own.iter().any(|own| word.starts_with(own))).collect()
}

/// Goal: what the package's files say lies in `/usr/share` lies there. Control: a path that does not.
#[test]
fn the_package_has_what_its_files_name() {
    let root = tempfile::tempdir().expect("a directory");
    lay_out(root.path());
    let is_there = |path: &str| fs::metadata(root.path().join(&path[1..])).is_ok();
    let mut seen = 0;
    for file in files_below(root.path()) {
        let text = fs::read_to_string(&file).expect("a text");
        for path in named_in(&text) {
            assert!(is_there(path), "{} names {path}", file.display());
            seen += 1;
        }
    }
    assert!(seen > 30, "only {seen} paths");
    let wrong = named_in("rules in `/usr/share/mirrorhub/dashboards/alert.yml`.");
    assert!(wrong == ["/usr/share/mirrorhub/dashboards/alert.yml"] && !is_there(wrong[0]));
}

/// Goal: promtool takes the examples where the package puts them, and the copy that the first one says how to
/// make. Controls: a copy without that, and the layout without the rules.
#[test]
fn prometheus_takes_the_examples_of_the_package() {
    let root = tempfile::tempdir().expect("a directory");
    lay_out(root.path());
    let own = root.path().join("usr/share/mirrorhub");
    let check = |file: &Path| {
        let checked = try_run(Command::new("promtool").args(["check", "config"]).arg(file));
        let said = [checked.stdout, checked.stderr].concat();
        (checked.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let example = own.join("examples/prometheus.yml");
    let (right, said) = check(&example);
    assert!(right && said.contains("1 rule files found"), "{said}");

    let text = fs::read_to_string(&example).expect("an example");
    let here = |text: &str| text.replace("/usr/share/mirrorhub", &own.to_string_lossy());
    let line = text.lines().find_map(|line| line.strip_prefix("#   sed ")).expect("how to copy it");
    let copies = tempfile::tempdir().expect("a directory");
    let sed = here(&format!("sed {line}"));
    run(Command::new("sh").args(["-ec", &sed]).current_dir(copies.path()));
    let copy = copies.path().join("prometheus.yml");
    let (right, said) = check(&copy);
    assert!(right && said.contains("1 rule files found"), "{said}");
    fs::copy(&example, &copy).expect("a copy");
    assert!(!check(&copy).0, "the rules are not beside a copy");

    // On a host with the package its path is the root's.
    let tls = own.join("examples/prometheus-tls.yml");
    let text = fs::read_to_string(&tls).expect("an example");
    fs::write(&tls, here(&text)).expect("an example");
    let (right, said) = check(&tls);
    assert!(right && said.contains("1 rule files found"), "{said}");

    fs::remove_file(own.join("dashboards/alerts.yml")).expect("the rules");
    for file in [&example, &tls] {
        let (right, said) = check(file);
        assert!(!right && said.contains("does not point to an existing file"), "{said}");
    }
}

/// The program writes its manual and completions as `config/deb/build` wants them.
#[test]
fn what_is_generated_for_the_package_can_be() {
    let directory = tempfile::tempdir().expect("a directory");
    run(Command::new(BINARY).arg("man").arg(directory.path()));
    let pages: Vec<_> = fs::read_dir(directory.path()).expect("pages").collect();
    assert!(pages.len() > 20, "{} pages", pages.len());
    for unit in ["mirrorhub-hub.1", "mirrorhub-source.1", "mirrorhub.1", "mirrorhub-seed.1"] {
        assert!(fs::metadata(directory.path().join(unit)).is_ok(), "{unit} is named by a unit");
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = run(Command::new(BINARY).args(["completions", shell]));
        assert!(output.stdout.len() > 1000, "{shell}");
    }
}

/// The long form: the package is built, and lintian has nothing to say.
#[test]
fn the_package_is_built_and_lintian_clean() {
    let tools = [("cargo", "deb"), ("lintian", "--version")];
    let there = |(program, argument): (&str, &str)| {
        let version = if argument == "deb" { vec!["deb", "--version"] } else { vec![argument] };
        Command::new(program).args(version).output().is_ok_and(|output| output.status.success())
    };
    if !is_full() || !tools.into_iter().all(there) {
        println!("skipped: MIRRORHUB_FULL=1 with cargo-deb and lintian builds the package");
        return;
    }
    let built = try_run(Command::new(project("config/deb/build")).current_dir(project(".")));
    let said = [built.stdout, built.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(built.status.success(), "{said}");
    let package = said.lines().rev().find(|line| line.ends_with(".deb")).expect("a package");
    let listed = run(Command::new("dpkg").arg("-c").arg(package));
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for file in
        ["usr/bin/mirrorhub", "mirrorhub-hub.service", "man1/mirrorhub-seed.1.gz", "_mirrorhub"]
    {
        assert!(listed.contains(file), "{file} is not in\n{listed}");
    }
}
