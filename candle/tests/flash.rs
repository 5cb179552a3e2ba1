//! The functions of candle-flash-attn against an f64 oracle that follows its kernels' rules.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::{Random, assert_close, fault, floats, oracle};
use fused_attention_candle::*;

/// The rules of candle-flash-attn: windows are aligned to the bottom right, a size beyond the keys is none, and one that is
/// open on the right ends as many keys past its centre as there are keys.
fn window_bias(left: Option<usize>, right: Option<usize>, seq_q: usize, seq_kv: usize, i: usize, j: usize) -> f64 {
    let limit = |size: Option<usize>| size.filter(|&size| size <= seq_kv).map(|size| size as i64);
    let (left, mut right) = (limit(left), limit(right));
    if left.is_some() && right.is_none() {
        right = Some(seq_kv as i64);
    }
    let (centre, j) = ((i + seq_kv) as i64 - seq_q as i64, j as i64);
    let inside = left.is_none_or(|left| j >= centre - left) && right.is_none_or(|right| j <= centre + right);
    if inside { 0.0 } else { f64::NEG_INFINITY }
}

struct Case {
    dtype: DType,
    batch: usize,
    seq_q: usize,
    seq_kv: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: (Option<usize>, Option<usize>),
    alibi: bool,
    softcap: f32,
}

const CASES: [Case; 13] = {
    const fn case(dtype: DType, sizes: [usize; 6]) -> Case {
        let [batch, seq_q, seq_kv, heads, kv_heads, head_dim] = sizes;
        Case {
            dtype,
            batch,
            seq_q,
            seq_kv,
            heads,
            kv_heads,
            head_dim,
            window: (None, None),
            alibi: false,
            softcap: 0.0,
        }
    }
    const CAUSAL: (Option<usize>, Option<usize>) = (None, Some(0));
    [
        case(DType::F32, [2, 37, 53, 3, 3, 40]),
        case(DType::F16, [1, 19, 77, 8, 8, 80]),
        case(DType::BF16, [3, 11, 29, 6, 2, 160]),
        case(DType::F32, [1, 7, 5, 2, 1, 13]),
        Case { window: CAUSAL, ..case(DType::F32, [2, 17, 31, 4, 2, 24]) },
        Case { window: CAUSAL, ..case(DType::F16, [1, 31, 17, 4, 4, 64]) },
        Case { window: (Some(5), Some(3)), ..case(DType::F32, [2, 23, 29, 3, 1, 16]) },
        Case { window: (Some(2), None), ..case(DType::F32, [1, 21, 6, 3, 3, 32]) },
        Case { window: (Some(40), Some(9)), ..case(DType::F32, [1, 29, 8, 2, 2, 48]) },
        Case { alibi: true, ..case(DType::F32, [2, 13, 27, 5, 5, 20]) },
        Case { alibi: true, window: CAUSAL, ..case(DType::F16, [1, 33, 33, 8, 4, 56]) },
        Case { softcap: 1.7, window: (None, Some(4)), ..case(DType::F32, [1, 15, 22, 4, 2, 64]) },
        Case { softcap: 2.5, alibi: true, window: (Some(11), Some(0)), ..case(DType::BF16, [2, 25, 40, 6, 3, 96]) },
    ]
};

impl Case {
    fn name(&self) -> String {
        let Case { dtype, batch, seq_q, seq_kv, heads, kv_heads, head_dim, window, alibi, softcap } = self;
        format!("{dtype:?} {batch}x{seq_q}x{heads}x{head_dim} kv {seq_kv}x{kv_heads} {window:?} {alibi} {softcap}")
    }

    fn inputs(&self, random: &mut Random) -> Result<[Tensor; 3]> {
        let shape = |seq, heads| [self.batch, seq, heads, self.head_dim];
        let (q, k, v) = (
            random.tensor(&shape(self.seq_q, self.heads)),
            random.tensor(&shape(self.seq_kv, self.kv_heads)),
            random.values(&shape(self.seq_kv, self.kv_heads)),
        );
        Ok([q.to_dtype(self.dtype)?, k.to_dtype(self.dtype)?, v.to_dtype(self.dtype)?])
    }

