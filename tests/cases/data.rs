//! The tensors of a case, in the memory layout it asks for, with poison wherever nothing may be read.

use super::{BiasCase, BiasValues, Case, GateCase, Layout, RegionCase};
use fused_attention::{
    Attention, Backward, Branch, DType, Engine, Error, Gate, Gradient, Gradients, Outputs, Segment, Tensor, TensorDesc,
    TensorMut, TensorRef,
};
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::HashMap;

/// The memory of a tensor, by element type.
#[derive(Clone, Debug)]
pub enum Buffer {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    U32(Vec<u32>),
}

/// A tensor that owns its memory.
#[derive(Clone, Debug)]
pub struct HostTensor {
    pub buffer: Buffer,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<isize>,
}

/// What unused elements of a buffer hold: reading one spoils the result, writing one is noticed.
const POISON: f32 = f32::NAN;

impl HostTensor {
    /// Stores `values`, given dense, in the layout. Float types round to nearest.
    pub fn new(dtype: DType, shape: &[usize], values: &[f32], layout: Layout) -> HostTensor {
        let (len, offset, strides) = place(shape, layout);
        let mut tensor = HostTensor { buffer: Buffer::new(dtype, len), offset, shape: shape.to_vec(), strides };
        for (n, &value) in values.iter().enumerate() {
            let at = tensor.position(n);
            tensor.buffer.set(at, value);
        }
        tensor
    }

    /// A buffer that ends with the last element that `desc` reaches, and `margin` poisoned elements around it.
    pub fn exact(desc: &TensorDesc, margin: usize, mut draw: impl FnMut() -> f32) -> HostTensor {
        let reach = |sign: isize| -> usize {
            let dims = desc.shape().iter().zip(desc.strides()).filter(|&(&extent, _)| extent > 1);
            dims.map(|(&extent, &stride)| (sign * stride).max(0) as usize * (extent - 1)).sum()
        };
        let (before, after) = if desc.is_empty() { (0, 0) } else { (reach(-1), reach(1) + 1) };
        let buffer = Buffer::new(desc.dtype(), before + after + 2 * margin);
        let mut tensor = HostTensor {
            buffer,
            offset: before + margin,
            shape: desc.shape().to_vec(),
            strides: desc.strides().to_vec(),
        };
        for n in 0..tensor.elements() {
            let at = tensor.position(n);
            tensor.buffer.set(at, draw());
        }
        tensor
    }

    /// Position in the buffer of the `n`th element in dense order.
    fn position(&self, mut n: usize) -> usize {
        let mut at = self.offset as isize;
        for (&extent, &stride) in self.shape.iter().zip(&self.strides).rev() {
            at += (n % extent) as isize * stride;
            n /= extent;
        }
        at as usize
    }

    /// The `n`th element in dense order.
    pub fn get(&self, n: usize) -> f32 {
        self.buffer.get(self.position(n))
    }

    /// The element at `index`; an index along an extent of 1 is taken as 0.
    pub fn at<const N: usize>(&self, index: [usize; N]) -> f32 {
        let missing = N - self.shape.len();
        let n = self.shape.iter().zip(&index[missing..]).fold(0, |n, (&extent, &i)| n * extent + i.min(extent - 1));
        self.get(n)
    }

    pub fn dtype(&self) -> DType {
        match self.buffer {
            Buffer::F16(_) => DType::F16,
            Buffer::BF16(_) => DType::BF16,
            Buffer::F32(_) => DType::F32,
            Buffer::Bool(_) => DType::Bool,
            Buffer::U32(_) => DType::U32,
        }
    }

    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// All elements in dense order.
    pub fn values(&self) -> Vec<f32> {
        (0..self.elements()).map(|n| self.get(n)).collect()
    }

    /// The elements in dense order as little-endian bytes, for a file.
    pub fn dense_bytes(&self) -> Vec<u8> {
        (0..self.elements())
            .flat_map(|n| {
                let at = self.position(n);
                match &self.buffer {
                    Buffer::F16(data) => data[at].to_le_bytes().to_vec(),
                    Buffer::BF16(data) => data[at].to_le_bytes().to_vec(),
                    Buffer::F32(data) => data[at].to_le_bytes().to_vec(),
                    Buffer::Bool(data) => vec![u8::from(data[at])],
                    Buffer::U32(data) => data[at].to_le_bytes().to_vec(),
                }
            })
            .collect()
    }

