//! Every case on the CUDA engine, from host memory and from device memory, within the bound.

use crate::cases::{Data, all, bound, naive};
use crate::device::Request;
use crate::stand_in::{Control, on_gpu_or_over, over};
use fused_attention::cuda::cudarc::driver::CudaContext;
use fused_attention::{DType, Engine, Error};
use rayon::prelude::*;
use std::env;

/// From device memory, on a stream of its own, the stream's context reused from case to case.
fn from_device_memory() {
    let context = CudaContext::new(0).expect("a device");
    let stream = context.new_stream().expect("a stream");
    let mut results = Vec::new();
    for case in all() {
        let data = Data::new(&case, 41);
        let mut request = Request::new(&stream, &data).expect("memory on the device");
        match request.launch(&stream) {
            Ok(_) if case.has_kernel(Engine::Cuda) => {}
            Err(Error::Refused(_)) if !case.has_kernel(Engine::Cuda) => continue,
            other => panic!("{}: {other:?}", case.name),
        }
        let (out, lse) = request.results(&stream).unwrap_or_else(|error| panic!("{}: {:?}", case.name, error.0));
        results.push((data, out, lse));
    }
    let failures = results.par_iter().flat_map_iter(|(data, out, lse)| misses(data, out, lse));
    let failures: Vec<String> = failures.collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(results.len() >= 80, "{} cases ran", results.len());
}

fn misses(data: &Data, out: &[f32], lse: &[f32]) -> Vec<String> {
    let case = &data.case;
    let oracle = data.attention().forward_f64().expect("every case is a legal problem");
    let naive = naive(data);
    let checks = [
        ("out", bound(case.dtype, out, &naive.out, &oracle.out.values)),
        ("lse", bound(DType::F32, lse, &naive.lse, &oracle.lse.values)),
    ];
    let missed = checks.iter().filter(|(_, check)| !check.holds());
    missed.map(|(what, check)| format!("{} {what}: {check:?}", case.name)).collect()
}

#[test]
fn every_case_from_device_memory() {
    on_gpu_or_over("case_list::every_case_from_device_memory", &[], from_device_memory);
}

#[test]
fn every_case_on_a_device_that_takes_other_machine_code() {
    let name = "case_list::every_case_on_a_device_that_takes_other_machine_code";
    over(name, &[("SIMT_DRIVER_DEVICES", "sm_90"), ("SIMT_DRIVER_SEED", "5")], from_device_memory);
}

#[test]
fn every_fifth_case_from_ptx() {
    over("case_list::every_fifth_case_from_ptx", &[("SIMT_DRIVER_DEVICES", "sm_120")], || {
        for case in all().iter().step_by(5).filter(|case| case.has_kernel(Engine::Cuda)) {
            let data = Data::new(case, 42);
            let (out, lse) = match data.try_run(Engine::Cuda) {
                Ok(results) => results,
                // Its blocks have less shared memory than those of the data centre.
                Err(Error::Refused(refusal)) if refusal.to_string().contains("shared memory") => continue,
                Err(error) => panic!("{}: {error}", case.name),
            };
            assert_eq!(misses(&data, &out.values(), &lse.values()), [""; 0]);
        }
    });
}

#[test]
fn every_case_from_host_memory() {
    let name = "case_list::every_case_from_host_memory";
    on_gpu_or_over(name, &[("SIMT_DRIVER_SEED", "3")], || {
        let mut results = Vec::new();
        for case in all() {
            let data = Data::new(&case, 43);
            match data.try_run(Engine::Cuda) {
                Ok((out, lse)) if case.has_kernel(Engine::Cuda) => results.push((data, out.values(), lse.values())),
                Err(Error::Refused(_)) if !case.has_kernel(Engine::Cuda) => {}
                other => panic!("{}: {:?}", case.name, other.err()),
            }
        }
        let failures = results.par_iter().flat_map_iter(|(data, out, lse)| misses(data, out, lse));
        assert_eq!(failures.collect::<Vec<_>>(), [""; 0]);
        assert!(results.len() >= 80, "{} cases ran", results.len());
        if env::var_os("LD_LIBRARY_PATH").is_some_and(|path| path.to_string_lossy().ends_with("stand_in_driver")) {
            let control = Control::new();
            assert!(control.launches().len() >= 70, "{} kernels ran", control.launches().len());
            let live = control.live();
            assert_eq!((live["allocations"], live["contexts"], live["events"]), (0, 0, 0), "{live:?}");
        }
    });
}
