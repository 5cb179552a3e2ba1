//! What a case asks for: tensors, problems, and the least work and traffic that they take.

use super::suites::{Bias, Case, Pass};
use crate::array::{Array, desc};
use crate::failure::Failure;
use crate::machine::Machine;
use fused_attention::{
    Attention, AttentionDesc, Backward, Branch, DType, Gate, Gradient, Gradients, Outputs, Problem, Refusal, Segment,
    TensorDesc,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Same inputs every time.
const SEED: u64 = 0x5eed;

/// What a tensor of the request holds.
#[derive(Clone, Copy)]
enum Kind {
    /// Keys, values, biases: of the type of q.
    Stored,
    /// As `Stored` in f32, from 0 to 1.
    Region,
    /// One f32.
    Gate(f32),
    /// bool, true for a prefix of the keys.
    Keys,
}

impl Case {
    /// Whether `--filter` means this case: it has all the words.
    pub(super) fn has_words(&self, words: &str) -> bool {
        words.split_whitespace().all(|wanted| self.name.split_whitespace().any(|word| word == wanted))
    }

    pub(super) fn keys(&self) -> Vec<usize> {
        self.branches.iter().flat_map(|branch| branch.keys).copied().collect()
    }

    pub(super) fn q_shape(&self) -> [usize; 4] {
        [self.batch, self.seq_q, self.heads, self.head_dim]
    }

    pub(super) fn lse_shape(&self) -> [usize; 4] {
        [self.branches.len(), self.batch, self.heads, self.seq_q]
    }

    fn kv_shape(&self, keys: usize) -> [usize; 4] {
        [self.batch, keys, self.heads, self.head_dim]
    }

    /// The request; `next` makes a tensor.
    fn attention<T>(&self, q: T, mut next: impl FnMut(&[usize], Kind) -> T) -> Attention<T> {
        let mut attention = Attention::new(q);
        for (b, shape) in self.branches.iter().enumerate() {
            let segments = shape.keys.iter().map(|&keys| {
                let kv = self.kv_shape(keys);
                let mut segment = Segment::new(next(&kv, Kind::Stored), next(&kv, Kind::Stored));
                segment.bias = shape.bias.map(|bias| match bias {
                    Bias::Keys => next(&[self.batch, 1, 1, keys], Kind::Keys),
                    Bias::Logits => next(&[self.batch, 1, self.seq_q, keys], Kind::Stored),
                });
                segment
            });
            let segments: Vec<_> = segments.collect();
            // A gate that learns is in memory.
            let learns = self.pass == Pass::TrainingStep && b > 0;
            let gate = if learns { Gate::Tensor(next(&[], Kind::Gate(shape.gate))) } else { Gate::Scalar(shape.gate) };
            let region = shape.region.then(|| next(&[self.batch, self.seq_q], Kind::Region));
            attention = attention.branch(Branch { segments, gate, region });
        }
        attention
    }

    fn desc(&self, dtype: DType) -> AttentionDesc {
        let q = TensorDesc::bshd(dtype, self.q_shape());
        self.attention(q, |shape, kind| match kind {
            Kind::Stored => desc(dtype, shape),
            Kind::Region | Kind::Gate(_) => desc(DType::F32, shape),
            Kind::Keys => desc(DType::Bool, shape),
        })
    }

    /// The request with random numbers.
    pub(super) fn inputs(&self, dtype: DType) -> Attention<Array<'static>> {
        let mut random = Random::new(0);
        let q = random.array(dtype, &self.q_shape());
        self.attention(q, |shape, kind| match kind {
            Kind::Stored => random.array(dtype, shape),
            Kind::Region => random.between(DType::F32, shape, 0.0..1.0),
            Kind::Gate(gate) => Array::rounded(DType::F32, shape, [gate].into_iter()),
            Kind::Keys => random.prefix(shape),
        })
    }

    /// The gradient of `out`, random up to query `end` and 0 from there on.
    pub(super) fn dout(&self, dtype: DType, end: usize) -> Array<'static> {
        let row = self.heads * self.head_dim;
        let mut random = Random::new(1);
        let numbers = (0..self.batch * self.seq_q * row).map(|at| {
            let number = random.0.random_range(-1.0..1.0f32);
            if at / row % self.seq_q < end { number } else { 0.0 }
        });
        Array::rounded(dtype, &self.q_shape(), numbers)
    }

    /// The gradients that the pass asks for, with their shapes. None, forward.
    pub(super) fn gradients(&self) -> Vec<(Gradient, Vec<usize>)> {
        if self.pass == Pass::Forward {
            return Vec::new();
        }
        let mut wanted = vec![(Gradient::Q, self.q_shape().to_vec())];
        let mut number = 0;
        for (b, branch) in self.branches.iter().enumerate() {
            for &keys in branch.keys {
                if self.pass == Pass::BackwardAll || b > 0 {
                    let shape = self.kv_shape(keys).to_vec();
                    wanted.extend([(Gradient::K(number), shape.clone()), (Gradient::V(number), shape)]);
                }
                number += 1;
            }
            if self.pass == Pass::TrainingStep && b > 0 {
                wanted.push((Gradient::Gate(b), Vec::new()));
            }
        }
        wanted
    }

    /// Every reason the machine has not to take the case, asked without a tensor.
    pub(super) fn refusal(&self, machine: Machine, dtype: DType) -> Result<Option<Refusal>, Failure> {
        let (request, out) = (self.desc(dtype), TensorDesc::bshd(dtype, self.q_shape()));
        let outputs = match self.pass {
            Pass::Forward => Outputs::new(out),
            _ => Outputs::new(out).lse(TensorDesc::contiguous(DType::F32, self.lse_shape())),
        };
        let mut problems = vec![Problem::forward(&request, &outputs)?];
        if let Some(lse) = outputs.lse {
            let wanted = self.gradients().into_iter();
            let wanted = wanted.map(|(gradient, shape)| (gradient, desc(stored(gradient, dtype), &shape))).collect();
            let backward = Backward::new(out).saved(out, lse);
            problems.push(Problem::backward(&request, &backward, &Gradients { wanted })?);
        }
        let refusals = problems.iter().filter_map(|problem| machine.plan(problem).err());
        Ok(refusals.reduce(|mut all, more| {
            for reason in more.reasons {
                if !all.reasons.contains(&reason) {
                    all.reasons.push(reason);
                }
            }
            all
        }))
    }

    /// Dense multiplications and additions: forward two products per key, backward those that the gradients asked for
    /// need, the logits and the probabilities' slopes first.
    pub(super) fn flops(&self) -> f64 {
        let rows = (self.batch * self.heads * self.seq_q) as f64;
        let products = |b: usize| match self.pass {
            Pass::Forward => 2.0,
            Pass::BackwardAll => 5.0,
            Pass::BackwardImage if b > 0 => 5.0,
            Pass::BackwardImage => 3.0,
            Pass::TrainingStep if b > 0 => 7.0,
            Pass::TrainingStep => 5.0,
        };
        let keys = self.branches.iter().enumerate();
        let keys: f64 = keys.map(|(b, branch)| products(b) * branch.keys.iter().sum::<usize>() as f64).sum();
        2.0 * rows * keys * self.head_dim as f64
    }

    /// Bytes that have to move at least once: the inputs and what is asked for; backward, dout in place of out; in a
    /// training step both.
    pub(super) fn compulsory_bytes(&self, dtype: DType) -> f64 {
        let bytes = |shape: &[usize], dtype: DType| shape.iter().product::<usize>() as f64 * dtype.size() as f64;
        let request = self.desc(dtype);
        let inputs: f64 = request.tensors().map(|(_, tensor)| bytes(tensor.shape(), tensor.dtype())).sum();
        let passed = if self.pass == Pass::TrainingStep { 2.0 } else { 1.0 };
        let gradients = self.gradients();
        let gradients = gradients.iter().map(|(gradient, shape)| bytes(shape, stored(*gradient, dtype)));
        inputs + passed * bytes(&self.q_shape(), dtype) + gradients.sum::<f64>()
    }
}

