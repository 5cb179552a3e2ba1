//! A whole kernel: a tiled product through cp.async, ldmatrix and mma, exact on small whole numbers, under any
//! schedule.

mod support;

use std::time::Instant;

use bytemuck::{Pod, Zeroable};
use simt::{Checks, Fault, FaultKind, Kernel, Launch, Report, SyncSite};
use support::{Numbers, assert_fault, bf16_bits, f16_bits, kernels};

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    a: u64,
    b: u64,
    c: u64,
    m: u32,
    n: u32,
    k: u32,
    unused: u32,
}

kernels! { Params:
    matmul_f16 matmul_bf16 matmul_unswizzled matmul_no_wait matmul_no_commit matmul_no_barrier_after_wait
    matmul_no_barrier_before_refill
}

const FILE: &str = "matmul.cpp";
const TILE: usize = 64;

/// A product of whole numbers from -8 to 8, with its exact result.
struct Product {
    m: usize,
    n: usize,
    k: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Product {
    fn new(m: usize, n: usize, k: usize) -> Self {
        let mut numbers = Numbers(0x9e37_79b9);
        let a: Vec<f32> = (0..m * k).map(|_| numbers.small(8)).collect();
        let b: Vec<f32> = (0..k * n).map(|_| numbers.small(8)).collect();
        let mut c = vec![0.0; m * n];
        for (row_a, row_c) in a.chunks(k).zip(c.chunks_mut(n)) {
            for (&x, row_b) in row_a.iter().zip(b.chunks(n)) {
                for (sum, &y) in row_c.iter_mut().zip(row_b) {
                    *sum += x * y;
                }
            }
        }
        Self { m, n, k, a, b, c }
    }

    /// No dimension a multiple of the tile, five blocks and more.
    fn ragged() -> Self {
        Self::new(100, 136, 168)
    }

    fn run(&self, kernel: Kernel<Params>, setup: Setup) -> Result<(Vec<f32>, Report), Fault> {
        let bits = |values: &[f32]| values.iter().map(|&x| (setup.bits)(x)).collect::<Vec<u16>>();
        let (a, b) = (bits(&self.a), bits(&self.b));
        let mut c = vec![f32::NAN; self.m * self.n];
        let grid = [self.n.div_ceil(TILE) as u32, self.m.div_ceil(TILE) as u32, 1];
        let mut launch = Launch::new(kernel, grid, 128)
            .shared_bytes(4 * (TILE * TILE * 2) as u32)
            .seed(setup.seed)
            .workers(setup.workers)
            .checks(setup.checks);
        for site in setup.dropped {
            launch = launch.drop_site(site);
        }
        let params = Params {
            a: launch.input("a", &a),
            b: launch.input("b", &b),
            c: launch.output("c", &mut c),
            m: self.m as u32,
            n: self.n as u32,
            k: self.k as u32,
            unused: 0,
        };
        let report = launch.run(&params)?;
        drop(launch);
        Ok((c, report))
    }
}

#[derive(Clone, Copy)]
struct Setup<'a> {
    bits: fn(f32) -> u16,
    seed: u64,
    workers: u32,
    checks: Checks,
    dropped: &'a [SyncSite],
}

const F16: Setup = Setup { bits: f16_bits, seed: 1, workers: 1, checks: Checks::Full, dropped: &[] };

#[test]
fn exact_in_f16_and_bf16() {
    let product = Product::ragged();
    let (c, report) = product.run(matmul_f16, F16).unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(c, product.c);
    let (c, _) = product.run(matmul_bf16, Setup { bits: bf16_bits, ..F16 }).unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(c, product.c);

    // 6 blocks, 3 tiles of k; per tile and warp 4 steps of 8 products and 5 ldmatrix of 4 matrices.
    assert_eq!(report.stats.mma, 6 * 3 * 4 * 4 * 8);
    assert_eq!(report.stats.ldmatrix_phases, 6 * 3 * 4 * 4 * 5 * 4);
    assert_eq!(report.stats.barriers, 6 * 3 * 2);
}

#[test]
fn every_byte_is_counted() {
    let product = Product::ragged();
    let (_, report) = product.run(matmul_f16, F16).unwrap_or_else(|fault| panic!("{fault}"));
    let bytes = |buffer| {
        let b = report.buffer(buffer);
        [b.read, b.read_async, b.written, b.atomic]
    };
    let [m, n, k] = [product.m, product.n, product.k].map(|d| d as u64);
    assert_eq!(bytes("a"), [0, 3 * m * k * 2, 0, 0]); // once per column of blocks
    assert_eq!(bytes("b"), [0, 2 * k * n * 2, 0, 0]); // once per row of blocks
    assert_eq!(bytes("c"), [0, 0, m * n * 4, 0]); // written once
}

