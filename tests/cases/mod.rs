//! One list of problems for every engine, test and bench, with the data, the naive computation and the error bound
//! that go with it.

#![allow(
    dead_code,
    unused_imports,
    missing_docs,
    reason = "shared by several test programs, each of which uses a part"
)]

mod bound;
mod data;
mod list;
mod naive;
mod naive_backward;

pub use bound::{Bound, bound, bound_of_draws};
pub use data::{Buffer, Data, HostTensor};
pub use list::all;
pub use naive::{Naive, naive, round_to};
pub use naive_backward::naive_draws;

use fused_attention::{Causal, DType, Engine, Window};

/// A problem: everything but the numbers in the tensors, which [`Data`] draws from the name and a seed.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub dtype: DType,
    pub batch: usize,
    pub seq_q: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub softmax_scale: Option<f32>,
    pub softcap: Option<f32>,
    pub branches: Vec<BranchCase>,
    pub layout: Layout,
}

#[derive(Clone, Debug)]
pub struct BranchCase {
    pub gate: GateCase,
    pub region: RegionCase,
    pub segments: Vec<SegmentCase>,
}

#[derive(Clone, Debug)]
pub struct SegmentCase {
    pub seq_kv: usize,
    pub kv_heads: usize,
    /// 1 or the batch.
    pub kv_batch: usize,
    pub bias: Option<BiasCase>,
    pub key_len: Option<Vec<u32>>,
    pub causal: Causal,
    pub window: Window,
}

#[derive(Clone, Debug)]
pub struct BiasCase {
    pub dtype: DType,
    pub shape: [usize; 4],
    pub values: BiasValues,
}

#[derive(Clone, Copy, Debug)]
pub enum BiasValues {
    /// Normal numbers; about two in three keys for bool.
    Random,
    /// As `Random`, and every third query may attend to nothing (-inf, false).
    EmptyRows,
    /// As `Random`, with some keys at the most negative finite number, and every third query with all of them so.
    FiniteMin,
}

#[derive(Clone, Debug)]
pub enum GateCase {
    None,
    Scalar(f32),
    /// `[]`
    Device(f32),
    /// `[batch]`
    PerBatch(Vec<f32>),
    /// `[batch, heads]`, random, some of them 0.
    PerHead,
}

#[derive(Clone, Copy, Debug)]
pub enum RegionCase {
    None,
    /// `[1, seq_q]`
    Shared,
    /// `[batch, seq_q]`
    PerBatch,
    /// `[1, heads, seq_q]`; not part of the file contract.
    PerHead,
    /// `[1, seq_q]`, from about 0.001 at the first query to about 3000 at the last.
    Growing,
}

/// How tensors lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// `[batch, seq, heads, dim]`, dense.
    Bshd,
    /// `[batch, heads, seq, dim]`, dense.
    Bhsd,
    /// Rows apart, at an odd offset, with poison between them.
    Gaps,
    /// The sequence runs backwards: negative strides.
    Reversed,
    /// Extents of 1 written as full extents of stride 0.
    Expanded,
}

impl Case {
    /// Plain attention of `[batch, seq_q, heads, head_dim]` over one segment.
    pub fn plain(name: impl Into<String>, dtype: DType, q: [usize; 4], seq_kv: usize) -> Case {
        let [batch, seq_q, heads, head_dim] = q;
        Case {
            name: name.into(),
            dtype,
            batch,
            seq_q,
            heads,
            head_dim,
            value_dim: head_dim,
            softmax_scale: None,
            softcap: None,
            branches: vec![BranchCase::new(SegmentCase::new(seq_kv, heads, batch))],
            layout: Layout::Bshd,
        }
    }

    /// Text and image branches, one per token count.
    pub fn decoupled(name: impl Into<String>, dtype: DType, q: [usize; 4], text: usize, image: &[usize]) -> Case {
        let mut case = Case::plain(name, dtype, q, text);
        for &tokens in image {
            case.branches.push(BranchCase::new(SegmentCase::new(tokens, q[2], q[0])));
        }
        case
    }

