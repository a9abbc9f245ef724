//! The stack file: text, spans, typed values, and in the end the desired state of one environment.
//!
//! [`load`] takes the bytes of an `orchestra.yaml` and returns what should exist, or everything that is wrong with the
//! file at once. [`json_schema`] describes the same format to editors; it is made from the tables that the decoder
//! itself reads keys and defaults from. [`render_text`] draws diagnostics for people.
//!
//! This crate is pure: it reads no file, no environment variable and no clock, and it never panics on hostile input.
//! Size, depth and number of values are bounded before anything is built from them.

mod decode;
mod expression;
mod graph;
mod layer;
mod load;
mod preview;
mod render;
mod report;
mod schema;
mod source;
mod suggest;
mod table;
mod tables;
mod yaml;

pub use load::{Context, IMPLICIT_ENVIRONMENT, Loaded, Outline, load, outline};
pub use preview::PreviewContext;
pub use render::render_text;
pub use schema::{json_schema, reference_tables};
pub use source::{MAX_BYTES, Source};
