//! Streams, events, threads and graphs: everything happens in the order that cudarc's users expect, on a driver that
//! executes nothing before it must, and streams in any order.

use crate::cases::{Case, Data};
use crate::device::Request;
use crate::stand_in::{Control, SEEDS, is_child, kernels_are_built, over, over_seeds};
use fused_attention::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags as Flags, CUstreamCaptureMode as Mode};
use fused_attention::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use fused_attention::cuda::{CudaTensor, CudaTensorMut};
use fused_attention::{Attention, Branch, DType, Engine, TensorMut, TensorRef};
use half::f16;
use std::sync::Arc;

fn case() -> Case {
    Case::decoupled("order", DType::F16, [2, 70, 3, 40], 77, &[16, 5])
}

/// What the engine `emulated` makes of it, to the bit: the same kernels on the same emulator.
fn expected(data: &Data) -> Vec<f32> {
    data.run(Engine::Emulated).0.values()
}

#[test]
fn a_launch_waits_for_other_streams_and_they_for_it() {
    over_seeds("order::a_launch_waits_for_other_streams_and_they_for_it", || {
        let context = CudaContext::new(0).expect("a device");
        let [before, here, after] = [(); 3].map(|()| context.new_stream().expect("a stream"));
        let data = Data::new(&case(), 51);
        let mut request = Request::new(&before, &data).expect("memory on the device");
        request.launch(&here).expect("a launch");
        let (out, _) = request.results(&after).expect("results");
        assert_eq!(out, expected(&data));
        // Written again while others may still read.
        request.launch(&before).expect("a launch");
        request.launch(&after).expect("a launch");
        assert_eq!(request.results(&here).expect("results").0, expected(&data));
    });
}

#[test]
fn the_stand_in_shows_a_missing_wait() {
    const NAME: &str = "order::the_stand_in_shows_a_missing_wait";
    let run = |seed: &str| {
        over(NAME, &[("SIMT_DRIVER_SEED", seed)], || {
            let context = CudaContext::new(0).expect("a device");
            // SAFETY: none of the orders that this asks for are kept, which is what is to be seen.
            unsafe { context.disable_event_tracking() };
            let [before, here] = [(); 2].map(|()| context.new_stream().expect("a stream"));
            let data = Data::new(&case(), 52);
            let mut request = Request::new(&before, &data).expect("memory on the device");
            request.launch(&here).expect("a launch");
            assert_eq!(request.results(&here).expect("results").0, expected(&data));
        });
    };
    if is_child() {
        run(SEEDS[0]);
    } else if kernels_are_built(NAME) {
        let goes_wrong = |seed: &&str| std::panic::catch_unwind(|| run(seed)).is_err();
        assert!(SEEDS.iter().any(goes_wrong), "no order shows that a wait is missing");
    }
}

#[test]
fn threads_share_one_loaded_kernel() {
    over("order::threads_share_one_loaded_kernel", &[("SIMT_DRIVER_DEVICES", "sm_80,sm_80")], || {
        let data = Data::new(&case(), 53);
        let expected = expected(&data);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (data, expected) = (&data, &expected);
                scope.spawn(move || {
                    let context = CudaContext::new(thread % 2).expect("a device");
                    let stream = if thread < 2 { context.default_stream() } else { context.new_stream().unwrap() };
                    for _ in 0..3 {
                        let mut request = Request::new(&stream, data).expect("memory on the device");
                        request.launch(&stream).expect("a launch");
                        assert_eq!(&request.results(&stream).expect("results").0, expected);
                    }
                });
            }
        });
        let calls = Control::new().calls();
        let count = |name: &str| calls.iter().filter(|call| *call == name).count();
        assert_eq!(count("cuLibraryLoadData"), 1, "one image for two devices of one kind");
        assert_eq!((count("cuKernelSetAttribute"), count("cuLaunchKernel")), (2, 12));
    });
}

