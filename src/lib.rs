//! Memory-efficient attention over any number of branches, in one pass.

mod attention;
mod engine;
mod error;
mod plan;
mod problem;

pub use attention::plan;
pub use engine::{cuda, device, reference};
pub use error::Error;
pub use plan::{CudaDevice, Device, Engine, INSTANCES, Instance, Plan, Reason, Refusal, support_table};
pub use problem::{
    Argument, Attention, AttentionDesc, Branch, Causal, DType, DTypes, Direction, Element, Extent, Float, Gate,
    Gradient, Gradients, Invalid, MAX_EXTENT, MAX_RANK, Outputs, Problem, Rule, Segment, Tensor, TensorDesc, TensorMut,
    TensorRef, Violation, Window,
};
