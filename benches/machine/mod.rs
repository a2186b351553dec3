//! The machine that a bench runs on: how its processes are scheduled, and what else runs.

use std::process::Command;

/// Puts this process and its children into a real-time class, and says which they are in.
pub fn real_time() -> String {
    let id = std::process::id().to_string();
    match Command::new("chrt").args(["-a", "-r", "-p", "1", &id]).output() {
        Ok(output) if output.status.success() => "scheduled as SCHED_RR 1".to_owned(),
        _ => "scheduled as usual: no right to a real-time class".to_owned(),
    }
}

/// As the kernel says it; empty if it does not.
pub fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}
