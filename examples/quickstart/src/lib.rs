//! What the programs of the quickstart share: the store on the volume, the agent, its tools, and how a program serves
//! and ends.
//!
//! They are ordinary programs, as a user would write them: each listens on `$PORT`, logs to standard output, and on
//! SIGTERM stops being ready, finishes what it has begun and exits with 0. Nothing here depends on Orchestra.

pub mod agent;
pub mod serve;
pub mod settings;
pub mod store;
pub mod stream;
pub mod tools;
