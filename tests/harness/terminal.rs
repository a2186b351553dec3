//! A pseudo-terminal for a program: a Python script plays the person before it.

use std::fs;
use std::path::Path;
use std::process::Command;

/// What a script stands on: `begin` runs a program in the terminal, `read` waits until something was
/// shown there, at most a minute after the start; `ended` waits for the end of it, and is its code.
const TERMINAL: &str = r#"
import fcntl, os, pty, select, struct, sys, termios, time
ours, theirs = pty.openpty()
seen, limit = b"", time.monotonic() + 60
def begin(rows, columns, program):
    global child
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    child = os.fork()
    if child == 0:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        for fd in range(3):
            os.dup2(theirs, fd)
        os.environ["TERM"] = "xterm"
        os.execv(program[0], program)
def read(until):
    global seen
    while until not in seen:
        if time.monotonic() > limit:
            sys.exit("not shown: %r in %r" % (until, seen[-4000:]))
        if select.select([ours], [], [], 0.5)[0]:
            seen += os.read(ours, 65536)
def ended():
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"#;

/// A command that plays `script`, which is written to `file`; its arguments are to be given.
pub fn before_terminal(file: &Path, script: &str) -> Command {
    fs::write(file, format!("{TERMINAL}{script}")).expect("a script");
    let mut command = Command::new("python3");
    command.arg(file);
    command
}
