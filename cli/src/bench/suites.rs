//! The shapes that real models ask for. Plain data: nothing here is computed.
//!
//! Batch 2 is one image under classifier-free guidance; models that run guidance as separate passes have batch 1.

/// One attention call of a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) suite: &'static str,
    /// Unique in its suite.
    pub(super) name: &'static str,
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
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    /// Gradients of q and of all keys and values.
    BackwardAll,
    /// As IP-Adapter trains: gradients of q and of the image branches; the text branch is frozen.
    BackwardImage,
}

/// The names that `--suite` takes beside `all`, which means these in this order.
pub(super) const SUITES: &[&str] = &["sd15", "sdxl", "flux", "wan", "ip-adapter", "backward"];

/// A suite for tests, not part of `all` nor of the help.
pub(super) const TINY: &str = "tiny";

const fn text(keys: &'static [usize]) -> BranchShape {
    BranchShape { keys, gate: 1.0, region: false }
}

/// An image prompt at a scale that people use.
const fn image(keys: &'static [usize]) -> BranchShape {
    BranchShape { keys, gate: 0.6, region: false }
}

const fn masked(keys: &'static [usize]) -> BranchShape {
    BranchShape { keys, gate: 0.6, region: true }
}

const fn case(
    suite: &'static str,
    name: &'static str,
    [batch, heads, seq_q, head_dim]: [usize; 4],
    branches: &'static [BranchShape],
) -> Case {
    Case { suite, name, batch, heads, seq_q, head_dim, branches, pass: Pass::Forward }
}

const fn backward(
    name: &'static str,
    [batch, heads, seq_q, head_dim]: [usize; 4],
    branches: &'static [BranchShape],
    pass: Pass,
) -> Case {
    Case { suite: "backward", name, batch, heads, seq_q, head_dim, branches, pass }
}

/// Every case. Sizes are [batch, heads, seq_q, head_dim].
pub(super) const CASES: &[Case] = &[
    // Stable Diffusion 1.5 at 512 x 512: the four levels of its UNet.
    case("sd15", "self 64x64", [2, 8, 4096, 40], &[text(&[4096])]),
    case("sd15", "self 32x32", [2, 8, 1024, 80], &[text(&[1024])]),
    case("sd15", "self 16x16", [2, 8, 256, 160], &[text(&[256])]),
    case("sd15", "self 8x8", [2, 8, 64, 160], &[text(&[64])]),
    case("sd15", "text 64x64", [2, 8, 4096, 40], &[text(&[77])]),
    case("sd15", "text 32x32", [2, 8, 1024, 80], &[text(&[77])]),
    case("sd15", "text 16x16", [2, 8, 256, 160], &[text(&[77])]),
    case("sd15", "text 8x8", [2, 8, 64, 160], &[text(&[77])]),
    // SDXL at 1024 x 1024, and at 832 x 1216, whose extents no tile divides.
    case("sdxl", "self 64x64", [2, 10, 4096, 64], &[text(&[4096])]),
    case("sdxl", "self 32x32", [2, 20, 1024, 64], &[text(&[1024])]),
    case("sdxl", "self 52x76", [2, 10, 3952, 64], &[text(&[3952])]),
    case("sdxl", "text 64x64", [2, 10, 4096, 64], &[text(&[77])]),
    case("sdxl", "text 32x32", [2, 20, 1024, 64], &[text(&[77])]),
    case("sdxl", "text 52x76", [2, 10, 3952, 64], &[text(&[77])]),
    // Flux: text and image in one softmax, as two segments.
    case("flux", "joint 512", [1, 24, 1536, 128], &[text(&[512, 1024])]),
    case("flux", "joint 1024", [1, 24, 4608, 128], &[text(&[512, 4096])]),
    // Wan 2.1 14B, 81 frames: 480 x 832 and 720 x 1280; image to video adds a branch of 257 CLIP tokens.
    case("wan", "text 480p", [1, 40, 32760, 128], &[text(&[512])]),
    case("wan", "text+image 480p", [1, 40, 32760, 128], &[text(&[512]), text(&[257])]),
    case("wan", "self 480p", [1, 40, 32760, 128], &[text(&[32760])]),
    case("wan", "text 720p", [1, 40, 75600, 128], &[text(&[512])]),
    case("wan", "text+image 720p", [1, 40, 75600, 128], &[text(&[512]), text(&[257])]),
    case("wan", "self 720p", [1, 40, 75600, 128], &[text(&[75600])]),
    // IP-Adapter: 4 tokens (base), 16 (plus), 257 (full face), two adapters at once, each masked to its region.
    case("ip-adapter", "sd15 4", [2, 8, 4096, 40], &[text(&[77]), image(&[4])]),
    case("ip-adapter", "sd15 16", [2, 8, 4096, 40], &[text(&[77]), image(&[16])]),
    case("ip-adapter", "sd15 257", [2, 8, 4096, 40], &[text(&[77]), image(&[257])]),
    case("ip-adapter", "sd15 16 masked", [2, 8, 4096, 40], &[text(&[77]), masked(&[16])]),
    case("ip-adapter", "sd15 4+16 masked", [2, 8, 4096, 40], &[text(&[77]), masked(&[4]), masked(&[16])]),
    case("ip-adapter", "sdxl 4", [2, 10, 4096, 64], &[text(&[77]), image(&[4])]),
    case("ip-adapter", "sdxl 16", [2, 10, 4096, 64], &[text(&[77]), image(&[16])]),
    case("ip-adapter", "sdxl 16 32x32", [2, 20, 1024, 64], &[text(&[77]), image(&[16])]),
    case("ip-adapter", "sdxl 257", [2, 10, 4096, 64], &[text(&[77]), image(&[257])]),
    case("ip-adapter", "sdxl 4+16 masked", [2, 10, 4096, 64], &[text(&[77]), masked(&[4]), masked(&[16])]),
    case("ip-adapter", "flux 16", [1, 24, 4096, 128], &[image(&[16])]),
    case("ip-adapter", "flux 128", [1, 24, 4608, 128], &[image(&[128])]),
    // Training. The last three are IP-Adapter's: nothing asks for the gradients of the text.
    backward("sd15 self 64x64", [2, 8, 4096, 40], &[text(&[4096])], Pass::BackwardAll),
    backward("sd15 text 64x64", [2, 8, 4096, 40], &[text(&[77])], Pass::BackwardAll),
    backward("sdxl self 32x32", [2, 20, 1024, 64], &[text(&[1024])], Pass::BackwardAll),
    backward("sdxl text 64x64", [2, 10, 4096, 64], &[text(&[77])], Pass::BackwardAll),
    backward("ip sd15 4", [2, 8, 4096, 40], &[text(&[77]), image(&[4])], Pass::BackwardImage),
    backward("ip sdxl 16", [2, 10, 4096, 64], &[text(&[77]), image(&[16])], Pass::BackwardImage),
    backward("ip sdxl 257", [2, 10, 4096, 64], &[text(&[77]), image(&[257])], Pass::BackwardImage),
    // Every kind of shape, in milliseconds.
    case(TINY, "self", [1, 2, 32, 16], &[text(&[32])]),
    case(TINY, "joint", [1, 2, 24, 16], &[text(&[8, 16])]),
    case(TINY, "ip 4+16 masked", [2, 2, 32, 16], &[text(&[7]), masked(&[4]), image(&[16])]),
];
