//! The rows of device code for sm_80 and newer: one function per file of kernels/, which states what a row of that kernel takes
//! of a multiprocessor. The build asserts the numbers against the kernel's own.

use super::instances::{DeviceCode, Engine, EntryPoint, Instance, MAX_SEGMENTS};
use crate::problem::{DType, Direction};

/// Kernels that follow others.
pub const BACKWARD_KEYS: &str = "backward_keys_sm80";
pub const BACKWARD_BIAS: &str = "backward_bias_sm80";
pub const BACKWARD_REDUCE: &str = "backward_reduce_sm80";

pub const F16: &[DType] = &[DType::F16];
pub const BF16: &[DType] = &[DType::BF16];

/// Rows of a block, queries or keys: four warps of 16.
const BLOCK: usize = 64;

/// A tile of 16-bit elements.
const fn tile_bytes(rows: usize, width: usize) -> usize {
    rows * width * 2
}

/// Tiles of `width` elements and `block_kv` keys.
pub const fn forward_streaming(dtypes: &'static [DType], width: usize, block_kv: usize) -> Instance {
    // Two stages of keys and values; Q beside them; the sum of the branches in f32, in the place of Q up to a width of 160,
    // behind it above.
    let (stages, q, sum) = (2 * 2 * tile_bytes(block_kv, width), tile_bytes(BLOCK, width), BLOCK * width * 4);
    let several = if width <= 160 { stages + sum } else { stages + q + sum };
    let entry = tiled("forward_streaming", "ForwardParams", "StreamingConfig", block_kv);
    let device = DeviceCode {
        // Narrow tiles leave registers for a third block; without the bound ptxas takes a few more, or spills to reach it.
        resident_blocks: if width <= 64 { 3 } else { 2 },
        shared_bytes: [(stages + q) as u32, several as u32],
        ..code(entry, 0)
    };
    Instance { kernel: "forward_streaming_sm80", block_kv, device: Some(device), ..forward(dtypes, width) }
}

/// Tiles of `width` elements, branches of at most `row_keys` keys.
pub const fn forward_short(dtypes: &'static [DType], width: usize, row_keys: usize) -> Instance {
    // A ring of two stages of queries; keys and values, 16 rows each.
    let (ring, key_tile) = (2 * tile_bytes(BLOCK, width), 2 * tile_bytes(16, width));
    let entry = tiled("forward_short", "ForwardParams", "ShortConfig", row_keys);
    let device = DeviceCode {
        resident_blocks: if width <= 64 { 3 } else { 2 },
        shared_bytes_per_key_tile: key_tile as u32,
        ..code(entry, ring)
    };
    Instance { kernel: "forward_short_sm80", block_kv: row_keys, device: Some(device), ..forward(dtypes, width) }
}

/// Tiles of `width` elements, branches of at most `row_keys` keys.
pub const fn backward_short(dtypes: &'static [DType], width: usize, row_keys: usize) -> Instance {
    // A power of two per branch; one or two stages of queries and dout; keys and values; and for keys with gradients, P and dS
    // of 64 queries, and two sums in f32 of tiles of 16 by 16.
    let stages = if width <= 64 { 2 } else { 1 };
    let gradient_tile = 2 * (tile_bytes(BLOCK, 16) + width.div_ceil(16) * 16 * 16 * 4);
    let entry = tiled("backward_short", "BackwardParams", "BackwardShortConfig", row_keys);
    let device = DeviceCode {
        shared_bytes_per_key_tile: 2 * tile_bytes(16, width) as u32,
        shared_bytes_per_gradient_tile: gradient_tile as u32,
        softcap: false,
        followers: &[BACKWARD_BIAS, BACKWARD_REDUCE],
        ..code(entry, 32 * 4 + stages * 2 * tile_bytes(BLOCK, width))
    };
    Instance { kernel: "backward_short_sm80", block_kv: row_keys, device: Some(device), ..backward(dtypes, width) }
}

