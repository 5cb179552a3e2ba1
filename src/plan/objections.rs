//! What speaks against a row of the table: everything, so that a refusal can tell it all.

use super::{Device, DeviceCode, Engine, Instance, MAX_BRANCHES, Plan, Reason, TOOLKIT, Target};
use crate::problem::{DType, Gradient, Problem, Results, SegmentProblem};

/// Is called with each reason against an instance, which is made only if it is wanted.
pub(super) type Objections<'o> = dyn FnMut(&dyn Fn() -> Reason) + 'o;

/// What a row has against a problem on a device, but for its launches.
pub(super) fn of_row(instance: &Instance, problem: &Problem, device: &Device, object: &mut Objections<'_>) {
    of_table(instance, device.engine(), problem, object);
    of_device(instance, problem, device, object);
}

/// Launches and scratch that are too large.
pub(super) fn of_plan(plan: &Plan, object: &mut Objections<'_>) {
    if let Some(blocks) =
        plan.launches.iter().map(|launch| launch.blocks as u128).max().filter(|&blocks| blocks > MAX_GRID)
    {
        object(&|| Reason::Grid { blocks });
    }
    if isize::try_from(plan.workspace_bytes).is_err() {
        object(&|| Reason::Workspace { bytes: plan.workspace_bytes });
    }
}

/// Whatever the device.
fn of_table(instance: &Instance, engine: Engine, problem: &Problem, object: &mut Objections<'_>) {
    // All rows of an engine speak with one voice: that a narrow row is passed over is no reason.
    let rows = || Instance::leading(engine, instance.direction);
    if !instance.dtypes.contains(&problem.dtype) {
        object(&|| {
            let mut supported: Vec<DType> = rows().flat_map(|row| row.dtypes).copied().collect();
            supported.sort_by_key(|dtype| dtype.name());
            supported.dedup();
            Reason::DType { got: problem.dtype, supported }
        });
    }
    for (dim, got) in [("head_dim", problem.head_dim), ("value_dim", problem.value_dim)] {
        if got > instance.max_head_dim {
            let widest = || rows().map(|row| row.max_head_dim).max().unwrap_or(0);
            object(&|| Reason::Width { dim, got, limit: widest() });
        }
        if !got.is_multiple_of(instance.head_dim_step) {
            object(&|| Reason::Step { dim, got, step: instance.head_dim_step });
        }
    }
    if let Some(device) = &instance.device {
        for branch in problem.branches.iter().filter(|_| device.shared_bytes_per_key_tile > 0) {
            let keys = branch.segments.iter().map(|segment| segment.seq_kv.next_multiple_of(16)).sum();
            if keys > instance.block_kv {
                object(&|| Reason::RowKeys { got: keys, limit: instance.block_kv });
            }
        }
        if problem.softcap.is_some() && !device.softcap {
            object(&|| Reason::Softcap);
        }
        if !device.biased {
            if let Some(segment) = problem.segments().position(|segment| segment.bias.is_some()) {
                object(&|| Reason::Bias { segment });
            }
            if problem.softmax_scale <= 0.0 {
                object(&|| Reason::Scale { got: problem.softmax_scale });
            }
        }
        if !device.positions
            && let Some(segment) = problem.segments().position(SegmentProblem::has_position_rule)
        {
            object(&|| Reason::Positions { segment });
        }
        for argument in problem.unmapped_rows(device.stores_by_map).filter(|_| device.tensor_maps) {
            object(&|| Reason::TensorMap { argument });
        }
        for argument in problem.misaligned_rows(instance.head_dim_step) {
            object(&|| Reason::Alignment { argument });
        }
        let segments = problem.segments().count();
        let lists = [("branches", problem.branches.len(), MAX_BRANCHES), ("segments", segments, device.max_segments)];
        for (list, got, limit) in lists.into_iter().filter(|&(_, got, limit)| got > limit) {
            object(&|| Reason::TooMany { list, got, limit });
        }
        // The most that any kernel starts: all queries of all heads, a tile each.
        let blocks = problem.heads as u128 * problem.batch as u128 * problem.seq_q.div_ceil(instance.block_q) as u128;
        if blocks > MAX_GRID {
            object(&|| Reason::Grid { blocks });
        }
    }
}

/// Blocks that a grid may have in its first dimension.
const MAX_GRID: u128 = i32::MAX as u128;

/// What the device lacks for a row and those that follow it.
fn of_device(instance: &Instance, problem: &Problem, device: &Device, object: &mut Objections<'_>) {
    let (Some(code), Some((have, shared))) = (&instance.device, device.limits()) else { return };
    let need = code.compute_capability;
    if code.specific && have != need {
        object(&|| Reason::OtherGpu { have, need });
    } else if have < need {
        object(&|| Reason::ComputeCapability { have, need });
    } else if let (Device::Cuda(_), Some(reason)) = (device, image_reason(code, have)) {
        object(&|| reason.clone());
    }
    let codes = [code].into_iter().chain(instance.followers().filter_map(|row| row.device.as_ref()));
    let need = codes.map(|code| code.shared_bytes_of(problem)).max().unwrap_or(0);
    if need > shared {
        object(&|| Reason::SharedMemory { need, have: shared });
    }
}

/// Whether this build holds the kernel in a form that the GPU loads.
fn image_reason(code: &DeviceCode, have: (u32, u32)) -> Option<Reason> {
    let Some(toolkit) = &TOOLKIT else { return Some(Reason::NoCompiler) };
    let compiled = toolkit.targets.iter().filter(|target| code.compiles_for(target));
    match Target::best(compiled, have) {
        Some(_) => None,
        None => Some(Reason::Architecture { have, compiled: toolkit.targets }),
    }
}

/// What the table alone says against an engine, whether or not its machine is there.
pub(crate) fn table_reasons(engine: Engine, problem: &Problem) -> Vec<Reason> {
    let direction = problem.direction();
    let mut reasons = Instance::leading(engine, direction)
        .map(|row| {
            let mut reasons = Vec::new();
            of_table(row, engine, problem, &mut |reason| reasons.push(reason()));
            reasons
        })
        .min_by_key(Vec::len)
        .unwrap_or_else(|| vec![Reason::NoKernel { direction }]);
    if engine == Engine::Cuda && TOOLKIT.is_none() {
        reasons.push(Reason::NoCompiler);
    }
    reasons
}

impl DeviceCode {
    /// Whether a build for the target holds it.
    pub fn compiles_for(&self, target: &Target) -> bool {
        target.takes(self.compute_capability, self.specific)
    }

    /// Bytes of dynamic shared memory of one block.
    pub(crate) fn shared_bytes_of(&self, problem: &Problem) -> u32 {
        let tiles = || problem.segments().map(|segment| segment.seq_kv.div_ceil(16)).enumerate();
        let with_gradients = tiles().filter(|&(n, _)| has_gradient(problem, n)).map(|(_, tiles)| tiles).sum();
        self.shared_bytes_for(problem.branches.len(), tiles().map(|(_, tiles)| tiles).sum(), with_gradients)
    }
}

/// Whether a gradient of the segment's keys or values is wanted.
fn has_gradient(problem: &Problem, segment: usize) -> bool {
    let Results::Backward { gradients, .. } = &problem.results else { return false };
    gradients.iter().any(|wanted| matches!(wanted.gradient, Gradient::K(n) | Gradient::V(n) if n == segment))
}
