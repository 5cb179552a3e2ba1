//! Each rule of mbarriers, bulk copies, wgmma and the async proxy: a kernel that keeps it passes, the same kernel with
//! one mistake is reported with its lines.

mod support;

use bytemuck::{Pod, Zeroable};
use simt::{Fault, FaultKind, Kernel, Launch, Report, Swizzle, TensorMap};
use support::{assert_fault, f16_bits, kernels, line_of};

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    map: TensorMap,
    input: u64,
    out: u64,
    unused: [u64; 6],
}

kernels! { Params:
    ring_correct ring_no_init_barrier ring_no_init_fence ring_wrong_count ring_producer_parity ring_consumer_parity
    ring_too_many_bytes ring_too_few_bytes ring_no_wait dump_tile
    stored_correct stored_no_proxy_fence stored_no_fence stored_no_wait stored_no_commit stored_write_in_flight
    stored_exit_in_flight stored_unaligned store_then_bulk_correct store_then_bulk_no_fence
    bulk_store_correct bulk_store_no_proxy_fence bulk_store_no_barrier bulk_store_no_commit bulk_store_no_wait
    bulk_store_overwrite bulk_store_foreign bulk_store_unaligned bulk_store_once_no_wait bulk_store_once_no_commit
    registers_given registers_kept register_counts_falling register_counts_rising register_counts_odd
    misuse_none misuse_one_more misuse_plain_read misuse_plain_write misuse_init_twice misuse_exit_in_flight
}

const FILE: &str = "hopper.cpp";
const BOX: [u32; 4] = [64, 64, 1, 1];

/// Runs over a tensor of 256 rows of 64 halves, small whole numbers, two of them in each word of the input.
fn run(kernel: Kernel<Params>, threads: u32, seed: u64) -> Result<(Vec<u32>, Vec<u32>), Fault> {
    let input: Vec<u32> = (0..8192).map(|i| u32::from(half(2 * i)) | u32::from(half(2 * i + 1)) << 16).collect();
    let mut out = vec![0; 4096];
    let mut launch = Launch::new(kernel, [1, 1, 1], threads).shared_bytes(2 * 8192 + 1024).registers(128).seed(seed);
    if threads > 128 {
        launch = launch.registers(65536 / threads / 8 * 8 - 8);
    }
    let address = launch.input("in", &input);
    let map = TensorMap::encode(address, [64, 256, 1, 1], [128, 32768, 32768], BOX, Swizzle::Bytes128);
    let params =
        Params { map: map.expect("a legal map"), input: address, out: launch.output("out", &mut out), unused: [0; 6] };
    launch.run(&params)?;
    drop(launch);
    Ok((input, out))
}

fn value(element: usize) -> i32 {
    (element * 7 % 11) as i32 - 5
}

fn half(element: usize) -> u16 {
    f16_bits(value(element) as f32)
}

fn outputs(kernel: Kernel<Params>) -> (Vec<u32>, Vec<u32>) {
    run(kernel, 128, 1).unwrap_or_else(|fault| panic!("{fault}"))
}

fn fault_of(kernel: Kernel<Params>) -> Fault {
    run(kernel, 128, 1).expect_err("a fault")
}

