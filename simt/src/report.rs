//! What a launch tells: counts and synchronisation sites where it went well, one fault where it did not.

use std::ffi::CStr;
use std::fmt;
use std::ops::Deref;
use std::sync::OnceLock;

use crate::ffi;

/// Counts of one launch. The plain-access ones are collected with [`crate::Checks::Full`] only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Arrivals of single lanes at warp-wide instructions.
    pub collectives: u64,
    /// Matrix products of one warp.
    pub mma: u64,
    /// 8x8 matrices that `ldmatrix` read.
    pub ldmatrix_phases: u64,
    /// Extra passes that `ldmatrix` needed because rows share banks.
    pub ldmatrix_conflicts: u64,
    /// Groups of lanes that `cp.async` writes to shared memory at once.
    pub cp_async_phases: u64,
    /// Extra passes of `cp.async`.
    pub cp_async_conflicts: u64,
    /// Groups of lanes that a plain load or store of shared memory serves at once.
    pub shared_phases: u64,
    /// Extra passes of plain loads and stores.
    pub shared_conflicts: u64,
    /// Completed barriers among warps.
    pub barriers: u64,
    /// Completed barriers of one warp.
    pub warp_barriers: u64,
    /// Atomics and reductions on global memory, of single lanes.
    pub atomics: u64,
    /// Switches between fibers.
    pub switches: u64,
    /// Products of `wgmma` that were executed, of single warps.
    pub wgmma: u64,
    /// Bytes that `cp.async.bulk.tensor` wrote to shared memory, zero-filled ones included.
    pub bulk_bytes: u64,
}

/// Bytes that a launch moved from and to one buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BufferStats {
    /// By plain loads.
    pub read: u64,
    /// By `cp.async` and `cp.async.bulk.tensor`, zero-filled bytes not included.
    pub read_async: u64,
    /// By plain stores and bulk stores.
    pub written: u64,
    /// By atomics and reductions.
    pub atomic: u64,
}

/// A place in the kernel's source where it synchronises: a barrier, an arrival, a wait, a commit, a fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncSite {
    /// The instruction.
    pub what: String,
    /// Source lines, innermost inlined call first.
    pub location: String,
    /// How often threads executed it.
    pub executed: u64,
    /// Its addresses: several where the compiler unrolled or duplicated the line.
    pub(crate) pcs: Vec<u32>,
}

/// The synchronisation sites of a launch, a slice. Their source lines are looked up when it is first looked at, which
/// may take a second.
#[derive(Clone, Debug)]
pub struct SyncSites {
    /// Address, instruction, count.
    found: Vec<(u32, String, u64)>,
    resolved: OnceLock<Vec<SyncSite>>,
}

impl SyncSites {
    fn resolve(&self) -> Vec<SyncSite> {
        let pcs: Vec<u32> = self.found.iter().map(|site| site.0).collect();
        // SAFETY: `pcs` lives through the call; the text is a C string, and is freed once, after its last use.
        let lines = unsafe {
            let lent = ffi::simt_locations(pcs.as_ptr(), pcs.len());
            let lines = text(lent);
            ffi::simt_text_free(lent);
            lines
        };
        let mut sites: Vec<SyncSite> = Vec::new();
        for ((pc, what, executed), location) in self.found.iter().zip(lines.lines()) {
            match sites.iter_mut().find(|s| s.what == *what && s.location == location) {
                Some(same) => {
                    same.executed += executed;
                    same.pcs.push(*pc);
                }
                None => sites.push(SyncSite {
                    what: what.clone(),
                    location: location.to_owned(),
                    executed: *executed,
                    pcs: vec![*pc],
                }),
            }
        }
        sites
    }
}

impl Deref for SyncSites {
    type Target = [SyncSite];

    fn deref(&self) -> &[SyncSite] {
        self.resolved.get_or_init(|| self.resolve())
    }
}

impl IntoIterator for SyncSites {
    type Item = SyncSite;
    type IntoIter = std::vec::IntoIter<SyncSite>;

    fn into_iter(mut self) -> Self::IntoIter {
        self.resolved.take().unwrap_or_else(|| self.resolve()).into_iter()
    }
}

