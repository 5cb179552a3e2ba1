//! Each rule of synchronisation: a kernel that keeps it passes, the same kernel without one line is reported with its
//! lines.

mod support;

use simt::FaultKind;
use support::{Buffers, Small, assert_fault, fault_of, kernels, line_of, outputs};

kernels! { Buffers:
    exchange_correct exchange_no_barrier rounds_correct rounds_no_second_barrier
    within_warp_correct within_warp_shuffle_only
    two_readers_correct two_readers_no_barrier store_then_ldmatrix_correct store_then_ldmatrix_no_barrier
    copy_correct copy_no_wait copy_no_commit copy_no_barrier copy_early_write exit_after_wait exit_without_wait
    divergent_correct divergent_halves exit_early_correct exit_early_half barrier_count_same barrier_count_mismatch
    skipped_barrier_none skipped_barrier_half
}

const FILE: &str = "protocol.cpp";

#[test]
fn missing_barrier() {
    assert_eq!(outputs(exchange_correct, 128), (0..128).map(|i| i ^ 32).collect::<Vec<_>>());
    assert_fault(&fault_of(exchange_no_barrier), FaultKind::Race, FILE, &["[exchange read]", "[exchange write]"]);
}

/// Whether the read or the write comes first depends on the seed; the race does not.
#[test]
fn a_race_is_found_under_every_seed() {
    let input: Vec<u32> = (0..128).collect();
    for seed in 0..50 {
        let mut out = vec![0; 128];
        let fault = Small { seed, ..Small::new(exchange_no_barrier, &input, &mut out) }.run().expect_err("a fault");
        assert_fault(&fault, FaultKind::Race, FILE, &["[exchange read]", "[exchange write]"]);
    }
}

#[test]
fn write_after_read_between_rounds() {
    assert_eq!(outputs(rounds_correct, 128), (0..128).map(|i| 3 * (i ^ 64) + 3).collect::<Vec<_>>());
    // Either side of the missing barrier may be met first; both are the same two lines.
    assert_fault(&fault_of(rounds_no_second_barrier), FaultKind::Race, FILE, &["[rounds write]", "[rounds read]"]);
}

#[test]
fn a_shuffle_orders_no_memory() {
    assert_eq!(outputs(within_warp_correct, 128), (0..128).map(|i| i ^ 1).collect::<Vec<_>>());
    let fault = fault_of(within_warp_shuffle_only);
    assert_fault(&fault, FaultKind::Race, FILE, &["[within_warp read]", "[within_warp write]"]);
}

#[test]
fn a_read_is_not_forgotten_over_another_lane_s() {
    outputs(two_readers_correct, 128);
    let fault = fault_of(two_readers_no_barrier);
    assert_fault(&fault, FaultKind::Race, FILE, &["[two_readers write]", "[two_readers read]"]);
}

#[test]
fn ldmatrix_needs_the_rows_of_all_lanes() {
    outputs(store_then_ldmatrix_correct, 512);
    let fault = fault_of(store_then_ldmatrix_no_barrier);
    assert_fault(&fault, FaultKind::Race, FILE, &["[store_then_ldmatrix read]", "[store_then_ldmatrix write]"]);
}

#[test]
fn missing_wait() {
    assert_eq!(outputs(copy_correct, 128), (0..128).map(|i| (i ^ 32) * 4).collect::<Vec<_>>());
    assert_fault(&fault_of(copy_no_wait), FaultKind::PendingCopy, FILE, &["[copy read]", "[copy issue]"]);
}

#[test]
fn missing_commit() {
    let fault = fault_of(copy_no_commit);
    assert_fault(&fault, FaultKind::PendingCopy, FILE, &["[copy read]", "[copy issue]"]);
    assert!(fault.message.ends_with("its group not committed"), "{fault}");
}

#[test]
fn a_wait_is_for_the_waiting_thread_only() {
    let fault = fault_of(copy_no_barrier);
    // As the schedule has it, the other thread's copy is in flight, has landed, or has yet to be issued.
    assert!(matches!(fault.kind, FaultKind::PendingCopy | FaultKind::Race), "{fault}");
    assert!(fault.message.contains(&line_of(FILE, "[copy read]")), "{fault}");
    assert!(fault.message.contains(&line_of(FILE, "[copy issue]")), "{fault}");
}

#[test]
fn write_under_a_copy_in_flight() {
    assert_fault(&fault_of(copy_early_write), FaultKind::PendingCopy, FILE, &["[copy write]", "[copy issue]"]);
}

#[test]
fn exit_with_a_copy_in_flight() {
    outputs(exit_after_wait, 128);
    assert_fault(&fault_of(exit_without_wait), FaultKind::CopyAtExit, FILE, &["[exit_in_flight issue]"]);
}

#[test]
fn divergent_instructions() {
    outputs(divergent_correct, 128);
    assert_fault(
        &fault_of(divergent_halves),
        FaultKind::Divergence,
        FILE,
        &["[divergent shfl]", "[divergent ldmatrix]"],
    );
}

#[test]
fn lanes_that_exited() {
    outputs(exit_early_correct, 128);
    // The seed decides whether the first lanes to run are those that leave.
    for seed in 0..200 {
        let mut out = vec![0; 128];
        let one_warp = Small { seed, threads: 32, ..Small::new(exit_early_half, &[0], &mut out) };
        let fault = one_warp.run().expect_err("a fault");
        assert_fault(&fault, FaultKind::Divergence, FILE, &["[exit_early shfl]"]);
    }
}

#[test]
fn barrier_with_two_counts() {
    outputs(barrier_count_same, 128);
    let fault = fault_of(barrier_count_mismatch);
    assert_fault(&fault, FaultKind::Barrier, FILE, &["[barrier_count]"]);
    assert!(fault.message.contains("64") && fault.message.contains("96"), "{fault}");
}

#[test]
fn deadlock_names_every_warp_s_line() {
    outputs(skipped_barrier_none, 128);
    let fault = fault_of(skipped_barrier_half);
    assert_fault(&fault, FaultKind::Deadlock, FILE, &["[skipped_barrier all]", "[skipped_barrier some]"]);
    for warp in 0..4 {
        assert!(fault.message.contains(&format!("warp {warp}: 32 lanes wait for bar.sync")), "{fault}");
    }
}
