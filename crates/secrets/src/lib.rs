//! Values of secrets: where they come from, and where those are kept that releases go back to.
//!
//! A release has the *version* of each secret that its programs get, and never a value. The values are in a [`Vault`],
//! sealed, so that going back to a release brings the value back that it had, whatever its source says by then; and so
//! that an instance of it can be started anew while the source is not there.

mod source;
mod vault;

pub use source::{MAX_VALUE, Unreadable, read};
pub use vault::{SPARED, Vault, VaultError};
