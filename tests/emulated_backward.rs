//! The backward kernels under emulation: each alone, what is read and written, any schedule, and that every
//! synchronisation is needed.
#![cfg(feature = "emulated")]

mod cases;
mod emulation;

use cases::{BiasValues, Case, Data, GateCase, HostTensor, RegionCase, all, bound_of_draws, naive_draws, round_to};
use emulation::{name, rungs};
use fused_attention::emulated::{Report, Rung, Settings, SyncSite};
use fused_attention::{
    Backward, Causal, DType, Direction, Engine, Error, Gradient, Gradients, INSTANCES, Instance, Plan, TensorRef,
};
use rayon::prelude::*;
use std::collections::HashMap;

fn kernels() -> Vec<Settings> {
    emulation::kernels(Direction::Backward)
}

/// The gradients, the plan, and a report of each of its launches.
type Emulated = (Vec<(Gradient, HostTensor)>, Plan, Vec<Report>);

fn run<'a>(
    data: &Data,
    settings: &Settings,
    backward: impl Into<Backward<TensorRef<'a>>>,
    mut tensors: Vec<(Gradient, HostTensor)>,
) -> Result<Emulated, Error> {
    let wanted = tensors.iter_mut().map(|(gradient, tensor)| (*gradient, tensor.view_mut())).collect();
    let (plan, reports) = data.attention().backward_emulated(settings, backward, Gradients { wanted })?;
    for (gradient, tensor) in &tensors {
        assert!(tensor.gaps_untouched(), "{}: written beside {gradient:?}", data.case.name);
    }
    Ok((tensors, plan, reports))
}

/// Every gradient of the case, those of q, k and v in f32.
fn run_all(data: &Data, settings: &Settings) -> Result<Emulated, Error> {
    run(data, settings, data.dout.view(), data.gradient_tensors(DType::F32, |_| true))
}

fn bits(tensors: &[(Gradient, HostTensor)]) -> Vec<u32> {
    tensors.iter().flat_map(|(_, tensor)| tensor.values()).map(f32::to_bits).collect()
}

/// Cases small enough to be run many times.
fn cases() -> Vec<Case> {
    let blocks = |case: &Case| case.batch * case.heads * case.seq_q.div_ceil(64);
    all().into_iter().filter(|case| case.has_backward(Engine::Emulated) && blocks(case) < 40).collect()
}

#[test]
fn each_kernel_alone_is_within_the_bound_and_free_of_bank_conflicts() {
    let kernels = kernels();
    // What nvcc made of the kernels is the same everywhere; a third of the cases goes through all of it.
    let takes = |n: usize, settings: &Settings| settings.rung == Rung::Source || n.is_multiple_of(3);
    let cases = cases();
    let ran: Vec<Vec<bool>> = (cases.par_iter().enumerate())
        .map(|(n, case)| {
            let data = Data::new(case, 51);
            let (oracle, naive) = (data.oracle_gradients(), naive_draws(&data, None));
            let ran = |settings: &Settings| takes(n, settings) && ran_within_bound(settings, &data, &naive, &oracle);
            kernels.par_iter().map(ran).collect()
        })
        .collect();
    for (n, settings) in kernels.iter().enumerate() {
        let ran = ran.iter().filter(|of_case| of_case[n]).count();
        assert!(ran >= 10, "{} takes {ran} cases", name(settings));
    }
}

fn ran_within_bound(
    settings: &Settings,
    data: &Data,
    naive: &HashMap<Gradient, Vec<Vec<f32>>>,
    oracle: &HashMap<Gradient, Vec<f64>>,
) -> bool {
    let (case, kernel) = (&data.case, name(settings));
    let (computed, plan, reports) = match run_all(data, settings) {
        Ok(emulated) => emulated,
        Err(Error::Refused(_)) => return false,
        Err(error) => panic!("{kernel} {}: {error}", case.name),
    };
    for (gradient, tensor) in &computed {
        let check = bound_of_draws(DType::F32, &tensor.values(), &naive[gradient], &oracle[gradient]);
        assert!(check.holds(), "{kernel} {} {gradient:?}: {check:?}", case.name);
    }
    for (launch, Report { stats, .. }) in plan.launches().zip(&reports) {
        assert_eq!(stats.ldmatrix_conflicts, 0, "{launch} {}", case.name);
        assert_eq!(stats.cp_async_conflicts, 0, "{launch} {}", case.name);
    }
    true
}

