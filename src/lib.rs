//! Memory-efficient attention over any number of branches, in one pass.
//!
//! ```text
//! S_s[i,j]  = softmax_scale · <q_i, k_s,j> + bias_s[i,j]
//! P_b       = softmax over all keys of branch b, of all its segments s
//! out_i     = Σ_b gate_b · region_b[i] · Σ_j P_b[i,j] v_j
//! lse_b[i]  = natural logarithm of the denominator of branch b
//! ```
//!
//! Plain self- or cross-attention is one branch of one segment:
//!
//! ```
//! # fn main() -> Result<(), fused_attention::Error> {
//! use fused_attention::{Attention, Branch, Engine, TensorMut, TensorRef};
//! # let (q, k, v) = (vec![0.5f32; 2 * 64 * 8 * 40], vec![0.5f32; 2 * 77 * 8 * 40], vec![0.5f32; 2 * 77 * 8 * 40]);
//! let mut out = vec![0.0f32; 2 * 64 * 8 * 40];
//! let q = TensorRef::bshd(&q, [2, 64, 8, 40]); // [batch, seq, heads, head_dim]
//! let branch = Branch::new(TensorRef::bshd(&k, [2, 77, 8, 40]), TensorRef::bshd(&v, [2, 77, 8, 40]));
//! Attention::new(q).branch(branch).forward(Engine::Cpu, TensorMut::bshd(&mut out, [2, 64, 8, 40]))?;
//! # assert!(out.iter().all(|x| (x - 0.5).abs() < 1e-6));
//! # Ok(())
//! # }
//! ```
//!
//! IP-Adapter's decoupled cross-attention is text and any number of image prompts, each a branch with its own softmax,
//! its gate (the adapter's scale) and, where wanted, a region of the picture:
//!
//! ```
//! # fn main() -> Result<(), fused_attention::Error> {
//! use fused_attention::{Attention, Branch, Engine, Outputs, TensorMut, TensorRef};
//! # let (text, face, style) = (vec![0.5f32; 2 * 77 * 320], vec![0.5f32; 2 * 16 * 320], vec![0.5f32; 4 * 320]);
//! # let (q, mask) = (vec![0.5f32; 2 * 64 * 320], vec![1.0f32; 64]);
//! # let (mut out, mut lse) = (vec![0.0f32; 2 * 64 * 320], vec![0.0f32; 3 * 2 * 8 * 64]);
//! let tokens = |data, batch, tokens| TensorRef::bshd::<f32>(data, [batch, tokens, 8, 40]);
//! # let (k_text, v_text, k_face, v_face, k_style, v_style) = (&text, &text, &face, &face, &style, &style);
//! Attention::new(tokens(&q, 2, 64))
//!     .branch(Branch::new(tokens(k_text, 2, 77), tokens(v_text, 2, 77)))
//!     .branch(
//!         Branch::new(tokens(k_face, 2, 16), tokens(v_face, 2, 16))
//!             .gate(0.8)
//!             .region(TensorRef::contiguous(&mask, [1, 64])),
//!     )
//!     .branch(Branch::new(tokens(k_style, 1, 4), tokens(v_style, 1, 4)).gate(-0.3)) // shared by the batch
//!     .forward(
//!         Engine::Cpu,
//!         Outputs::new(TensorMut::bshd(&mut out, [2, 64, 8, 40])).lse(TensorMut::contiguous(&mut lse, [3, 2, 8, 64])),
//!     )?;
//! # assert!(out.iter().all(|x| (x - 0.75).abs() < 1e-6));
//! # Ok(())
//! # }
//! ```
//!
//! # From request to kernel
//!
//! ```text
//! AttentionDesc ──▶ Problem ──▶ Plan ──▶ engine
//! what is asked     it is       which    reference   f64, naive: the oracle
//! (plain data)      legal       kernel   cpu         tiled, all cores
//!                                        cuda        kernels of CUDA C++, on a GPU
//!                                        emulated    their source, on the CPU
//! ```
//!
//! [`Attention`] holds tensors in host memory or, as [`AttentionDesc`], their descriptions alone; [`Problem`] can only be
//! had by passing every rule of the operator; [`Plan`] names the kernel or every reason why there is none, without a GPU
//! and without data.
//!
//! # Rules that every engine obeys
//!
//! * A row with no key left contributes 0 and has lse -inf: never NaN, forward or backward.
//! * Logits, softmax, gates, regions and the sum of branches are f32 at least; one rounding, at the store of `out`.
//! * A gate of exactly 0 gives, to the bit, the result without that branch, even if its tensors hold NaN.
//! * Keys and values past `key_len` are never read. What a mask, a position rule or a region of 0 excludes must be finite.
//! * An option that an engine cannot honour is refused with all its reasons; nothing is ignored, clamped or replaced.
//!
//! # Features
//!
//! * `cuda` (default): compiles the kernels where there is nvcc, and finds the NVIDIA driver at run time; nothing is linked, and it
//!   builds and runs without either. `cuda` is the module then.
//! * `emulated`: the CUDA kernels on the CPU, every access checked; needs a C++ compiler. For tests and the command line.
//!
//! # Unsafe code
//!
//! Writing disjoint rows of one output from several threads (`engine/cpu/shared.rs`), reading the tiles of a matrix product
//! whose extents were checked before (`engine/cpu/product.rs`), calling the CUDA driver and vouching for what its kernels are given (`engine/cuda/`), and, with
//! `emulated`, vouching for the kernels' parameter block and entry points (`engine/emulated.rs`).

mod attention;
mod engine;
mod error;
mod plan;
mod problem;

#[cfg(feature = "cuda")]
pub use engine::cuda;
#[cfg(feature = "emulated")]
pub use engine::emulated;
pub use engine::{Choice, device, plan, reference};
pub use error::Error;
pub use plan::{
    CudaDevice, CudaError, Device, DeviceCode, Engine, Form, INSTANCES, Instance, MAX_BRANCHES, MAX_SEGMENTS, NotTaken,
    Plan, Reason, Refusal, Target, Toolkit, support_table,
};
pub use problem::{
    Argument, Attention, AttentionDesc, Backward, Branch, Causal, DType, DTypes, Direction, Element, Extent, Float,
    Gate, Gradient, Gradients, Invalid, MAX_EXTENT, MAX_RANK, Outputs, Problem, Rule, Saved, Segment, Tensor,
    TensorDesc, TensorMut, TensorRef, Violation, Window,
};