/// Tiles of `width` elements and `block_kv` keys.
pub const fn backward_queries(dtypes: &'static [DType], width: usize, block_kv: usize) -> Instance {
    // Q and dout; two stages of keys and values.
    let bytes = 2 * tile_bytes(BLOCK, width) + 2 * 2 * tile_bytes(block_kv, width);
    let entry = tiled("backward_queries", "BackwardParams", "BackwardQueriesConfig", block_kv);
    let device = DeviceCode { followers: &[BACKWARD_KEYS, BACKWARD_BIAS, BACKWARD_REDUCE], ..code(entry, bytes) };
    Instance { kernel: "backward_queries_sm80", block_kv, device: Some(device), ..backward(dtypes, width) }
}

/// Tiles of `width` elements and `block_q` queries.
pub const fn backward_keys(dtypes: &'static [DType], width: usize, block_q: usize) -> Instance {
    // Keys and values; two stages of Q and dout with four numbers of each query.
    let bytes = 2 * tile_bytes(BLOCK, width) + 2 * (2 * tile_bytes(block_q, width) + 4 * block_q * 4);
    let entry = tiled("backward_keys", "BackwardParams", "BackwardKeysConfig", block_q);
    let device = Some(code(entry, bytes));
    let rows = Instance { block_q, block_kv: BLOCK, leads: false, ..backward(dtypes, width) };
    Instance { kernel: BACKWARD_KEYS, device, ..rows }
}

/// Tiles of `width` elements and `block_kv` keys.
pub const fn backward_bias(dtypes: &'static [DType], width: usize, block_kv: usize) -> Instance {
    // Q and dout; keys and values.
    let bytes = 2 * tile_bytes(BLOCK, width) + 2 * tile_bytes(block_kv, width);
    let entry = tiled("backward_bias", "BackwardParams", "BackwardBiasConfig", block_kv);
    let device = Some(code(entry, bytes));
    Instance { kernel: BACKWARD_BIAS, block_kv, leads: false, device, ..backward(dtypes, width) }
}

/// Sums of whatever width. Elements are of the type of gradients that are not f32.
pub const fn backward_reduce(dtypes: &'static [DType]) -> Instance {
    let entry = EntryPoint {
        function: "backward_reduce",
        params: "ReduceParams",
        config: "BackwardReduceConfig",
        rows: None,
        warpgroups: None,
    };
    let device = Some(DeviceCode { resident_blocks: 4, ..code(entry, THREADS as usize * 4) });
    Instance { kernel: BACKWARD_REDUCE, leads: false, device, ..backward(dtypes, 256) }
}

const THREADS: u32 = 128;

const fn tiled(function: &'static str, params: &'static str, config: &'static str, rows: usize) -> EntryPoint {
    EntryPoint { function, params, config, rows: Some(rows), warpgroups: None }
}

/// What most kernels have in common: shared memory that depends on nothing, two blocks on a multiprocessor.
const fn code(entry: EntryPoint, shared_bytes: usize) -> DeviceCode {
    DeviceCode {
        compute_capability: (8, 0),
        specific: false,
        threads: THREADS,
        resident_blocks: 2,
        shared_bytes: [shared_bytes as u32; 2],
        shared_bytes_per_key_tile: 0,
        least_key_tiles: 0,
        shared_bytes_per_gradient_tile: 0,
        biased: true,
        softcap: true,
        tensor_maps: false,
        stores_by_map: false,
        positions: true,
        max_segments: MAX_SEGMENTS,
        followers: &[],
        finer: None,
        entry,
    }
}

const fn forward(dtypes: &'static [DType], width: usize) -> Instance {
    rows(Direction::Forward, dtypes, width)
}

const fn backward(dtypes: &'static [DType], width: usize) -> Instance {
    rows(Direction::Backward, dtypes, width)
}

const fn rows(direction: Direction, dtypes: &'static [DType], width: usize) -> Instance {
    Instance {
        kernel: "",
        engines: &[Engine::Cuda, Engine::Emulated],
        direction,
        dtypes,
        head_dim_step: 8,
        max_head_dim: width,
        block_q: BLOCK,
        block_kv: 0,
        deterministic: true,
        leads: true,
        device: None,
    }
}
