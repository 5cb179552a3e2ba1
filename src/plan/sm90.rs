//! The rows of device code for sm_90a alone: what each takes of a multiprocessor. The build asserts the numbers against the
//! kernels' own.

use super::instances::{DeviceCode, Engine, EntryPoint, Instance, MAX_BRANCHES, MAX_MAPPED_SEGMENTS};
use crate::problem::{DType, Direction};

/// Tiles of a row: keys of a tile or of a branch, warpgroups that multiply, each with 64 queries, and stages of the ring.
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
    streaming("forward_streaming_sm90", "PlainConfig", false, Some(FINE), dtypes, width, tiles)
}

/// The same in blocks of two warpgroups' queries.
pub const fn forward_fine(dtypes: &'static [DType], width: usize, tiles: Tiles) -> Instance {
    streaming(FINE, "FineConfig", false, None, dtypes, width, tiles)
}

const FINE: &str = "forward_fine_sm90";

/// Any logits: capped, biased, or times any scale.
pub const fn forward_biased(dtypes: &'static [DType], width: usize, tiles: Tiles) -> Instance {
    streaming("forward_biased_sm90", "BiasedConfig", true, None, dtypes, width, tiles)
}

const fn streaming(
    kernel: &'static str,
    config: &'static str,
    biased: bool,
    finer: Option<&'static str>,
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
    let device =
        DeviceCode { shared_bytes: [one as u32, several as u32], biased, softcap: biased, finer, ..code(entry) };
    Instance { kernel, block_q, block_kv, device: Some(device), ..forward(dtypes, width) }
}

/// Tiles of `width` elements, branches of at most `block_kv` keys, which stay; the ring is of queries.
pub const fn forward_short(dtypes: &'static [DType], width: usize, tiles: Tiles) -> Instance {
    short("forward_short_sm90", "ShortConfig", dtypes, width, tiles)
}

/// The same for longer branches.
pub const fn forward_medium(dtypes: &'static [DType], width: usize, tiles: Tiles) -> Instance {
    short("forward_medium_sm90", "MediumConfig", dtypes, width, tiles)
}

const fn short(
    kernel: &'static str,
    config: &'static str,
    dtypes: &'static [DType],
    width: usize,
    Tiles { block_kv, consumers, stages }: Tiles,
) -> Instance {
    // The ring; mbarriers, two of them for each stage; keys of each tile and gate of each branch.
    let barriers = ((2 + 2 * stages) * 8).next_multiple_of(16);
    let bytes = (stages * tile_bytes(64, width) + barriers + 64 * 4 + MAX_BRANCHES * 4) as u32;
    let entry = EntryPoint {
        function: "forward_short",
        params: "MappedForwardParams",
        config,
        rows: Some(block_kv),
        warpgroups: Some([consumers, stages]),
    };
    let device = DeviceCode {
        shared_bytes: [bytes; 2],
        shared_bytes_per_key_tile: 2 * tile_bytes(16, width) as u32,
        least_key_tiles: block_kv / 16,
        stores_by_map: true,
        positions: false,
        ..code(entry)
    };
    Instance { kernel, block_q: 64, block_kv, device: Some(device), ..forward(dtypes, width) }
}

/// What all have in common: a warpgroup that copies beside those that multiply, one block on a multiprocessor.
const fn code(entry: EntryPoint) -> DeviceCode {
    let [consumers, _] = match entry.warpgroups {
        Some(warpgroups) => warpgroups,
        None => [0; 2],
    };
    DeviceCode {
        compute_capability: (9, 0),
        specific: true,
        threads: (1 + consumers) as u32 * 128,
        resident_blocks: 1,
        shared_bytes: [0; 2],
        shared_bytes_per_key_tile: 0,
        least_key_tiles: 0,
        shared_bytes_per_gradient_tile: 0,
        biased: false,
        softcap: false,
        tensor_maps: true,
        stores_by_map: false,
        positions: true,
        max_segments: MAX_MAPPED_SEGMENTS,
        followers: &[],
        finer: None,
        entry,
    }
}

const fn forward(dtypes: &'static [DType], width: usize) -> Instance {
    Instance {
        kernel: "",
        engines: &[Engine::Cuda, Engine::Emulated],
        direction: Direction::Forward,
        dtypes,
        head_dim_step: 8,
        max_head_dim: width,
        block_q: 0,
        block_kv: 0,
        deterministic: true,
        leads: true,
        device: None,
    }
}
