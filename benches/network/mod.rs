//! A network of the bench's own: nothing else goes over its loopback, and it has one more address.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// An address of this machine's own that is none of loopback, in a network of its own.
pub const OWN_ADDRESS: &str = "10.99.0.1";
const OWN_NETWORK: &str = "MIRRORHUB_BENCH_OWN_NETWORK";

/// Begins again in a network of its own, with loopback and [`OWN_ADDRESS`], if that is allowed; `Err` if it could
/// not. Before anything else was begun.
pub fn own_network() -> io::Result<()> {
    let allowed = || Command::new("unshare").args(["--net", "true"]).output();
    if has_own_network() || !allowed().is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    let set_up = format!(
        "ip link set lo up && ip address add {OWN_ADDRESS}/32 dev lo && exec \"$0\" \"$@\""
    );
    let mut again = Command::new("unshare");
    again.args(["--net", "sh", "-c", &set_up]).arg(std::env::current_exe()?);
    Err(again.args(std::env::args_os().skip(1)).env(OWN_NETWORK, "1").exec())
}

/// Whether this is that network.
pub fn has_own_network() -> bool {
    std::env::var_os(OWN_NETWORK).is_some()
}