    pub fn view(&self) -> TensorRef<'_> {
        let (offset, shape, strides) = (self.offset, &self.shape, &self.strides);
        match &self.buffer {
            Buffer::F16(data) => TensorRef::from_slices(data, offset, shape, strides),
            Buffer::BF16(data) => TensorRef::from_slices(data, offset, shape, strides),
            Buffer::F32(data) => TensorRef::from_slices(data, offset, shape, strides),
            Buffer::Bool(data) => TensorRef::from_slices(data, offset, shape, strides),
            Buffer::U32(data) => TensorRef::from_slices(data, offset, shape, strides),
        }
        .expect("as many strides as extents, at most four")
    }

    /// The same for a float tensor, to be written.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        let (offset, shape, strides) = (self.offset, &self.shape, &self.strides);
        match &mut self.buffer {
            Buffer::F16(data) => TensorMut::from_slices(data, offset, shape, strides),
            Buffer::BF16(data) => TensorMut::from_slices(data, offset, shape, strides),
            Buffer::F32(data) => TensorMut::from_slices(data, offset, shape, strides),
            Buffer::Bool(_) | Buffer::U32(_) => unreachable!("outputs are floats"),
        }
        .expect("as many strides as extents, at most four")
    }

    /// Whether every element that no index reaches is still poison.
    pub fn gaps_untouched(&self) -> bool {
        let mut reached = vec![false; self.buffer.len()];
        (0..self.elements()).for_each(|n| reached[self.position(n)] = true);
        (0..reached.len()).filter(|&at| !reached[at]).all(|at| self.buffer.is_poison(at))
    }
}

impl Buffer {
    /// All poison.
    fn new(dtype: DType, len: usize) -> Buffer {
        match dtype {
            DType::F16 => Buffer::F16(vec![f16::from_f32(POISON); len]),
            DType::BF16 => Buffer::BF16(vec![bf16::from_f32(POISON); len]),
            DType::F32 => Buffer::F32(vec![POISON; len]),
            DType::Bool => Buffer::Bool(vec![true; len]),
            DType::U32 => Buffer::U32(vec![u32::MAX; len]),
        }
    }

    fn len(&self) -> usize {
        match self {
            Buffer::F16(data) => data.len(),
            Buffer::BF16(data) => data.len(),
            Buffer::F32(data) => data.len(),
            Buffer::Bool(data) => data.len(),
            Buffer::U32(data) => data.len(),
        }
    }

    fn set(&mut self, at: usize, value: f32) {
        match self {
            Buffer::F16(data) => data[at] = f16::from_f32(value),
            Buffer::BF16(data) => data[at] = bf16::from_f32(value),
            Buffer::F32(data) => data[at] = value,
            Buffer::Bool(data) => data[at] = value != 0.0,
            Buffer::U32(data) => data[at] = value as u32,
        }
    }

    fn get(&self, at: usize) -> f32 {
        match self {
            Buffer::F16(data) => data[at].to_f32(),
            Buffer::BF16(data) => data[at].to_f32(),
            Buffer::F32(data) => data[at],
            Buffer::Bool(data) => f32::from(data[at]),
            Buffer::U32(data) => data[at] as f32,
        }
    }

    fn is_poison(&self, at: usize) -> bool {
        self.get(at).is_nan()
    }
}

/// Length of the buffer, offset of index zero and strides.
fn place(shape: &[usize], layout: Layout) -> (usize, usize, Vec<isize>) {
    let dense = |order: &[usize], pitch: usize| {
        let mut strides = vec![0isize; shape.len()];
        let mut next = 1;
        for (n, &dim) in order.iter().enumerate() {
            strides[dim] = next as isize;
            next *= shape[dim];
            if n == 0 {
                next += pitch;
            }
        }
        (strides, next)
    };
    let natural: Vec<usize> = (0..shape.len()).rev().collect();
    let full_rank = shape.len() == 4;
    match layout {
        Layout::Bhsd if full_rank => {
            let (strides, len) = dense(&[3, 1, 2, 0], 0);
            (len, 0, strides)
        }
        Layout::Gaps => {
            let (strides, len) = dense(&natural, 3);
            (len + 12, 5, strides)
        }
        Layout::Reversed if full_rank => {
            let (mut strides, len) = dense(&natural, 0);
            let offset = strides[1] as usize * shape[1].saturating_sub(1);
            strides[1] = -strides[1];
            (len, offset, strides)
        }
        Layout::Bshd | Layout::Bhsd | Layout::Reversed | Layout::Expanded => {
            let (strides, len) = dense(&natural, 0);
            (len, 0, strides)
        }
    }
}

