//! The data plane as users meet it: a real proxy process, real sockets, instances in this process.

mod control;
mod cut;
mod flip;
mod harness;
mod hold;
mod protocols;
mod raw;
mod retry;
mod survive;
