//! `mirrorhub certify`: certificates of the hub's own authority for clients of NBD and HTTP, and for
//! the sources that serve them.
//!
//! Nothing is noted of them: who has one comes in until it ends, or until the authority of clients is
//! another (`tls.client_ca`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;

use super::Done;
use super::authority::{Authority, AuthorityError, Issued};
use super::failure::{Failure, USAGE, print};
use super::locate::ConfigArgument;
use super::new_file::write_new;
use crate::config::around::load_around;
use crate::device::directory::create_durably;

/// Write a certificate for a client of NBD and HTTP, signed by the hub's own authority
///
/// The files have the names that QEMU and libnbd look for. With --for it is one that a source shows its
/// clients at that address: `served_cert` and `served_key` in its section tls.
#[derive(Debug, Args)]
pub struct CertifyArguments {
    /// Directory to write to
    directory: PathBuf,
    /// An address or DNS name at which clients reach the server that it is for
    #[arg(long = "for", value_name = "ADDRESS")]
    at: Vec<String>,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &CertifyArguments) -> Result<Done, Failure> {
    let CertifyArguments { directory, at, config } = arguments;
    let file = config.file()?;
    let around = load_around(&file, None, &BTreeSet::new()).map_err(Failure::Problems)?;
    let authority = around.config.tls.as_ref().and_then(|tls| tls.authority.as_deref());
    let Some(authority) = authority else {
        return Err(Failure::Message {
            code: USAGE,
            what: format!("{}: this hub has no authority of its own", file.display()),
            next: "have the authority of `tls.ca` sign it, or write an empty section [tls]".into(),
        });
    };
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let failed = |error: AuthorityError| {
        let next = "a hub with [tls] makes its authority when it is started";
        Failure::failed(format!("certify: {error}"), next)
    };
    let issued = Authority(authority).issue_for(&name, at).map_err(failed)?;
    let role = if at.is_empty() { "client" } else { "served" };
    write(directory, role, &issued)?;
    let shown = directory.display();
    print(&format!("{shown}: ca-cert.pem, {role}-cert.pem, {role}-key.pem written\n"))?;
    Ok(Done::WELL)
}

fn write(directory: &Path, role: &str, issued: &Issued) -> Result<(), Failure> {
    let failed = |path: &Path, error: std::io::Error| {
        Failure::failed(format!("{}: {error}", path.display()), "name a directory without them")
    };
    create_durably(directory).map_err(|error| failed(directory, error))?;
    let Issued { ca, cert, key, .. } = issued;
    let files = [
        (format!("{role}-key.pem"), key, 0o600),
        (format!("{role}-cert.pem"), cert, 0o644),
        ("ca-cert.pem".to_owned(), ca, 0o644),
    ];
    for (name, text, mode) in files {
        let path = directory.join(name);
        write_new(&path, text, mode).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}