#[test]
fn every_row_of_the_table_runs() {
    let leads = |row: &&Instance| row.runs_on(Engine::Emulated) && row.direction == Direction::Backward && row.leads;
    let rows = INSTANCES.iter().filter(leads);
    let rows: Vec<_> = rows.flat_map(|row| rungs(row).iter().map(move |&rung| (row, rung))).collect();
    let launched: Vec<Vec<String>> = (rows.par_iter())
        .map(|&(row, rung)| {
            let shape = [1, 70, 2, row.max_head_dim];
            let case = Case::decoupled(row.symbol(), row.dtypes[0], shape, 20, &[10])
                .region(1, RegionCase::Shared)
                .bias(0, DType::F32, [1, 1, 1, 20], BiasValues::Random);
            let data = Data::new(&case, 55);
            let settings = Settings { kernel: Some(row.kernel.to_string()), rung, ..Settings::default() };
            let tensors = data.gradient_tensors(case.dtype, |_| true);
            let (computed, plan, _) = run(&data, &settings, data.dout.view(), tensors).expect("a legal problem");
            assert_eq!(plan.symbol(), row.symbol());
            let (oracle, naive) = (data.oracle_gradients(), naive_draws(&data, None));
            for (gradient, tensor) in &computed {
                let round = |values: &Vec<f32>| values.iter().map(|&value| round_to(tensor.dtype(), value)).collect();
                let naive: Vec<Vec<f32>> = naive[gradient].iter().map(round).collect();
                let check = bound_of_draws(tensor.dtype(), &tensor.values(), &naive, &oracle[gradient]);
                assert!(check.holds(), "{} {gradient:?}: {check:?}", row.symbol());
            }
            plan.launches().collect()
        })
        .collect();
    let ran = |row: &Instance| launched.iter().flatten().any(|symbol| *symbol == row.symbol());
    let backward = |row: &&Instance| row.runs_on(Engine::Emulated) && row.direction == Direction::Backward;
    let missed: Vec<String> = INSTANCES.iter().filter(backward).filter(|row| !ran(row)).map(Instance::symbol).collect();
    assert!(missed.is_empty(), "never launched: {missed:?}");
}

/// What training an adapter asks for: the text is frozen.
fn of_the_adapter(gradient: Gradient) -> bool {
    !matches!(gradient, Gradient::K(0) | Gradient::V(0) | Gradient::Gate(0))
}

#[test]
fn an_adapter_is_trained_in_one_pass() {
    let case = Case::decoupled("adapter", DType::F16, [2, 150, 3, 40], 77, &[4, 16]).value_dim(32);
    let data = Data::new(&case, 52);
    let tensors = data.gradient_tensors(DType::F32, of_the_adapter);
    let (_, plan, reports) = run(&data, &Settings::default(), data.dout.view(), tensors).expect("a legal problem");
    let names: Vec<String> = plan.launches().collect();
    assert_eq!(names[0], "backward_short_sm80_f16_w40");
    assert!(names[1..].iter().all(|name| name.starts_with("backward_reduce_sm80")), "{names:?}");
    let rows = 2 * 150 * 3;
    let (q, dout, dq) = (reports[0].buffer("q"), reports[0].buffer("dout"), reports[0].buffer("dq"));
    assert_eq!((q.read_async, q.read, q.written), (rows * 40 * 2, 0, 0));
    assert_eq!((dout.read_async, dout.read, dout.written), (rows * 32 * 2, 0, 0));
    assert_eq!((dq.written, dq.read), (rows * 40 * 4, 0));
    // Nor is anything done for the keys of the frozen text: 5 tiles of 16 keys, beside 2 of the images.
    let with_text = data.gradient_tensors(DType::F32, |_| true);
    let (_, _, all) = run(&data, &Settings::default(), data.dout.view(), with_text).expect("a legal problem");
    let of_a_tile = (all[0].stats.mma - reports[0].stats.mma) / 5;
    let (tiles_of_queries, heads) = (3, 2 * 3);
    // Of 64 queries and 16 keys, each of two products takes 4 steps, in 5 columns of 8.
    assert_eq!(of_a_tile, tiles_of_queries * heads * 2 * 4 * 5);
}

