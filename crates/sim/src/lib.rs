//! The real machines against a fake world on virtual time, with seeded faults.
//!
//! [`world::World`] drives `orchestra_machine::Environment` exactly as the engine's driver does: it commits all changes
//! of a batch to a fake disk, and only then begins its effects. [`seed::run`] lets an operator and chance have their way
//! with it and checks the laws of [`check`] after every step; [`script`] plays text scenarios whose output a person can
//! review. Nothing here reads a clock or starts a thread: equal seeds give equal worlds.

pub mod behaviour;
mod check;
pub mod disk;
pub mod operator;
pub mod rollouts;
pub mod script;
pub mod seed;
pub mod stack;
pub mod world;