/// q, k and out of a small self-attention.
fn tensors(stream: &Arc<CudaStream>) -> (CudaSlice<f16>, CudaSlice<f16>) {
    let input = stream.clone_htod(&input(0.0)).expect("memory on the device");
    (input, stream.alloc_zeros(SHAPE.iter().product()).expect("memory on the device"))
}

const SHAPE: [usize; 4] = [1, 33, 2, 64];

fn input(shift: f32) -> Vec<f16> {
    (0..SHAPE.iter().product()).map(|n: usize| f16::from_f32((n * 37 % 101) as f32 / 50.0 - 1.0 + shift)).collect()
}

fn on_host(input: &[f16]) -> Vec<f16> {
    let mut out = vec![f16::NAN; input.len()];
    let x = TensorRef::bshd(input, SHAPE);
    let attention = Attention::new(x).branch(Branch::new(x, x));
    attention.forward(Engine::Emulated, TensorMut::bshd(&mut out, SHAPE)).expect("a legal problem");
    out
}

#[test]
fn a_graph_repeats_a_launch_that_loaded_its_kernel_while_captured() {
    over_seeds("order::a_graph_repeats_a_launch_that_loaded_its_kernel_while_captured", || {
        let context = CudaContext::new(0).expect("a device");
        // As cudarc's own captures: an event from outside may not be waited for inside.
        // SAFETY: everything here is on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().expect("a stream");
        let (mut x, mut out) = tensors(&stream);
        // The mode that forbids most.
        stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL).expect("a capture");
        {
            let q = CudaTensor::bshd(&x, SHAPE);
            let attention = Attention::new(q).branch(Branch::new(q, q));
            attention.launch(&stream, CudaTensorMut::bshd(&mut out, SHAPE)).expect("a captured launch");
        }
        let graph = stream.end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        let graph = graph.expect("a graph").expect("with a launch in it");
        let control = Control::new();
        assert_eq!(control.launches().len(), 0, "captured, not run");
        for shift in [0.0, 0.25] {
            stream.memcpy_htod(&input(shift), &mut x).expect("a copy");
            graph.launch().expect("a launch of the graph");
            assert_eq!(stream.clone_dtoh(&out).expect("results"), on_host(&input(shift)));
        }
        assert_eq!(control.launches().len(), 2);
    });
}

#[test]
fn views_and_masks_of_bytes_are_tensors() {
    over("order::views_and_masks_of_bytes_are_tensors", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.default_stream();
        let len: usize = SHAPE.iter().product();
        // Two requests in one buffer, results in another, by views.
        let both = stream.clone_htod(&[input(0.5), input(0.0)].concat()).expect("memory on the device");
        let mut results = stream.alloc_zeros::<f16>(2 * len).expect("memory on the device");
        let mask: Vec<u8> = (0..33).map(|key| u8::from(key % 3 != 1)).collect();
        let mask = stream.clone_htod(&mask).expect("memory on the device");
        {
            let second = both.slice(len..);
            let x = CudaTensor::bshd(&second, SHAPE);
            let mut branch = Branch::new(x, x);
            branch.segments[0].bias = Some(CudaTensor::mask(&mask, 0, [1, 1, 1, 33], [0, 0, 0, 1]));
            let mut out = results.slice_mut(len..);
            let attention = Attention::new(x).branch(branch);
            attention.launch(&stream, CudaTensorMut::bshd(&mut out, SHAPE)).expect("a launch");
        }
        let results = stream.clone_dtoh(&results).expect("results");
        assert!(results[..len].iter().all(|x| x.to_bits() == 0), "written outside of the view");

        let host_mask: Vec<bool> = (0..33).map(|key| key % 3 != 1).collect();
        let (host, mut out) = (input(0.0), vec![f16::NAN; len]);
        let x = TensorRef::bshd(&host, SHAPE);
        let mut branch = Branch::new(x, x);
        branch.segments[0].bias = Some(TensorRef::contiguous(&host_mask, [1, 1, 1, 33]));
        Attention::new(x).branch(branch).forward(Engine::Emulated, TensorMut::bshd(&mut out, SHAPE)).unwrap();
        assert_eq!(results[len..], out);
    });
}
