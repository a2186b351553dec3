//! `mirrorhub top` in a real terminal: a pseudo-terminal, keys in, a screen out.

use std::fs;
use std::process::{Command, Stdio};

use crate::harness::{BINARY, Cluster, SourceSettings, run, try_run};

/// Opens a pseudo-terminal of 100 columns and 20 lines, runs the arguments in it, and plays the
/// steps: what must be shown before what is pressed. Says whether the terminal is as it was.
const TERMINAL: &str = r#"
import fcntl, os, pty, select, struct, sys, termios, time
steps = [("2 sources", "s"), ("SOURCE+", "\x1b[B"), ("\x1b[7m", "\r"), ("rates ", "\x1b"),
         ("s: sort", "/"), ("look for: ", "no-such\r"), ("no sources", "\x7f"), ("filer-b", "q")]
ours, theirs = pty.openpty()
fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 100, 0, 0))
before = termios.tcgetattr(theirs)
child = os.fork()
if child == 0:
    os.setsid()
    fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
    for fd in range(3):
        os.dup2(theirs, fd)
    os.environ["TERM"] = "xterm"
    os.execv(sys.argv[1], sys.argv[1:])
seen, limit = b"", time.monotonic() + 60
def read(until):
    global seen
    while until not in seen:
        if time.monotonic() > limit:
            sys.exit("not shown: %r in %r" % (until, seen[-4000:]))
        if select.select([ours], [], [], 0.5)[0]:
            seen += os.read(ours, 65536)
for shown, pressed in steps:
    read(shown.encode())
    if pressed == "\r":
        if termios.tcgetattr(theirs) == before:
            sys.exit("the terminal is not raw")
    seen = b""
    os.write(ours, pressed.encode())
read(b"\x1b[?1049l")
status = os.waitpid(child, 0)[1]
if os.waitstatus_to_exitcode(status) != 0:
    sys.exit("it ended with %d" % os.waitstatus_to_exitcode(status))
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
    let script = cluster.path("terminal.py");
    fs::write(&script, TERMINAL).expect("a script");
    let mut terminal = Command::new("python3");
    terminal.arg(&script).args([BINARY, "top", "--config"]).arg(cluster.hub_config());
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
