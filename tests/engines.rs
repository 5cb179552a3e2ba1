//! Every engine that runs here on every case, held against the oracle.

mod cases;

use cases::{
    BiasValues, Case, Data, GateCase, HostTensor, Layout, all, bound, bound_of_draws, naive, naive_draws, round_to,
};
use fused_attention::{
    Argument, Attention, Backward, DType, Direction, Engine, Error, Gradient, Outputs, Reason, Saved, TensorDesc,
    TensorRef, device,
};
use rayon::prelude::*;
use std::io::Write;

/// Engines to test in one direction, all but the oracle; those that cannot run here are named loudly.
fn engines(direction: Direction) -> Vec<Engine> {
    let (there, missing): (Vec<Engine>, Vec<Engine>) =
        [Engine::Cpu, Engine::Emulated, Engine::Cuda].into_iter().partition(|&engine| {
            device(engine).is_ok()
                && fused_attention::INSTANCES.iter().any(|row| row.runs_on(engine) && row.direction == direction)
        });
    for engine in missing {
        let why = match device(engine) {
            Err(reason) => reason.to_string(),
            Ok(_) => "it has no kernel".to_string(),
        };
        left_out(&format!("the {} engine on the case list, {}: {why}", engine.name(), direction.name()));
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
    let engines = engines(Direction::Forward);
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
    for engine in engines(Direction::Forward) {
        for case in all().iter().step_by(5).filter(|case| case.has_kernel(engine)) {
            let data = Data::new(case, 3);
            assert_eq!(bits(&data.run(engine).0), bits(&data.run(engine).0), "{} {}", engine.name(), case.name);
        }
    }
}

fn bits(tensor: &HostTensor) -> Vec<u32> {
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
    data.branches[1].segments[0].v = HostTensor::new(DType::F16, &shape, &values, Layout::Bshd);
    for engine in engines(Direction::Forward).into_iter().chain([Engine::Reference]) {
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
fn a_long_branch_behind_a_gate_of_zero_splits_no_other() {
    // So few queries that keys are split, into parts that must not depend on the closed branch.
    for queries in [1, 40] {
        let with = Case::decoupled("zero", DType::F32, [1, queries, 4, 40], 700, &[3000, 20])
            .kv_heads(0, 1)
            .gate(1, GateCase::Scalar(0.0));
        let data = Data::new(&with, 4);
        let closed = data.run(Engine::Cpu).0;
        let mut without = data.attention();
        without.branches.remove(1);
        let (mut out, _) = data.outputs();
        without.forward(Engine::Cpu, out.view_mut()).expect("a legal problem");
        assert_eq!(bits(&closed), bits(&out), "{queries} queries");
    }
}

#[test]
fn accumulating_adds_before_the_rounding() {
    for engine in engines(Direction::Forward).into_iter().chain([Engine::Reference]) {
        for (dtype, queries) in
            [DType::F16, DType::BF16, DType::F32].into_iter().flat_map(|dtype| [(dtype, 70), (dtype, 3)])
        {
            let layout = if engine == Engine::Emulated { Layout::Bhsd } else { Layout::Gaps };
            let case = Case::plain("accumulate", dtype, [2, queries, 3, 40], 77).layout(layout);
            if !case.has_kernel(engine) {
                continue;
            }
            let data = Data::new(&case, 5);
            let shape = [2, queries, 3, 40];
            let before: Vec<f32> =
                (0..2 * queries * 3 * 40).map(|n| round_to(dtype, 0.37 * (n % 101) as f32 - 15.0)).collect();
            let mut out = HostTensor::new(dtype, &shape, &before, layout);
            let attention = data.attention().accumulate();
            attention.forward(engine, Outputs::new(out.view_mut())).expect("a legal problem");
            let oracle = data.attention().forward_f64().expect("a legal problem").out.values;
            let sum: Vec<f64> = oracle.iter().zip(&before).map(|(&new, &old)| new + f64::from(old)).collect();
            let naive: Vec<f32> =
                naive(&data).out.iter().zip(&before).map(|(&new, &old)| round_to(dtype, new + old)).collect();
            let check = bound(dtype, &out.values(), &naive, &sum);
            assert!(check.holds(), "{} {dtype}, {queries} queries: {check:?}", engine.name());
            assert!(out.gaps_untouched());
        }
    }
}

#[test]
fn nan_inputs_show_in_their_rows_alone() {
    // The second entry has no keys, and what one thread computes for it comes right after the row.
    let shape = [2, 70, 1, 16];
    let case = Case::plain("nan", DType::BF16, shape, 90).key_len(0, &[90, 0]);
    let mut data = Data::new(&case, 6);
    let mut values = data.q.values();
    values[69 * 16 + 5] = f32::NAN;
    data.q = HostTensor::new(DType::BF16, &shape, &values, Layout::Bshd);
    let thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    for engine in engines(Direction::Forward).into_iter().chain([Engine::Reference]) {
        let out = thread.install(|| data.run(engine)).0.values();
        for (i, row) in out.chunks(16).enumerate() {
            assert_eq!(row.iter().all(|x| x.is_nan()), i == 69, "{} row {i}", engine.name());
            assert_eq!(row.iter().any(|x| x.is_nan()), i == 69, "{} row {i}", engine.name());
            assert!(i < 70 || row.iter().all(|&x| x == 0.0), "{} row {i}: {row:?}", engine.name());
        }
    }
}

#[test]
fn every_gradient_within_the_bound() {
    let engines = engines(Direction::Backward);
    let failures: Vec<String> = all().par_iter().flat_map_iter(|case| gradient_failures(case, &engines)).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn gradient_failures(case: &Case, engines: &[Engine]) -> Vec<String> {
    let data = Data::new(case, 7);
    let (oracle, naive) = (data.oracle_gradients(), naive_draws(&data, None));
    let mut failures = Vec::new();
    for &engine in engines {
        // From what the forward saved they are asked for in f32.
        let dtype = case.dtype;
        let tensors = data.gradient_tensors(dtype, |_| true);
        let computed = match data.try_backward(engine, data.dout.view(), tensors) {
            Ok(computed) if case.has_backward(engine) => computed,
            Err(Error::Refused(_)) if !case.has_backward(engine) => continue,
            Ok(_) => panic!("{} ran {}, which it has no kernel for", engine.name(), case.name),
            Err(error) => {
                failures.push(format!("{} {}: {error}", engine.name(), case.name));
                continue;
            }
        };
        for (gradient, tensor) in &computed {
            let check = judge(tensor, &naive[gradient], &oracle[gradient]);
            if !check.holds() {
                failures.push(format!("{} {} {gradient:?} in {dtype}: {check:?}", engine.name(), case.name));
            }
        }
    }
    failures
}

/// A gradient beside the naive one, both rounded to the type of its tensor.
fn judge(tensor: &HostTensor, naive: &[Vec<f32>], oracle: &[f64]) -> cases::Bound {
    let dtype = tensor.dtype();
    let round = |naive: &Vec<f32>| naive.iter().map(|&value| round_to(dtype, value)).collect();
    let naive: Vec<Vec<f32>> = naive.iter().map(round).collect();
    bound_of_draws(dtype, &tensor.values(), &naive, oracle)
}

/// Bits of every gradient that `wanted` admits.
fn gradient_bits(data: &Data, engine: Engine, wanted: impl Fn(Gradient) -> bool) -> Vec<(Gradient, Vec<u32>)> {
    let tensors = data.gradient_tensors(data.case.dtype, wanted);
    let computed = data.try_backward(engine, data.dout.view(), tensors).expect("a case with a kernel");
    computed.into_iter().map(|(gradient, tensor)| (gradient, bits(&tensor))).collect()
}

fn backward_cases(engine: Engine) -> impl Iterator<Item = Case> {
    all().into_iter().step_by(4).filter(move |case| case.has_backward(engine))
}

#[test]
fn gradients_have_the_same_bits_whatever_runs_them() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let (one, three) = (pool(1), pool(3));
    for engine in engines(Direction::Backward) {
        for case in backward_cases(engine) {
            let data = Data::new(&case, 8);
            let first = gradient_bits(&data, engine, |_| true);
            for (threads, again) in [
                ("as many", gradient_bits(&data, engine, |_| true)),
                ("1", one.install(|| gradient_bits(&data, engine, |_| true))),
                ("3", three.install(|| gradient_bits(&data, engine, |_| true))),
            ] {
                assert!(first == again, "{} {}: {threads} threads", engine.name(), case.name);
            }
        }
    }
}

#[test]
fn a_gradient_has_the_same_bits_alone() {
    // On a GPU the sums over queries are split into as many parts as keep all multiprocessors busy with what is wanted: two
    // runs of one request have the same bits there, and so have only these.
    for engine in [Engine::Cpu, Engine::Reference] {
        for case in backward_cases(engine) {
            let data = Data::new(&case, 9);
            for (gradient, together) in gradient_bits(&data, engine, |_| true) {
                let alone = gradient_bits(&data, engine, |wanted| wanted == gradient);
                assert_eq!(alone.len(), 1);
                assert!(alone[0].1 == together, "{} {} {gradient:?}", engine.name(), case.name);
            }
        }
    }
}

#[test]
fn a_gate_of_zero_lets_no_gradient_through() {
    let case = Case::decoupled("zero", DType::F16, [2, 70, 3, 40], 77, &[16, 5])
        .gate(1, GateCase::Scalar(0.0))
        .gate(2, GateCase::Scalar(0.7));
    let mut data = Data::new(&case, 10);
    let clean = Data::new(&case, 10);
    let values = vec![f32::NAN; data.branches[1].segments[0].v.elements()];
    let shape = data.branches[1].segments[0].v.shape.clone();
    data.branches[1].segments[0].v = HostTensor::new(DType::F16, &shape, &values, Layout::Bshd);
    for engine in engines(Direction::Backward).into_iter().chain([Engine::Reference]) {
        let all_but_its_gate = |gradient| gradient != Gradient::Gate(1);
        let closed = gradient_bits(&data, engine, all_but_its_gate);
        assert!(closed == gradient_bits(&clean, engine, all_but_its_gate), "{}", engine.name());
        for (gradient, bits) in closed {
            let nothing = matches!(gradient, Gradient::K(1) | Gradient::V(1));
            assert_eq!(bits.iter().all(|&bits| bits << 1 == 0), nothing, "{} {gradient:?}", engine.name());
        }

        // A gate that starts closed can learn to open (docs/math.md, equation 8).
        let opening = gradient_bits(&clean, engine, |gradient| gradient == Gradient::Gate(1));
        assert!(f32::from_bits(opening[0].1[0]).abs() > 1e-3, "{}", engine.name());
    }
}

/// A tensor of the same shape whose dimensions lie in another order, the fastest first, and its elements a step apart.
fn turned(tensor: &HostTensor, order: [usize; 4], step: isize) -> HostTensor {
    let mut next = step;
    let mut strides = vec![0; tensor.shape.len()];
    for dim in order.into_iter().filter(|&dim| dim < tensor.shape.len()) {
        // Backwards along the first dimension.
        strides[dim] = if dim == 0 { -next } else { next };
        next *= tensor.shape[dim] as isize;
    }
    let desc = TensorDesc::from_slices(tensor.dtype(), &tensor.shape, &strides).expect("as many strides");
    // A margin of 32 bytes in either type.
    HostTensor::exact(&desc, 16, || f32::NAN)
}

#[test]
fn gradients_of_any_strides() {
    let case = Case::plain("strides", DType::BF16, [2, 72, 4, 24], 91).kv_heads(0, 2).gate(0, GateCase::PerHead).bias(
        0,
        DType::F32,
        [2, 1, 72, 91],
        BiasValues::Random,
    );
    let data = Data::new(&case, 12);
    for engine in engines(Direction::Backward).into_iter().chain([Engine::Reference]) {
        for dtype in [DType::BF16, DType::F32] {
            let dense = data.gradient_tensors(dtype, |_| true);
            let dense = data.try_backward(engine, data.dout.view(), dense).expect("a case with a kernel");
            let run = |order: [usize; 4], step: isize| {
                let turned = dense.iter().map(|(gradient, tensor)| (*gradient, turned(tensor, order, step)));
                let computed = data.try_backward(engine, data.dout.view(), turned.collect());
                computed.map(|computed| assert_same(&dense, &computed, engine))
            };
            run([3, 0, 2, 1], 1).expect("dense rows, in whichever order");
            // Components outermost, or every second element: rows that no kernel stores.
            for (order, step) in [([0, 1, 2, 3], 1), ([3, 0, 2, 1], 2)] {
                let of_rows = [Argument::Dq, Argument::Dk(0), Argument::Dv(0)];
                match (engine, run(order, step)) {
                    (Engine::Cpu | Engine::Reference, Ok(())) => {}
                    (Engine::Emulated | Engine::Cuda, Err(Error::Refused(refusal))) => {
                        assert_eq!(refusal.reasons, of_rows.map(|argument| Reason::Alignment { argument }));
                    }
                    (_, result) => panic!("{}: {result:?}", engine.name()),
                }
            }
        }
    }
}

fn assert_same(dense: &[(Gradient, HostTensor)], turned: &[(Gradient, HostTensor)], engine: Engine) {
    for ((gradient, dense), (_, turned)) in dense.iter().zip(turned) {
        assert!(bits(dense) == bits(turned), "{} {gradient:?} in {}", engine.name(), dense.dtype());
        assert!(turned.gaps_untouched(), "{} {gradient:?}: written beside it", engine.name());
    }
}

#[test]
fn rows_without_keys_have_no_gradient() {
    let case = Case::plain("empty", DType::BF16, [1, 150, 2, 40], 64).causal(0, fused_attention::Causal::BottomRight);
    let data = Data::new(&case, 11);
    for engine in engines(Direction::Backward).into_iter().chain([Engine::Reference]) {
        let tensors = data.gradient_tensors(DType::F32, |gradient| gradient == Gradient::Q);
        let computed = data.try_backward(engine, data.dout.view(), tensors).expect("a case with a kernel");
        for (row, dq) in computed[0].1.values().chunks(40).enumerate() {
            // 86 queries more than keys; the first key belongs to one query only, whose softmax is constant.
            assert_eq!(dq.iter().all(|&dq| dq == 0.0), row / 2 < 87, "{} row {row}", engine.name());
        }
    }
}

#[test]
fn gradients_from_what_the_forward_saved() {
    let engines = engines(Direction::Backward);
    let failures: Vec<String> = all().par_iter().flat_map_iter(|case| saved_failures(case, &engines)).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// `out` was rounded when it was saved, and the yardstick has the same loss: a naive computation from the saved results.
fn saved_failures(case: &Case, engines: &[Engine]) -> Vec<String> {
    let data = Data::new(case, 7);
    let oracle = data.oracle_gradients();
    let mut failures = Vec::new();
    for &engine in engines.iter().filter(|&&engine| case.has_backward(engine)) {
        let (out, lse) = data.run(engine);
        let naive = naive_draws(&data, Some(&Saved { out: out.clone(), lse: lse.clone() }));
        // Of gates and regions the saved results tell nothing.
        let tensors =
            data.gradient_tensors(DType::F32, |gradient| !matches!(gradient, Gradient::Gate(_) | Gradient::Region(_)));
        let backward = Backward::new(data.dout.view()).saved(out.view(), lse.view());
        let computed = data.try_backward(engine, backward, tensors).expect("a case with a kernel");
        for (gradient, tensor) in &computed {
            let check = judge(tensor, &naive[gradient], &oracle[gradient]);
            if !check.holds() {
                failures.push(format!("{} {} {gradient:?} saved: {check:?}", engine.name(), case.name));
            }
        }
    }
    failures
}