/// The tensors of a case and the request they make.
#[derive(Clone)]
pub struct Data {
    pub case: Case,
    pub q: HostTensor,
    pub branches: Vec<BranchData>,
    pub dout: HostTensor,
}

#[derive(Clone)]
pub struct BranchData {
    pub gate: Option<HostTensor>,
    pub region: Option<HostTensor>,
    pub segments: Vec<SegmentData>,
}

#[derive(Clone)]
pub struct SegmentData {
    pub k: HostTensor,
    pub v: HostTensor,
    pub bias: Option<HostTensor>,
    pub key_len: Option<HostTensor>,
}

impl Data {
    /// Draws the numbers of a case.
    pub fn new(case: &Case, seed: u64) -> Data {
        let hash = case.name.bytes().fold(seed, |hash, byte| hash.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte));
        let mut draw = Draw { rng: StdRng::seed_from_u64(hash), layout: case.layout };
        let Case { batch, seq_q, heads, head_dim, value_dim, dtype, .. } = *case;
        let q = draw.rows(dtype, [batch, seq_q, heads, head_dim], 0.25);
        let dout = draw.rows(dtype, [batch, seq_q, heads, value_dim], -0.1);
        let mut branches = Vec::new();
        for branch in &case.branches {
            let segments = (branch.segments.iter())
                .map(|segment| {
                    let shape = [segment.kv_batch, segment.seq_kv, segment.kv_heads];
                    let [b, s, h] = shape;
                    let mut k = draw.rows(dtype, [b, s, h, head_dim], -0.25);
                    let mut v = draw.rows(dtype, [b, s, h, value_dim], 0.5);
                    if case.layout == Layout::Expanded {
                        (k, v) = (k.expand(0, batch), v.expand(0, batch));
                    }
                    let bias = segment.bias.as_ref().map(|bias| {
                        let full = [batch, heads, seq_q, segment.seq_kv];
                        let bias = draw.bias(bias);
                        if case.layout != Layout::Expanded {
                            return bias;
                        }
                        full.iter().enumerate().fold(bias, |bias, (dim, &extent)| bias.expand(dim, extent))
                    });
                    let key_len = segment.key_len.as_ref().map(|len| {
                        let values: Vec<f32> = len.iter().map(|&len| len as f32).collect();
                        HostTensor::new(DType::U32, &[batch], &values, Layout::Gaps)
                    });
                    SegmentData { k, v, bias, key_len }
                })
                .collect();
            let gate = match &branch.gate {
                GateCase::None | GateCase::Scalar(_) => None,
                GateCase::Device(gate) => Some(HostTensor::new(DType::F32, &[], &[*gate], Layout::Bshd)),
                GateCase::PerBatch(gates) => Some(HostTensor::new(DType::F32, &[batch], gates, case.layout)),
                GateCase::PerHead => {
                    let gates: Vec<f32> =
                        (0..batch * heads).map(|n| if n % 3 == 1 { 0.0 } else { draw.normal() }).collect();
                    Some(HostTensor::new(DType::F32, &[batch, heads], &gates, case.layout))
                }
            };
            let region = match branch.region {
                RegionCase::None => None,
                RegionCase::Shared => Some(draw.region(&[1, seq_q])),
                RegionCase::PerBatch => Some(draw.region(&[batch, seq_q])),
                RegionCase::PerHead => Some(draw.region(&[1, heads, seq_q])),
                RegionCase::Growing => {
                    let exponent = |i: usize| -3.0 + 6.5 * i as f32 / seq_q as f32;
                    let values: Vec<f32> = (0..seq_q).map(|i| draw.normal() * 10f32.powf(exponent(i))).collect();
                    Some(HostTensor::new(DType::F32, &[1, seq_q], &values, case.layout))
                }
            };
            branches.push(BranchData { gate, region, segments });
        }
        Data { case: case.clone(), q, branches, dout }
    }

    /// The request.
    pub fn attention(&self) -> Attention<TensorRef<'_>> {
        self.request(HostTensor::view)
    }

    /// The request with something made of each tensor in its place.
    pub fn request<'a, T>(&'a self, mut make: impl FnMut(&'a HostTensor) -> T) -> Attention<T> {
        let make = &mut make;
        let mut attention = Attention::new(make(&self.q));
        attention.softmax_scale = self.case.softmax_scale;
        attention.softcap = self.case.softcap;
        for (branch, described) in self.branches.iter().zip(&self.case.branches) {
            let mut segments = Vec::new();
            for (segment, described) in branch.segments.iter().zip(&described.segments) {
                segments.push(Segment {
                    k: make(&segment.k),
                    v: make(&segment.v),
                    bias: segment.bias.as_ref().map(&mut *make),
                    key_len: segment.key_len.as_ref().map(&mut *make),
                    causal: described.causal,
                    window: described.window,
                });
            }
            let gate = match (&branch.gate, &described.gate) {
                (Some(gate), _) => Gate::Tensor(make(gate)),
                (None, GateCase::Scalar(gate)) => Gate::Scalar(*gate),
                (None, _) => Gate::Scalar(1.0),
            };
            let region = branch.region.as_ref().map(&mut *make);
            attention = attention.branch(Branch { segments, gate, region });
        }
        attention
    }

    /// Poisoned outputs: `out` in the case's layout and `lse`.
    pub fn outputs(&self) -> (HostTensor, HostTensor) {
        let Case { batch, seq_q, heads, value_dim, dtype, layout, .. } = self.case;
        let lse = [self.branches.len(), batch, heads, seq_q];
        (
            HostTensor::new(dtype, &[batch, seq_q, heads, value_dim], &[], layout),
            HostTensor::new(DType::F32, &lse, &[], layout),
        )
    }

    /// Every gradient that the case has, and the shape of its input.
    pub fn gradients(&self) -> Vec<(Gradient, Vec<usize>)> {
        let mut all = vec![(Gradient::Q, self.q.shape.clone())];
        let mut segments = 0;
        for (n, branch) in self.branches.iter().enumerate() {
            for segment in &branch.segments {
                all.push((Gradient::K(segments), segment.k.shape.clone()));
                all.push((Gradient::V(segments), segment.v.shape.clone()));
                let bias = segment.bias.as_ref().filter(|bias| bias.dtype() != DType::Bool);
                all.extend(bias.map(|bias| (Gradient::Bias(segments), bias.shape.clone())));
                segments += 1;
            }
            let gate = branch.gate.as_ref().map_or(Vec::new(), |gate| gate.shape.clone());
            all.push((Gradient::Gate(n), gate));
            all.extend(branch.region.as_ref().map(|region| (Gradient::Region(n), region.shape.clone())));
        }
        all
    }

    /// The oracle's gradients, dense.
    pub fn oracle_gradients(&self) -> HashMap<Gradient, Vec<f64>> {
        let mut wanted = Gradients::new();
        for (gradient, shape) in self.gradients() {
            let dense = HostTensor::new(DType::F32, &shape, &[], Layout::Bshd);
            wanted = wanted.want(gradient, dense.view().desc());
        }
        let oracle = self.attention().backward_f64(self.dout.view(), &wanted).expect("every case is a legal problem");
        oracle.into_iter().map(|(gradient, dense)| (gradient, dense.values)).collect()
    }

    /// Poisoned tensors for the gradients that `wanted` admits, in the case's layout; those of q, k and v of type
    /// `dtype`.
    pub fn gradient_tensors(&self, dtype: DType, wanted: impl Fn(Gradient) -> bool) -> Vec<(Gradient, HostTensor)> {
        let tensor = |(gradient, shape): (Gradient, Vec<usize>)| {
            let dtype = match gradient {
                Gradient::Q | Gradient::K(_) | Gradient::V(_) => dtype,
                Gradient::Bias(_) | Gradient::Gate(_) | Gradient::Region(_) => DType::F32,
            };
            (gradient, HostTensor::new(dtype, &shape, &[], self.case.layout))
        };
        self.gradients().into_iter().filter(|&(gradient, _)| wanted(gradient)).map(tensor).collect()
    }

    /// Runs an engine's backward into poisoned tensors, after which nothing beside them may have been written.
    pub fn try_backward<'a>(
        &self,
        engine: Engine,
        backward: impl Into<Backward<TensorRef<'a>>>,
        mut tensors: Vec<(Gradient, HostTensor)>,
    ) -> Result<Vec<(Gradient, HostTensor)>, Error> {
        let wanted = tensors.iter_mut().map(|(gradient, tensor)| (*gradient, tensor.view_mut())).collect();
        self.attention().backward(engine, backward, Gradients { wanted })?;
        for (gradient, tensor) in &tensors {
            assert!(tensor.gaps_untouched(), "{}: written beside {gradient:?}", self.case.name);
        }
        Ok(tensors)
    }

    /// Runs an engine into poisoned outputs and returns them, after checking that nothing beside them was written.
    pub fn run(&self, engine: Engine) -> (HostTensor, HostTensor) {
        self.try_run(engine).unwrap_or_else(|error| panic!("{} {}: {error}", engine.name(), self.case.name))
    }

    /// The same for an engine that may refuse.
    pub fn try_run(&self, engine: Engine) -> Result<(HostTensor, HostTensor), Error> {
        let (mut out, mut lse) = self.outputs();
        self.attention().forward(engine, Outputs::new(out.view_mut()).lse(lse.view_mut()))?;
        assert!(out.gaps_untouched() && lse.gaps_untouched(), "{}: written beside an output", self.case.name);
        Ok((out, lse))
    }
}

