//! The file contract: which tensors and settings a file holds, what they mean, what is wrong with them.
//!
//! ```text
//! bytes ─header─▶ names, types, shapes ─layout─▶ branches ─request─▶ problems
//!            └────────data────────▶ arrays ─▶ the library ─▶ results ─write─▶ bytes
//! ```

mod data;
mod fault;
mod header;
mod layout;
mod names;
mod request;
mod results;
mod settings;
mod write;

pub(crate) use data::read_arrays;
pub(crate) use header::Header;
pub(crate) use request::Request;
pub(crate) use results::Results;
pub(crate) use write::{check_target, write_atomically};
