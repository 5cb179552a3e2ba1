//! The cpu engine on shapes of real models: `cargo bench`. Each shape is first held against the oracle on few queries.

#[path = "../tests/cases/mod.rs"]
mod cases;
mod support;

use cases::Data;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fused_attention::{DType, Engine, Outputs, Problem, Tensor};
use support::{SHAPES, assert_correct, case};

fn forward(criterion: &mut Criterion) {
    for dtype in [DType::F32, DType::F16] {
        let mut group = criterion.benchmark_group(format!("forward_{dtype}"));
        group.sample_size(10);
        for (name, q, text, image) in SHAPES {
            let few = case(name, dtype, [1, 40, 2, q[3]], text, image);
            assert_correct(&few, |data| data.run(Engine::Cpu).0.values());

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

criterion_group!(benches, forward);
criterion_main!(benches);
