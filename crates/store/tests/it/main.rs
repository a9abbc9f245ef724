//! The store from outside: what is committed, what is refused, what survives.

mod commits;
mod crash;
mod damage;
mod disk;
mod fixture;
mod invariants;
mod read_only;
mod retention;
mod torn;
