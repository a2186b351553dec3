//! Control: the admin socket between a running hub or source and the command line.
//!
//! Floor 9. The socket is `admin.sock` in the data directory, mode 0600: who may open it may do
//! everything. One request a connection, in lines of JSON:
//!
//! ```text
//! -> {"schema":1,"command":"checkpoint","source":"filer-a"}
//! <- {"progress":{"what":"applying","object":"filer-a","done":1048576,"total":4194304,"unit":"bytes"}}
//! <- {"result":{"schema":1,"sources":[..]}}
//!  or {"error":{"message":"..","next_step":"..","code":"hub-lost"}}
//! ```
//!
//! * [`feed`]: a file that follows a request
//! * [`message`]: requests, progress, errors, and their lines
//! * [`server`]: listens, hands requests to an [`server::Admin`]
//! * [`client`]: asks, for the command line
//!
//! Every length, wait and count is bounded ([`crate::limits`]); a bad request is answered with its
//! reason and nobody else notices.

pub mod client;
pub mod feed;
pub mod journal;
pub mod message;
pub mod server;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

/// Name of the socket in the data directory.
pub const SOCKET_NAME: &str = "admin.sock";

/// Path of the socket of the process with that data directory.
pub fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join(SOCKET_NAME)
}
