//! Every engine that runs here on every case, held against the oracle.

mod cases;

use cases::{Case, Data, GateCase, Layout, all, bound, naive};
use fused_attention::{Attention, DType, Direction, Engine, Error, Outputs, TensorRef, device};
use rayon::prelude::*;
use std::io::Write;

/// Engines to test, all but the oracle; those that cannot run here are named loudly.
fn engines() -> Vec<Engine> {
    let (there, missing): (Vec<Engine>, Vec<Engine>) =
        [Engine::Cpu, Engine::Emulated, Engine::Cuda].into_iter().partition(|&engine| {
            device(engine).is_ok()
                && fused_attention::INSTANCES
                    .iter()
                    .any(|row| row.runs_on(engine) && row.direction == Direction::Forward)
        });
    for engine in missing {
        let why = match device(engine) {
            Err(reason) => reason.to_string(),
            Ok(_) => "it has no kernel".to_string(),
        };
        left_out(&format!("the {} engine on the case list: {why}", engine.name()));
    }
    there
}

fn left_out(what: &str) {
    // Not eprintln: the test harness would swallow it.
    let _ = writeln!(std::io::stderr(), "LEFT OUT: {what}");
}

#[test]
fn every_case_within_the_bound() {
    let cases = all();
    assert!(cases.len() >= 60, "the list has {} cases", cases.len());
    let engines = engines();
    let failures: Vec<String> = cases.par_iter().flat_map_iter(|case| failures(case, &engines)).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn failures(case: &Case, engines: &[Engine]) -> Vec<String> {
    let data = Data::new(case, 1);
    let oracle = data.attention().forward_f64().expect("every case is a legal problem");
    let naive = naive(&data);
    let mut failures = Vec::new();
    for &engine in engines {
        let (out, lse) = match data.try_run(engine) {
            Ok(results) if case.has_kernel(engine) => results,
            Err(Error::Refused(_)) if !case.has_kernel(engine) => continue,
            Ok(_) => panic!("{} ran {}, which it has no kernel for", engine.name(), case.name),
            Err(error) => {
                failures.push(format!("{} {}: {error}", engine.name(), case.name));
                continue;
            }
        };
        let checks = [
            ("out", bound(case.dtype, &out.values(), &naive.out, &oracle.out.values)),
            ("lse", bound(DType::F32, &lse.values(), &naive.lse, &oracle.lse.values)),
        ];
        for (what, check) in checks.iter().filter(|(_, check)| !check.holds()) {
            failures.push(format!("{} {} {what}: {check:?}", engine.name(), case.name));
        }
    }
    failures
}

#[test]
fn the_reference_rounds_the_oracle_once() {
    for case in all() {
        let data = Data::new(&case, 2);
        let oracle = data.attention().forward_f64().expect("every case is a legal problem");
        let (out, lse) = data.run(Engine::Reference);
        for (&got, &exact) in out.values().iter().zip(&oracle.out.values) {
            let rounded = match case.dtype {
                DType::F16 => half::f16::from_f64(exact).to_f32(),
                DType::BF16 => half::bf16::from_f64(exact).to_f32(),
                _ => exact as f32,
            };
            assert_eq!(got.to_bits(), rounded.to_bits(), "{}", case.name);
        }
        assert!(lse.values().iter().zip(&oracle.lse.values).all(|(&got, &exact)| got == exact as f32));
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    for engine in engines() {
        for case in all().iter().step_by(5).filter(|case| case.has_kernel(engine)) {
            let data = Data::new(case, 3);
            assert_eq!(bits(&data.run(engine).0), bits(&data.run(engine).0), "{} {}", engine.name(), case.name);
        }
    }
}

fn bits(tensor: &cases::HostTensor) -> Vec<u32> {
    tensor.values().iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_gate_of_zero_is_no_branch() {
    let with = Case::decoupled("zero", DType::F16, [2, 70, 3, 40], 77, &[16, 5])
        .gate(1, GateCase::Scalar(0.0))
        .gate(2, GateCase::Scalar(0.7));
    let mut data = Data::new(&with, 4);
    // Not even NaN gets through a closed gate.
    let values = vec![f32::NAN; data.branches[1].segments[0].v.elements()];
    let shape = data.branches[1].segments[0].v.shape.clone();
    data.branches[1].segments[0].v = cases::HostTensor::new(DType::F16, &shape, &values, Layout::Bshd);
    for engine in engines().into_iter().chain([Engine::Reference]) {
        let closed = data.run(engine).0;
        let mut without: Attention<TensorRef<'_>> = data.attention();
        without.branches.remove(1);
        let (mut out, _) = data.outputs();
        without.forward(engine, out.view_mut()).expect("a legal problem");
        assert_eq!(bits(&closed), bits(&out), "{}", engine.name());

        // The same without lse, where the closed branch costs nothing.
        let (mut out, _) = data.outputs();
        data.attention().forward(engine, out.view_mut()).expect("a legal problem");
        assert_eq!(bits(&closed), bits(&out), "{}", engine.name());
    }
}

#[test]
fn accumulating_adds_before_the_rounding() {
    for engine in engines().into_iter().chain([Engine::Reference]) {
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let layout = if engine == Engine::Emulated { Layout::Bhsd } else { Layout::Gaps };
            let case = Case::plain("accumulate", dtype, [2, 70, 3, 40], 77).layout(layout);
            if !case.has_kernel(engine) {
                continue;
            }
            let data = Data::new(&case, 5);
            let shape = [2, 70, 3, 40];
            let before: Vec<f32> =
                (0..2 * 70 * 3 * 40).map(|n| cases::round_to(dtype, 0.37 * (n % 101) as f32 - 15.0)).collect();
            let mut out = cases::HostTensor::new(dtype, &shape, &before, layout);
            let attention = data.attention().accumulate();
            attention.forward(engine, Outputs::new(out.view_mut())).expect("a legal problem");
            let oracle = data.attention().forward_f64().expect("a legal problem").out.values;
            let sum: Vec<f64> = oracle.iter().zip(&before).map(|(&new, &old)| new + f64::from(old)).collect();
            let naive: Vec<f32> =
                naive(&data).out.iter().zip(&before).map(|(&new, &old)| cases::round_to(dtype, new + old)).collect();
            let check = bound(dtype, &out.values(), &naive, &sum);
            assert!(check.holds(), "{} {dtype}: {check:?}", engine.name());
            assert!(out.gaps_untouched());
        }
    }
}

#[test]
fn nan_inputs_show_in_their_rows_alone() {
    let case = Case::plain("nan", DType::BF16, [1, 70, 1, 16], 90);
    let mut data = Data::new(&case, 6);
    let mut values = data.q.values();
    values[33 * 16 + 5] = f32::NAN;
    data.q = cases::HostTensor::new(DType::BF16, &[1, 70, 1, 16], &values, Layout::Bshd);
    for engine in engines().into_iter().chain([Engine::Reference]) {
        let out = data.run(engine).0.values();
        for (i, row) in out.chunks(16).enumerate() {
            assert_eq!(row.iter().all(|x| x.is_nan()), i == 33, "{} row {i}", engine.name());
            assert_eq!(row.iter().any(|x| x.is_nan()), i == 33, "{} row {i}", engine.name());
        }
    }
}
