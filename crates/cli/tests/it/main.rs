//! Whole commands against a scripted server, in a hermetic home: arguments in, screens, requests and exit codes out.

mod commands;
mod environment;
mod local;
mod runs;
mod servers;
mod tls;
