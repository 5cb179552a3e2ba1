//! The forward kernels under emulation: what the emulator counts, any schedule, and that every synchronisation is needed.
#![cfg(feature = "emulated")]

mod cases;
mod emulation;

use cases::{Case, Data, GateCase, HostTensor, Layout, Naive, RegionCase, all, bound, naive};
use emulation::{name, rungs, settings};
use fused_attention::emulated::{Report, Rung, Settings, SyncSite};
use fused_attention::{Causal, DType, Direction, Engine, Error, INSTANCES, Instance, Outputs, reference};
use rayon::prelude::*;

fn kernels() -> Vec<Settings> {
    emulation::kernels(Direction::Forward)
}

/// Cases small enough to be run many times.
fn cases() -> Vec<Case> {
    let blocks = |case: &Case| case.batch * case.heads * case.seq_q.div_ceil(64);
    all().into_iter().filter(|case| case.has_kernel(Engine::Emulated) && blocks(case) < 100).collect()
}

type Emulated = (Vec<f32>, Vec<f32>, Option<Report>);

fn run(data: &Data, settings: &Settings) -> Result<Emulated, Error> {
    let (mut out, mut lse) = data.outputs();
    let outputs = Outputs::new(out.view_mut()).lse(lse.view_mut());
    let (_, report) = data.attention().forward_emulated(settings, outputs)?;
    assert!(out.gaps_untouched() && lse.gaps_untouched(), "{}: written beside an output", data.case.name);
    Ok((out.values(), lse.values(), report))
}

#[test]
fn each_kernel_alone_is_within_the_bound_and_free_of_bank_conflicts() {
    let kernels = kernels();
    let ran: Vec<Vec<bool>> = cases().par_iter().map(|case| within_bound(&kernels, case)).collect();
    for (n, settings) in kernels.iter().enumerate() {
        let ran = ran.iter().filter(|of_case| of_case[n]).count();
        assert!(ran >= 20, "{} takes {ran} cases", name(settings));
    }
}

/// Which kernels take the case.
fn within_bound(kernels: &[Settings], case: &Case) -> Vec<bool> {
    let data = Data::new(case, 21);
    let oracle = data.attention().forward_f64().expect("every case is a legal problem");
    let naive = naive(&data);
    kernels.par_iter().map(|settings| ran_within_bound(settings, &data, &naive, &oracle)).collect()
}

fn ran_within_bound(settings: &Settings, data: &Data, naive: &Naive, oracle: &reference::Forward) -> bool {
    let (case, kernel) = (&data.case, name(settings));
    let (out, lse, report) = match run(data, settings) {
        Ok(emulated) => emulated,
        Err(Error::Refused(_)) => return false,
        Err(error) => panic!("{kernel} {}: {error}", case.name),
    };
    for (what, check) in [
        ("out", bound(case.dtype, &out, &naive.out, &oracle.out.values)),
        ("lse", bound(DType::F32, &lse, &naive.lse, &oracle.lse.values)),
    ] {
        assert!(check.holds(), "{kernel} {} {what}: {check:?}", case.name);
    }
    if let Some(Report { stats, .. }) = report {
        assert_eq!(stats.ldmatrix_conflicts, 0, "{kernel} {}", case.name);
        assert_eq!(stats.cp_async_conflicts, 0, "{kernel} {}", case.name);
    }
    true
}

/// Shared memory of a block of sm_90.
const FITS: u32 = 227 << 10;

#[test]
fn every_row_of_the_table_runs() {
    let forward = |row: &&Instance| row.runs_on(Engine::Emulated) && row.direction == Direction::Forward;
    let rows = INSTANCES.iter().filter(forward);
    let rows: Vec<_> = rows.flat_map(|row| rungs(row).iter().map(move |&rung| (row, rung))).collect();
    rows.par_iter().for_each(|&(row, rung)| {
        let shape = [1, 70, 2, row.max_head_dim];
        let [_, several] = row.device.as_ref().expect("a row of device code").shared_bytes;
        let case = match several {
            0..=FITS => Case::decoupled(row.symbol(), row.dtypes[0], shape, 50, &[20]).region(1, RegionCase::Shared),
            // No block has room for the sum of several branches.
            _ => Case::plain(row.symbol(), row.dtypes[0], shape, 50).region(0, RegionCase::Shared),
        };
        let data = Data::new(&case, 25);
        let (mut out, _) = data.outputs();
        let settings = settings(row, rung);
        let (plan, _) = data.attention().forward_emulated(&settings, out.view_mut()).expect("a legal problem");
        assert_eq!(plan.symbol(), row.symbol());
        let oracle = data.attention().forward_f64().expect("a legal problem");
        let check = bound(case.dtype, &out.values(), &naive(&data).out, &oracle.out.values);
        assert!(check.holds(), "{}: {check:?}", row.symbol());
    });
}

