//! The backward on the CUDA engine: the case list, order, cost and refusals.

use crate::cases::{BiasValues, Case, Data, GateCase, HostTensor, RegionCase, all, bound_of_draws, naive_draws};
use crate::cost::allocations;
use crate::device_backward::BackwardRequest;
use crate::stand_in::{Control, on_gpu_or_over, over, over_seeds};
use fused_attention::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags as Flags, CUstreamCaptureMode as Mode};
use fused_attention::cuda::cudarc::driver::{CudaContext, CudaStream, DevicePtr};
use fused_attention::cuda::{CudaTensor, CudaTensorMut, RawTensor};
use fused_attention::{
    Argument, Attention, Branch, DType, Engine, Error, Gradient, Gradients, Plan, Rule, Saved, TensorDesc,
};
use half::f16;
use rayon::prelude::*;
use std::sync::Arc;

type Computed = Vec<(Gradient, HostTensor)>;

fn misses(data: &Data, computed: &Computed, saved: Option<&Saved<HostTensor>>) -> Vec<String> {
    let (oracle, naive) = (data.oracle_gradients(), naive_draws(data, saved));
    let checks = computed.iter().map(|(gradient, tensor)| {
        (gradient, bound_of_draws(DType::F32, &tensor.values(), &naive[gradient], &oracle[gradient]))
    });
    let missed = checks.filter(|(_, check)| !check.holds());
    missed.map(|(gradient, check)| format!("{} {gradient:?}: {check:?}", data.case.name)).collect()
}

fn from_device_memory(cases: &[Case]) {
    let context = CudaContext::new(0).expect("a device");
    let stream = context.new_stream().expect("a stream");
    let mut results = Vec::new();
    for case in cases {
        let data = Data::new(case, 81);
        let tensors = data.gradient_tensors(DType::F32, |_| true);
        let mut request = match BackwardRequest::new(&stream, &data, None, tensors) {
            Ok(request) if case.has_backward(Engine::Cuda) => request,
            Err(Error::Refused(_)) if !case.has_backward(Engine::Cuda) => continue,
            other => panic!("{}: {:?}", case.name, other.err()),
        };
        request.launch(&stream).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let computed = request.results(&stream).unwrap_or_else(|error| panic!("{}: {:?}", case.name, error.0));
        results.push((data, computed));
    }
    // The oracle takes longer than a GPU does: on all cores.
    let failures = results.par_iter().flat_map_iter(|(data, computed)| misses(data, computed, None));
    let failures: Vec<String> = failures.collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(results.len() >= cases.len() / 2, "{} of {} cases ran", results.len(), cases.len());
}

/// Over the stand-in driver, the half of the list that has fewer blocks; a GPU takes all of it.
fn affordable() -> Vec<Case> {
    let mut cases = all();
    if fused_attention::emulated::stand_in_driver().is_some() && std::env::var_os("SIMT_DRIVER_DEVICES").is_some() {
        cases.sort_by_key(|case| case.batch * case.heads * case.seq_q);
        cases.truncate(cases.len() / 2);
    }
    cases
}

#[test]
fn every_case_from_device_memory() {
    let name = "backward::every_case_from_device_memory";
    on_gpu_or_over(name, &[("SIMT_DRIVER_DEVICES", "sm_80")], || from_device_memory(&affordable()));
}

#[test]
fn cases_on_a_device_that_takes_other_machine_code() {
    let name = "backward::cases_on_a_device_that_takes_other_machine_code";
    over(name, &[("SIMT_DRIVER_DEVICES", "sm_90"), ("SIMT_DRIVER_SEED", "7")], || {
        let cases: Vec<Case> = affordable().into_iter().step_by(3).collect();
        from_device_memory(&cases);
    });
}

#[test]
fn from_what_the_forward_saved() {
    let name = "backward::from_what_the_forward_saved";
    on_gpu_or_over(name, &[("SIMT_DRIVER_DEVICES", "sm_80"), ("SIMT_DRIVER_SEED", "9")], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.new_stream().expect("a stream");
        for case in affordable().iter().step_by(4).filter(|case| case.has_backward(Engine::Cuda)) {
            let data = Data::new(case, 82);
            let (out, lse) = data.run(Engine::Cuda);
            let saved = Saved { out, lse };
            let of_rows = |gradient| !matches!(gradient, Gradient::Gate(_) | Gradient::Region(_));
            let tensors = data.gradient_tensors(DType::F32, of_rows);
            let mut request =
                BackwardRequest::new(&stream, &data, Some(&saved), tensors).expect("a case with a kernel");
            request.launch(&stream).expect("a launch");
            let computed = request.results(&stream).expect("results");
            assert_eq!(misses(&data, &computed, Some(&saved)), [""; 0]);
        }
    });
}

