//! Process provider and shim.
