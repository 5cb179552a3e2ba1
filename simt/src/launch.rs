//! One launch: the kernel, the grid, the buffers it may touch.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;

use bytemuck::{NoUninit, Pod};

use crate::report::Outcome;
use crate::{Fault, Program, Report, SyncSite, ffi};

/// The entry function of a kernel whose parameter block is a `P`.
pub struct Kernel<P> {
    entry: unsafe extern "C" fn(*const c_void),
    params: PhantomData<fn(&P)>,
}

impl<P> Clone for Kernel<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Kernel<P> {}

impl<P> Kernel<P> {
    /// # Safety `entry` was exported with `simt::entry` from a translation unit compiled with build_support.rs, its
    /// parameter block has the layout of `P`, and, if it is ever launched with [`Checks::Off`], it touches nothing but
    /// the buffers of its launch.
    pub const unsafe fn new(entry: unsafe extern "C" fn(*const c_void)) -> Self {
        Self { entry, params: PhantomData }
    }
}

/// How closely a launch is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// Every access is checked: bounds, races, initialisation, alignment.
    Full,
    /// Only executed, still with asynchronous copies at their last moment over poison. Run a kernel checked first: what
    /// it does out of bounds here, it does to this process.
    Off,
}

/// A launch in preparation. Buffers are registered with it and borrowed until it is dropped.
pub struct Launch<'a, P> {
    kernel: Kernel<P>,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    workers: u32,
    seed: u64,
    registers: u32,
    checks: Checks,
    program: Option<&'a Program>,
    names: Vec<String>,
    buffers: Vec<RawBuffer>,
    dropped: Vec<u32>,
    borrowed: PhantomData<&'a mut [u8]>,
}

struct RawBuffer {
    data: *mut c_void,
    bytes: usize,
    writable: bool,
}

impl<'a, P: NoUninit> Launch<'a, P> {
    /// A launch of `grid` blocks of `block` threads each, checked, on one OS thread, with seed 0.
    pub fn new(kernel: Kernel<P>, grid: [u32; 3], block: u32) -> Self {
        Self {
            kernel,
            grid,
            block: [block, 1, 1],
            shared_bytes: 0,
            workers: 1,
            seed: 0,
            registers: 0,
            checks: Checks::Full,
            program: None,
            names: Vec::new(),
            buffers: Vec::new(),
            dropped: Vec::new(),
            borrowed: PhantomData,
        }
    }

    /// Threads of a block in three dimensions.
    pub fn block(mut self, block: [u32; 3]) -> Self {
        self.block = block;
        self
    }

    /// Bytes of dynamic shared memory.
    pub fn shared_bytes(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// OS threads to run on, each with one block at a time.
    pub fn workers(mut self, workers: u32) -> Self {
        self.workers = workers;
        self
    }

    /// Decides the order of blocks, warps and lanes.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Registers that the launch allots to each thread, which `setmaxnreg` starts from. Without this, as many as one
    /// block per multiprocessor may have.
    pub fn registers(mut self, registers: u32) -> Self {
        self.registers = registers;
        self
    }

    /// How closely the launch is watched.
    pub fn checks(mut self, checks: Checks) -> Self {
        self.checks = checks;
        self
    }

    /// Interprets a program in place of the kernel: what nvcc made of the same source.
    ///
    /// # Panics
    /// If its parameter block is not as long as `P`.
    pub fn program(mut self, program: &'a Program) -> Self {
        assert_eq!(program.param_bytes(), size_of::<P>(), "bytes of the program's parameter block");
        self.program = Some(program);
        self
    }

    /// Turns a synchronisation of an earlier report into a no-op, to see whether anything depends on it. A
    /// kernel without its synchronisation must be run with [`Checks::Full`].
    pub fn drop_site(mut self, site: &SyncSite) -> Self {
        self.dropped.extend(&site.pcs);
        self
    }

    /// Registers memory that the kernel may read, and returns its device address. `name` is for messages.
    pub fn input<T: NoUninit>(&mut self, name: &str, data: &'a [T]) -> u64 {
        self.add(name, data.as_ptr().cast_mut().cast(), size_of_val(data), false)
    }

    /// Registers memory that the kernel may read and write, and returns its device address.
    pub fn output<T: Pod>(&mut self, name: &str, data: &'a mut [T]) -> u64 {
        self.add(name, data.as_mut_ptr().cast(), size_of_val(data), true)
    }

    /// Registers memory by address, for a caller that has no slices.
    ///
    /// # Safety
    /// `bytes` bytes from `data` on are initialised, valid for reads, and for writes if `writable`, for as long as this
    /// launch lives, and nobody else writes them (or, if `writable`, reads them) while it runs.
    pub unsafe fn raw(&mut self, name: &str, data: *mut u8, bytes: usize, writable: bool) -> u64 {
        self.add(name, data.cast(), bytes, writable)
    }

    fn add(&mut self, name: &str, data: *mut c_void, bytes: usize, writable: bool) -> u64 {
        self.names.push(name.to_owned());
        self.buffers.push(RawBuffer { data, bytes, writable });
        data as u64
    }

    /// Runs the kernel to its end, or up to its first fault. Outputs are then whatever was written so far.
    ///
    /// # Panics
    /// If a buffer's name holds a zero byte.
    pub fn run(&mut self, params: &P) -> Result<Report, Fault> {
        let names: Vec<CString> =
            self.names.iter().map(|name| CString::new(name.as_str()).expect("a name without zero bytes")).collect();
        let buffers: Vec<ffi::Buffer> = std::iter::zip(&self.buffers, &names)
            .map(|(b, name)| ffi::Buffer {
                data: b.data,
                bytes: b.bytes,
                writable: b.writable.into(),
                name: name.as_ptr(),
            })
            .collect();
        let launch = ffi::Launch {
            entry: self.kernel.entry,
            program: self.program.map_or(std::ptr::null(), Program::as_ptr),
            params: std::ptr::from_ref(params).cast(),
            params_bytes: size_of::<P>(),
            grid: self.grid,
            block: self.block,
            shared_bytes: self.shared_bytes,
            workers: self.workers,
            seed: self.seed,
            registers: self.registers,
            checks: (self.checks == Checks::Full).into(),
            buffers: buffers.as_ptr(),
            buffer_count: buffers.len(),
            dropped: self.dropped.as_ptr(),
            dropped_count: self.dropped.len(),
        };
        // SAFETY: every pointer of `launch` lives in this function or, the buffers' data, as long as `'a`; writable
        // buffers are borrowed mutably. The kernel's accesses are checked against them, or promised by Kernel::new.
        let outcome = unsafe { Outcome::new(ffi::simt_run(&launch)) };
        outcome.into_result(&self.names)
    }
}