#[test]
fn from_host_memory() {
    let name = "backward::from_host_memory";
    on_gpu_or_over(name, &[("SIMT_DRIVER_DEVICES", "sm_80"), ("SIMT_DRIVER_SEED", "3")], || {
        for case in affordable().iter().step_by(4).filter(|case| case.has_backward(Engine::Cuda)) {
            let data = Data::new(case, 83);
            let tensors = data.gradient_tensors(DType::F32, |_| true);
            let computed = data.try_backward(Engine::Cuda, data.dout.view(), tensors).expect("a case with a kernel");
            assert_eq!(misses(&data, &computed, None), [""; 0]);
        }
    });
}

/// Launches of every kind: text and two adapters, one of them too long to stay in shared memory.
fn case() -> Case {
    Case::decoupled("backward", DType::F16, [2, 70, 3, 40], 77, &[110, 5])
        .bias(0, DType::F32, [2, 1, 1, 77], BiasValues::Random)
        .gate(1, GateCase::PerBatch(vec![0.7, -1.5]))
        .region(2, RegionCase::PerBatch)
}

fn request(stream: &Arc<CudaStream>, data: &Data) -> BackwardRequest {
    let tensors = data.gradient_tensors(DType::F32, |_| true);
    BackwardRequest::new(stream, data, None, tensors).expect("memory on the device")
}

fn bits(computed: &Computed) -> Vec<u32> {
    computed.iter().flat_map(|(_, tensor)| tensor.values()).map(f32::to_bits).collect()
}

/// What the engine `emulated` makes of it, to the bit: the same kernels, and as many multiprocessors.
fn expected(data: &Data) -> Vec<u32> {
    let tensors = data.gradient_tensors(DType::F32, |_| true);
    bits(&data.try_backward(Engine::Emulated, data.dout.view(), tensors).expect("a case with a kernel"))
}

#[test]
fn the_launches_keep_their_order_among_streams() {
    over_seeds("backward::the_launches_keep_their_order_among_streams", || {
        let context = CudaContext::new(0).expect("a device");
        let [before, here, after] = [(); 3].map(|()| context.new_stream().expect("a stream"));
        let data = Data::new(&case(), 84);
        let expected = expected(&data);
        let mut request = request(&before, &data);
        request.launch(&here).expect("a launch");
        assert!(bits(&request.results(&after).expect("results")) == expected);
        // Once more, in the same workspace, while others may still read.
        request.launch(&before).expect("a launch");
        request.launch(&after).expect("a launch");
        assert!(bits(&request.results(&here).expect("results")) == expected);
    });
}

#[test]
fn a_graph_repeats_all_launches() {
    over_seeds("backward::a_graph_repeats_all_launches", || {
        let context = CudaContext::new(0).expect("a device");
        // SAFETY: everything here is on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().expect("a stream");
        let data = Data::new(&case(), 85);
        let mut request = request(&stream, &data);
        stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL).expect("a capture");
        let launches = request.launch(&stream).expect("a captured launch").launches().count();
        let graph = stream.end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        let graph = graph.expect("a graph").expect("with launches in it");
        let control = Control::new();
        assert_eq!(control.launches().len(), 0, "captured, not run");
        for _ in 0..2 {
            graph.launch().expect("a launch of the graph");
            assert!(bits(&request.results(&stream).expect("results")) == expected(&data));
        }
        assert_eq!(control.launches().len(), 2 * launches);
    });
}

#[test]
fn a_backward_is_one_call_of_the_driver_for_each_launch() {
    over("backward::a_backward_is_one_call_of_the_driver_for_each_launch", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.default_stream();
        let data = Data::new(&case(), 86);
        let mut request = request(&stream, &data);
        let plan = request.launch(&stream).expect("a launch");
        let kernels: Vec<String> = plan.launches().collect();
        let stems = ["queries", "keys", "bias", "reduce", "reduce"];
        assert!(
            kernels.iter().map(String::as_str).zip(stems).all(|(kernel, stem)| kernel.contains(stem)),
            "{kernels:?}"
        );
        assert_eq!(kernels.len(), stems.len());
        let control = Control::new();
        control.forget_calls();
        request.launch(&stream).expect("a launch");
        let calls = control.calls();
        assert_eq!(calls.iter().filter(|call| *call == "cuLaunchKernel").count(), kernels.len());
        assert!(calls.iter().all(|call| call == "cuLaunchKernel" || call == "cuCtxGetCurrent"), "{calls:?}");
    });
}

