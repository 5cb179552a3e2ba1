//! The rows of device code for sm_90a alone: what each takes of a multiprocessor. The build asserts the numbers against the
//! kernels' own.

use super::instances::{DeviceCode, Engine, EntryPoint, Instance, MAX_MAPPED_SEGMENTS};
use crate::problem::{DType, Direction};

/// Tiles of a row: keys of a tile, warpgroups that multiply, each with 64 queries, and stages of the ring.
pub struct Tiles {
    pub block_kv: usize,
    pub consumers: usize,
    pub stages: usize,
}

/// Bytes of a tile: blocks of 64 columns of 16-bit elements.
const fn tile_bytes(rows: usize, width: usize) -> usize {
    width.div_ceil(64) * rows * 128
}

/// Logits that are products times a positive scale.
pub const fn forward_streaming(dtypes: &'static [DType], width: usize, tiles: Tiles) -> Instance {
    streaming("forward_streaming_sm90", "PlainConfig", false, dtypes, width, tiles)
}

/// Any logits: capped, biased, or times any scale.
pub const fn forward_biased(dtypes: &'static [DType], width: usize, tiles: Tiles) -> Instance {
    streaming("forward_biased_sm90", "BiasedConfig", true, dtypes, width, tiles)
}

const fn streaming(
    kernel: &'static str,
    config: &'static str,
    biased: bool,
    dtypes: &'static [DType],
    width: usize,
    Tiles { block_kv, consumers, stages }: Tiles,
) -> Instance {
    let block_q = consumers * 64;
    // Stages of keys and values; Q; five mbarriers, four of them for each stage; the sum of the branches in f32.
    let barriers = ((1 + 4 * stages) * 8).next_multiple_of(16);
    let one = stages * 2 * tile_bytes(block_kv, width) + consumers * tile_bytes(64, width) + barriers;
    let several = one + block_q * width * 4;
    let entry = EntryPoint {
        function: "forward_streaming",
        params: "MappedForwardParams",
        config,
        rows: Some(block_kv),
        warpgroups: Some([consumers, stages]),
    };
    let device = DeviceCode {
        compute_capability: (9, 0),
        specific: true,
        threads: (1 + consumers) as u32 * 128,
        resident_blocks: 1,
        shared_bytes: [one as u32, several as u32],
        shared_bytes_per_key_tile: 0,
        shared_bytes_per_gradient_tile: 0,
        biased,
        softcap: biased,
        tensor_maps: true,
        max_segments: MAX_MAPPED_SEGMENTS,
        followers: &[],
        entry,
    };
    Instance {
        kernel,
        engines: &[Engine::Cuda, Engine::Emulated],
        direction: Direction::Forward,
        dtypes,
        head_dim_step: 8,
        max_head_dim: width,
        block_q,
        block_kv,
        deterministic: true,
        leads: true,
        device: Some(device),
    }
}