    fn slopes(&self) -> Result<Option<Tensor>> {
        let slope = |h: usize| 2f32.powf(-8.0 * (h + 1) as f32 / self.heads as f32);
        self.alibi.then(|| Tensor::from_iter((0..self.heads).map(slope), &Device::Cpu)).transpose()
    }

    /// Bias of a head, query and key.
    fn bias(&self, slopes: Option<&[f32]>, h: usize, i: usize, j: usize) -> f64 {
        let distance = ((i + self.seq_kv) as f64 - self.seq_q as f64 - j as f64).abs();
        let alibi = slopes.map_or(0.0, |slopes| -f64::from(slopes[h]) * distance);
        window_bias(self.window.0, self.window.1, self.seq_q, self.seq_kv, i, j) + alibi
    }

    /// The same calculation made of candle's operations.
    fn naive(&self, [q, k, v]: &[Tensor; 3], slopes: Option<&[f32]>, scale: f32) -> Result<Tensor> {
        let index = (0..self.heads).flat_map(|h| (0..self.seq_q).map(move |i| (h, i)));
        let bias = index.flat_map(|(h, i)| (0..self.seq_kv).map(move |j| self.bias(slopes, h, i, j) as f32));
        let bias = Tensor::from_iter(bias, &Device::Cpu)?.reshape((1, self.heads, self.seq_q, self.seq_kv))?;
        let segment = Segment::new(k.clone(), v.clone()).bias(bias);
        let mut request = Attention::new(q.clone()).softmax_scale(scale).branch(segment.into());
        request.softcap = (self.softcap != 0.0).then_some(self.softcap);
        eager_attention(&request)
    }
}

#[test]
fn every_function_agrees_with_the_oracle() -> Result<()> {
    for (number, case) in CASES.iter().enumerate() {
        let mut random = Random::new(number as u64);
        let inputs = case.inputs(&mut random)?;
        let [q, k, v] = &inputs;
        let scale = 1.3 / (case.head_dim as f32).sqrt();
        let (left, right) = case.window;
        let slopes = case.slopes()?;
        let numbers = slopes.as_ref().map(floats);
        let out = match (&slopes, case.softcap, case.window) {
            (None, 0.0, (None, None)) => flash_attn(q, k, v, scale, false)?,
            (None, 0.0, (None, Some(0))) => flash_attn(q, k, v, scale, true)?,
            (None, 0.0, _) => flash_attn_windowed(q, k, v, scale, left, right)?,
            (Some(slopes), 0.0, (None, None)) => flash_attn_alibi(q, k, v, slopes, scale, false)?,
            (Some(slopes), 0.0, (None, Some(0))) => flash_attn_alibi(q, k, v, slopes, scale, true)?,
            (slopes, softcap, _) => {
                flash_attn_alibi_windowed_softcap(q, k, v, slopes.as_ref(), scale, left, right, softcap)?
            }
        };
        let softcap = (case.softcap != 0.0).then_some(case.softcap);
        let bias = |_, h, i, j| case.bias(numbers.as_deref(), h, i, j);
        let expected = oracle([q, k, v], scale, softcap, bias);
        let naive = case.naive(&inputs, numbers.as_deref(), scale)?;
        assert_close(&case.name(), &out, &naive, &expected);

        // The custom operation itself, and the function with every option, are the same computation.
        let op = FlashAttn {
            softmax_scale: scale,
            alibi_slopes: slopes.clone(),
            window_size_left: left,
            window_size_right: right,
            softcap,
        };
        assert_eq!(common::bits(&q.apply_op3(k, v, op)?), common::bits(&out), "{}", case.name());
        let full = flash_attn_alibi_windowed_softcap(q, k, v, slopes.as_ref(), scale, left, right, case.softcap)?;
        assert_eq!(common::bits(&full), common::bits(&out), "{}", case.name());
        if let (Some(slopes), 0.0) = (&slopes, case.softcap) {
            let windowed = flash_attn_alibi_windowed(q, k, v, slopes, scale, left, right)?;
            assert_eq!(common::bits(&windowed), common::bits(&out), "{}", case.name());
        }
    }
    Ok(())
}

