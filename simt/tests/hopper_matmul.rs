//! A warp-specialised product, bulk copies and wgmma, exact on small whole numbers, under any schedule.

mod support;

use bytemuck::{Pod, Zeroable};
use simt::{Fault, FaultKind, Kernel, Launch, Report, Swizzle, SyncSite, TensorMap};
use support::{Numbers, assert_fault, bf16_bits, f16_bits, kernels, line_of};

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    a: TensorMap,
    b: TensorMap,
    c: u64,
    sizes: [u32; 3],
    unused: [u32; 11],
}

kernels! { Params:
    product_ss_f16 product_ss_bf16 product_rs_f16 product_rs_bf16 product_early_release product_overwritten
}

const FILE: &str = "hopper_matmul.cpp";
const TILE: usize = 64;
// No dimension a multiple of the tile; five tiles of k go through a ring of two.
const M: usize = 70;
const N: usize = 72;
const K: usize = 264;

struct Product {
    kernel: Kernel<Params>,
    bits: fn(f32) -> u16,
    transposed: bool,
}

const SS: Product = Product { kernel: product_ss_f16, bits: f16_bits, transposed: true };
const RS: Product = Product { kernel: product_rs_f16, bits: f16_bits, transposed: false };

fn map(address: u64, rows: usize, columns: usize) -> TensorMap {
    let row = columns as u64 * 2;
    let whole = row * rows as u64;
    let dimensions = [columns as u64, rows as u64, 1, 1];
    TensorMap::encode(address, dimensions, [row, whole, whole], [TILE as u32, TILE as u32, 1, 1], Swizzle::Bytes128)
        .expect("a legal tensor map")
}

impl Product {
    /// The result's distance from the exact one, and the report.
    fn run(&self, seed: u64, dropped: &[SyncSite]) -> Result<Report, Fault> {
        let mut numbers = Numbers(0x9e37_79b9);
        let a: Vec<f32> = (0..M * K).map(|_| numbers.small(8)).collect();
        let b: Vec<f32> = (0..K * N).map(|_| numbers.small(8)).collect();
        let stored = |i: usize| if self.transposed { b[i % K * N + i / K] } else { b[i] };
        let a_bits: Vec<u16> = a.iter().map(|&x| (self.bits)(x)).collect();
        let b_bits: Vec<u16> = (0..K * N).map(|i| (self.bits)(stored(i))).collect();
        let mut c = vec![f32::NAN; M * N];
        let mut launch = Launch::new(self.kernel, [N.div_ceil(TILE) as u32, M.div_ceil(TILE) as u32, 1], 256)
            .shared_bytes(4 * 8192 + 32)
            .registers(128)
            .seed(seed);
        for site in dropped {
            launch = launch.drop_site(site);
        }
        let (rows, columns) = if self.transposed { (N, K) } else { (K, N) };
        let params = Params {
            a: map(launch.input("a", &a_bits), M, K),
            b: map(launch.input("b", &b_bits), rows, columns),
            c: launch.output("c", &mut c),
            sizes: [M, N, K].map(|size| size as u32),
            unused: [0; 11],
        };
        let report = launch.run(&params)?;
        drop(launch);
        for (i, &found) in c.iter().enumerate() {
            let (row, column) = (i / N, i % N);
            let exact: f32 = (0..K).map(|k| a[row * K + k] * b[k * N + column]).sum();
            assert_eq!(found, exact, "row {row} column {column} under seed {seed}");
        }
        Ok(report)
    }
}

#[track_caller]
fn well(run: Result<Report, Fault>) -> Report {
    run.unwrap_or_else(|fault| panic!("{fault}"))
}

#[test]
fn exact_with_both_operands_shared() {
    let report = well(SS.run(1, &[]));
    well(Product { kernel: product_ss_bf16, bits: bf16_bits, ..SS }.run(1, &[]));
    // 4 blocks, 5 tiles of k: 4 products by 4 warps, and two whole boxes.
    assert_eq!(report.stats.wgmma, 4 * 5 * 4 * 4);
    assert_eq!(report.stats.bulk_bytes, 4 * 5 * 2 * 8192);
    // What lies outside of the tensor is not read: A once per column of blocks.
    assert_eq!(report.buffer("a").read_async, (2 * M * K * 2) as u64);
}

#[test]
fn exact_with_a_in_registers() {
    well(RS.run(1, &[]));
    well(Product { kernel: product_rs_bf16, bits: bf16_bits, ..RS }.run(1, &[]));
}

#[test]
fn fifty_seeds_agree() {
    for seed in 0..50 {
        well(SS.run(seed, &[]));
        well(RS.run(seed, &[]));
    }
}

/// The refill meets the operand while it is in flight, or the read that nothing orders before it.
#[test]
fn a_stage_released_before_the_wait() {
    for seed in 0..10 {
        let fault = Product { kernel: product_early_release, ..SS }.run(seed, &[]).expect_err("a fault");
        assert!(matches!(fault.kind, FaultKind::Wgmma | FaultKind::Race), "{fault}");
        assert!(fault.message.contains(&line_of(FILE, "[ss]")), "{fault}");
        let refill = ["[refill of a]", "[refill of b]"].iter().any(|mark| fault.message.contains(&line_of(FILE, mark)));
        assert!(refill, "{fault}");
    }
}

#[test]
fn a_registers_overwritten_in_flight() {
    let fault = Product { kernel: product_overwritten, ..RS }.run(1, &[]).expect_err("a fault");
    assert_fault(&fault, FaultKind::Wgmma, FILE, &["[overwritten]", "[rs]"]);
}

#[test]
fn every_synchronisation_is_load_bearing() {
    for product in [SS, RS] {
        let sites = well(product.run(1, &[])).sync_sites;
        let mut found: Vec<_> = sites.iter().map(|site| site.what.as_str()).collect();
        found.sort_unstable();
        let wait = "mbarrier.try_wait";
        let (arrive, expect, fence) = ("mbarrier.arrive", "mbarrier.arrive.expect_tx", "fence.mbarrier_init");
        let wgmma = ["wgmma.commit_group", "wgmma.fence", "wgmma.wait_group"];
        assert_eq!(found, [&["bar.sync 0", fence, arrive, expect, wait, wait], &wgmma[..]].concat(), "{sites:?}");
        for site in &sites {
            let noticed = (0..10).any(|seed| product.run(seed, std::slice::from_ref(site)).is_err());
            assert!(noticed, "nobody notices that {} ({}) is gone", site.what, site.location);
        }
    }
}
