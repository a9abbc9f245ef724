//! The data plane as users meet it: a real proxy process, real sockets, instances in this process.

#![expect(clippy::float_cmp, reason = "counters are whole numbers in the exposition format")]

mod control;
mod cut;
mod early;
mod flags;
mod flip;
mod frames;
mod harness;
mod hold;
mod interim;
mod mirror;
mod policy;
mod protocols;
mod raw;
mod rest;
mod retry;
mod split;
mod survive;
mod tls;
mod traffic;