impl<'a> IntoIterator for &'a SyncSites {
    type Item = &'a SyncSite;
    type IntoIter = std::slice::Iter<'a, SyncSite>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A launch that went through without a fault.
#[derive(Clone, Debug)]
pub struct Report {
    /// Counts of the whole launch.
    pub stats: Stats,
    /// The synchronisation sites that were executed, for [`crate::Launch::drop_site`].
    pub sync_sites: SyncSites,
    pub(crate) buffers: Vec<(String, BufferStats)>,
}

impl Report {
    /// What was moved from and to the buffer registered under `name`.
    ///
    /// # Panics
    /// If no buffer has that name.
    pub fn buffer(&self, name: &str) -> BufferStats {
        self.buffers.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no buffer `{name}`")).1
    }
}

/// Kinds of [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// Two accesses to shared memory that nothing orders.
    Race,
    /// Shared memory touched while an asynchronous copy to it is in flight.
    PendingCopy,
    /// Shared memory read before anything was written to it.
    Uninitialised,
    /// An access outside of the block's shared memory.
    SharedBounds,
    /// An access outside of every buffer.
    GlobalBounds,
    /// A write to a buffer registered as input.
    ReadOnly,
    /// Two blocks touched the same global memory and nothing orders them.
    BlockRace,
    /// Lanes of one warp at different warp-wide instructions.
    Divergence,
    /// A barrier with inconsistent or impossible thread counts.
    Barrier,
    /// No thread can continue.
    Deadlock,
    /// A thread exited while its asynchronous copies were in flight.
    CopyAtExit,
    /// An address not aligned as the instruction requires.
    Misaligned,
    /// An access to another thread's local memory.
    ForeignStack,
    /// More local memory than a thread has.
    StackOverflow,
    /// A bulk copy or `wgmma` met what plain stores wrote, without a fence towards the async proxy.
    Proxy,
    /// An mbarrier used as its state does not allow.
    Mbarrier,
    /// `wgmma` without its fence, or its operands touched while it is in flight.
    Wgmma,
    /// `setmaxnreg` with an impossible count.
    Registers,
    /// Legal, but not modelled.
    Unsupported,
    /// A grid, block or amount of shared memory that no GPU accepts.
    BadLaunch,
}

impl FaultKind {
    /// In the order of `SimtFaultKind`, which starts with "no fault".
    pub(crate) fn from_code(code: i32) -> Option<Self> {
        use FaultKind::*;
        let kinds = [
            Race,
            PendingCopy,
            Uninitialised,
            SharedBounds,
            GlobalBounds,
            ReadOnly,
            BlockRace,
            Divergence,
            Barrier,
            Deadlock,
            CopyAtExit,
            Misaligned,
            ForeignStack,
            StackOverflow,
            Proxy,
            Mbarrier,
            Wgmma,
            Registers,
            Unsupported,
            BadLaunch,
        ];
        usize::try_from(code).ok()?.checked_sub(1).map(|i| kinds[i])
    }
}

/// What the kernel did wrong, with the block, the lane and the source lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which detector reports.
    pub kind: FaultKind,
    /// The report, with source lines.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// Owns the emulator's result until it has been read.
pub(crate) struct Outcome(*mut ffi::Outcome);

impl Outcome {
    /// # Safety
    /// `result` comes from `simt_run` and is given away.
    pub(crate) unsafe fn new(result: *mut ffi::Outcome) -> Self {
        Self(result)
    }

    pub(crate) fn into_result(self, names: &[String]) -> Result<Report, Fault> {
        let mut message = std::ptr::null();
        // SAFETY: self.0 is a live result, and the message it lends lives as long.
        let (code, message) = unsafe { (ffi::simt_result_fault(self.0, &mut message), text(message)) };
        if let Some(kind) = FaultKind::from_code(code) {
            return Err(Fault { kind, message });
        }
        let mut count = 0;
        // SAFETY: a live result lends its counts, `count` of them.
        let buffers = unsafe { slice(ffi::simt_result_buffers(self.0, &mut count), count) };
        let buffers = names.iter().cloned().zip(buffers.iter().copied()).collect();
        // SAFETY: as above, one of them.
        let stats = unsafe { *ffi::simt_result_stats(self.0) };
        Ok(Report { stats, sync_sites: self.sync_sites(), buffers })
    }

    fn sync_sites(&self) -> SyncSites {
        let mut count = 0;
        // SAFETY: a live result lends its sites, `count` of them.
        let found = unsafe { slice(ffi::simt_result_sites(self.0, &mut count), count) };
        // SAFETY: the name of an instruction is a literal of the emulator's.
        let found = found.iter().map(|site| (site.pc, unsafe { text(site.what) }, site.executed)).collect();
        SyncSites { found, resolved: OnceLock::new() }
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        // SAFETY: the pointer came from simt_run and is freed here only.
        unsafe { ffi::simt_result_free(self.0) }
    }
}

/// # Safety
/// `text` is a C string that lives during the call.
unsafe fn text(text: *const std::ffi::c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// # Safety
/// `data` points to `count` values that live during `'a`, or is anything if there are none.
unsafe fn slice<'a, T>(data: *const T, count: usize) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, count) }
}
