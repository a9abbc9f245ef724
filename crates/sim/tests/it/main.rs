//! Integration tests of the simulator.

mod seeds;
