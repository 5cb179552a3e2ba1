//! The cpu engine on shapes of real models: `cargo bench`. Each shape is first held against the oracle on few queries.

#[path = "../tests/cases/mod.rs"]
mod cases;

use cases::{Case, Data, GateCase, RegionCase, bound, naive};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fused_attention::{DType, Engine, Outputs, Problem, Tensor};

/// Name, `[batch, seq_q, heads, head_dim]`, keys of the text and of each image branch.
const SHAPES: [(&str, [usize; 4], usize, &[usize]); 5] = [
    ("sd15_self_32x32", [1, 1024, 8, 80], 1024, &[]),
    ("sdxl_self_32x32", [1, 1024, 20, 64], 1024, &[]),
    ("sdxl_text_64x64", [1, 4096, 10, 64], 77, &[]),
    ("sdxl_ip_adapter_64x64", [2, 4096, 10, 64], 77, &[16]),
    ("sdxl_two_adapters_64x64", [2, 4096, 10, 64], 77, &[4, 16]),
];

fn case(name: &str, dtype: DType, q: [usize; 4], text: usize, image: &[usize]) -> Case {
    let case = Case::decoupled(name, dtype, q, text, image);
    (1..=image.len())
        .fold(case, |case, branch| case.gate(branch, GateCase::Scalar(0.6)).region(branch, RegionCase::Shared))
}

fn forward(criterion: &mut Criterion) {
    for dtype in [DType::F32, DType::F16] {
        let mut group = criterion.benchmark_group(format!("forward_{dtype}"));
        group.sample_size(10);
        for (name, q, text, image) in SHAPES {
            assert_correct(&case(name, dtype, [1, 40, 2, q[3]], text, image));

            let data = Data::new(&case(name, dtype, q, text, image), 1);
            let (mut out, _) = data.outputs();
            let attention = data.attention();
            let outputs = Outputs::new(out.view_mut().desc());
            let problem = Problem::forward(&attention.desc(), &outputs).expect("a legal problem");
            group.throughput(Throughput::Elements(problem.forward_flops() as u64));
            group.bench_function(BenchmarkId::new("cpu", name), |bencher| {
                bencher.iter(|| attention.forward(Engine::Cpu, out.view_mut()).expect("a legal problem"));
            });
        }
    }
}

fn assert_correct(case: &Case) {
    let data = Data::new(case, 1);
    let oracle = data.attention().forward_f64().expect("a legal problem");
    let got = data.run(Engine::Cpu).0.values();
    let check = bound(case.dtype, &got, &naive(&data).out, &oracle.out.values);
    assert!(check.holds(), "{}: {check:?}", case.name);
}

criterion_group!(benches, forward);
criterion_main!(benches);