impl HostTensor {
    /// A dimension of extent 1 as `extent` times the same.
    fn expand(mut self, dim: usize, extent: usize) -> HostTensor {
        if self.shape[dim] == 1 {
            self.shape[dim] = extent;
            self.strides[dim] = 0;
        }
        self
    }
}

struct Draw {
    rng: StdRng,
    layout: Layout,
}

impl Draw {
    /// Nearly normal: the sum of twelve uniform numbers.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.rng.random::<f32>()).sum::<f32>() - 6.0
    }

    /// Rows around `centre`; one in sixteen is twice as large, so that some softmaxes are nearly one-hot.
    fn rows(&mut self, dtype: DType, shape: [usize; 4], centre: f32) -> HostTensor {
        let width = shape[3];
        let rows: usize = shape[..3].iter().product();
        let mut values = Vec::with_capacity(rows * width);
        for row in 0..rows {
            let size = if row % 16 == 11 { 2.0 } else { 1.0 };
            values.extend((0..width).map(|_| size * (self.normal() + centre)));
        }
        HostTensor::new(dtype, &shape, &values, self.layout)
    }

    /// Any float, sometimes 0, sometimes negative.
    fn region(&mut self, shape: &[usize]) -> HostTensor {
        let elements: usize = shape.iter().product();
        let values: Vec<f32> = (0..elements).map(|n| if n % 5 == 0 { 0.0 } else { 0.5 + self.normal() }).collect();
        HostTensor::new(DType::F32, shape, &values, self.layout)
    }

    fn bias(&mut self, bias: &BiasCase) -> HostTensor {
        let [_, _, seq_q, seq_kv] = bias.shape;
        let elements: usize = bias.shape.iter().product();
        let lowest = match bias.dtype {
            DType::F16 => f16::MIN.to_f32(),
            DType::BF16 => bf16::MIN.to_f32(),
            _ => f32::MIN,
        };
        let is_bool = bias.dtype == DType::Bool;
        let values: Vec<f32> = (0..elements)
            .map(|n| {
                let random = if is_bool { f32::from(self.rng.random::<f32>() < 0.66) } else { self.normal() };
                let row = n / seq_kv.max(1) % seq_q.max(1);
                match bias.values {
                    BiasValues::Random => random,
                    BiasValues::EmptyRows if row % 3 != 2 => random,
                    BiasValues::EmptyRows if is_bool => 0.0,
                    BiasValues::EmptyRows => f32::NEG_INFINITY,
                    BiasValues::FiniteMin if row % 3 == 2 || n % 4 == 0 => lowest,
                    BiasValues::FiniteMin => random,
                }
            })
            .collect();
        HostTensor::new(bias.dtype, &bias.shape, &values, self.layout)
    }
}
