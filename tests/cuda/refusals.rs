//! What cannot run is an error that says why: no driver, an old one, a GPU without kernels, memory that will not do.

use crate::cases::{Case, Data};
use crate::device::Request;
use crate::stand_in::{Control, over, without_driver};
use fused_attention::cuda::cudarc::driver::{CudaContext, DevicePtr};
use fused_attention::cuda::{CudaTensor, CudaTensorMut, RawTensor};
use fused_attention::{
    Argument, Attention, Branch, DType, Device, Engine, Error, Outputs, Plan, Problem, Reason, Rule, TensorDesc,
    TensorMut, TensorRef, cuda, device,
};
use half::f16;

const SHAPE: [usize; 4] = [1, 33, 2, 64];
const LEN: usize = 33 * 2 * 64;

/// The reasons for which a small call from host memory is refused.
fn refused() -> Vec<Reason> {
    let (input, mut out) = (vec![f16::ONE; LEN], vec![f16::ONE; LEN]);
    let x = TensorRef::bshd(&input, SHAPE);
    let result = Attention::new(x).branch(Branch::new(x, x)).forward(Engine::Cuda, TensorMut::bshd(&mut out, SHAPE));
    assert!(out.iter().all(|&x| x == f16::ONE), "nothing is written");
    match result {
        Err(Error::Refused(refusal)) => refusal.reasons,
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_driver() {
    without_driver("refusals::no_driver", || {
        let reasons = refused();
        assert!(matches!(reasons[0], Reason::NoDriver { .. }), "{reasons:?}");
        assert!(reasons[0].to_string().contains("libcuda.so.1"), "{reasons:?}");
        let choice = Engine::auto();
        assert_eq!(choice.engine, Engine::Cpu);
        assert!(choice.to_string().contains("no NVIDIA driver library"), "{choice}");
    });
}

#[test]
fn no_device() {
    over("refusals::no_device", &[("SIMT_DRIVER_DEVICES", "")], || {
        assert_eq!(refused(), [Reason::NoDevice]);
        assert_eq!(Engine::auto().engine, Engine::Cpu);
    });
}

#[test]
fn an_old_driver() {
    over("refusals::an_old_driver", &[("SIMT_DRIVER_VERSION", "12000")], || {
        let need = cuda::toolkit().map(|toolkit| (toolkit.version.0, 0).max((12, 1))).expect("kernels");
        assert_eq!(refused(), [Reason::OldDriver { have: (12, 0), need }]);
        assert!(cuda::devices().is_ok_and(|devices| devices.len() == 1), "they are still listed");
    });
}

#[test]
fn a_gpu_without_kernels() {
    over("refusals::a_gpu_without_kernels", &[("SIMT_DRIVER_DEVICES", "sm_75")], || {
        let reasons = refused();
        assert!(reasons.contains(&Reason::ComputeCapability { have: (7, 5), need: (8, 0) }), "{reasons:?}");
        assert!(device(Engine::Cuda).is_err() && Engine::auto().engine == Engine::Cpu);
        // A plan for another GPU needs none.
        let mut gpu = cuda::devices().expect("it is listed").remove(0);
        gpu.compute_capability = (8, 0);
        let x = TensorDesc::bshd(DType::F16, SHAPE);
        let attention = Attention::new(x).branch(Branch::new(x, x));
        let problem = Problem::forward(&attention, &Outputs::new(x)).expect("a legal problem");
        assert!(Plan::new(&problem, &Device::Cuda(gpu)).is_ok());
        let choice = Engine::auto_for(&problem).expect("the cpu engine takes it");
        assert_eq!((choice.engine, choice.passed_over.len()), (Engine::Cpu, 1));
    });
}

#[test]
fn memory_of_another_device_or_context() {
    over("refusals::memory_of_another_device_or_context", &[("SIMT_DRIVER_DEVICES", "sm_80,sm_80")], || {
        let [here, there] = [0, 1].map(|ordinal| CudaContext::new(ordinal).expect("a device").default_stream());
        let (q, k) = (here.clone_htod(&vec![f16::ONE; LEN]).unwrap(), there.clone_htod(&vec![f16::ONE; LEN]).unwrap());
        let mut out = here.alloc_zeros::<f16>(LEN).unwrap();
        let (q, k) = (CudaTensor::bshd(&q, SHAPE), CudaTensor::bshd(&k, SHAPE));
        let attention = Attention::new(q).branch(Branch::new(k, q));
        let Err(Error::Invalid(invalid)) = attention.launch(&here, CudaTensorMut::bshd(&mut out, SHAPE)) else {
            panic!("k is on another device");
        };
        let told: Vec<_> = invalid.violations.iter().map(|told| (told.argument, &told.rule)).collect();
        assert_eq!(told, [(Argument::K(0), &Rule::Device { got: 1, stream: 0 })]);
        assert_eq!(invalid.to_string().matches("GPU 1").count(), 1, "{invalid}");
    });
}

#[test]
fn short_buffers_and_wrong_widths_are_all_told() {
    over("refusals::short_buffers_and_wrong_widths_are_all_told", &[], || {
        let stream = CudaContext::new(0).expect("a device").default_stream();
        let q = stream.clone_htod(&vec![f16::ONE; LEN - 1]).unwrap();
        let mut out = stream.alloc_zeros::<f16>(LEN).unwrap();
        let x = CudaTensor::bshd(&q, SHAPE);
        let attention = Attention::new(x).branch(Branch::new(x, x));
        let Err(Error::Invalid(invalid)) = attention.launch(&stream, CudaTensorMut::bshd(&mut out, SHAPE)) else {
            panic!("q is too short");
        };
        let short = Rule::SliceTooShort { needed: Some(LEN), len: LEN - 1 };
        assert_eq!(invalid.violations.iter().filter(|told| told.rule == short).count(), 3, "{invalid}");

        // Rows that start between multiples of 16 bytes: of every tensor that has them.
        let q = stream.clone_htod(&vec![f16::ONE; LEN + 1]).unwrap();
        let x = CudaTensor::strided(&q, 1, SHAPE, [LEN as isize, 128, 64, 1]);
        let attention = Attention::new(x).branch(Branch::new(x, x));
        let Err(Error::Refused(refusal)) = attention.launch(&stream, CudaTensorMut::bshd(&mut out, SHAPE)) else {
            panic!("rows start at odd addresses");
        };
        let rows = [Argument::Q, Argument::K(0), Argument::V(0)].map(|argument| Reason::Alignment { argument });
        assert_eq!(refusal.reasons, rows);
        assert_eq!(Control::new().launches().len(), 0);
    });
}

/// A dense tensor by address.
fn raw(address: u64) -> RawTensor {
    RawTensor::new(address, TensorDesc::bshd(DType::F16, SHAPE))
}

#[test]
fn bare_addresses_are_checked_and_launched() {
    over("refusals::bare_addresses_are_checked_and_launched", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.new_stream().expect("a stream");
        let input: Vec<f16> = (0..LEN).map(|n| f16::from_f32((n * 37 % 101) as f32 / 50.0 - 1.0)).collect();
        let memory = stream.clone_htod(&input).expect("memory on the device");
        let out = stream.clone_htod(&vec![f16::NAN; LEN]).expect("memory on the device");
        let (from, to) = (memory.device_ptr(&stream).0, out.device_ptr(&stream).0);
        let launch = |q: RawTensor, k: RawTensor, out: RawTensor| {
            let attention = Attention::new(q).branch(Branch::new(k, k));
            // SAFETY: the buffers live until the stream is waited for; what is wrong with them is refused.
            unsafe { attention.launch_raw(0, stream.cu_stream().cast(), out) }
        };
        let violations = |result: Result<Plan, Error>| match result {
            Err(Error::Invalid(invalid)) => invalid.violations,
            other => panic!("{other:?}"),
        };
        let rules = |result| violations(result).into_iter().map(|told| told.rule).collect::<Vec<_>>();
        assert_eq!(rules(launch(raw(0), raw(from), raw(to))), [Rule::Null]);
        assert_eq!(rules(launch(raw(from), raw(from), raw(from + 16))).len(), 3, "out lies over q, k and v");
        let odd = rules(launch(raw(from + 1), raw(from), raw(to)));
        assert_eq!(odd, [Rule::Address { address: from + 1, dtype: DType::F16 }]);
        let elsewhere = RawTensor { ordinal: 1, ..raw(from) };
        assert_eq!(rules(launch(raw(from), elsewhere, raw(to))), vec![Rule::Device { got: 1, stream: 0 }; 2]);
        let short = RawTensor { bytes: 2 * LEN - 1, ..raw(to) };
        let needed = Rule::SliceTooShort { needed: Some(LEN), len: LEN - 1 };
        assert_eq!(rules(launch(raw(from), raw(from), short)), [needed]);
        assert_eq!(Control::new().launches().len(), 0, "none of these ran");

        let plan = launch(raw(from), raw(from), raw(to)).expect("a launch");
        assert_eq!(plan.engine(), Engine::Cuda);
        let got = stream.clone_dtoh(&out).expect("results");
        let mut expected = vec![f16::NAN; LEN];
        let x = TensorRef::bshd(&input, SHAPE);
        let attention = Attention::new(x).branch(Branch::new(x, x));
        attention.forward(Engine::Emulated, TensorMut::bshd(&mut expected, SHAPE)).expect("a legal problem");
        assert_eq!(got, expected);
    });
}

#[test]
fn memory_that_is_gone_is_noticed() {
    over("refusals::memory_that_is_gone_is_noticed", &[], || {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.new_stream().expect("a stream");
        let mut request = Request::new(&stream, &Data::new(&Case::plain("gone", DType::F16, SHAPE, 33), 1)).unwrap();
        request.launch(&stream).expect("a launch");
        let gone = stream.clone_htod(&vec![f16::ONE; LEN]).expect("memory on the device");
        let address = gone.device_ptr(&stream).0;
        drop(gone);
        let out = stream.clone_htod(&vec![f16::ONE; LEN]).expect("memory on the device");
        let attention = Attention::new(raw(address)).branch(Branch::new(raw(address), raw(address)));
        // SAFETY: none: the memory is gone, and the stand-in driver is to notice.
        let launched = unsafe { attention.launch_raw(0, stream.cu_stream().cast(), raw(out.device_ptr(&stream).0)) };
        launched.expect("nothing is known of it yet");
        let error = stream.synchronize().expect_err("the kernel read freed memory");
        assert_eq!(format!("{:?}", error.0), "CUDA_ERROR_ILLEGAL_ADDRESS");
        assert!(Control::new().fault().contains("out of bounds"), "{}", Control::new().fault());
    });
}