/// The type that a gradient is asked for in: that of its input.
pub(super) fn stored(gradient: Gradient, dtype: DType) -> DType {
    match gradient {
        Gradient::Q | Gradient::K(_) | Gradient::V(_) => dtype,
        Gradient::Bias(_) | Gradient::Gate(_) | Gradient::Region(_) => DType::F32,
    }
}

/// Where the inputs come from.
struct Random(StdRng);

impl Random {
    fn new(stream: u64) -> Self {
        Random(StdRng::seed_from_u64(SEED + stream))
    }

    fn between(&mut self, dtype: DType, shape: &[usize], range: std::ops::Range<f32>) -> Array<'static> {
        let numbers = std::iter::repeat_with(|| self.0.random_range(range.clone()));
        Array::rounded(dtype, shape, numbers.take(shape.iter().product()))
    }

    fn array(&mut self, dtype: DType, shape: &[usize]) -> Array<'static> {
        self.between(dtype, shape, -1.0..1.0)
    }

    /// In each row at least the first half is true.
    fn prefix(&mut self, shape: &[usize]) -> Array<'static> {
        let keys = shape.last().copied().unwrap_or(0);
        let rows = shape.iter().product::<usize>() / keys.max(1);
        let ends: Vec<usize> = (0..rows).map(|_| self.0.random_range(keys / 2..=keys).max(1)).collect();
        Array::bools(shape, ends.into_iter().flat_map(|end| (0..keys).map(move |key| key < end)))
    }
}
