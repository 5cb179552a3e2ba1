//! The GPU's own clock: work captured into a CUDA graph, replayed between two events.

use super::REPEATS;
use crate::failure::Failure;
use fused_attention::cuda::cudarc::driver::sys::{
    CUdevice_attribute as Attribute, CUevent_flags as EventFlags, CUgraphInstantiate_flags as GraphFlags,
    CUstreamCaptureMode as Mode,
};
use fused_attention::cuda::cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Launches of one graph, unless more are asked for: so many that what its start takes does not show.
const LAUNCHES: f64 = 32.0;
/// What a graph need not take longer than for that.
const LONG: f64 = 1e-3;

/// The first GPU and a stream on it.
pub(super) struct Gpu {
    context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
}

impl Gpu {
    pub(super) fn first() -> Result<Self, Failure> {
        let context = CudaContext::new(0).map_err(failed)?;
        // SAFETY: everything that is timed is on one stream, and waits for it before memory is given back.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed)?;
        Ok(Gpu { context, stream })
    }

    /// Bytes of the second-level cache; 0 where the driver knows of none.
    pub(super) fn cache_bytes(&self) -> usize {
        let told = self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
        told.ok().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0)
    }

    fn event(&self) -> Result<CudaEvent, Failure> {
        self.context.new_event(Some(EventFlags::CU_EVENT_DEFAULT)).map_err(failed)
    }

    /// How many launches of what `launch` puts on the stream make a graph long enough. Runs it twice.
    pub(super) fn enough(&self, mut launch: impl FnMut() -> Result<(), Failure>) -> Result<usize, Failure> {
        let (before, after) = (self.event()?, self.event()?);
        launch()?;
        before.record(&self.stream).map_err(failed)?;
        launch()?;
        after.record(&self.stream).map_err(failed)?;
        let seconds = f64::from(before.elapsed_ms(&after).map_err(failed)?) * 1e-3;
        Ok((LONG / seconds.max(1e-9)).clamp(1.0, LAUNCHES).ceil() as usize)
    }

    /// The median time of one launch, of the `launches` that `enqueue` puts on the stream.
    pub(super) fn median(
        &self,
        launches: usize,
        at_least: Duration,
        enqueue: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Duration, Failure> {
        self.stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
        let captured = enqueue();
        let graph = self.stream.end_capture(GraphFlags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        captured?;
        let graph = graph.map_err(failed)?.ok_or_else(|| Failure::bad("the driver captured no graph"))?;
        graph.upload().map_err(failed)?;

        let (before, after) = (self.event()?, self.event()?);
        let (start, mut times) = (Instant::now(), Vec::new());
        while times.len() < REPEATS || start.elapsed() < at_least {
            // The first replay is not counted: it keeps the GPU busy until the second is submitted.
            graph.launch().map_err(failed)?;
            before.record(&self.stream).map_err(failed)?;
            graph.launch().map_err(failed)?;
            after.record(&self.stream).map_err(failed)?;
            times.push(f64::from(before.elapsed_ms(&after).map_err(failed)?) * 1e-3 / launches as f64);
        }
        self.stream.synchronize().map_err(failed)?;
        times.sort_unstable_by(f64::total_cmp);
        Ok(Duration::from_secs_f64(times[times.len() / 2]).max(Duration::from_nanos(1)))
    }
}

pub(super) fn failed(error: DriverError) -> Failure {
    Failure::Refused(vec![format!("the CUDA driver answered {:?}", error.0)])
}
