//! Which kernel computes a problem, or every reason why none does. Needs no GPU and no data.

#[cfg_attr(not(any(feature = "cuda", feature = "emulated")), allow(dead_code, reason = "only launches look into it"))]
pub(crate) mod backward;
pub(crate) mod cpu;
mod device;
mod instances;
#[cfg(any(feature = "cuda", feature = "emulated"))]
pub(crate) mod launch;
mod objections;
#[cfg(any(feature = "cuda", feature = "emulated"))]
#[expect(dead_code, reason = "the build script reads the offsets")]
pub(crate) mod params;
mod refusal;
mod sm80;
mod sm90;
#[allow(dead_code, reason = "the build script reads names and the PTX architecture")]
mod target;
mod waves;

pub use device::{CudaDevice, Device};
pub use instances::{DeviceCode, Engine, INSTANCES, Instance, MAX_BRANCHES, MAX_SEGMENTS, MAX_SUMS, support_table};
pub(crate) use objections::table_reasons;
pub use refusal::{CudaError, Reason, Refusal};
pub use target::{Form, Target, Toolkit};

use crate::problem::{Direction, Problem, elements};
use backward::Division;
use smallvec::SmallVec;
use std::fmt;

/// How a problem will be computed.
#[derive(Clone, Debug)]
pub struct Plan {
    engine: Engine,
    instance: &'static Instance,
    /// Blocks that share the queries of one head; 0 on a host engine.
    head_blocks: usize,
    /// Of the GPU; 0 on a host engine.
    multiprocessors: usize,
    launches: SmallVec<[Launched; 4]>,
    workspace_bytes: usize,
}

/// One launch of a plan for a GPU, which has at least one block.
#[derive(Clone, Debug)]
pub(crate) struct Launched {
    pub(crate) instance: &'static Instance,
    pub(crate) blocks: usize,
    /// Of the kernel that adds up parts: which list of sums, and the first of the launch.
    #[cfg_attr(
        not(any(feature = "cuda", feature = "emulated")),
        allow(dead_code, reason = "only launches look into it")
    )]
    pub(crate) sums: Option<(usize, usize)>,
}

impl Plan {
    /// Chooses the kernel for `problem` on `device`.
    ///
    /// # Errors
    /// [`Refusal`] with every reason of the kernel that came nearest.
    pub fn new(problem: &Problem, device: &Device) -> Result<Plan, Refusal> {
        Self::among(problem, device, |_| true)
    }

    /// The same with only some rows of the table to choose from, for tests that compare kernels.
    pub(crate) fn among(
        problem: &Problem,
        device: &Device,
        admitted: impl Fn(&Instance) -> bool,
    ) -> Result<Plan, Refusal> {
        let engine = device.engine();
        let rows = || Instance::leading(engine, problem.direction()).filter(|row| admitted(row));
        if let Some(plan) = rows().find_map(|row| Plan::fitting(row, problem, device)) {
            let finer = plan.instance.finer().filter(|row| admitted(row));
            let finer = finer.and_then(|row| Plan::fitting(row, problem, device));
            let sooner = finer.filter(|finer| waves::is_sooner(finer, &plan, problem));
            return Ok(sooner.unwrap_or(plan));
        }
        let mut nearest: Option<Vec<Reason>> = None;
        for instance in rows() {
            let mut reasons = Vec::new();
            objections::of_row(instance, problem, device, &mut |reason| reasons.push(reason()));
            if reasons.is_empty() {
                let plan = Plan::with(instance, problem, device);
                objections::of_plan(&plan, &mut |reason| reasons.push(reason()));
            }
            if nearest.as_ref().is_none_or(|known| reasons.len() < known.len()) {
                nearest = Some(reasons);
            }
        }
        Err(Refusal { engine, reasons: nearest.unwrap_or_else(|| table_reasons(engine, problem)) })
    }

