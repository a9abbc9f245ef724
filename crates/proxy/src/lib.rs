//! The data plane: the proxy process that carries requests to instances, and the handle by which the server steers it.
//!
//! The proxy ([`main`]) routes by the last table it was given, with or without a server. It never decides who is ready,
//! when an instance stops or what a route weighs: it reports what is in flight and obeys. The [`ProxyHandle`] lives in
//! the server, holds duplicates of every listening socket, and keeps exactly one proxy per home alive.

mod files;
mod handle;
mod table;
mod wire;

pub use handle::{OpenError, Options, ProxyHandle};
mod process;
pub use process::main;