#[test]
fn hundred_seeds_agree() {
    let product = Product::new(70, 72, 136);
    let mut switches = Vec::new();
    for seed in 0..100 {
        let run = product.run(matmul_f16, Setup { seed, ..F16 });
        let (c, report) = run.unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        assert_eq!(c, product.c, "seed {seed}");
        switches.push(report.stats.switches);
    }
    // The schedules did differ.
    switches.sort_unstable();
    switches.dedup();
    assert!(switches.len() > 10, "{switches:?}");
}

#[test]
fn workers_and_checks_change_nothing() {
    let product = Product::ragged();
    for (workers, checks) in [(2, Checks::Full), (5, Checks::Full), (1, Checks::Off), (3, Checks::Off)] {
        let (c, report) =
            product.run(matmul_f16, Setup { workers, checks, ..F16 }).unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(c, product.c);
        assert_eq!(report.stats.mma, 6 * 3 * 4 * 4 * 8);
    }
}

#[test]
fn launches_on_two_threads_do_not_meet() {
    std::thread::scope(|scope| {
        for seed in 0..2 {
            scope.spawn(move || {
                let product = Product::new(64 + 8 * seed, 72, 64);
                for round in 0..10 {
                    let setup = Setup { seed: round, workers: 2, ..F16 };
                    let (c, _) = product.run(matmul_f16, setup).unwrap_or_else(|fault| panic!("{fault}"));
                    assert_eq!(c, product.c);
                    // A fault of one launch is no business of the other's.
                    assert!(product.run(matmul_no_wait, setup).is_err());
                }
            });
        }
    });
}

#[test]
fn bank_conflicts() {
    let product = Product::ragged();
    let (_, swizzled) = product.run(matmul_f16, F16).unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(swizzled.stats.ldmatrix_conflicts, 0);
    assert_eq!(swizzled.stats.cp_async_conflicts, 0);
    let (c, plain) = product.run(matmul_unswizzled, F16).unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(c, product.c);
    // Rows of 128 bytes: the eight rows of a matrix share their banks.
    assert_eq!(plain.stats.ldmatrix_conflicts, 7 * plain.stats.ldmatrix_phases);
    assert_eq!(plain.stats.cp_async_conflicts, 0); // eight lanes write one row
}

#[test]
fn missing_synchronisation_is_reported() {
    let product = Product::ragged();
    let fault = |kernel| product.run(kernel, F16).expect_err("a fault");
    let (issue, read, read_b) = ("ptx::cp_async_cg_16(", "ptx::ldmatrix_x4(", "ptx::ldmatrix_x4_trans(");
    assert_fault(&fault(matmul_no_wait), FaultKind::PendingCopy, FILE, &[issue]);
    assert_fault(&fault(matmul_no_commit), FaultKind::PendingCopy, FILE, &[issue, read]);

    let missing = fault(matmul_no_barrier_after_wait);
    assert!(matches!(missing.kind, FaultKind::Race | FaultKind::PendingCopy | FaultKind::Uninitialised), "{missing}");
    let refill = fault(matmul_no_barrier_before_refill);
    assert_eq!(refill.kind, FaultKind::Race, "{refill}");
    let names = |mark| refill.message.contains(&support::line_of(FILE, mark));
    assert!(names(issue) && (names(read) || names(read_b)), "{refill}");
}

#[test]
fn every_synchronisation_is_load_bearing() {
    let product = Product::ragged();
    let (_, report) = product.run(matmul_f16, F16).unwrap_or_else(|fault| panic!("{fault}"));
    let mut found: Vec<_> = report.sync_sites.iter().map(|site| site.what.as_str()).collect();
    found.sort_unstable();
    let commit = "cp.async.commit_group";
    assert_eq!(found, ["bar.sync 0", "bar.sync 0", commit, commit, "cp.async.wait_group"], "{:?}", report.sync_sites);
    for site in &report.sync_sites {
        let fault = (0..10)
            .find_map(|seed| product.run(matmul_f16, Setup { seed, dropped: std::slice::from_ref(site), ..F16 }).err());
        assert!(fault.is_some(), "nobody notices that {} ({}) is gone", site.what, site.location);
    }
}

/// Prints the emulator's speed: `cargo test --release -- --ignored --nocapture speed`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let product = Product::new(512, 512, 512);
    for (name, checks, workers) in
        [("checked", Checks::Full, 1), ("unchecked", Checks::Off, 1), ("checked, 2 workers", Checks::Full, 2)]
    {
        let times = (0..3).map(|seed| {
            let start = Instant::now();
            product.run(matmul_f16, Setup { checks, workers, seed, ..F16 }).unwrap_or_else(|fault| panic!("{fault}"));
            start.elapsed().as_secs_f64()
        });
        let best = times.fold(f64::INFINITY, f64::min);
        println!("{name}: {:.0} ms, {:.2} GFLOP/s", best * 1e3, 2.0 * 512f64.powi(3) / best / 1e9);
    }
}
