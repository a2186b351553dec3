//! Observe: the HTTP listener of a hub or source, for reading only.
//!
//! Floor 9. `/metrics` for Prometheus, `/healthz` for load balancers and service managers,
//! `/api/v1/status` with the JSON of `mirrorhub status --json`, `/` with the page and what it lives
//! on. GET and HEAD, nothing else: nothing here changes anything.
//!
//! * [`recorder`]: installs the metric recorder, with the buckets of the catalogue
//! * [`server`]: routes and answers
//! * [`live`]: rows that changed, the last hour, changes of state
//! * [`page`]: the status page's files
//! * [`listener`]: bounds connections in number and idleness
//!
//! Answers come from published copies by [`server::Observed`]; a slow reader holds one of a bounded
//! number of connections and nothing of the data path.

mod encrypted;
pub mod listener;
pub mod live;
pub mod page;
mod plain;
pub mod recorder;
pub mod server;
