//! Every call of the driver fails once: each time the answer is an error, and nothing is left behind.

use crate::cases::{Case, Data};
use crate::device::Request;
use crate::stand_in::{Control, over};
use fused_attention::cuda::cudarc::driver::{CudaContext, result::primary_ctx};
use fused_attention::{DType, Engine, Error};

/// CUDA_ERROR_OUT_OF_MEMORY
const OUT_OF_MEMORY: u32 = 2;
/// CUDA_ERROR_LAUNCH_FAILED
const LAUNCH_FAILED: u32 = 719;

fn case() -> Case {
    Case::decoupled("faults", DType::F16, [1, 40, 2, 40], 33, &[4])
}

/// Has the first call fail, then the second, until a run needs no more calls; `run` tells whether it was an error.
fn each_call_fails(control: &Control, run: impl Fn() -> bool) -> u64 {
    for n in 1..500 {
        control.fail_call(n, OUT_OF_MEMORY);
        control.forget_calls();
        let failed = run();
        let calls = control.calls();
        control.fail_call(0, 0);
        if (calls.len() as u64) < n {
            assert!(!failed, "an error without a call that failed");
            return n - 1;
        }
        let name = &calls[n as usize - 1];
        // What tidies up has no answer to give; the next call tells.
        let tidies = ["Free", "Destroy", "Release"].iter().any(|word| name.contains(word));
        assert!(failed || tidies || is_cleaning(&calls, n), "{name}, call {n}, failed without an error: {calls:?}");
    }
    panic!("there is no end of calls");
}

/// Whether what failed belongs to dropping something: cudarc makes the context current first.
fn is_cleaning(calls: &[String], n: u64) -> bool {
    let rest = &calls[n as usize - 1..];
    let current = |name: &String| name == "cuCtxGetCurrent" || name == "cuCtxSetCurrent";
    let next = rest.iter().find(|name| !current(name)).map_or("", String::as_str);
    current(&rest[0]) && ["Free", "Destroy", "Release", "Record"].iter().any(|word| next.contains(word))
        || rest[0] == "cuEventRecord"
        || rest[0] == "cuStreamWaitEvent"
}

#[test]
fn from_host_memory() {
    over("faults::from_host_memory", &[], || {
        let control = Control::new();
        let data = Data::new(&case(), 71);
        let expected = data.run(Engine::Emulated).0.values();
        let calls = each_call_fails(&control, || match data.try_run(Engine::Cuda) {
            Ok((out, _)) => {
                assert_eq!(out.values(), expected);
                false
            }
            Err(error) => tells_of_memory(error),
        });
        assert!(calls > 20, "{calls} calls");
        // Where freeing itself failed, the driver still has what was to be freed, and nothing else.
        let (out, _) = data.run(Engine::Cuda);
        assert_eq!(out.values(), expected, "the device is as good as before");
    });
}

/// Whatever could not be done, the error says that memory was lacking.
fn tells_of_memory(error: Error) -> bool {
    match error {
        Error::Driver { call, error } => assert_eq!(error.code, OUT_OF_MEMORY, "{call}"),
        Error::Refused(refusal) => assert!(refusal.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{refusal}"),
        Error::Fault { message, .. } => assert!(message.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{message}"),
        error => panic!("{error}"),
    }
    true
}

#[test]
fn a_backward_from_host_memory() {
    over("faults::a_backward_from_host_memory", &[], || {
        let control = Control::new();
        let data = Data::new(&case(), 75);
        let run = |engine| {
            let computed = data.try_backward(engine, data.dout.view(), data.gradient_tensors(DType::F32, |_| true))?;
            Ok(computed.iter().flat_map(|(_, tensor)| tensor.values()).collect::<Vec<f32>>())
        };
        let expected = run(Engine::Emulated).expect("a case with a kernel");
        let calls = each_call_fails(&control, || match run(Engine::Cuda) {
            Ok(computed) => {
                assert_eq!(computed, expected);
                false
            }
            Err(error) => tells_of_memory(error),
        });
        assert!(calls > 40, "{calls} calls");
        assert_eq!(run(Engine::Cuda).expect("the device is as good as before"), expected);
    });
}

#[test]
fn nothing_is_left_behind() {
    over("faults::nothing_is_left_behind", &[], || {
        let control = Control::new();
        let data = Data::new(&case(), 72);
        data.run(Engine::Cuda);
        let clean = control.live();
        for n in 1..500 {
            control.fail_call(n, OUT_OF_MEMORY);
            control.forget_calls();
            let result = data.try_run(Engine::Cuda);
            control.fail_call(0, 0);
            let calls = control.calls();
            let Some(name) = calls.get(n as usize - 1) else {
                assert!(result.is_ok() && n > 15, "{n} calls");
                return;
            };
            // A free that fails leaves what it should have freed. So does a question that cudarc asks about the context that
            // it has just retained, and then forgets. Everything else leaves nothing.
            let frees = ["Free", "Destroy", "Release"].iter().any(|word| name.contains(word));
            let forgotten = calls[(n as usize).saturating_sub(2)..]
                .starts_with(&["cuDevicePrimaryCtxRetain".to_string(), name.clone()]);
            if frees || forgotten || is_cleaning(&calls, n) {
                return_everything(&control);
                continue;
            }
            assert_eq!(control.live(), clean, "{name}, call {n}: {calls:?}");
        }
        panic!("there is no end of calls");
    });
}

/// What a failing free left makes every later count wrong: give the contexts back, which takes all with them.
fn return_everything(control: &Control) {
    while control.live()["retained"] > 0 {
        let context = CudaContext::new(0).expect("a device");
        // SAFETY: nothing of it is in use; each call gives back one of the two retentions, the drop the other.
        unsafe { primary_ctx::release(context.cu_device()) }.expect("a release");
    }
}

#[test]
fn on_a_stream() {
    over("faults::on_a_stream", &[], || {
        let control = Control::new();
        let data = Data::new(&case(), 73);
        let expected = data.run(Engine::Emulated).0.values();
        let calls = each_call_fails(&control, || {
            let Ok(context) = CudaContext::new(0) else { return true };
            let Ok(stream) = context.new_stream() else { return true };
            let Ok(mut request) = Request::new(&stream, &data) else { return true };
            if request.launch(&stream).is_err() {
                return true;
            }
            let Ok((out, _)) = request.results(&stream) else { return true };
            // A wait or a record that failed is told by the next call of the context.
            if context.check_err().is_err() {
                return true;
            }
            assert_eq!(out, expected);
            false
        });
        assert!(calls > 50, "{calls} calls");
    });
}

#[test]
fn a_kernel_that_fails_is_told_by_whoever_waits() {
    over("faults::a_kernel_that_fails_is_told_by_whoever_waits", &[], || {
        let control = Control::new();
        let data = Data::new(&case(), 74);
        control.fail_execution(1, LAUNCH_FAILED);
        match data.try_run(Engine::Cuda) {
            Err(Error::Fault { kernel, message }) => {
                assert!(kernel.starts_with("forward_"), "{kernel}");
                assert_eq!(message, "CUDA_ERROR_LAUNCH_FAILED");
            }
            other => panic!("{:?}", other.err()),
        }
    });
}
