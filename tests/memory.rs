//! The memory rule: scratch is a few tiles per thread, whatever the sequence lengths.
//!
//! Alone in its program, because it counts what the whole process allocates.

use fused_attention::{Attention, Branch, DType, Engine, Plan, TensorMut, TensorRef};
use half::f16;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; the counters touch no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(HELD.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs self-attention of `tokens` and returns the plan and the bytes allocated at the peak beyond those before.
fn peak_of(tokens: usize) -> (Plan, usize) {
    const WIDTH: usize = 64;
    let shape = [1, tokens, 1, WIDTH];
    let data: Vec<f16> = (0..tokens * WIDTH).map(|n| f16::from_f32((n * 37 % 101) as f32 / 50.0 - 1.0)).collect();
    let mut out = vec![f16::NAN; tokens * WIDTH];
    let x = TensorRef::bshd(&data, shape);
    let attention = Attention::new(x).branch(Branch::new(x, x));

    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let plan = attention.forward(Engine::Cpu, TensorMut::bshd(&mut out, shape)).expect("a legal problem");
    let peak = PEAK.load(Relaxed) - before;
    assert!(out.iter().all(|x| x.is_finite()));
    (plan, peak)
}

#[test]
fn scratch_does_not_grow_with_the_sequence() {
    // The first call also starts the thread pool.
    let (_, first) = peak_of(256);
    let (_, short) = peak_of(1024);
    let (plan, long) = peak_of(16_384);
    println!("peak beyond the tensors: {first} bytes at 256 tokens, {short} at 1,024, {long} at 16,384");
    println!("planned: {} bytes", plan.workspace_bytes());
    assert!(long < 64 << 20, "{long} bytes of scratch for 16,384 tokens");
    // Sixteen times the tokens: an Sq×Skv buffer would grow 256-fold.
    assert!(long <= short + short / 4, "{short} bytes at 1,024 tokens, {long} at 16,384");
    assert_eq!(plan.engine(), Engine::Cpu);
    assert!(DType::F16.size() * 16_384 * 16_384 > 64 << 20, "the buffer that is not there would break the limit");
}
