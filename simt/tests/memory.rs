//! Each rule of memory: bounds, initialisation, alignment, whose memory it is, banks.

mod support;

use simt::{Checks, Fault, FaultKind, Kernel, Launch, Report};
use support::{Buffers, Small, assert_fault, fault_of, kernels, outputs};

kernels! { Buffers:
    uninitialised_written uninitialised_read copy_words write_to_input store_shared
    shared_window_inside shared_window_outside bytes_read bytes_written
    alignment_correct alignment_ldmatrix alignment_destination alignment_source alignment_plain
    copy_with_tail copy_late own_stack other_stack local_10k_words local_20k_words local_uninitialised
    accumulate_atomically accumulate_plainly read_from_other_block through_global_correct through_global_no_barrier
    last_block_correct last_block_no_release last_block_no_acquire last_block_no_barrier
    stride_1 stride_2 stride_32 table
}

const FILE: &str = "memory.cpp";

fn run_with(kernel: Kernel<Buffers>, input: usize, out: usize, shared_bytes: u32) -> Result<Report, Fault> {
    let input = vec![1; input];
    let mut out = vec![0; out];
    Small { shared_bytes, ..Small::new(kernel, &input, &mut out) }.run()
}

#[test]
fn uninitialised_shared_memory() {
    outputs(uninitialised_written, 128);
    assert_fault(&fault_of(uninitialised_read), FaultKind::Uninitialised, FILE, &["[uninitialised read]"]);
}

#[test]
fn global_bounds() {
    let report = run_with(copy_words, 128, 128, 0).expect("no fault");
    assert_eq!((report.buffer("in").read, report.buffer("out").written), (512, 512));
    assert_eq!((report.buffer("in").written, report.buffer("out").read), (0, 0));

    let fault = run_with(copy_words, 127, 128, 0).expect_err("a read past the end");
    assert_fault(&fault, FaultKind::GlobalBounds, FILE, &["[global read]"]);
    assert!(
        fault.message.contains("read of 4 bytes") && fault.message.contains("4 bytes past the end of `in`"),
        "{fault}"
    );

    let fault = run_with(copy_words, 128, 127, 0).expect_err("a write past the end");
    assert_fault(&fault, FaultKind::GlobalBounds, FILE, &["[global write]"]);
    assert!(fault.message.contains("4 bytes past the end of `out`"), "{fault}");
}

#[test]
fn read_only_buffer() {
    let fault = fault_of(write_to_input);
    assert_fault(&fault, FaultKind::ReadOnly, FILE, &["[write_input]"]);
    assert!(fault.message.contains("`in`"), "{fault}");
}

#[test]
fn shared_bounds() {
    run_with(store_shared, 1, 128, 512).expect("no fault");
    let fault = run_with(store_shared, 1, 128, 508).expect_err("a store past the end");
    assert_fault(&fault, FaultKind::SharedBounds, FILE, &["[shared_store write]"]);

    run_with(shared_window_inside, 4, 1, 2048).expect("no fault");
    let fault = run_with(shared_window_outside, 4, 1, 2048).expect_err("a copy past the end");
    assert_fault(&fault, FaultKind::SharedBounds, FILE, &["[shared_window]"]);
}

#[test]
fn single_bytes_of_shared_memory() {
    assert_eq!(outputs(bytes_read, 128), (0..128).collect::<Vec<_>>());
    assert_fault(&fault_of(bytes_written), FaultKind::Unsupported, FILE, &["[single_bytes write]"]);
}

#[test]
fn alignment() {
    outputs(alignment_correct, 128);
    assert_fault(&fault_of(alignment_ldmatrix), FaultKind::Misaligned, FILE, &["[alignment ldmatrix]"]);
    assert_fault(&fault_of(alignment_destination), FaultKind::Misaligned, FILE, &["[alignment copy]"]);
    assert_fault(&fault_of(alignment_source), FaultKind::Misaligned, FILE, &["[alignment copy]"]);
    assert_fault(&fault_of(alignment_plain), FaultKind::Misaligned, FILE, &["[alignment plain]"]);
}

/// Nothing of the source is read beyond src_size, and the rest of the destination is zero.
#[test]
fn source_bounds_of_asynchronous_copies() {
    let input: Vec<u32> = (0..508).map(|i| i | 0x0101_0000).collect();
    let mut out = vec![9; 512];
    let report = Small::new(copy_with_tail, &input, &mut out).run().expect("no fault");
    for (i, &word) in out.iter().enumerate() {
        let kept = [16, 10, 2, 0][i / 4 % 4] - (i % 4) as i32 * 4;
        let mask = if kept >= 4 { u32::MAX } else { (1u64 << (8 * kept.max(0))) as u32 - 1 };
        assert_eq!(word, input.get(i).copied().unwrap_or(0) & mask, "word {i}");
    }
    assert_eq!(report.buffer("in").read_async, 32 * 28);

    let fault = run_with(copy_with_tail, 505 - 4, 512, 4096).expect_err("a copy from past the end");
    assert_fault(&fault, FaultKind::GlobalBounds, FILE, &["[copy_tail]"]);
    assert!(fault.message.contains("asynchronous"), "{fault}");
}

#[test]
fn copies_read_their_source_at_the_last_moment() {
    assert_eq!(outputs(copy_late, 256)[128..], [2; 128]);
}