/// Sequences of several lengths, an empty one and one without keys among them.
const LENGTHS: [(usize, usize); 5] = [(7, 11), (0, 3), (13, 5), (1, 1), (4, 0)];

fn cumulative(lengths: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut sums = vec![0];
    lengths.for_each(|len| sums.push(sums[sums.len() - 1] + len as u32));
    sums
}

#[test]
fn packed_sequences_are_calls_of_their_own() -> Result<()> {
    let mut random = Random::new(100);
    let [cu_q, cu_k] = [cumulative(LENGTHS.iter().map(|l| l.0)), cumulative(LENGTHS.iter().map(|l| l.1))];
    let (total_q, total_k) = (cu_q[5] as usize, cu_k[5] as usize);
    let q = random.tensor(&[total_q, 6, 24]);
    let (k, v) = (random.tensor(&[total_k, 3, 24]), random.values(&[total_k, 3, 24]));
    let [seq_q, seq_k] = [Tensor::new(cu_q.as_slice(), &Device::Cpu)?, Tensor::new(cu_k.as_slice(), &Device::Cpu)?];
    let slopes = Tensor::new(&[0.5f32, 0.25, 0.125, 0.4, 0.2, 0.1], &Device::Cpu)?;
    let scale = 0.3;

    type Call<'a> = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + 'a>;
    let pairs: Vec<(Tensor, Call)> = vec![
        (
            flash_attn_varlen(&q, &k, &v, &seq_q, &seq_k, 13, 11, scale, false)?,
            Box::new(|q, k, v| flash_attn(q, k, v, scale, false)),
        ),
        (
            flash_attn_varlen(&q, &k, &v, &seq_q, &seq_k, 13, 11, scale, true)?,
            Box::new(|q, k, v| flash_attn(q, k, v, scale, true)),
        ),
        (
            flash_attn_varlen_windowed(&q, &k, &v, &seq_q, &seq_k, 20, 30, scale, Some(1), Some(1))?,
            Box::new(|q, k, v| flash_attn_windowed(q, k, v, scale, Some(1), Some(1))),
        ),
        (
            flash_attn_varlen_alibi(&q, &k, &v, &slopes, &seq_q, &seq_k, 13, 11, scale, true)?,
            Box::new(|q, k, v| flash_attn_alibi(q, k, v, &slopes, scale, true)),
        ),
        (
            flash_attn_varlen_alibi_windowed(&q, &k, &v, &slopes, &seq_q, &seq_k, 13, 11, scale, Some(1), Some(0))?,
            Box::new(|q, k, v| flash_attn_alibi_windowed(q, k, v, &slopes, scale, Some(1), Some(0))),
        ),
        (
            flash_attn_varlen_alibi_windowed_softcap(
                &q,
                &k,
                &v,
                Some(&slopes),
                &seq_q,
                &seq_k,
                13,
                11,
                scale,
                None,
                Some(0),
                1.5,
            )?,
            Box::new(|q, k, v| flash_attn_alibi_windowed_softcap(q, k, v, Some(&slopes), scale, None, Some(0), 1.5)),
        ),
    ];
    for (number, (packed, call)) in pairs.iter().enumerate() {
        assert_eq!(packed.dims(), [total_q, 6, 24]);
        for (s, &(len_q, len_k)) in LENGTHS.iter().enumerate() {
            let (start_q, start_k) = (cu_q[s] as usize, cu_k[s] as usize);
            let part = |t: &Tensor, start, len| t.narrow(0, start, len)?.unsqueeze(0);
            let alone = call(&part(&q, start_q, len_q)?, &part(&k, start_k, len_k)?, &part(&v, start_k, len_k)?)?;
            let within = packed.narrow(0, start_q, len_q)?;
            assert_eq!(common::bits(&within), common::bits(&alone), "call {number}, sequence {s}");
        }
    }
    Ok(())
}

