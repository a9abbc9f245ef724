//! Programs to orchestrate and load to put on them.
//!
//! `testbed-app` is a small server and job whose behaviour is set by its environment; [`load`] has open-loop clients that
//! count what happened to every single request; `testbed-origin` and [`pace`] stand behind and before what is measured;
//! [`pattern`] makes output whose every byte can be checked; [`random`] repeats itself by seed.
//!
//! It never is a dependency of the product: only tests and benchmarks use it.

pub mod handled;
pub mod load;
pub mod pace;
pub mod pattern;
pub mod random;
