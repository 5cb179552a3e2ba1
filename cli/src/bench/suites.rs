//! The shapes that real models ask for. Plain data, multiplied by batch sizes: nothing else here is computed.
//!
//! Under classifier-free guidance batch 2 is one image and batch 8 four of them; models that run guidance as separate
//! passes have batch 1.

use std::sync::LazyLock;

/// One attention call of a model.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) suite: &'static str,
    /// Unique in its suite; ends with the batch size.
    pub(super) name: String,
    /// Whether a suite has it unless more is asked for.
    pub(super) usual: bool,
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) seq_q: usize,
    pub(super) head_dim: usize,
    pub(super) branches: &'static [BranchShape],
    pub(super) pass: Pass,
}

/// One softmax: the keys of its segments, and how it enters the sum.
#[derive(Clone, Copy, Debug)]
pub(super) struct BranchShape {
    pub(super) keys: &'static [usize],
    pub(super) gate: f32,
    /// Whether a mask says, query by query, how much of the branch enters.
    pub(super) region: bool,
    pub(super) bias: Option<Bias>,
}

/// What is added to the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    /// bool, `[batch, 1, 1, keys]`: a prompt shorter than its padding.
    Keys,
    /// Type of q, `[batch, 1, queries, keys]`: which part of the picture attends to which words.
    Logits,
}

impl Bias {
    pub(super) fn name(self) -> &'static str {
        match self {
            Bias::Keys => "keys",
            Bias::Logits => "logits",
        }
    }
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    /// Gradients of q and of all keys and values.
    BackwardAll,
    /// As IP-Adapter trains: gradients of q and of the image branches; the text branch is frozen.
    BackwardImage,
    /// Forward and then backward of such a layer, with the gradient of each adapter's gate.
    TrainingStep,
}

impl Pass {
    pub(super) fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::BackwardAll | Pass::BackwardImage => "backward",
            Pass::TrainingStep => "training step",
        }
    }
}

/// The names that `--suite` takes beside `all`, which means these in this order.
pub(super) const SUITES: &[&str] =
    &["sd15", "sdxl", "sd3", "flux", "wan", "ip-adapter", "masked", "backward", "training"];

/// Suites for tests, not part of `all` nor of the help.
pub(super) const TINY: &[&str] = &["tiny", "tiny-backward"];

/// A call at several batch sizes.
struct Shape {
    suite: &'static str,
    name: &'static str,
    batches: &'static [usize],
    /// `[heads, seq_q, head_dim]`.
    sizes: [usize; 3],
    branches: &'static [BranchShape],
    pass: Pass,
}

/// Of the batch sizes of a call the first is the usual one; 0 in its place: none is.
const GUIDED: &[usize] = &[2, 1, 8];
const GUIDED_LARGE: &[usize] = &[0, 1, 2, 8];
const SINGLE: &[usize] = &[1, 2, 8];
const SINGLE_ONLY: &[usize] = &[1];
const SINGLE_LARGE: &[usize] = &[0, 1];
/// What IP-Adapter's own recipe trains with, a GPU.
const TRAINED: &[usize] = &[8, 1, 2];

const fn text(keys: &'static [usize]) -> BranchShape {
    BranchShape { keys, gate: 1.0, region: false, bias: None }
}

/// An image prompt at a scale that people use.
const fn image(keys: &'static [usize]) -> BranchShape {
    BranchShape { keys, gate: 0.6, region: false, bias: None }
}

/// The same where a mask lets it.
const fn regional(keys: &'static [usize]) -> BranchShape {
    BranchShape { keys, gate: 0.6, region: true, bias: None }
}

const fn biased(keys: &'static [usize], bias: Bias) -> BranchShape {
    BranchShape { keys, gate: 1.0, region: false, bias: Some(bias) }
}

const fn call(
    suite: &'static str,
    name: &'static str,
    batches: &'static [usize],
    sizes: [usize; 3],
    branches: &'static [BranchShape],
) -> Shape {
    Shape { suite, name, batches, sizes, branches, pass: Pass::Forward }
}

impl Shape {
    const fn pass(mut self, pass: Pass) -> Shape {
        self.pass = pass;
        self
    }

    fn cases(&self) -> impl Iterator<Item = Case> {
        let [heads, seq_q, head_dim] = self.sizes;
        let numbered = self.batches.iter().enumerate().filter(|&(_, &batch)| batch > 0);
        numbered.map(move |(at, &batch)| Case {
            suite: self.suite,
            name: format!("{} b{batch}", self.name),
            usual: at == 0,
            batch,
            heads,
            seq_q,
            head_dim,
            branches: self.branches,
            pass: self.pass,
        })
    }
}

/// Every case.
pub(super) static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| SHAPES.iter().flat_map(Shape::cases).collect());