    /// Of every other kernel for the same direction and GPU, in the table's order, why it does not run `problem`, which this is the
    /// plan of on `device`.
    pub fn not_taken(&self, problem: &Problem, device: &Device) -> Vec<NotTaken> {
        let mut kernels: Vec<NotTaken> = Vec::new();
        for row in Instance::leading(self.engine, self.direction()).filter(|row| row.kernel != self.kernel()) {
            let mut reasons = Vec::new();
            objections::of_row(row, problem, device, &mut |reason| reasons.push(reason()));
            // As far as this kernel's own widths go.
            let rows = Instance::leading(self.engine, self.direction()).filter(|other| other.kernel == row.kernel);
            let widest = rows.map(|row| row.max_head_dim).max();
            for reason in &mut reasons {
                if let (Reason::Width { limit, .. }, Some(widest)) = (reason, widest) {
                    *limit = widest;
                }
            }
            match kernels.last_mut().filter(|known| known.kernel == row.kernel) {
                Some(known) if reasons.len() < known.reasons.len() => known.reasons = reasons,
                Some(_) => {}
                None => kernels.push(NotTaken { kernel: row.kernel, reasons }),
            }
        }
        let other = |reason: &Reason| matches!(reason, Reason::OtherGpu { .. } | Reason::ComputeCapability { .. });
        kernels.retain(|kernel| !kernel.reasons.iter().any(other));
        kernels
    }

    /// With a row that nothing speaks against.
    fn fitting(instance: &'static Instance, problem: &Problem, device: &Device) -> Option<Plan> {
        // Most rows do not fit; that costs a call nothing but the question.
        let mut fits = true;
        objections::of_row(instance, problem, device, &mut |_| fits = false);
        let plan = fits.then(|| Plan::with(instance, problem, device))?;
        objections::of_plan(&plan, &mut |_| fits = false);
        fits.then_some(plan)
    }

    /// With a row that nothing of its own speaks against.
    fn with(instance: &'static Instance, problem: &Problem, device: &Device) -> Plan {
        let mut plan = Plan {
            engine: device.engine(),
            instance,
            head_blocks: head_blocks(instance, problem, device),
            multiprocessors: device.multiprocessors(),
            launches: SmallVec::new(),
            workspace_bytes: workspace_bytes(instance, problem, device),
        };
        if instance.device.is_some() {
            let division = plan.division(problem);
            plan.workspace_bytes = division.workspace_bytes;
            plan.add_launches(problem, &division);
        }
        plan
    }

    /// How the launches of a backward divide the work; empty for a forward.
    pub(crate) fn division(&self, problem: &Problem) -> Division {
        let followers = [sm80::BACKWARD_KEYS, sm80::BACKWARD_BIAS].map(|kernel| self.instance.follower(kernel));
        Division::new(problem, followers, self.head_blocks, self.multiprocessors)
    }

    fn add_launches(&mut self, problem: &Problem, division: &Division) {
        let mut add = |instance: Option<&'static Instance>, blocks: usize, sums: Option<(usize, usize)>| {
            let launch = instance.filter(|_| blocks > 0).map(|instance| Launched { instance, blocks, sums });
            self.launches.extend(launch);
        };
        let queries = elements(&[self.head_blocks, problem.heads, problem.batch]);
        let wanted = problem.direction() == Direction::Forward || division.branches != 0;
        add(Some(self.instance), if wanted { queries } else { 0 }, None);
        let of_segments = |blocks: fn(&backward::SegmentDivision) -> usize| division.segments.iter().map(blocks).sum();
        add(self.instance.follower(sm80::BACKWARD_KEYS), of_segments(|segment| segment.key_blocks), None);
        add(self.instance.follower(sm80::BACKWARD_BIAS), of_segments(|segment| segment.bias_blocks), None);
        for (stage, sums) in division.sums.iter().enumerate() {
            for (chunk, sums) in sums.chunks(MAX_SUMS).enumerate() {
                let reduce = self.instance.follower(sm80::BACKWARD_REDUCE);
                let threads = reduce.and_then(|row| row.device.as_ref()).map_or(1, |code| code.threads as usize);
                let blocks = sums.iter().map(|sum| sum.blocks(threads)).sum();
                add(reduce, blocks, Some((stage, chunk * MAX_SUMS)));
            }
        }
    }

    /// Engine that runs it.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Name of the kernel, a row of the table.
    pub fn kernel(&self) -> &'static str {
        self.instance.kernel
    }

    /// Forward or backward.
    pub fn direction(&self) -> Direction {
        self.instance.direction
    }

    /// Name of the row of the table: the kernel and, of device code, its type and tile width.
    pub fn symbol(&self) -> String {
        self.instance.symbol()
    }

    /// Names of the rows that are launched on a GPU, in order; several in a backward, none where there is nothing to do.
    pub fn launches(&self) -> impl Iterator<Item = String> + use<'_> {
        self.launches.iter().map(|launch| launch.instance.symbol())
    }

    /// The launches themselves.
    #[cfg(any(feature = "cuda", feature = "emulated"))]
    pub(crate) fn launched(&self) -> &[Launched] {
        &self.launches
    }

    /// Whether its kernel copies by tensor maps.
    #[cfg(any(feature = "cuda", feature = "emulated"))]
    pub(crate) fn has_tensor_maps(&self) -> bool {
        self.instance.device.as_ref().is_some_and(|code| code.tensor_maps)
    }

    /// Whether it stores by one as well.
    #[cfg(any(feature = "cuda", feature = "emulated"))]
    pub(crate) fn stores_by_map(&self) -> bool {
        self.instance.device.as_ref().is_some_and(|code| code.stores_by_map)
    }

    /// Keys that one copy by a tensor map brings.
    #[cfg(any(feature = "cuda", feature = "emulated"))]
    pub(crate) fn mapped_keys(&self) -> usize {
        let stay = self.instance.device.as_ref().is_some_and(|code| code.shared_bytes_per_key_tile > 0);
        if stay { 16 } else { self.instance.block_kv }
    }

    /// Queries of one tile.
    pub(crate) fn block_q(&self) -> usize {
        self.instance.block_q
    }

    /// Keys of one tile.
    pub(crate) fn block_kv(&self) -> usize {
        self.instance.block_kv
    }

    /// Bytes of scratch. On a GPU the caller's, who hands it to the call; the host engines allocate it themselves: the cpu
    /// engine tiles per thread and, backward, a few numbers of every query, the reference its results in f64.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Whether two runs on the same machine give the same bits.
    pub fn is_deterministic(&self) -> bool {
        self.instance.deterministic
    }
}

