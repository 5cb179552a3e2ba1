//! Times one case: inputs, a warm-up, runs, the median.

use super::REPEATS;
use super::suites::{Case, Pass};
use crate::array::Array;
use crate::failure::Failure;
use crate::machine::Machine;
use fused_attention::{
    Attention, AttentionDesc, Backward, Branch, DType, Engine, Gradient, Gradients, Outputs, Plan, Problem, Refusal,
    Segment, TensorDesc, TensorMut, TensorRef,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::time::{Duration, Instant};

/// Same inputs every time.
const SEED: u64 = 0x5eed;

/// What one case took.
pub(super) struct Row {
    pub(super) case: &'static Case,
    pub(super) engine: Engine,
    pub(super) kernel: String,
    pub(super) direction: &'static str,
    pub(super) dtype: DType,
    pub(super) median_us: f64,
    pub(super) tflops: f64,
    pub(super) gbytes_per_s: f64,
}

impl Case {
    pub(super) fn keys(&self) -> Vec<usize> {
        self.branches.iter().flat_map(|branch| branch.keys).copied().collect()
    }

    fn q_shape(&self) -> [usize; 4] {
        [self.batch, self.seq_q, self.heads, self.head_dim]
    }

    fn kv_shape(&self, keys: usize) -> [usize; 4] {
        [self.batch, keys, self.heads, self.head_dim]
    }

    /// The request; `next` makes a tensor of a shape and is told whether it is a region.
    fn attention<T>(&self, q: T, mut next: impl FnMut(&[usize], bool) -> T) -> Attention<T> {
        let mut attention = Attention::new(q);
        for shape in self.branches {
            let mut segments = shape.keys.iter().map(|&keys| {
                let kv = self.kv_shape(keys);
                Segment::new(next(&kv, false), next(&kv, false))
            });
            let Some(first) = segments.next() else { continue };
            let mut branch = segments.fold(Branch::from(first), Branch::join).gate(shape.gate);
            if shape.region {
                branch = branch.region(next(&[self.batch, self.seq_q], true));
            }
            attention = attention.branch(branch);
        }
        attention
    }

    fn desc(&self, dtype: DType) -> AttentionDesc {
        let q = TensorDesc::bshd(dtype, self.q_shape());
        self.attention(q, |shape, region| crate::array::desc(if region { DType::F32 } else { dtype }, shape))
    }

    /// The gradients that the pass asks for, with their shapes.
    fn gradients(&self) -> Vec<(Gradient, [usize; 4])> {
        let mut wanted = vec![(Gradient::Q, self.q_shape())];
        let mut number = 0;
        for (b, branch) in self.branches.iter().enumerate() {
            for &keys in branch.keys {
                if self.pass == Pass::BackwardAll || b > 0 {
                    let shape = self.kv_shape(keys);
                    wanted.extend([(Gradient::K(number), shape), (Gradient::V(number), shape)]);
                }
                number += 1;
            }
        }
        wanted
    }

    fn problem(&self, dtype: DType) -> Result<Problem, Failure> {
        let (desc, out) = (self.desc(dtype), TensorDesc::bshd(dtype, self.q_shape()));
        if self.pass == Pass::Forward {
            return Ok(Problem::forward(&desc, &Outputs::new(out))?);
        }
        let wanted = self.gradients().into_iter();
        let wanted = wanted.map(|(gradient, shape)| (gradient, TensorDesc::bshd(DType::F32, shape)));
        Ok(Problem::backward(&desc, &Backward::new(out), &Gradients { wanted: wanted.collect() })?)
    }

    /// The plan, or why there is none, without a tensor.
    pub(super) fn plan(&self, machine: Machine, dtype: DType) -> Result<Result<Plan, Refusal>, Failure> {
        Ok(machine.plan(&self.problem(dtype)?))
    }

    /// Dense multiplications and additions: forward two products per key, backward those that the gradients asked for
    /// need, the logits and the probabilities' slopes first.
    fn flops(&self) -> f64 {
        let rows = (self.batch * self.heads * self.seq_q) as f64;
        let products = |b: usize| match self.pass {
            Pass::Forward => 2.0,
            Pass::BackwardAll => 5.0,
            Pass::BackwardImage if b > 0 => 5.0,
            Pass::BackwardImage => 3.0,
        };
        let keys = self.branches.iter().enumerate();
        let keys: f64 = keys.map(|(b, branch)| products(b) * branch.keys.iter().sum::<usize>() as f64).sum();
        2.0 * rows * keys * self.head_dim as f64
    }

    /// Bytes that have to move at least once: q, k, v and out; backward, dout in place of out, and the gradients.
    fn compulsory_bytes(&self, dtype: DType) -> f64 {
        let elements = |shape: [usize; 4]| shape.iter().map(|&extent| extent as f64).product::<f64>();
        let inputs: f64 = self.keys().iter().map(|&keys| 2.0 * elements(self.kv_shape(keys))).sum();
        let stored = (2.0 * elements(self.q_shape()) + inputs) * dtype.size() as f64;
        let gradients = if self.pass == Pass::Forward { Vec::new() } else { self.gradients() };
        stored + gradients.iter().map(|&(_, shape)| elements(shape) * DType::F32.size() as f64).sum::<f64>()
    }

    /// Times the case with random inputs.
    pub(super) fn measure(&'static self, machine: Machine, dtype: DType, at_least: Duration) -> Result<Row, Failure> {
        let mut random = Random(StdRng::seed_from_u64(SEED));
        let q = random.array(dtype, &self.q_shape(), -1.0..1.0);
        let owned = self.attention(q, |shape, region| {
            let (dtype, range) = if region { (DType::F32, 0.0..1.0) } else { (dtype, -1.0..1.0) };
            random.array(dtype, shape, range)
        });
        let attention = owned.map(Array::view);

        let (plan, median) = if machine.engine() == Engine::Cuda && self.pass == Pass::Forward {
            super::gpu::median(&owned, dtype, self.q_shape(), at_least)?
        } else if self.pass == Pass::Forward {
            let mut out = Array::zeros(dtype, &self.q_shape());
            median(at_least, || Ok(machine.forward(&attention, writable(&mut out)?)?))?
        } else {
            let dout = random.array(dtype, &self.q_shape(), -1.0..1.0);
            let zeros = |(gradient, shape): (Gradient, [usize; 4])| (gradient, Array::zeros(DType::F32, &shape));
            let mut arrays: Vec<_> = self.gradients().into_iter().map(zeros).collect();
            median(at_least, || backward(&attention, machine, dout.view(), &mut arrays))?
        };
        let seconds = median.as_secs_f64();
        Ok(Row {
            case: self,
            engine: machine.engine(),
            kernel: plan.symbol(),
            direction: plan.direction().name(),
            dtype,
            median_us: seconds * 1e6,
            tflops: self.flops() / seconds / 1e12,
            gbytes_per_s: self.compulsory_bytes(dtype) / seconds / 1e9,
        })
    }
}

fn backward(
    attention: &Attention<TensorRef<'_>>,
    machine: Machine,
    dout: TensorRef<'_>,
    arrays: &mut [(Gradient, Array<'static>)],
) -> Result<Plan, Failure> {
    let mut wanted = Gradients::new();
    for (gradient, array) in arrays {
        wanted = wanted.want(*gradient, writable(array)?);
    }
    Ok(machine.backward(attention, dout, wanted)?)
}

fn writable<'a>(array: &'a mut Array<'static>) -> Result<TensorMut<'a>, Failure> {
    array.view_mut().ok_or_else(|| Failure::bad("results are of a float type"))
}

/// One run that does not count, then runs until there are enough of them and enough time has passed.
fn median(at_least: Duration, mut run: impl FnMut() -> Result<Plan, Failure>) -> Result<(Plan, Duration), Failure> {
    let plan = run()?;
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < REPEATS || start.elapsed() < at_least {
        let start = Instant::now();
        run()?;
        // No clock is finer than this; without it, a time of 0 would divide.
        times.push(start.elapsed().max(Duration::from_nanos(1)));
    }
    times.sort_unstable();
    let middle = times.len() / 2;
    let median = if times.len() % 2 == 1 { times[middle] } else { (times[middle - 1] + times[middle]) / 2 };
    Ok((plan, median))
}

/// Where the inputs come from.
struct Random(StdRng);

impl Random {
    fn array(&mut self, dtype: DType, shape: &[usize], range: std::ops::Range<f32>) -> Array<'static> {
        let numbers = std::iter::repeat_with(|| self.0.random_range(range.clone()));
        Array::rounded(dtype, shape, numbers.take(shape.iter().product()))
    }
}