    pub fn value_dim(mut self, value_dim: usize) -> Case {
        self.value_dim = value_dim;
        self
    }

    pub fn scale(mut self, scale: f32) -> Case {
        self.softmax_scale = Some(scale);
        self
    }

    pub fn softcap(mut self, softcap: f32) -> Case {
        self.softcap = Some(softcap);
        self
    }

    pub fn layout(mut self, layout: Layout) -> Case {
        self.layout = layout;
        self
    }

    pub fn gate(mut self, branch: usize, gate: GateCase) -> Case {
        self.branches[branch].gate = gate;
        self
    }

    pub fn region(mut self, branch: usize, region: RegionCase) -> Case {
        self.branches[branch].region = region;
        self
    }

    /// Adds a segment to a branch's softmax.
    pub fn join(mut self, branch: usize, seq_kv: usize) -> Case {
        let segment = SegmentCase::new(seq_kv, self.heads, self.batch);
        self.branches[branch].segments.push(segment);
        self
    }

    /// Changes a segment, counted across branches.
    pub fn segment(mut self, number: usize, change: impl FnOnce(&mut SegmentCase)) -> Case {
        let segments = self.branches.iter_mut().flat_map(|branch| &mut branch.segments);
        change(segments.into_iter().nth(number).expect("a segment of this number"));
        self
    }

    pub fn bias(self, number: usize, dtype: DType, shape: [usize; 4], values: BiasValues) -> Case {
        self.segment(number, |segment| segment.bias = Some(BiasCase { dtype, shape, values }))
    }

    pub fn key_len(self, number: usize, key_len: &[u32]) -> Case {
        self.segment(number, |segment| segment.key_len = Some(key_len.to_vec()))
    }

    pub fn causal(self, number: usize, causal: Causal) -> Case {
        self.segment(number, |segment| segment.causal = causal)
    }

    pub fn window(self, number: usize, left: Option<u32>, right: Option<u32>) -> Case {
        self.segment(number, |segment| segment.window = Window { left, right })
    }

    pub fn kv_heads(self, number: usize, kv_heads: usize) -> Case {
        self.segment(number, |segment| segment.kv_heads = kv_heads)
    }

    /// Keys and values shared by the whole batch.
    pub fn kv_shared(self, number: usize) -> Case {
        self.segment(number, |segment| segment.kv_batch = 1)
    }

    pub fn segments(&self) -> impl Iterator<Item = &SegmentCase> {
        self.branches.iter().flat_map(|branch| &branch.segments)
    }

    /// Whether an engine has a kernel for it; the others it must refuse.
    pub fn has_kernel(&self, engine: Engine) -> bool {
        let whole = |width: usize| width.is_multiple_of(8) && width <= 256;
        match engine {
            Engine::Reference | Engine::Cpu => true,
            Engine::Emulated | Engine::Cuda => {
                let aligned = self.layout != Layout::Gaps;
                self.dtype != DType::F32 && whole(self.head_dim) && whole(self.value_dim) && aligned
            }
        }
    }

    /// The same for its gradients.
    pub fn has_backward(&self, engine: Engine) -> bool {
        self.has_kernel(engine)
    }

    /// Whether the command line's files can say it.
    pub fn fits_file_contract(&self) -> bool {
        !self.branches.iter().any(|branch| matches!(branch.region, RegionCase::PerHead))
    }
}

impl BranchCase {
    fn new(segment: SegmentCase) -> Self {
        BranchCase { gate: GateCase::None, region: RegionCase::None, segments: vec![segment] }
    }
}

impl SegmentCase {
    fn new(seq_kv: usize, kv_heads: usize, kv_batch: usize) -> Self {
        SegmentCase {
            seq_kv,
            kv_heads,
            kv_batch,
            bias: None,
            key_len: None,
            causal: Causal::None,
            window: Window::default(),
        }
    }
}