#[test]
fn queries_are_read_once_and_results_written_once() {
    for settings in kernels() {
        let kernel = name(&settings);
        let case = Case::decoupled("traffic", DType::F16, [2, 150, 3, 40], 77, &[4, 16]).value_dim(32);
        let data = Data::new(&case, 22);
        let (mut out, _) = data.outputs();
        let (_, report) = data.attention().forward_emulated(&settings, out.view_mut()).expect("a legal problem");
        let report = report.expect("there are queries");
        let (q, out) = (report.buffer("q"), report.buffer("out"));
        let rows = 2 * 150 * 3 * 2;
        assert_eq!((q.read_async, q.read, q.written), (rows * 40, 0, 0), "{kernel}");
        assert_eq!((out.written, out.read), (rows * 32, 0), "{kernel}");
    }
}

#[test]
fn not_even_nan_passes_a_closed_gate() {
    let shape = [1, 130, 2, 64];
    // Of several branches, and of all there are.
    let cases = [
        Case::decoupled("closed", DType::F16, shape, 20, &[70, 90]).gate(1, GateCase::Scalar(0.0)),
        Case::plain("all_closed", DType::F16, shape, 90).gate(0, GateCase::Scalar(0.0)),
    ];
    for (settings, case) in kernels().iter().flat_map(|settings| cases.iter().map(move |case| (settings, case))) {
        let (clean, mut data) = (Data::new(case, 27), Data::new(case, 27));
        let closed = case.branches.len().min(2) - 1;
        let segment = &mut data.branches[closed].segments[0];
        for tensor in [&mut segment.k, &mut segment.v] {
            let values = vec![f32::NAN; tensor.elements()];
            *tensor = HostTensor::new(DType::F16, &tensor.shape.clone(), &values, Layout::Bshd);
        }
        let out = |data: &Data| run(data, settings).unwrap_or_else(|error| panic!("{}: {error}", name(settings))).0;
        assert_eq!(out(&data), out(&clean), "{} {}", name(settings), case.name);
    }
}

