//! The programs as processes over loopback, the way a stack runs them.

mod programs;
mod world;