#[test]
fn local_memory_is_private() {
    assert_eq!(outputs(own_stack, 128), (0..128).collect::<Vec<_>>());
    assert_fault(&fault_of(other_stack), FaultKind::ForeignStack, FILE, &["[foreign_stack read]"]);
}

/// A thread has 64 KiB of it.
#[test]
fn local_memory_ends() {
    assert_eq!(outputs(local_10k_words, 128), (0..128).map(|i| i % 4).collect::<Vec<_>>());
    assert_eq!(fault_of(local_20k_words).kind, FaultKind::StackOverflow);
}

#[test]
fn blocks_that_write_the_same_words() {
    for workers in [1, 3] {
        let mut out = vec![0; 128];
        let report =
            Small { blocks: 5, workers, ..Small::new(accumulate_atomically, &[0], &mut out) }.run().expect("no fault");
        assert_eq!(report.stats.atomics, 5 * 128);
        assert!(out.iter().all(|&bits| f32::from_bits(bits) == 5.0));

        let fault =
            Small { blocks: 5, workers, ..Small::new(accumulate_plainly, &[0], &mut out) }.run().expect_err("a fault");
        assert_fault(&fault, FaultKind::BlockRace, FILE, &["[accumulate write]"]);
        assert_eq!(fault.message.matches("memory.cpp:").count(), 2, "{fault}");
    }
}

#[test]
fn block_that_reads_what_another_wrote() {
    for seed in 0..20 {
        let mut out = vec![0; 512];
        let fault =
            Small { blocks: 4, seed, ..Small::new(read_from_other_block, &[0], &mut out) }.run().expect_err("a fault");
        assert_fault(&fault, FaultKind::BlockRace, FILE, &["[read_other_block write]", "[read_other_block read]"]);
    }
}

#[test]
fn threads_that_exchange_through_global_memory() {
    assert_eq!(outputs(through_global_correct, 256)[128..], (0..128).map(|i| i ^ 32).collect::<Vec<_>>());
    let fault = fault_of(through_global_no_barrier);
    assert_fault(&fault, FaultKind::Race, FILE, &["[through_global write]", "[through_global read]"]);
}

/// The message between blocks: fence, atomic, fence. Without either fence some seed shows it, and without the barrier
/// that gathers the block's writes too.
#[test]
fn last_block_reads_all_partial_results() {
    let input: Vec<u32> = (0..128).collect();
    let run = |kernel, seed, workers| {
        let mut out = vec![0; 32 + 5 * 128];
        let result = Small { blocks: 4, seed, workers, ..Small::new(kernel, &input, &mut out) }.run();
        result.map(|_| out)
    };
    for seed in 0..20 {
        let out =
            run(last_block_correct, seed, 1 + seed as u32 % 3).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        assert_eq!(out[32 + 4 * 128..], (0..128).map(|i| 4 * i + 6).collect::<Vec<_>>());
    }
    for kernel in [last_block_no_release, last_block_no_acquire, last_block_no_barrier] {
        let fault = (0..20).find_map(|seed| run(kernel, seed, 1).err()).expect("some seed shows it");
        assert_fault(&fault, FaultKind::BlockRace, FILE, &["[last_block_sums read]", "[last_block_sums write]"]);
    }
}

#[test]
fn bank_conflicts_of_plain_accesses() {
    let conflicts = |kernel, words: u32| {
        let stats = run_with(kernel, 1, 128, words * 4).expect("no fault").stats;
        assert_eq!(stats.shared_phases, 4 * 2); // four warps store and load
        stats.shared_conflicts
    };
    assert_eq!(conflicts(stride_1, 128), 0);
    assert_eq!(conflicts(stride_2, 256), 4 * 2);
    assert_eq!(conflicts(stride_32, 4096), 4 * 2 * 31);
}

#[test]
fn constant_tables_are_readable() {
    assert_eq!(outputs(table, 128)[..8], [3, 1, 4, 1, 5, 9, 2, 6]);
}

/// g++ fills locals with 0xfe; clang, where floats are concerned, with NaN.
#[test]
fn uninitialised_locals_are_absurd() {
    let input = [0, 0];
    let mut out = vec![0; 128];
    Small::new(local_uninitialised, &input, &mut out).run().expect("no fault");
    assert_eq!(out[0], 1);
    let mut out = vec![0; 128];
    Small::new(local_uninitialised, &[0, 2], &mut out).run().expect("no fault");
    assert_ne!(out[0], 0);
}

#[test]
fn impossible_launches_are_refused() {
    let refusal = |grid, block, shared_bytes| {
        let mut launch = Launch::new(copy_words, grid, block).shared_bytes(shared_bytes).checks(Checks::Off);
        let fault = launch.run(&Buffers { input: 0, out: 0 }).expect_err("a refusal");
        assert_eq!(fault.kind, FaultKind::BadLaunch, "{fault}");
        fault.message
    };
    assert!(refusal([1, 1, 1], 100, 0).contains("100 threads"));
    assert!(refusal([1, 1, 1], 2048, 0).contains("2048 threads"));
    assert!(refusal([0, 1, 1], 128, 0).contains("without blocks"));
    assert!(refusal([1, 65536, 1], 128, 0).contains("65535"));
    assert!(refusal([1, 1, 1], 128, 300_000).contains("300000 bytes"));
}
