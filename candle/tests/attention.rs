//! The operator on candle's tensors: its sum over branches, lse, and what it refuses.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::{Random, assert_close, bits, elements, fault, oracle};
use fused_attention_candle::*;

#[test]
fn branches_are_weighed_and_summed() -> Result<()> {
    for (seed, dtype) in [DType::F32, DType::F16, DType::BF16].into_iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let mut rows = |tokens: usize| random.values(&[2, tokens, 4, 40]).to_dtype(dtype);
        let (q, text, face) = (rows(13)?, [rows(17)?, rows(17)?], [rows(5)?, rows(5)?]);
        let (gate, region) = (random.tensor(&[2, 4]), random.tensor(&[2, 13]));
        let branches = [
            Branch::new(text[0].clone(), text[1].clone()).gate(0.75),
            Branch::new(face[0].clone(), face[1].clone()).gate_tensor(gate.clone()).region(region.clone()),
        ];
        let out = decoupled_cross_attention(&q, &branches)?;
        let scale = 1.0 / 40f32.sqrt();
        let alone = |kv: &[Tensor; 2]| oracle([&q, &kv[0], &kv[1]], scale, None, |_, _, _, _| 0.0);
        let (gate, region) = (elements(&gate), elements(&region));
        let expected: Vec<f64> = (alone(&text).iter().zip(alone(&face)).enumerate())
            .map(|(at, (text, face))| {
                // [batch, seq, heads, head_dim]
                let (row, head) = (at / 160, at / 40 % 4);
                0.75 * text + gate[row / 13 * 4 + head] * region[row] * face
            })
            .collect();
        let mut request = Attention::new(q.clone());
        request.branches = branches.to_vec();
        assert_close(&format!("{dtype:?}"), &out, &eager_attention(&request)?, &expected);

        // A gate of 0 is no branch, to the bit.
        let text_alone = decoupled_cross_attention(&q, &branches[..1])?;
        let zero = [branches[0].clone(), branches[1].clone().gate(0.0)];
        assert_eq!(bits(&decoupled_cross_attention(&q, &zero)?), bits(&text_alone));
    }
    Ok(())
}

#[test]
fn lse_is_the_logarithm_of_each_denominator() -> Result<()> {
    let mut random = Random::new(10);
    let (q, k, v) = (random.tensor(&[2, 7, 4, 12]), random.tensor(&[2, 9, 2, 12]), random.values(&[2, 9, 2, 12]));
    let other = [random.tensor(&[2, 3, 4, 12]), random.values(&[2, 3, 4, 12])];
    // Of the second batch entry no key is left.
    let mask =
        Tensor::cat(&[random.mask(&[1, 1, 7, 9], 0.6), Tensor::zeros((1, 1, 7, 9), DType::U8, &Device::Cpu)?], 0)?;
    let first = Segment::new(k.clone(), v.clone()).bias(mask.clone());
    let request = Attention::new(q.clone())
        .softmax_scale(0.5)
        .branch(Branch::from(first).gate(-0.3))
        .branch(Branch::new(other[0].clone(), other[1].clone()));
    let (out, lse) = attention_with_lse(&request)?;
    assert_eq!(bits(&out), bits(&attention(&request)?));
    assert_eq!(lse.dims(), [2, 2, 4, 7]);
    assert!(elements(&out).iter().all(|x| x.is_finite()));
    let [q, k, other, mask, lse] = [&q, &k, &other[0], &mask, &lse].map(elements);
    let mut empty = 0;
    for (b, h, i) in (0..2).flat_map(|b| (0..4).flat_map(move |h| (0..7).map(move |i| (b, h, i)))) {
        let dot = |k: &[f64], row: usize| -> f64 {
            let query = &q[((b * 7 + i) * 4 + h) * 12..][..12];
            query.iter().zip(&k[row * 12..][..12]).map(|(q, k)| q * k).sum()
        };
        let kept = (0..9).filter(|j| mask[(b * 7 + i) * 9 + j] != 0.0);
        let sums: [f64; 2] = [
            kept.map(|j| (0.5 * dot(&k, (b * 9 + j) * 2 + h / 2)).exp()).sum(),
            (0..3).map(|j| (0.5 * dot(&other, (b * 3 + j) * 4 + h)).exp()).sum(),
        ];
        for (branch, sum) in sums.into_iter().enumerate() {
            let got = lse[((branch * 2 + b) * 4 + h) * 7 + i];
            match sum == 0.0 {
                true => assert_eq!(got, f64::NEG_INFINITY),
                false => assert!((got - sum.ln()).abs() <= 2e-6, "{got} {}", sum.ln()),
            }
            empty += usize::from(sum == 0.0);
        }
    }
    assert!(empty >= 28);
    Ok(())
}

#[test]
fn refusals_tell_everything_at_once() -> Result<()> {
    let mut random = Random::new(20);
    let (q, k) = (random.tensor(&[2, 7, 4, 12]), random.tensor(&[2, 9, 4, 12]));
    let request = |segment: Segment<Tensor>| Attention::new(q.clone()).branch(segment.into());
    let plain = || Segment::new(k.clone(), k.clone());
    let refused = |message: String, words: &[&str]| {
        words.iter().for_each(|words| assert!(message.contains(words), "{message}"));
    };
    let wrong = Segment::new(k.to_dtype(DType::F64)?, k.to_dtype(DType::I64)?);
    refused(fault(attention(&request(wrong))), &["k.0 is F64; convert it to F32", "v.0 is I64; convert it to F32"]);
    let twos = (random.mask(&[2, 1, 7, 9], 0.5) * 2.0)?;
    refused(fault(attention(&request(plain().bias(twos)))), &["bias.0 is a mask in U8 with values other than 0 and 1"]);
    let lens = Tensor::new(&[3u32, 10], &Device::Cpu)?;
    let bias = random.tensor(&[2, 3, 7, 9]);
    let both = request(plain().key_len(lens.clone()));
    refused(fault(attention(&both)), &["key_len.0 is 10 for batch entry 1; the segment has 9 keys"]);
    let both = request(plain().bias(bias));
    refused(fault(attention(&both.softcap(-1.0))), &["bias.0 has heads 3; it must be 1 or 4", "softcap is -1"]);
    refused(fault(attention(&request(plain().key_len(lens.to_dtype(DType::I64)?)))), &["key_len.0 is I64"]);
    let five = Segment::new(k.reshape((2, 9, 4, 12, 1))?, k.clone());
    refused(fault(attention(&request(five))), &["k.0 has 5 dimensions; the operator's tensors have at most 4"]);
    refused(fault(attention(&Attention::new(q.clone()))), &["branches is an empty list"]);
    refused(fault(attention(&request(plain()).accumulate())), &["accumulate is set"]);
    refused(fault(attention(&Attention::new(q.get(0)?).branch(plain().into()))), &["q has 3 dimensions"]);
    refused(fault(eager_attention(&request(plain()).accumulate())), &["accumulate is set"]);
    Ok(())
}
