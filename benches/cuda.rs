//! The cuda engine on shapes of real models, by the GPU's own clock: `cargo bench --bench cuda`. Each shape is first held
//! against the oracle on few queries. All launches have the same tensors: what the cache holds is warm. Cold times, and
//! more shapes, are the command line's: `fused-attention bench --engine cuda`.

#[path = "../tests/cases/mod.rs"]
mod cases;
#[path = "../tests/cuda/device.rs"]
mod device;
mod support;

use cases::Data;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use device::Request;
use fused_attention::cuda::cudarc::driver::sys::{
    CUevent_flags as EventFlags, CUgraphInstantiate_flags as GraphFlags, CUstreamCaptureMode as Mode,
};
use fused_attention::cuda::cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError};
use fused_attention::{DType, Engine, Outputs, Problem, Tensor};
use std::sync::Arc;
use std::time::Duration;
use support::{SHAPES, assert_correct, case};

/// Launches of one graph, so that what its start takes does not show.
const LAUNCHES: u64 = 32;

/// A request that a graph launches again and again.
struct Replay {
    graph: CudaGraph,
    stream: Arc<CudaStream>,
    before: CudaEvent,
    after: CudaEvent,
    /// The graph's tensors.
    _request: Request,
}

impl Replay {
    fn new(stream: &Arc<CudaStream>, data: &Data) -> Result<Self, DriverError> {
        let mut request = Request::new(stream, data)?;
        // Loads the kernel, which no capture may.
        request.launch(stream).expect("a launch");
        stream.synchronize()?;
        stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        for _ in 0..LAUNCHES {
            request.launch(stream).expect("a launch");
        }
        let graph = stream.end_capture(GraphFlags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)?;
        let graph = graph.expect("a graph of the launches");
        graph.upload()?;
        let event = || stream.context().new_event(Some(EventFlags::CU_EVENT_DEFAULT));
        Ok(Replay { graph, stream: stream.clone(), before: event()?, after: event()?, _request: request })
    }

    /// What so many launches take, of whole graphs at least as many.
    fn time(&self, launches: u64) -> Result<Duration, DriverError> {
        let replays = launches.div_ceil(LAUNCHES);
        // Not counted: keeps the GPU busy until the next is submitted.
        self.graph.launch()?;
        self.before.record(&self.stream)?;
        for _ in 0..replays {
            self.graph.launch()?;
        }
        self.after.record(&self.stream)?;
        let seconds = f64::from(self.before.elapsed_ms(&self.after)?) * 1e-3;
        Ok(Duration::from_secs_f64(seconds * launches as f64 / (replays * LAUNCHES) as f64))
    }
}

fn forward(criterion: &mut Criterion) {
    if let Err(reason) = fused_attention::device(Engine::Cuda) {
        eprintln!("LEFT OUT: benches of the cuda engine: {reason}");
        return;
    }
    let context = CudaContext::new(0).expect("a device");
    // SAFETY: everything here is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    for dtype in [DType::F16, DType::BF16] {
        let mut group = criterion.benchmark_group(format!("cuda_forward_{dtype}"));
        for (name, q, text, image) in SHAPES {
            let few = case(name, dtype, [1, 40, 2, q[3]], text, image);
            assert_correct(&few, |data| {
                let mut request = Request::new(&stream, data).expect("memory on the device");
                request.launch(&stream).expect("a launch");
                request.results(&stream).expect("results").0
            });

            let data = Data::new(&case(name, dtype, q, text, image), 1);
            let outputs = Outputs::new(data.outputs().0.view_mut().desc());
            let problem = Problem::forward(&data.attention().desc(), &outputs).expect("a legal problem");
            let replay = Replay::new(&stream, &data).expect("a graph");
            group.throughput(Throughput::Elements(problem.forward_flops() as u64));
            group.bench_function(BenchmarkId::new("cuda", name), |bencher| {
                bencher.iter_custom(|launches| replay.time(launches).expect("the driver's clock"));
            });
        }
    }
}

criterion_group!(benches, forward);
criterion_main!(benches);
