//! What a launch costs the host: calls of the driver, and allocations.

use crate::cases::{BiasValues, Case, Data, GateCase, RegionCase};
use crate::device::{OnDevice, Request};
use crate::stand_in::{Control, over};
use fused_attention::cuda::cudarc::driver::CudaContext;
use fused_attention::{DType, Outputs};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Instant;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system allocator unchanged; the counter is of the thread and touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread so far.
pub fn allocations() -> u64 {
    ALLOCATIONS.get()
}

/// Text and three adapters, with a bias, a key length, a gate and a region on the device.
fn case() -> Case {
    Case::decoupled("cost", DType::BF16, [2, 70, 3, 64], 77, &[16, 4, 5])
        .bias(0, DType::F32, [2, 1, 1, 77], BiasValues::Random)
        .key_len(0, &[77, 50])
        .gate(1, GateCase::PerHead)
        .region(2, RegionCase::PerBatch)
}

#[test]
fn a_launch_is_one_call_of_the_driver() {
    over("cost::a_launch_is_one_call_of_the_driver", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.default_stream();
        let mut request = Request::new(&stream, &Data::new(&case(), 61)).expect("memory on the device");
        let control = Control::new();
        control.forget_calls();
        request.launch(&stream).expect("a launch");
        let first = control.calls();
        assert!(first.iter().any(|call| call == "cuLibraryLoadData"), "{first:?}");
        let synchronises = |call: &str| ["Synchronize", "Memcpy", "Alloc"].iter().any(|word| call.contains(word));
        assert!(!first.iter().any(|call| synchronises(call)), "{first:?}");

        // cudarc asks for the thread's context before every call.
        control.forget_calls();
        request.launch(&stream).expect("a launch");
        assert_eq!(control.calls(), ["cuCtxGetCurrent", "cuLaunchKernel"]);

        // Where it manages several streams, it has this one wait for each input, twice for each output, and records each.
        let stream = context.new_stream().expect("a stream");
        let mut request = Request::new(&stream, &Data::new(&case(), 61)).expect("memory on the device");
        let count = |calls: &[String], name: &str| calls.iter().filter(|call| *call == name).count();
        let inputs = request.inputs.tensors().count();
        control.forget_calls();
        request.launch(&stream).expect("a launch");
        let calls = control.calls();
        assert_eq!(count(&calls, "cuLaunchKernel"), 1, "{calls:?}");
        assert_eq!(count(&calls, "cuStreamWaitEvent"), inputs + 2 * 2, "{calls:?}");
        assert_eq!(count(&calls, "cuEventRecord"), inputs + 2, "{calls:?}");
        let others = ["cuLaunchKernel", "cuStreamWaitEvent", "cuEventRecord", "cuCtxGetCurrent"];
        assert!(calls.iter().all(|call| others.contains(&call.as_str())), "{calls:?}");
    });
}

#[test]
fn a_launch_allocates_nothing() {
    over("cost::a_launch_allocates_nothing", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.default_stream();
        let mut request = Request::new(&stream, &Data::new(&case(), 62)).expect("memory on the device");
        request.launch(&stream).expect("a launch");
        let inputs = request.inputs.map(OnDevice::tensor);
        let outputs = Outputs::new(request.out.tensor_mut()).lse(request.lse.tensor_mut());
        let before = allocations();
        let start = Instant::now();
        let plan = inputs.launch(&stream, outputs).expect("a launch");
        let took = start.elapsed();
        assert_eq!(allocations() - before, 0, "allocations in a launch");
        println!("{} launched in {:.1} us", plan.symbol(), took.as_secs_f64() * 1e6);
    });
}