/// A kernel that does not run a problem because of what speaks against it, or because another comes first.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct NotTaken {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// All that speaks against the row that comes nearest; nothing if it would take the problem too.
    pub reasons: Vec<Reason>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "engine         {}", self.engine().name())?;
        writeln!(f, "kernel         {}", self.symbol())?;
        writeln!(f, "direction      {}", self.direction().name())?;
        writeln!(f, "workspace      {} bytes", self.workspace_bytes())?;
        if let Some(code) = &self.instance.device {
            writeln!(f, "blocks         {} a head, {} threads each", self.head_blocks, code.threads)?;
            for follower in self.launches().filter(|name| *name != self.symbol()) {
                writeln!(f, "then           {follower}")?;
            }
        }
        write!(f, "deterministic  {}", if self.is_deterministic() { "yes" } else { "no" })
    }
}

/// What this build's kernels were compiled with; nothing where no CUDA compiler was found.
#[cfg(feature = "cuda")]
pub(crate) const TOOLKIT: Option<Toolkit> = include!(concat!(env!("OUT_DIR"), "/toolkit.rs"));
#[cfg(not(feature = "cuda"))]
pub(crate) const TOOLKIT: Option<Toolkit> = None;

/// Blocks for one head's queries: as many as it has tiles, or, where a block keeps all keys, as many as give each
/// multiprocessor two blocks, so that the keys are loaded rarely; on sm_90, where a multiprocessor has one block, as many as
/// end soonest.
fn head_blocks(instance: &Instance, problem: &Problem, device: &Device) -> usize {
    let Some(code) = &instance.device else { return 0 };
    let tiles = problem.seq_q.div_ceil(instance.block_q);
    if code.shared_bytes_per_key_tile == 0 {
        return tiles;
    }
    let heads = elements(&[problem.batch, problem.heads]).max(1);
    if let Some([consumers, _]) = code.entry.warpgroups {
        return waves::soonest(heads, tiles, device.multiprocessors(), consumers);
    }
    (2 * device.multiprocessors()).div_ceil(heads).clamp(1, tiles.max(1)).min(tiles)
}

fn workspace_bytes(instance: &Instance, problem: &Problem, device: &Device) -> usize {
    match *device {
        Device::Cpu { threads } if instance.direction == Direction::Backward => {
            cpu::backward_bytes(instance, problem, threads)
        }
        Device::Cpu { threads } => cpu::forward_bytes(problem, threads),
        // Probabilities and slopes of one row; the results in f64.
        Device::Reference => {
            let row = 2 * problem.seq_kv().max().unwrap_or(0);
            row.saturating_add(problem.result_elements()).saturating_mul(size_of::<f64>())
        }
        Device::Emulated { .. } | Device::Cuda(_) => 0,
    }
}
