//! The memory rule: scratch is a few tiles per thread, whatever the sequence lengths.
//!
//! Alone in its program, because it counts what the whole process allocates.

use fused_attention::{Attention, Branch, DType, Direction, Engine, Gradient, Gradients, Plan, TensorMut, TensorRef};
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

const WIDTH: usize = 64;

/// Bytes that `run` allocates at the peak beyond those before, and its plan.
fn peak_of(run: impl FnOnce() -> Plan) -> (Plan, usize) {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let plan = run();
    (plan, PEAK.load(Relaxed) - before)
}

fn numbers(tokens: usize) -> Vec<f16> {
    (0..tokens * WIDTH).map(|n| f16::from_f32((n * 37 % 101) as f32 / 50.0 - 1.0)).collect()
}

/// Self-attention of `tokens`.
fn forward(tokens: usize) -> (Plan, usize) {
    let (data, shape) = (numbers(tokens), [1, tokens, 1, WIDTH]);
    let mut out = vec![f16::NAN; tokens * WIDTH];
    let x = TensorRef::bshd(&data, shape);
    let attention = Attention::new(x).branch(Branch::new(x, x));
    let peak = peak_of(|| attention.forward(Engine::Cpu, TensorMut::bshd(&mut out, shape)).expect("a legal problem"));
    assert!(out.iter().all(|x| x.is_finite()));
    peak
}

/// One query against `tokens`.
fn decode(tokens: usize) -> (Plan, usize) {
    let (data, shape) = (numbers(tokens), [1, 1, 1, WIDTH]);
    let mut out = vec![f16::NAN; WIDTH];
    let x = TensorRef::bshd(&data, [1, tokens, 1, WIDTH]);
    let attention = Attention::new(TensorRef::bshd(&data, shape)).branch(Branch::new(x, x));
    let peak = peak_of(|| attention.forward(Engine::Cpu, TensorMut::bshd(&mut out, shape)).expect("a legal problem"));
    assert!(out.iter().all(|x| x.is_finite()));
    peak
}

/// All its gradients, of some heads.
fn backward(tokens: usize, heads: usize) -> (Plan, usize) {
    let (data, shape) = (numbers(tokens * heads), [1, tokens, heads, WIDTH]);
    let x = TensorRef::bshd(&data, shape);
    let attention = Attention::new(x).branch(Branch::new(x, x));
    let mut tensors = [Gradient::Q, Gradient::K(0), Gradient::V(0)]
        .map(|gradient| (gradient, vec![f16::NAN; tokens * heads * WIDTH]));
    let peak = peak_of(|| {
        let wanted = tensors.iter_mut().map(|(gradient, data)| (*gradient, TensorMut::bshd(data, shape))).collect();
        attention.backward(Engine::Cpu, x, Gradients { wanted }).expect("a legal problem")
    });
    assert!(tensors.iter().flat_map(|(_, data)| data).all(|x| x.is_finite()));
    peak
}

/// The request's own lists and those of the pool.
const BESIDE_THE_PLAN: usize = 256 << 10;

// One test, because what another allocates at the same time would count too.
#[test]
fn scratch_does_not_grow_with_the_sequence() {
    // The first call also starts the thread pool.
    let (_, first) = forward(256);
    let (short_plan, short) = forward(1024);
    let (plan, long) = forward(16_384);
    println!("peak beyond the tensors: {first} bytes at 256 tokens, {short} at 1,024, {long} at 16,384");
    println!("planned: {} and {} bytes", short_plan.workspace_bytes(), plan.workspace_bytes());
    assert!(long < 64 << 20, "{long} bytes of scratch for 16,384 tokens");
    // Blocks of queries and kept tiles of keys grow with the sequence up to a size, and stay so.
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let kept = 2 << 20;
    assert!(
        long <= threads * (kept + (512 << 10)) + BESIDE_THE_PLAN,
        "{short} bytes at 1,024 tokens, {long} at 16,384"
    );
    let (decode_plan, decoded) = decode(16_384);
    println!("one query: {decoded} bytes against 16,384 keys, {} planned", decode_plan.workspace_bytes());
    for (plan, peak) in [(short_plan, short), (plan.clone(), long), (decode_plan, decoded)] {
        let planned = plan.workspace_bytes();
        assert!(peak <= planned + BESIDE_THE_PLAN, "{peak} bytes at the peak, {planned} planned");
        assert!(planned <= 2 * peak, "{peak} bytes at the peak, {planned} planned");
    }
    assert_eq!(plan.engine(), Engine::Cpu);
    assert!(DType::F16.size() * 16_384 * 16_384 > 64 << 20, "the buffer that is not there would break the limit");

    let (_, first) = backward(256, 1);
    let (short_plan, short) = backward(1024, 1);
    let (plan, long) = backward(8192, 1);
    let (heads_plan, heads) = backward(1024, 16);
    println!("backward: {first} bytes at 256 tokens, {short} at 1,024 tokens, {long} at 8,192; {heads} of 16 heads");
    let planned = [&short_plan, &plan, &heads_plan].map(|plan| plan.workspace_bytes());
    println!("planned: {planned:?} bytes");
    // A thread's tiles, and dk and dv of the heads in work, which stop growing at 16 MB where heads are few. A few numbers of
    // every row come with the tokens; an Sq×Skv buffer would be 134 MB.
    const ROW: usize = 32;
    assert!(long <= short + short / 4 + ROW * 8192, "{short} at 1,024, {long} at 8,192");
    assert!(long <= (16 << 20) + threads * (4 << 20) + ROW * 8192, "{short} at 1,024, {long} at 8,192");
    // Naive, the logits of 16 heads would be 67 MB, and their gradient as much.
    assert!(heads <= threads * (4 << 20) + ROW * 1024 * 16, "{heads} bytes for 16 heads");
    for (plan, peak) in [(short_plan, short), (plan, long), (heads_plan, heads)] {
        assert_eq!((plan.engine(), plan.direction()), (Engine::Cpu, Direction::Backward));
        let planned = plan.workspace_bytes();
        assert!(peak <= planned + BESIDE_THE_PLAN, "{peak} bytes at the peak, {planned} planned");
        assert!(planned <= 2 * peak, "{peak} bytes at the peak, {planned} planned");
    }
}