/// Sizes are `[heads, seq_q, head_dim]`.
const SHAPES: &[Shape] = &[
    // Stable Diffusion 1.5: the four levels of its UNet, for pictures of 512 x 512 and of 1024 x 1024.
    call("sd15", "512 self 64x64", GUIDED, [8, 4096, 40], &[text(&[4096])]),
    call("sd15", "512 self 32x32", GUIDED, [8, 1024, 80], &[text(&[1024])]),
    call("sd15", "512 self 16x16", GUIDED, [8, 256, 160], &[text(&[256])]),
    call("sd15", "512 self 8x8", GUIDED, [8, 64, 160], &[text(&[64])]),
    call("sd15", "512 text 64x64", GUIDED, [8, 4096, 40], &[text(&[77])]),
    call("sd15", "512 text 32x32", GUIDED, [8, 1024, 80], &[text(&[77])]),
    call("sd15", "512 text 16x16", GUIDED, [8, 256, 160], &[text(&[77])]),
    call("sd15", "512 text 8x8", GUIDED, [8, 64, 160], &[text(&[77])]),
    call("sd15", "1024 self 128x128", GUIDED_LARGE, [8, 16384, 40], &[text(&[16384])]),
    call("sd15", "1024 self 64x64", GUIDED_LARGE, [8, 4096, 80], &[text(&[4096])]),
    call("sd15", "1024 self 32x32", GUIDED_LARGE, [8, 1024, 160], &[text(&[1024])]),
    call("sd15", "1024 self 16x16", GUIDED_LARGE, [8, 256, 160], &[text(&[256])]),
    call("sd15", "1024 text 128x128", GUIDED_LARGE, [8, 16384, 40], &[text(&[77])]),
    call("sd15", "1024 text 64x64", GUIDED_LARGE, [8, 4096, 80], &[text(&[77])]),
    call("sd15", "1024 text 32x32", GUIDED_LARGE, [8, 1024, 160], &[text(&[77])]),
    call("sd15", "1024 text 16x16", GUIDED_LARGE, [8, 256, 160], &[text(&[77])]),
    // SDXL: the two levels with attention; then 832 x 1216, whose extents no tile divides.
    call("sdxl", "1024 self 64x64", GUIDED, [10, 4096, 64], &[text(&[4096])]),
    call("sdxl", "1024 self 32x32", GUIDED, [20, 1024, 64], &[text(&[1024])]),
    call("sdxl", "1024 text 64x64", GUIDED, [10, 4096, 64], &[text(&[77])]),
    call("sdxl", "1024 text 32x32", GUIDED, [20, 1024, 64], &[text(&[77])]),
    call("sdxl", "512 self 32x32", GUIDED_LARGE, [10, 1024, 64], &[text(&[1024])]),
    call("sdxl", "512 self 16x16", GUIDED_LARGE, [20, 256, 64], &[text(&[256])]),
    call("sdxl", "512 text 32x32", GUIDED_LARGE, [10, 1024, 64], &[text(&[77])]),
    call("sdxl", "512 text 16x16", GUIDED_LARGE, [20, 256, 64], &[text(&[77])]),
    call("sdxl", "832x1216 self 52x76", &[2], [10, 3952, 64], &[text(&[3952])]),
    call("sdxl", "832x1216 text 52x76", &[2], [10, 3952, 64], &[text(&[77])]),
    // Stable Diffusion 3 medium: picture and 77 + 256 words in one softmax; its adapter's 64 tokens beside the picture's.
    call("sd3", "512 joint", GUIDED, [24, 1357, 64], &[text(&[1024, 333])]),
    call("sd3", "1024 joint", GUIDED, [24, 4429, 64], &[text(&[4096, 333])]),
    call("sd3", "1024 adapter", GUIDED, [24, 4096, 64], &[image(&[4096, 64])]),
    // Flux: words and picture in one softmax, as two segments.
    call("flux", "512 joint", SINGLE, [24, 1536, 128], &[text(&[512, 1024])]),
    call("flux", "1024 joint", SINGLE, [24, 4608, 128], &[text(&[512, 4096])]),
    // Wan 2.1 14B, 81 frames: 480 x 832 and 720 x 1280; image to video adds a branch of 257 CLIP tokens.
    call("wan", "480p text", SINGLE_ONLY, [40, 32760, 128], &[text(&[512])]),
    call("wan", "480p text+image", SINGLE_ONLY, [40, 32760, 128], &[text(&[512]), text(&[257])]),
    call("wan", "480p self", SINGLE_LARGE, [40, 32760, 128], &[text(&[32760])]),
    call("wan", "720p text", SINGLE_LARGE, [40, 75600, 128], &[text(&[512])]),
    call("wan", "720p text+image", SINGLE_LARGE, [40, 75600, 128], &[text(&[512]), text(&[257])]),
    call("wan", "720p self", SINGLE_LARGE, [40, 75600, 128], &[text(&[75600])]),
    // IP-Adapter: 4 tokens (base), 16 (plus), 257 (full face); one adapter, two, three.
    call("ip-adapter", "sd15 4", GUIDED, [8, 4096, 40], &[text(&[77]), image(&[4])]),
    call("ip-adapter", "sd15 16", GUIDED, [8, 4096, 40], &[text(&[77]), image(&[16])]),
    call("ip-adapter", "sd15 257", GUIDED, [8, 4096, 40], &[text(&[77]), image(&[257])]),
    call("ip-adapter", "sd15 4+16", GUIDED, [8, 4096, 40], &[text(&[77]), image(&[4]), image(&[16])]),
    call("ip-adapter", "sd15 4 32x32", GUIDED, [8, 1024, 80], &[text(&[77]), image(&[4])]),
    call("ip-adapter", "sd15 4 16x16", GUIDED, [8, 256, 160], &[text(&[77]), image(&[4])]),
    call("ip-adapter", "sdxl 4", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[4])]),
    call("ip-adapter", "sdxl 16", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[16])]),
    call("ip-adapter", "sdxl 257", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[257])]),
    call("ip-adapter", "sdxl 4+16", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[4]), image(&[16])]),
    call(
        "ip-adapter",
        "sdxl 4+16+257",
        GUIDED,
        [10, 4096, 64],
        &[text(&[77]), image(&[4]), image(&[16]), image(&[257])],
    ),
    call("ip-adapter", "sdxl 16 32x32", GUIDED, [20, 1024, 64], &[text(&[77]), image(&[16])]),
    call("ip-adapter", "sdxl 257 32x32", GUIDED, [20, 1024, 64], &[text(&[77]), image(&[257])]),
    call("ip-adapter", "flux 16", SINGLE_ONLY, [24, 4096, 128], &[image(&[16])]),
    call("ip-adapter", "flux 128", SINGLE_ONLY, [24, 4608, 128], &[image(&[128])]),
    // Adapters masked to their regions; prompts shorter than their padding; a bias for each logit.
    call("masked", "sd15 16 region", GUIDED, [8, 4096, 40], &[text(&[77]), regional(&[16])]),
    call("masked", "sdxl 16 region", GUIDED, [10, 4096, 64], &[text(&[77]), regional(&[16])]),
    call("masked", "sdxl 4+16 regions", GUIDED, [10, 4096, 64], &[text(&[77]), regional(&[4]), regional(&[16])]),
    call("masked", "sdxl text keys", GUIDED, [10, 4096, 64], &[biased(&[77], Bias::Keys)]),
    call("masked", "sdxl text logits", GUIDED, [10, 4096, 64], &[biased(&[77], Bias::Logits)]),
    call("masked", "sdxl self 32x32 logits", GUIDED, [20, 1024, 64], &[biased(&[1024], Bias::Logits)]),
    call("masked", "wan 480p text keys", SINGLE_LARGE, [40, 32760, 128], &[biased(&[512], Bias::Keys)]),
    // Training. The last three are IP-Adapter's: nothing asks for the gradients of the text.
    call("backward", "sd15 self 64x64", GUIDED, [8, 4096, 40], &[text(&[4096])]).pass(Pass::BackwardAll),
    call("backward", "sd15 text 64x64", GUIDED, [8, 4096, 40], &[text(&[77])]).pass(Pass::BackwardAll),
    call("backward", "sdxl self 32x32", GUIDED, [20, 1024, 64], &[text(&[1024])]).pass(Pass::BackwardAll),
    call("backward", "sdxl text 64x64", GUIDED, [10, 4096, 64], &[text(&[77])]).pass(Pass::BackwardAll),
    call("backward", "sd15 4", TRAINED, [8, 4096, 40], &[text(&[77]), image(&[4])]).pass(Pass::BackwardImage),
    call("backward", "sdxl 16", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[16])]).pass(Pass::BackwardImage),
    call("backward", "sdxl 257", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[257])]).pass(Pass::BackwardImage),
    call("training", "sd15 4", TRAINED, [8, 4096, 40], &[text(&[77]), image(&[4])]).pass(Pass::TrainingStep),
    call("training", "sd15 4 32x32", TRAINED, [8, 1024, 80], &[text(&[77]), image(&[4])]).pass(Pass::TrainingStep),
    call("training", "sd15 16", TRAINED, [8, 4096, 40], &[text(&[77]), image(&[16])]).pass(Pass::TrainingStep),
    call("training", "sdxl 4", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[4])]).pass(Pass::TrainingStep),
    call("training", "sdxl 16", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[16])]).pass(Pass::TrainingStep),
    call("training", "sdxl 257", GUIDED, [10, 4096, 64], &[text(&[77]), image(&[257])]).pass(Pass::TrainingStep),
    // Every kind of shape, in milliseconds.
    call("tiny", "self", &[1], [2, 32, 16], &[text(&[32])]),
    call("tiny", "joint", &[1], [2, 24, 16], &[text(&[8, 16])]),
    call("tiny", "keys, logits", &[2], [2, 24, 16], &[biased(&[9], Bias::Keys), biased(&[16], Bias::Logits)]),
    call("tiny", "ip 4+16 region", &[2, 1], [2, 32, 16], &[text(&[7]), regional(&[4]), image(&[16])]),
    call("tiny-backward", "joint", &[1], [2, 24, 16], &[text(&[8, 16])]).pass(Pass::BackwardAll),
    call("tiny-backward", "ip 4", &[1], [2, 80, 16], &[text(&[7]), image(&[4])]).pass(Pass::BackwardImage),
    call("tiny-backward", "ip 4 step", &[2], [2, 80, 16], &[text(&[7]), regional(&[4])]).pass(Pass::TrainingStep),
];
