//! The data plane: the proxy process that carries requests to instances, and the handle by which the server steers it.
//!
//! The proxy ([`main`]) routes by the last table it was given, with or without a server. It never decides who is ready,
//! when an instance stops or what a route weighs: it reports what is in flight and obeys. The [`ProxyHandle`] lives in
//! the server, holds duplicates of every listening socket, and keeps exactly one proxy per home alive.
//!
//! A request's way: `listen` (connection) → `exchange` (request) → `seek` (endpoint, hold; the release by `assign`) →
//! `upstream` (pools) → and back, with `flight` counting what is on its way. `state` puts tables into force and reports
//! drained endpoints; `flags` answers for flags; `watch` and `load` keep what `reports` tells of traffic, `mirror` sends copies; `process` obeys the
//! server over `wire`. `tls` stands between `listen::Listener` and `listen::serve`, where a
//! connection is nothing but a stream yet.

mod admin;
mod assign;
mod breaker;
mod budget;
mod clock;
mod exchange;
mod files;
mod flags;
mod flight;
mod handle;
mod idle;
mod limit;
mod listen;
mod load;
mod metrics;
mod mirror;
mod outflow;
mod outlier;
mod process;
mod reports;
mod rules;
mod seek;
mod state;
mod stream;
mod table;
mod tls;
mod tunnel;
mod upstream;
mod watch;
mod wire;

pub use handle::{OpenError, Options, ProxyHandle};
pub use process::main;