#[test]
fn what_nobody_wants_is_not_computed() {
    let case =
        Case::plain("subset", DType::F16, [1, 130, 2, 64], 200).bias(0, DType::F32, [1, 1, 1, 200], BiasValues::Random);
    let data = Data::new(&case, 53);
    let products = |wanted: &[Gradient]| -> u64 {
        let tensors = data.gradient_tensors(DType::F32, |gradient| wanted.contains(&gradient));
        let (_, _, reports) = run(&data, &Settings::default(), data.dout.view(), tensors).expect("a legal problem");
        reports.iter().map(|report| report.stats.mma).sum()
    };
    // Two products for the statistics; then, each time, those that the gradient needs.
    let statistics = products(&[Gradient::Gate(0)]);
    let per_product = statistics / 2;
    assert_eq!(products(&[Gradient::Q]), statistics + 3 * per_product);
    // Sixteen keys by 64 queries instead of the other way round: as many products, of whole tiles of keys.
    assert_eq!(products(&[Gradient::V(0)]), statistics + 2 * per_product);
    assert_eq!(products(&[Gradient::K(0)]), statistics + 3 * per_product);
    assert_eq!(products(&[Gradient::K(0), Gradient::V(0)]), statistics + 4 * per_product);
    assert_eq!(products(&[Gradient::Bias(0)]), statistics + 2 * per_product);
    assert_eq!(products(&[]), 0);
}

#[test]
fn tiles_outside_a_window_are_passed_over() {
    let all = Case::plain("band", DType::F16, [1, 256, 2, 64], 256);
    // Each query its own key: of the four blocks of queries and of keys each meets one.
    let band = all.clone().window(0, Some(0), Some(0));
    let products = |case: &Case| -> Vec<(String, u64)> {
        let data = Data::new(case, 59);
        let tensors = data.gradient_tensors(DType::F32, |_| true);
        let (_, plan, reports) = run(&data, &Settings::default(), data.dout.view(), tensors).expect("a legal problem");
        plan.launches().zip(reports.iter().map(|report| report.stats.mma)).collect()
    };
    let (of_all, of_band) = (products(&all), products(&band));
    assert!(of_all[0].1 > 0 && of_all[1].1 > 0, "{of_all:?}");
    for ((symbol, most), (_, few)) in of_all.iter().zip(&of_band) {
        assert_eq!(few * 4, *most, "{symbol}");
    }
}

/// Cases that between them go through every part of the kernels.
fn eventful() -> Vec<Case> {
    vec![
        Case::decoupled("eventful", DType::F16, [1, 200, 2, 64], 77, &[20, 4])
            .gate(1, GateCase::PerHead)
            .region(2, RegionCase::Shared),
        Case::plain("streamed", DType::F16, [1, 150, 2, 64], 200).causal(0, Causal::BottomRight).bias(
            0,
            DType::F32,
            [1, 1, 1, 200],
            BiasValues::Random,
        ),
        // The first branch ends before the first barrier of the loop over tiles.
        Case::decoupled("brief", DType::F16, [1, 130, 1, 64], 20, &[70]),
        // One stage of queries, and two tiles of them for each block.
        Case::decoupled("wide", DType::BF16, [1, 200, 2, 80], 77, &[16]),
    ]
}