#[test]
fn a_paged_cache_is_its_blocks_in_order() -> Result<()> {
    let mut random = Random::new(101);
    let (lens_q, lens_k) = ([5, 2], [9, 4]);
    let (block, heads, width) = (4, 2, 16);
    let q = random.tensor(&[7, heads, width]);
    let (k, v) = (random.tensor(&[6, block, heads, width]), random.values(&[6, block, heads, width]));
    let table = [[4u32, 0, 3], [5, 77, 77]];
    let [seq_q, seq_k] =
        [lens_q, lens_k].map(|lens| Tensor::new(cumulative(lens.into_iter()).as_slice(), &Device::Cpu));
    let (seq_q, seq_k) = (seq_q?, seq_k?);
    let paged = |table: &Tensor| {
        flash_attn_varlen_paged_windowed(
            &q,
            &k,
            &v,
            &seq_q,
            &seq_k,
            table,
            None,
            5,
            9,
            0.25,
            None,
            Some(0),
            block,
            Some(3.0),
        )
    };
    let table_u32 = Tensor::new(&table, &Device::Cpu)?;
    let out = paged(&table_u32)?;
    assert_eq!(common::bits(&paged(&table_u32.to_dtype(DType::I32)?)?), common::bits(&out));

    let gathered = |cache: &Tensor| {
        let sequence = |s: usize| -> Result<Tensor> {
            let blocks = table[s].iter().filter(|&&b| b < 6).map(|&b| cache.get(b as usize));
            Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, 0)?.narrow(0, 0, lens_k[s])
        };
        Tensor::cat(&[sequence(0)?, sequence(1)?], 0)
    };
    let expected = flash_attn_varlen_alibi_windowed_softcap(
        &q,
        &gathered(&k)?,
        &gathered(&v)?,
        None,
        &seq_q,
        &seq_k,
        5,
        9,
        0.25,
        None,
        Some(0),
        3.0,
    )?;
    assert_eq!(common::bits(&out), common::bits(&expected));
    Ok(())
}

#[test]
fn views_are_read_where_they_are() -> Result<()> {
    let mut random = Random::new(102);
    // Packed projections, heads before the sequence, one head count narrowed, a batch that broadcasts.
    let qkv = random.tensor(&[2, 19, 3, 4, 24]);
    let part = |n| qkv.narrow(2, n, 1)?.squeeze(2);
    let [q, k, v] = [part(0)?, part(1)?, part(2)?];
    let out = flash_attn(&q, &k, &v, 0.2, true)?;
    let dense = flash_attn(&q.contiguous()?, &k.contiguous()?, &v.contiguous()?, 0.2, true)?;
    assert_eq!(common::bits(&out), common::bits(&dense));

    let stored = random.tensor(&[2, 4, 19, 24]);
    let k = stored.transpose(1, 2)?;
    let shared = random.values(&[1, 19, 4, 24]).broadcast_as((2, 19, 4, 24))?;
    let out = flash_attn(&q, &k, &shared, 0.2, false)?;
    let dense = flash_attn(&q, &k.contiguous()?, &shared.contiguous()?, 0.2, false)?;
    assert_eq!(common::bits(&out), common::bits(&dense));
    Ok(())
}

