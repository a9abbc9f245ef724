//! The planner from outside: decisions, laws, saved plans, and what a person reads.

mod fixture;
mod flags;
mod laws;
mod planner;
mod render;
mod saved;