#[test]
fn thirty_schedules_give_the_same_bits() {
    for settings in kernels() {
        for case in eventful() {
            let data = Data::new(&case, 56);
            let run = |seed: u64| match run_all(&data, &Settings { seed, ..settings.clone() }) {
                Ok((tensors, ..)) => Some(bits(&tensors)),
                Err(Error::Refused(_)) => None,
                Err(error) => panic!("{} {} seed {seed}: {error}", name(&settings), case.name),
            };
            let first = run(0);
            (1..30u64).into_par_iter().for_each(|seed| assert!(run(seed) == first, "{} seed {seed}", name(&settings)));
        }
    }
}

/// Where the launches of a case synchronise, with their numbers; nothing of a case that the kernel does not take.
fn sites_of(settings: &Settings, case: &Case) -> Vec<(usize, String, SyncSite)> {
    let Ok((_, plan, reports)) = run_all(&Data::new(case, 57), settings) else { return Vec::new() };
    let launches = plan.launches().zip(reports).enumerate();
    let sites = |(number, (symbol, report)): (usize, (String, Report))| {
        let of_launch = report.sync_sites.to_vec();
        of_launch.into_iter().map(move |site| (number, symbol.clone(), site))
    };
    launches.flat_map(sites).collect()
}

/// Whether some schedule of the case fails, or gives other bits, without a synchronisation.
fn noticed(settings: &Settings, case: &Case, launch: usize, site: &SyncSite) -> bool {
    let data = Data::new(case, 57);
    let Ok((expected, ..)) = run_all(&data, settings) else { return false };
    (0..4).any(|seed| {
        let without = Some((launch, site.clone()));
        match run_all(&data, &Settings { seed, without, ..settings.clone() }) {
            Err(Error::Fault { .. }) => true,
            Err(error) => panic!("{error}"),
            Ok((changed, ..)) => bits(&changed) != bits(&expected),
        }
    })
}

#[test]
fn every_synchronisation_is_needed() {
    for settings in kernels() {
        let mut sites: Vec<(String, Case, usize, SyncSite)> = Vec::new();
        for case in eventful() {
            for (launch, symbol, site) in sites_of(&settings, &case) {
                // A line of the source is one site, in however many instances of the kernel it stands; one of PTX is of one
                // instance.
                let line = match settings.rung {
                    Rung::Source => {
                        let chain =
                            site.location.rsplit_once(" <- ").map_or(site.location.as_str(), |(chain, _)| chain);
                        format!("{} at {chain}", site.what)
                    }
                    Rung::Ptx => format!("{} at {} of {symbol}", site.what, site.location),
                };
                sites.push((line, case.clone(), launch, site));
            }
        }
        let mut lines: Vec<&String> = sites.iter().map(|(line, ..)| line).collect();
        lines.sort();
        lines.dedup();
        assert!(lines.len() >= 8, "{} synchronises at {} places", name(&settings), lines.len());
        let is_noticed = |line: &&&String| {
            let mut here = sites.iter().filter(|(of, ..)| of == **line);
            !here.any(|(_, case, launch, site)| noticed(&settings, case, *launch, site))
        };
        let missed: Vec<&&String> = lines.par_iter().filter(is_noticed).collect();
        assert!(missed.is_empty(), "{}: removing these changes nothing: {missed:#?}", name(&settings));
    }
}

#[test]
fn saved_results_spare_the_first_sweep() {
    let case = Case::plain("saved", DType::BF16, [1, 130, 2, 64], 200).gate(0, GateCase::Scalar(0.5));
    let data = Data::new(&case, 58);
    let (out, lse) = data.run(Engine::Emulated);
    let products = |backward: Backward<TensorRef<'_>>| -> u64 {
        let tensors = data.gradient_tensors(DType::F32, |gradient| gradient == Gradient::Q);
        let (_, _, reports) = run(&data, &Settings::default(), backward, tensors).expect("a legal problem");
        reports.iter().map(|report| report.stats.mma).sum()
    };
    let anew = products(Backward::new(data.dout.view()));
    let saved = products(Backward::new(data.dout.view()).saved(out.view(), lse.view()));
    // Five products in all, of which the first sweep has two.
    assert_eq!(saved * 5, anew * 3);
}