#[test]
fn a_ring_of_two_stages() {
    for seed in 0..50 {
        let (input, out) = run(ring_correct, 128, seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        let sum = |words: &[u32]| words.iter().fold(0u32, |sum, &word| sum.wrapping_add(word));
        assert_eq!(sum(&out), sum(&input), "seed {seed}");
    }
}

#[test]
fn initialisation_without_a_barrier() {
    for seed in 0..10 {
        let fault = run(ring_no_init_barrier, 128, seed).expect_err("a fault");
        // As the schedule has it, the mbarrier is not there yet, or nothing says that it is.
        assert!(matches!(fault.kind, FaultKind::Mbarrier | FaultKind::Race | FaultKind::Proxy), "{fault}");
        assert!(fault.message.contains("hopper.cpp:"), "{fault}");
    }
}

#[test]
fn initialisation_without_a_fence() {
    assert_fault(&fault_of(ring_no_init_fence), FaultKind::Proxy, FILE, &["[ring issue]"]);
}

#[test]
fn an_arrival_too_few() {
    let fault = fault_of(ring_wrong_count);
    assert_fault(&fault, FaultKind::Deadlock, FILE, &["[ring wait empty]", "[ring wait full]"]);
    assert!(fault.message.contains("lacks 1 of 97 arrivals"), "{fault}");
}

#[test]
fn the_producer_waits_for_the_wrong_parity() {
    let fault = fault_of(ring_producer_parity);
    assert_fault(&fault, FaultKind::Deadlock, FILE, &["[ring wait empty]", "[ring wait full]"]);
}

#[test]
fn the_consumer_does_not_wait_for_the_copy() {
    for kernel in [ring_consumer_parity, ring_no_wait] {
        for seed in 0..10 {
            let fault = run(kernel, 128, seed).expect_err("a fault");
            let early = matches!(fault.kind, FaultKind::PendingCopy | FaultKind::Uninitialised | FaultKind::Race);
            assert!(early, "{fault}");
            assert!(fault.message.contains(&line_of(FILE, "[ring read]")), "{fault}");
        }
    }
}

#[test]
fn bytes_that_never_come_and_bytes_unannounced() {
    let fault = fault_of(ring_too_many_bytes);
    assert_fault(&fault, FaultKind::Deadlock, FILE, &["[ring wait full]"]);
    assert!(fault.message.contains("0 of 1 arrivals and 16 bytes"), "{fault}");
    assert!(fault_of(ring_too_few_bytes).message.contains("0 of 1 arrivals and -16 bytes"));
}

/// Chunk c of row r lies at c ^ (r % 8); what is outside of the tensor is zero.
#[test]
fn a_tile_lies_swizzled() {
    let (_, out) = outputs(dump_tile);
    for row in 0..64 {
        for column in 0..64 {
            let place = row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8;
            let found = (out[place / 2] >> (place % 2 * 16)) as u16;
            let inside = row >= 3 && column + 8 < 64;
            let expected = if inside { half((row - 3) * 64 + column + 8) } else { 0 };
            assert_eq!(found, expected, "row {row} column {column}");
        }
    }
}

#[test]
fn rules_of_tensor_maps() {
    let encode = |address, row, first, swizzle| {
        TensorMap::encode(address, [64, 256, 1, 1], [row, 32768, 32768], [first, 64, 1, 1], swizzle)
    };
    assert!(encode(1 << 20, 128, 64, Swizzle::Bytes128).is_ok());
    assert!(encode(1 << 20, 128, 128, Swizzle::None).is_ok());
    let broken = |result: Result<TensorMap, String>| result.expect_err("a broken rule");
    assert!(broken(encode((1 << 20) + 8, 128, 64, Swizzle::None)).contains("address"));
    assert!(broken(encode(1 << 20, 120, 64, Swizzle::None)).contains("stride"));
    assert!(broken(encode(1 << 20, 128, 72, Swizzle::Bytes128)).contains("span"));
    assert!(broken(encode(1 << 20, 128, 60, Swizzle::None)).contains("multiple of 16"));
    assert!(broken(encode(1 << 20, 128, 264, Swizzle::None)).contains("1 to 256"));
}

#[test]
fn stored_operands() {
    let (_, out) = outputs(stored_correct);
    for thread in 0..128 {
        for i in 0..32 {
            let row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
            let column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            let exact: i32 = (0..64).map(|k| value(row * 64 + k) * value(column * 64 + k)).sum();
            assert_eq!(out[thread * 32 + i] as i32, exact, "row {row} column {column}");
        }
    }
}

#[test]
fn plain_stores_without_a_proxy_fence() {
    let fault = fault_of(stored_no_proxy_fence);
    assert_fault(&fault, FaultKind::Proxy, FILE, &["[stored write]", "[stored wgmma]"]);
    outputs(store_then_bulk_correct);
    let fault = fault_of(store_then_bulk_no_fence);
    assert_fault(&fault, FaultKind::Proxy, FILE, &["[store_then_bulk write]", "[store_then_bulk issue]"]);
}

#[test]
fn wgmma_out_of_order() {
    assert_fault(&fault_of(stored_no_fence), FaultKind::Wgmma, FILE, &["[stored wgmma]"]);
    assert_fault(&fault_of(stored_no_wait), FaultKind::Wgmma, FILE, &["[stored use]", "[stored wgmma]"]);
    let fault = fault_of(stored_no_commit);
    assert_fault(&fault, FaultKind::Wgmma, FILE, &["[stored wgmma]"]);
    assert!(fault.message.contains("never committed"), "{fault}");
    assert_fault(&fault_of(stored_exit_in_flight), FaultKind::Wgmma, FILE, &["[stored wgmma]"]);
}

#[test]
fn a_shared_operand_written_in_flight() {
    let fault = fault_of(stored_write_in_flight);
    // Another warp's products may have been issued, be in flight, or be over: all of them conflict with the store.
    assert!(matches!(fault.kind, FaultKind::Wgmma | FaultKind::Race | FaultKind::Proxy), "{fault}");
    assert!(fault.message.contains(&line_of(FILE, "[stored overwrite]")), "{fault}");
}

#[test]
fn a_tile_between_two_rows_of_the_swizzle() {
    assert_fault(&fault_of(stored_unaligned), FaultKind::Misaligned, FILE, &["[stored wgmma]"]);
}

/// Runs a kernel that stores to a tensor of 256 rows of 60 halves, 64 in memory, which starts out as ones: what is then there.
fn stored(kernel: Kernel<Params>, seed: u64) -> Result<(Vec<u16>, Report), Fault> {
    let input: Vec<u32> = (0..4096).map(|i| u32::from(half(2 * i)) | u32::from(half(2 * i + 1)) << 16).collect();
    let mut tensor = vec![u128::MAX; 256 * 64 / 8];
    let mut launch = Launch::new(kernel, [1, 1, 1], 128).shared_bytes(8192 + 1024).seed(seed);
    let address = launch.output("tensor", &mut tensor);
    let map = TensorMap::encode(address, [60, 256, 1, 1], [128, 32768, 32768], BOX, Swizzle::Bytes128);
    let params = Params { map: map.expect("a legal map"), input: launch.input("in", &input), out: 0, unused: [0; 6] };
    let report = launch.run(&params)?;
    drop(launch);
    Ok((bytemuck::cast_slice(&tensor).to_vec(), report))
}

/// Two tiles, from column 8 on; what lies outside of the tensor is left alone.
#[test]
fn a_bulk_store_writes_what_is_inside() {
    for seed in 0..10 {
        let (tensor, report) = stored(bulk_store_correct, seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        for (n, &found) in tensor.iter().enumerate() {
            let (row, column) = (n / 64, n % 64);
            let from = [3, 103].into_iter().position(|first| (first..first + 64).contains(&row));
            let expected = match from.filter(|_| (8..60).contains(&column)) {
                Some(tile) => half(tile * 4096 + (row - 3 - 100 * tile) * 64 + column - 8),
                None => u16::MAX,
            };
            assert_eq!(found, expected, "row {row} column {column} seed {seed}");
        }
        assert_eq!(report.buffer("tensor").written, 2 * 64 * 52 * 2);
    }
    // A box that is nowhere in the tensor.
    let (tensor, report) = stored(bulk_store_foreign, 1).unwrap_or_else(|fault| panic!("{fault}"));
    assert!(tensor.iter().all(|&found| found == u16::MAX));
    assert_eq!(report.buffer("tensor").written, 0);
}

#[test]
fn bulk_stores_out_of_order() {
    let fault = |kernel| stored(kernel, 1).expect_err("a fault");
    let (write, issue) = ("[bulk_store write]", "[bulk_store issue]");
    assert_fault(&fault(bulk_store_no_proxy_fence), FaultKind::Proxy, FILE, &[write, issue]);
    assert_fault(&fault(bulk_store_overwrite), FaultKind::PendingCopy, FILE, &["[bulk_store overwrite]", issue]);
    // Without commit or wait the tile is written again too early, or is gone too early.
    for kernel in [bulk_store_no_commit, bulk_store_no_wait] {
        assert_fault(&fault(kernel), FaultKind::PendingCopy, FILE, &[write, issue]);
    }
    assert_fault(&fault(bulk_store_unaligned), FaultKind::Misaligned, FILE, &[issue]);
    for seed in 0..10 {
        let fault = stored(bulk_store_no_barrier, seed).expect_err("a fault");
        let early = matches!(
            fault.kind,
            FaultKind::Race | FaultKind::Uninitialised | FaultKind::PendingCopy | FaultKind::Proxy
        );
        assert!(early && fault.message.contains("hopper.cpp:"), "{fault}");
    }
}

#[test]
fn exit_with_a_bulk_store_unread() {
    for (kernel, uncommitted) in [(bulk_store_once_no_wait, false), (bulk_store_once_no_commit, true)] {
        let fault = stored(kernel, 1).expect_err("a fault");
        assert_fault(&fault, FaultKind::CopyAtExit, FILE, &["[bulk_store issue]"]);
        assert_eq!(fault.message.contains("never committed"), uncommitted, "{fault}");
    }
}

#[test]
fn a_bulk_store_to_an_input() {
    let input = vec![0u128; 256 * 64 / 8];
    let words = vec![0u32; 4096];
    let mut launch = Launch::new(bulk_store_correct, [1, 1, 1], 128).shared_bytes(8192 + 1024);
    let address = launch.input("tensor", &input);
    let map = TensorMap::encode(address, [60, 256, 1, 1], [128, 32768, 32768], BOX, Swizzle::Bytes128);
    let params = Params { map: map.expect("a legal map"), input: launch.input("in", &words), out: 0, unused: [0; 6] };
    assert_fault(&launch.run(&params).expect_err("a fault"), FaultKind::ReadOnly, FILE, &["[bulk_store issue]"]);
}

#[test]
fn registers_change_hands() {
    for seed in 0..50 {
        run(registers_given, 256, seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
    }
    let fault = run(registers_kept, 512, 1).expect_err("a fault");
    assert_fault(&fault, FaultKind::Deadlock, FILE, &["[registers inc]"]);
}

#[test]
fn impossible_counts_of_registers() {
    outputs(register_counts_falling);
    for kernel in [register_counts_rising, register_counts_odd] {
        assert_fault(&fault_of(kernel), FaultKind::Registers, FILE, &["[register_counts]"]);
    }
}

#[test]
fn an_mbarrier_is_no_plain_memory() {
    outputs(misuse_none);
    for (kernel, mark) in [
        (misuse_one_more, "[misuse arrive]"),
        (misuse_plain_read, "[misuse read]"),
        (misuse_plain_write, "[misuse write]"),
        (misuse_init_twice, "[misuse init]"),
    ] {
        assert_fault(&fault_of(kernel), FaultKind::Mbarrier, FILE, &[mark]);
    }
}

#[test]
fn exit_with_a_bulk_copy_in_flight() {
    assert_fault(&fault_of(misuse_exit_in_flight), FaultKind::CopyAtExit, FILE, &["[misuse issue]"]);
}
