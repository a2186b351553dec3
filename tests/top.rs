//! `mirrorhub top` in a real terminal: a pseudo-terminal, keys in, a screen out.

use std::process::{Command, Stdio};

use crate::harness::terminal::before_terminal;
use crate::harness::{BINARY, Cluster, SourceSettings, run, try_run};

/// Runs the arguments in a terminal of 100 columns and 20 lines, and plays the steps: what must be shown
/// before what is pressed. Says whether the terminal is as it was.
const STEPS: &str = r#"
steps = [("2 sources", "s"), ("SOURCE+", "\x1b[B"), ("\x1b[7m", "\r"), ("rates ", "\x1b"),
         ("s: sort", "/"), ("look for: ", "no-such\r"), ("no sources", "\x7f"), ("filer-b", "q")]
before = termios.tcgetattr(theirs)
begin(20, 100, sys.argv[1:])
for shown, pressed in steps:
    read(shown.encode())
    if pressed == "\r":
        if termios.tcgetattr(theirs) == before:
            sys.exit("the terminal is not raw")
    seen = b""
    os.write(ours, pressed.encode())
read(b"\x1b[?1049l")
code = ended()
if code != 0:
    sys.exit("it ended with %d" % code)
if b"\x1b[?25h" not in seen:
    sys.exit("the cursor is not shown again")
if termios.tcgetattr(theirs) != before:
    sys.exit("the terminal is not as it was")
"#;

#[test]
fn sources_are_sorted_looked_for_and_shown_whole() {
    let mut cluster = Cluster::start(&["filer-a", "filer-b"].map(SourceSettings::new));
    for name in ["filer-a", "filer-b"] {
        cluster.wait_in_sync(name);
    }
    let mut terminal = before_terminal(&cluster.path("terminal.py"), STEPS);
    terminal.args([BINARY, "top", "--config"]).arg(cluster.hub_config());
    run(&mut terminal);
    // A source shows itself; without a terminal there is a better command.
    let mut piped = Command::new(BINARY);
    piped.args(["top", "--config"]).arg(cluster.source_config("filer-a")).stdin(Stdio::null());
    let done = try_run(&mut piped);
    assert_eq!(done.status.code(), Some(2));
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(said.contains("no terminal") && said.contains("status --watch"), "{said}");
    cluster.end();
}
