//! The CUDA engine's host code: on a GPU where there is one, and over the stand-in driver everywhere else.
#![cfg(all(feature = "cuda", feature = "emulated"))]

#[path = "../cases/mod.rs"]
mod cases;

mod backward;
mod case_list;
mod cost;
mod device;
mod device_backward;
mod faults;
mod order;
mod refusals;
mod stand_in;
