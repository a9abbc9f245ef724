//! Does the analysis keep its promises? Simulated releases, laws, limits.

mod figures;
mod hostile;
mod laws;
mod rules;
mod sources;
mod world;
