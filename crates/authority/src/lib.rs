//! The development authority: one certificate authority per state directory, for TLS on machines that nobody else
//! reaches.
//!
//! [`Authority`] is made once and lies in `tls/authority` of the state directory, its key readable by its owner alone.
//! It can vouch for names of development and addresses of private networks only, whoever gets hold of
//! its key. [`CertifiedDataPlane`] stands in front of a data plane and gives every route that asks for a development
//! certificate the path of one, issued or renewed where that is due: the proxy gets certificates, never the authority's
//! key.
//!
//! This crate verifies nothing and speaks no TLS.

mod authority;
mod constraints;
mod data_plane;
mod folder;
mod issued;

pub use authority::{Authority, AuthorityError};
pub use data_plane::CertifiedDataPlane;
pub use issued::Issued;
