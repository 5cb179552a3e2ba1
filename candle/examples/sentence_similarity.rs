//! A real model with its real weights: sentence embeddings by all-MiniLM-L6-v2, with the fused operator and with candle's own
//! operations.
//!
//! Six layers of 12 heads of 32, sentences of different lengths padded and masked. Embeddings of both must agree, and the
//! similarities must be those of the model's own implementation. Run:
//!
//!     scripts/get-minilm
//!     cargo run --release -p fused-attention-candle --example sentence_similarity

use candle_core::{D, DType, Device, Error, Result, Tensor};
use fused_attention_candle::{Attention, Segment, attention};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

const QUERIES: [&str; 3] = [
    "A man is eating pasta.",
    "Someone in a gorilla costume is playing a set of drums.",
    "A cheetah chases prey on across a field.",
];
const CORPUS: [&str; 9] = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
];
/// Cosines of each query with each sentence, as PyTorch and transformers 5.24 compute them from the same files.
const EXPECTED: [[f32; 9]; 3] = [
    [0.7035, 0.5272, -0.0898, 0.1889, 0.0336, -0.0594, 0.1047, 0.0819, 0.0980],
    [0.0630, 0.0216, 0.0247, 0.1389, 0.2564, -0.0895, 0.1191, 0.6433, 0.1080],
    [0.1399, 0.0344, 0.0156, 0.0650, -0.0334, -0.0155, 0.1097, 0.1292, 0.8253],
];
/// Half a unit of their last place, and what f32 adds.
const COSINE_BOUND: f32 = 1e-4;
const EMBEDDING_BOUND: f32 = 1e-4;
/// The sentence that each query is nearest to.
const NEAREST: [usize; 3] = [0, 7, 8];

const HEADS: usize = 12;
/// Tokens of a passage in the measurement; the model's own limit.
const PASSAGE: usize = 256;
const RUNS: usize = 5;

fn main() -> Result<()> {
    let folder = model_folder()?;
    let bert = Bert::load(&folder.join("model.safetensors"))?;

    let sentences: Vec<&str> = QUERIES.into_iter().chain(CORPUS).collect();
    let batch = Batch::new(&folder, &sentences)?;
    let mut times = [Duration::ZERO; 2];
    let fused = bert.embed(&batch, fused, &mut times[0])?;
    let eager = bert.embed(&batch, eager, &mut times[1])?;
    let difference = largest(&(&fused - &eager)?)?;
    println!(
        "{} sentences of up to {} tokens; embeddings differ by {difference:.1e}\n",
        sentences.len(),
        batch.tokens()
    );
    assert!(difference <= EMBEDDING_BOUND);

    let cosines = fused.narrow(0, 0, 3)?.matmul(&fused.narrow(0, 3, 9)?.t()?)?.to_vec2::<f32>()?;
    for (query, (cosines, expected)) in cosines.iter().zip(&EXPECTED).enumerate() {
        let mut ranked: Vec<usize> = (0..CORPUS.len()).collect();
        ranked.sort_by(|&a, &b| cosines[b].total_cmp(&cosines[a]));
        println!("{}", QUERIES[query]);
        ranked.iter().take(3).for_each(|&n| println!("    {:.4}  {}", cosines[n], CORPUS[n]));
        assert_eq!(ranked[0], NEAREST[query]);
        assert!(cosines.iter().zip(expected).all(|(got, expected)| (got - expected).abs() <= COSINE_BOUND));
    }
    measure(&bert, &folder)
}

/// Embeds passages of real text, both ways in turn.
fn measure(bert: &Bert, folder: &Path) -> Result<()> {
    let passages: Vec<&str> =
        concat!(include_str!("../../README.md"), include_str!("../../ARCHITECTURE.md")).split("\n## ").collect();
    let batch = Batch::new(folder, &passages)?;
    let mut spent = [Vec::new(), Vec::new()];
    for _ in 0..RUNS {
        for (way, spent) in [fused as Attend, eager].into_iter().zip(&mut spent) {
            let (start, mut in_attention) = (Instant::now(), Duration::ZERO);
            bert.embed(&batch, way, &mut in_attention)?;
            spent.push((start.elapsed(), in_attention));
        }
    }
    println!("\n{} passages of up to {} tokens, median of {RUNS}", passages.len(), batch.tokens());
    println!("{:8}{:>14}{:>14}", "", "all layers", "attention");
    for (name, mut spent) in ["fused", "eager"].into_iter().zip(spent) {
        spent.sort();
        let (whole, in_attention) = spent[RUNS / 2];
        println!("{name:8}{:>11.1} ms{:>11.1} ms", whole.as_secs_f64() * 1e3, in_attention.as_secs_f64() * 1e3);
    }
    Ok(())
}

fn model_folder() -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.models/all-MiniLM-L6-v2");
    match folder.join("model.safetensors").exists() {
        true => Ok(folder),
        false => Err(Error::msg("all-MiniLM-L6-v2 is not in .models/; run scripts/get-minilm first")),
    }
}

/// Token numbers `[sentences, tokens]`, padded, and which of them are there.
struct Batch {
    ids: Tensor,
    mask: Tensor,
}