#[test]
fn refusals_name_the_argument_and_the_remedy() -> Result<()> {
    let mut random = Random::new(103);
    let (q, k) = (random.tensor(&[1, 4, 6, 8]), random.tensor(&[1, 5, 4, 8]));
    let message = fault(flash_attn(&q, &k, &k, 0.1, false));
    assert!(message.contains("k.0 has 4 heads, which do not divide the 6 heads of q"), "{message}");
    let message = fault(flash_attn(&q.to_dtype(DType::F64)?, &k, &k, 0.1, false));
    assert!(message.contains("q is F64; convert it to F32, F16 or BF16"), "{message}");
    let message = fault(flash_attn(&q, &q.transpose(2, 3)?, &q, 0.1, false));
    assert!(message.contains("k.0 has stride 8 in its last dimension"), "{message}");
    let message = fault(flash_attn(&q, &q, &q, f32::NAN, false));
    assert!(message.contains("softmax_scale is NaN"), "{message}");
    let message = fault(flash_attn_alibi_windowed_softcap(&q, &q, &q, None, 0.1, None, None, -2.0));
    assert!(message.contains("softcap is -2"), "{message}");
    let slopes = Tensor::ones(5, DType::F32, &Device::Cpu)?;
    let message = fault(flash_attn_alibi(&q, &q, &q, &slopes, 0.1, false));
    assert!(message.contains("alibi_slopes has shape [5] and type F32; it must be [6] F32"), "{message}");
    let slopes = candle_core::Var::from_tensor(&Tensor::ones(6, DType::F32, &Device::Cpu)?)?;
    let message = fault(flash_attn_alibi(&q, &q, &q, slopes.as_tensor(), 0.1, false));
    assert!(message.contains("gradients of slopes are not there yet"), "{message}");

    let rows = random.tensor(&[9, 2, 8]);
    let offsets = |numbers: &[u32]| Tensor::new(numbers, &Device::Cpu);
    let packed = |q: &[u32], k: &[u32], max| -> Result<String> {
        Ok(fault(flash_attn_varlen(&rows, &rows, &rows, &offsets(q)?, &offsets(k)?, max, 9, 0.1, false)))
    };
    let message = packed(&[0, 4, 9], &[0, 9], 3)?;
    assert!(message.contains("seqlens_q has 3 elements and seqlens_k 2"), "{message}");
    assert!(message.contains("max_seqlen_q is 3, but sequence 0 has 4"), "{message}");
    let message = packed(&[1, 8], &[0, 12], 9)?;
    assert!(message.contains("seqlens_q starts with 1"), "{message}");
    assert!(message.contains("seqlens_q ends with 8, but q has 9 rows"), "{message}");
    assert!(message.contains("seqlens_k ends with 12, but k and v have 9 rows"), "{message}");
    let message = packed(&[0, 6, 5, 9], &[0, 3, 6, 9], 9)?;
    assert!(message.contains("seqlens_q goes down from 6 to 5"), "{message}");
    let message = fault(flash_attn_varlen(&rows, &rows, &rows, &rows, &rows, 9, 9, 0.1, false));
    assert!(message.contains("seqlens_q has shape"), "{message}");

    let cache = random.tensor(&[3, 4, 2, 8]);
    let table = Tensor::new(&[[0u32, 7]], &Device::Cpu)?;
    let lens = offsets(&[0, 8])?;
    let paged = |ranges: Option<&Tensor>, block| {
        let q = rows.narrow(0, 0, 8)?;
        flash_attn_varlen_paged_windowed(
            &q, &cache, &cache, &lens, &lens, &table, ranges, 8, 8, 0.1, None, None, block, None,
        )
    };
    let message = fault(paged(Some(&table), 4));
    assert!(message.contains("mm_prefix_ranges are not there yet"), "{message}");
    let message = fault(paged(None, 8));
    assert!(message.contains("page_block_size is 8, but the blocks of k have 4 keys"), "{message}");
    let message = fault(paged(None, 4));
    assert!(message.contains("block_table names block 7 for sequence 0; there are 3"), "{message}");
    Ok(())
}
