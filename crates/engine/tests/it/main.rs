//! The control plane against fake worlds: real store, real machines, a provider and a data plane without a machine
//! behind them.

mod fake_data_plane;
mod recovery;
mod routes;
mod runs;
mod scaling;
mod support;