#[test]
fn a_backward_allocates_nothing() {
    over("backward::a_backward_allocates_nothing", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.default_stream();
        // As many tensors as training one adapter has: text, image, gate and region.
        let case = Case::decoupled("adapter", DType::BF16, [2, 70, 3, 64], 77, &[16])
            .gate(1, GateCase::PerHead)
            .region(1, RegionCase::PerBatch);
        let data = Data::new(&case, 87);
        let of_the_adapter = |gradient| !matches!(gradient, Gradient::K(0) | Gradient::V(0) | Gradient::Gate(0));
        let tensors = data.gradient_tensors(DType::F32, of_the_adapter);
        let mut request = BackwardRequest::new(&stream, &data, None, tensors).expect("memory on the device");
        request.launch(&stream).expect("a launch");
        let count = request.count_during_launch(&stream, allocations);
        assert_eq!(count, 0, "allocations in a backward");
    });
}

#[test]
fn a_workspace_that_will_not_do_is_refused() {
    over("backward::a_workspace_that_will_not_do_is_refused", &[("SIMT_DRIVER_DEVICES", "sm_80,sm_80")], || {
        let [stream, there] = [0, 1].map(|ordinal| CudaContext::new(ordinal).expect("a device").default_stream());
        let data = Data::new(&case(), 88);
        let mut request = request(&stream, &data);
        let needed = request.workspace.len();
        let control = Control::new();
        let rules = |result: Result<Plan, Error>| match result {
            Err(Error::Invalid(invalid)) => {
                assert!(invalid.violations.iter().all(|told| told.argument == Argument::Workspace), "{invalid}");
                invalid.violations.into_iter().map(|told| told.rule).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        request.workspace = stream.alloc_zeros(needed - 1).expect("memory on the device");
        assert_eq!(rules(request.launch(&stream)), [Rule::WorkspaceTooShort { needed, len: needed - 1 }]);
        request.workspace = there.alloc_zeros(needed).expect("memory on the device");
        assert_eq!(rules(request.launch(&stream)), [Rule::Device { got: 1, stream: 0 }]);
        assert_eq!(control.launches().len(), 0, "none of these ran");
    });
}

#[test]
fn bare_addresses_are_checked_and_launched() {
    over("backward::bare_addresses_are_checked_and_launched", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.new_stream().expect("a stream");
        const SHAPE: [usize; 4] = [1, 33, 2, 64];
        const LEN: usize = 33 * 2 * 64;
        let input: Vec<f16> = (0..LEN).map(|n| f16::from_f32((n * 37 % 101) as f32 / 50.0 - 1.0)).collect();
        let memory = stream.clone_htod(&input).expect("memory on the device");
        let dq = stream.clone_htod(&vec![f16::NAN; LEN]).expect("memory on the device");
        let (from, to) = (memory.device_ptr(&stream).0, dq.device_ptr(&stream).0);
        let dense = |address| RawTensor::new(address, TensorDesc::bshd(DType::F16, SHAPE));
        let x = dense(from);
        let attention = Attention::new(x).branch(Branch::new(x, x));
        let launch = |dq: RawTensor, workspace: (u64, usize)| {
            let gradients = Gradients::new().want(Gradient::Q, dq);
            // SAFETY: the buffers live until the stream is waited for; what is wrong with them is refused.
            unsafe { attention.launch_backward_raw(0, stream.cu_stream().cast(), x, &gradients, workspace) }
        };
        let told = |result: Result<Plan, Error>| match result {
            Err(Error::Invalid(invalid)) => {
                invalid.violations.into_iter().map(|told| (told.argument, told.rule)).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        // 33 queries of two heads: the gradient goes straight where it is wanted, and nothing is kept.
        let short = launch(dense(to), (0, 0)).expect("no workspace is needed");
        assert_eq!((short.workspace_bytes(), short.launches().count()), (0, 1));
        assert_eq!(told(launch(dense(0), (0, 0))), [(Argument::Dq, Rule::Null)]);
        let over_inputs = told(launch(dense(from), (0, 0)));
        assert!(over_inputs.iter().all(|(argument, _)| *argument == Argument::Dq) && over_inputs.len() == 4);

        let expected = {
            let x = CudaTensor::bshd(&memory, SHAPE);
            let mut dq = stream.alloc_zeros::<f16>(LEN).expect("memory on the device");
            let wanted = Gradients::new().want(Gradient::Q, CudaTensorMut::bshd(&mut dq, SHAPE));
            let mut workspace = stream.alloc_zeros::<u8>(1).expect("memory on the device");
            let attention = Attention::new(x).branch(Branch::new(x, x));
            attention.launch_backward(&stream, x, wanted, &mut workspace).expect("a launch");
            stream.clone_dtoh(&dq).expect("results")
        };
        assert_eq!(stream.clone_dtoh(&dq).expect("results"), expected);
        assert!(expected.iter().any(|x| x.to_f32().abs() > 1e-3));
    });
}