#[test]
fn source_and_ptx_differ_by_f32_roundings_at_most() {
    for settings in kernels().into_iter().filter(|settings| settings.rung == Rung::Ptx) {
        for case in eventful_of(&settings) {
            let data = Data::new(&case, 26);
            let [source, ptx] = [Rung::Source, Rung::Ptx]
                .map(|rung| run(&data, &Settings { rung, ..settings.clone() }).expect("a legal problem"));
            // nvcc reorders and fuses f32 arithmetic where the host's compiler must not. That shows in lse, and in a result of
            // a narrower type only where it lies on the border between two of its numbers.
            let other = source.0.iter().zip(&ptx.0).filter(|(a, b)| a != b).count();
            assert!(other * 100 <= source.0.len(), "{} {}: {other} of {}", name(&settings), case.name, source.0.len());
            let furthest = source.1.iter().zip(&ptx.1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(furthest <= 4e-6, "{} {}: lse differs by {furthest}", name(&settings), case.name);
        }
    }
}

/// Cases that between them go through every part of a kernel.
fn eventful_of(settings: &Settings) -> Vec<Case> {
    let mut cases = eventful();
    match settings.kernel.as_deref() {
        // More tiles of queries than the ring has stages, through each product that the kernel has; keys that end within a tile.
        Some("forward_short_sm90") => {
            cases.push(Case::decoupled("around", DType::F16, [1, 830, 1, 64], 77, &[4]).key_len(0, &[69]));
        }
        Some("forward_medium_sm90") => {
            cases.push(Case::decoupled("around", DType::F16, [1, 590, 1, 64], 77, &[4]).key_len(0, &[69]));
            cases.push(Case::plain("wide", DType::F16, [1, 590, 1, 64], 130));
        }
        // More tiles of keys than the ring has stages, in one branch and over several; keys that end within a tile.
        _ if settings.compute_capability == (9, 0) => {
            cases.push(Case::plain("long", DType::F16, [1, 70, 1, 64], 700).key_len(0, &[669]));
            cases.push(Case::decoupled("wound", DType::F16, [1, 70, 1, 64], 150, &[140, 20, 150]));
            cases.push(streamed());
        }
        _ => cases.push(streamed()),
    }
    cases
}

/// Those that every kernel takes.
fn eventful() -> Vec<Case> {
    vec![
        Case::decoupled("eventful", DType::F16, [1, 150, 2, 64], 77, &[20, 4])
            .gate(1, GateCase::PerHead)
            .region(2, RegionCase::Shared),
        // The first branch ends before the first barrier of the loop over tiles.
        Case::decoupled("brief", DType::F16, [1, 130, 1, 64], 20, &[70]),
    ]
}

/// For those that take position rules.
fn streamed() -> Case {
    Case::plain("streamed", DType::BF16, [1, 130, 1, 40], 90).causal(0, Causal::BottomRight)
}

#[test]
fn a_hundred_schedules_give_the_same_bits() {
    for settings in kernels() {
        let kernel = name(&settings);
        for case in eventful_of(&settings) {
            let data = Data::new(&case, 23);
            let bits = |seed: u64| -> Vec<u32> {
                let (out, lse, _) = run(&data, &Settings { seed, ..settings.clone() })
                    .unwrap_or_else(|error| panic!("{kernel} {} seed {seed}: {error}", case.name));
                out.iter().chain(&lse).map(|value| value.to_bits()).collect()
            };
            let first = bits(0);
            (1..100u64).into_par_iter().for_each(|seed| assert_eq!(bits(seed), first, "{kernel} seed {seed}"));
        }
    }
}

#[test]
fn every_synchronisation_is_needed() {
    for settings in kernels().iter().filter(|settings| settings.rung == Rung::Source) {
        let kernel = name(settings);
        let mut sites: Vec<SyncSite> = Vec::new();
        for case in eventful_of(settings) {
            for site in sites_of(settings, &case) {
                if !sites.iter().any(|known| known.location == site.location && known.what == site.what) {
                    sites.push(site);
                }
            }
        }
        assert!(sites.len() >= 5, "{kernel} synchronises at {} places", sites.len());
        // A line is one site, in however many instances of the kernel it stands.
        let line = |site: &SyncSite| {
            let chain = site.location.rsplit_once(" <- ").map_or(site.location.as_str(), |(chain, _)| chain);
            format!("{} at {chain}", site.what)
        };
        let cases = eventful_of(settings);
        let is_noticed = |site: &&SyncSite| cases.iter().any(|case| noticed(settings, case, site));
        let noticed: Vec<String> = sites.par_iter().filter(is_noticed).map(line).collect();
        let missed: Vec<String> = sites.iter().map(line).filter(|line| !noticed.contains(line)).collect();
        assert!(missed.is_empty(), "{kernel}: removing these changes nothing: {missed:#?}");
    }
}

#[test]
fn every_synchronisation_that_nvcc_emits_is_needed() {
    for settings in kernels().iter().filter(|settings| settings.rung == Rung::Ptx) {
        // A line of PTX belongs to one instance: all cases go to the same.
        let cases = eventful_of(settings).into_iter().map(|case| Case {
            dtype: DType::F16,
            head_dim: 64,
            value_dim: 64,
            ..case
        });
        let cases: Vec<Case> = cases.collect();
        let mut lines: Vec<SyncSite> = Vec::new();
        for site in cases.iter().flat_map(|case| sites_of(settings, case)) {
            if !lines.iter().any(|known| known.location == site.location) {
                lines.push(site);
            }
        }
        assert!(lines.len() >= 5, "{} synchronises at {} places", name(settings), lines.len());
        let missed: Vec<String> = (lines.par_iter())
            .filter(|site| !cases.iter().any(|case| noticed(settings, case, site)))
            .map(|site| format!("{} at {}", site.what, site.location))
            .collect();
        assert!(missed.is_empty(), "{}: without these nothing changes: {missed:#?}", name(settings));
    }
}

/// Where a kernel synchronises in a case.
fn sites_of(settings: &Settings, case: &Case) -> Vec<SyncSite> {
    let (.., report) = run(&Data::new(case, 24), settings).expect("a legal problem");
    report.expect("there are queries").sync_sites.iter().cloned().collect()
}

/// Whether some schedule of the case fails, or gives other bits, without a synchronisation.
fn noticed(settings: &Settings, case: &Case, site: &SyncSite) -> bool {
    let data = Data::new(case, 24);
    let (out, lse, _) = run(&data, settings).expect("a legal problem");
    (0..4).any(|seed| match run(&data, &Settings { seed, without: Some((0, site.clone())), ..settings.clone() }) {
        Err(Error::Fault { .. }) => true,
        Err(error) => panic!("{error}"),
        Ok((changed_out, changed_lse, _)) => changed_out != out || changed_lse != lse,
    })
}