impl Batch {
    fn new(folder: &Path, sentences: &[&str]) -> Result<Self> {
        let text = |error: tokenizers::Error| Error::msg(error);
        let mut tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).map_err(text)?;
        tokenizer.with_padding(Some(PaddingParams::default()));
        let truncation = TruncationParams { max_length: PASSAGE, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(text)?;
        let encoded = tokenizer.encode_batch(sentences.to_vec(), true).map_err(text)?;
        let ids: Vec<&[u32]> = encoded.iter().map(|sentence| sentence.get_ids()).collect();
        let mask: Vec<&[u32]> = encoded.iter().map(|sentence| sentence.get_attention_mask()).collect();
        Ok(Batch { ids: Tensor::new(ids, &Device::Cpu)?, mask: Tensor::new(mask, &Device::Cpu)? })
    }

    fn tokens(&self) -> usize {
        self.ids.dims()[1]
    }
}

/// Attention of q over k and v, `[batch, seq, heads, head_dim]`; the mask `[batch, seq]` has 1 where there is a token.
type Attend = fn(&Tensor, &Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn fused(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = mask.to_dtype(DType::U8)?.unsqueeze(1)?.unsqueeze(1)?;
    attention(&Attention::new(q.clone()).branch(Segment::new(k.clone(), v.clone()).bias(mask).into()))
}

fn eager(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let [q, k, v] = [q, k, v].map(|rows| rows.transpose(1, 2)?.contiguous());
    let q = q?;
    let logits = (q.matmul(&k?.t()?)? * (1.0 / (q.dim(3)? as f64).sqrt()))?;
    // 0 for a token, a number that no logit reaches for padding.
    let bias = ((mask.to_dtype(DType::F32)?.unsqueeze(1)?.unsqueeze(1)? - 1.0)? * 1e9)?;
    let logits = logits.broadcast_add(&bias)?;
    let exponentials = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
    let p = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
    p.matmul(&v?)?.transpose(1, 2)
}

/// The encoder, by the names of its file.
struct Bert {
    tensors: HashMap<String, Tensor>,
    layers: usize,
}

impl Bert {
    fn load(file: &Path) -> Result<Self> {
        let tensors = candle_core::safetensors::load(file, &Device::Cpu)?;
        let has = |layer: &usize| tensors.contains_key(&format!("encoder.layer.{layer}.output.dense.weight"));
        Ok(Bert { layers: (0..).take_while(has).count(), tensors })
    }

    /// Mean over the tokens of the last layer, of length 1: `[sentences, 384]`. Adds the time spent in attention.
    fn embed(&self, batch: &Batch, attend: Attend, in_attention: &mut Duration) -> Result<Tensor> {
        let positions = Tensor::arange(0, batch.tokens() as u32, &Device::Cpu)?;
        let look_up = |name: &str, ids: &Tensor| {
            let rows =
                self.tensor(&format!("embeddings.{name}_embeddings.weight"))?.index_select(&ids.flatten_all()?, 0)?;
            rows.reshape([ids.dims(), &[rows.dim(1)?]].concat())
        };
        let words = look_up("word", &batch.ids)?;
        let kinds = look_up("token_type", &batch.ids.zeros_like()?)?;
        let embedded = (words + kinds)?.broadcast_add(&look_up("position", &positions)?)?;
        let mut hidden = self.norm("embeddings.LayerNorm", &embedded)?;
        for layer in 0..self.layers {
            hidden = self.layer(&format!("encoder.layer.{layer}"), &hidden, batch, attend, in_attention)?;
        }
        let mask = batch.mask.to_dtype(DType::F32)?.unsqueeze(2)?;
        let mean = hidden.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?;
        mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)
    }

    fn layer(&self, name: &str, x: &Tensor, batch: &Batch, attend: Attend, spent: &mut Duration) -> Result<Tensor> {
        let (count, tokens, width) = x.dims3()?;
        let by_head = |part: &str| {
            let rows = self.linear(&format!("{name}.attention.self.{part}"), x)?;
            rows.reshape((count, tokens, HEADS, width / HEADS))
        };
        let (q, k, v) = (by_head("query")?, by_head("key")?, by_head("value")?);
        let start = Instant::now();
        let attended = attend(&q, &k, &v, &batch.mask)?;
        *spent += start.elapsed();
        let attended = self.linear(&format!("{name}.attention.output.dense"), &attended.flatten_from(2)?)?;
        let x = self.norm(&format!("{name}.attention.output.LayerNorm"), &(x + attended)?)?;
        let inner = self.linear(&format!("{name}.intermediate.dense"), &x)?.gelu_erf()?;
        self.norm(&format!("{name}.output.LayerNorm"), &(&x + self.linear(&format!("{name}.output.dense"), &inner)?)?)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::msg(format!("the file has no {name}")))
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = self.tensor(&format!("{name}.weight"))?;
        x.flatten_to(1)?.matmul(&weight.t()?)?.broadcast_add(self.tensor(&format!("{name}.bias"))?)?.reshape((
            x.dim(0)?,
            x.dim(1)?,
            weight.dim(0)?,
        ))
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
        let normal = centred.broadcast_div(&deviation)?;
        normal
            .broadcast_mul(self.tensor(&format!("{name}.weight"))?)?
            .broadcast_add(self.tensor(&format!("{name}.bias"))?)
    }
}

/// The largest magnitude; NaN if there is one.
fn largest(x: &Tensor) -> Result<f32> {
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::abs).fold(0.0, |max, x| if x <= max { max } else { x }))
}
