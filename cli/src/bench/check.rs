//! What an engine computed, held against another before it is timed: the first queries of every head, as many as the
//! other one does in a second or so.

use super::request::stored;
use super::suites::Case;
use crate::array::Array;
use crate::failure::Failure;
use fused_attention::{Attention, Backward, DType, Engine, Gradient, Gradients, TensorMut, TensorRef};

/// Queries that are compared, at most.
const MOST: usize = 64;
/// Operations of the reference engine in a fraction of a second.
const NAIVE_FLOPS: f64 = 2e8;

/// How many queries are compared with what `oracle` says.
pub(super) fn queries(case: &Case, oracle: Engine) -> usize {
    let naive = (NAIVE_FLOPS * case.seq_q as f64 / case.flops().max(1.0)) as usize;
    let most = if oracle == Engine::Reference { naive.clamp(1, MOST) } else { MOST };
    case.seq_q.min(most)
}

/// Compares the first queries of `out`.
pub(super) fn forward(
    case: &Case,
    inputs: &Attention<Array<'_>>,
    out: &Array<'_>,
    oracle: Engine,
) -> Result<(), Failure> {
    let count = queries(case, oracle);
    let [batch, seq_q, heads, dim] = case.q_shape();
    let mut expected = Array::zeros(out.dtype(), &[batch, count, heads, dim]);
    leading(inputs, count).forward(oracle, writable(&mut expected)?)?;
    let got = first_rows(&out.values(), seq_q, heads * dim, count);
    compare("out", out.dtype(), &got, &expected.values(), 1.0, 0.0)
}

/// Compares gradients of which `dout` is 0 but for the first queries: those of keys, values and gates are whole then,
/// and that of q where the queries are.
pub(super) fn gradients(
    case: &Case,
    inputs: &Attention<Array<'_>>,
    dout: &Array<'_>,
    got: &[(Gradient, Array<'_>)],
) -> Result<(), Failure> {
    let count = queries(case, Engine::Reference);
    let [batch, seq_q, heads, dim] = case.q_shape();
    let mut expected: Vec<(Gradient, Array<'static>)> = Vec::new();
    for (gradient, mut shape) in case.gradients() {
        if gradient == Gradient::Q {
            shape = vec![batch, count, heads, dim];
        }
        expected.push((gradient, Array::zeros(DType::F32, &shape)));
    }
    let mut wanted = Gradients::new();
    for (gradient, array) in &mut expected {
        wanted = wanted.want(*gradient, writable(array)?);
    }
    leading(inputs, count).backward(Engine::Reference, Backward::new(dout.leading(1, count)), wanted)?;

    for ((gradient, got), (_, expected)) in got.iter().zip(&expected) {
        let (mut values, mut least) = (got.values(), 0.0);
        if *gradient == Gradient::Q {
            values = first_rows(&values, seq_q, heads * dim, count);
        }
        if let Gradient::Gate(branch) = gradient {
            // A sum of products of dout, of variance 1/3, and averages over the keys, of variance 1/3 a key: it may be
            // small by chance, but its error is that of sums of this size.
            let keys: usize = case.branches[*branch].keys.iter().sum();
            least = ((batch * count * heads * dim) as f64 / (9.0 * keys as f64)).sqrt();
        }
        debug_assert_eq!(got.dtype(), stored(*gradient, inputs.q.dtype()));
        compare(&format!("the gradient {gradient:?}"), inputs.q.dtype(), &values, &expected.values(), 2.0, least)?;
    }
    Ok(())
}

/// The request for the first queries alone.
fn leading<'a>(inputs: &'a Attention<Array<'_>>, count: usize) -> Attention<TensorRef<'a>> {
    let mut attention = inputs.map(Array::view);
    attention.q = inputs.q.leading(1, count);
    for (branch, arrays) in attention.branches.iter_mut().zip(&inputs.branches) {
        branch.region = arrays.region.as_ref().map(|region| region.leading(1, count));
        for (segment, arrays) in branch.segments.iter_mut().zip(&arrays.segments) {
            segment.bias = arrays.bias.as_ref().map(|bias| bias.leading(2, count));
        }
    }
    attention
}

fn first_rows(values: &[f32], seq_q: usize, row: usize, count: usize) -> Vec<f32> {
    values.chunks(seq_q * row).flat_map(|entry| &entry[..count * row]).copied().collect()
}

pub(super) fn writable<'a>(array: &'a mut Array<'static>) -> Result<TensorMut<'a>, Failure> {
    array.view_mut().ok_or_else(|| Failure::bad("results are of a float type"))
}

/// Relative in the Frobenius norm, to `least` where the norm is smaller.
fn compare(what: &str, dtype: DType, got: &[f32], expected: &[f32], passes: f64, least: f64) -> Result<(), Failure> {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(expected).map(|(got, want)| square(got - want)).sum::<f64>().sqrt();
    let norm = expected.iter().map(|&want| square(want)).sum::<f64>().sqrt().max(least);
    // Roundings of both results, of the probabilities for the second product, of the products themselves; in f32 those of
    // long sums. Twice as many backward.
    let rounding: f64 = match dtype {
        DType::BF16 => 4.0 / 256.0,
        DType::F16 => 4.0 / 2048.0,
        _ => 1e-5,
    };
    let most = passes * rounding;
    if got.len() == expected.len() && (error <= most * norm) {
        return Ok(());
    }
    Err(Failure::Refused(vec![format!(
        "{what} is off by {:.1e} of its norm, at most {most:.1e}, over the first queries: not timed",
        error / norm
    )]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_or_no_number_is_noticed() {
        let right = [1.0, -2.0, 0.5];
        let check = |got: &[f32]| compare("out", DType::F16, got, &right, 1.0, 0.0);
        assert!(check(&right).is_ok() && check(&[1.001, -2.0, 0.5]).is_ok());
        for wrong in [&[1.0, -2.0, f32::NAN] as &[f32], &[1.1, -2.0, 0.5], &[1.0, -2.0], &[]] {
            assert!(check(wrong).is_err(), "{wrong:?}");
        }
        // Of what is small by chance, the error of larger sums.
        assert!(compare("dgate", DType::F16, &[0.001], &[0.0], 1.0, 10.0).is_ok());
        assert!(compare("dgate", DType::F16, &[0.1], &[0.0], 1.0, 10.0).is_err());
    }
}
