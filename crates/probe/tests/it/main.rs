//! The prober against real local servers, and its rates on a paused clock.

mod commands;
mod consult;
mod grpc;
mod http;
mod rate;
mod world;
