//! Small kernels on whatever CUDA driver the process finds, called directly.

use libloading::Library;
use std::ffi::{CString, c_void};

/// A device with one module loaded.
pub(crate) struct Gpu {
    library: Library,
    module: *mut c_void,
    pub(crate) name: String,
}

/// Calls a function of the driver by name and turns its answer into a result.
macro_rules! call {
    ($library:expr, $name:ident($($argument:expr => $ty:ty),*)) => {{
        // SAFETY: the types are those of cuda.h for the function of this name; pointers are to live memory of the caller.
        let code = unsafe {
            let function = $library.get::<unsafe extern "C" fn($($ty),*) -> u32>(stringify!($name).as_bytes());
            function.map_err(|error| error.to_string())?($($argument),*)
        };
        if code == 0 { Ok(()) } else { Err(format!("{}: error {code}", stringify!($name))) }
    }};
}

impl Gpu {
    pub(crate) fn open(library: &str, ptx: &str) -> Result<Self, String> {
        // SAFETY: loading the driver runs its initialisers.
        let library = unsafe { Library::new(library) }.map_err(|error| error.to_string())?;
        let (mut device, mut context, mut module) = (0i32, std::ptr::null_mut(), std::ptr::null_mut());
        let mut name = [0u8; 128];
        call!(library, cuInit(0 => u32))?;
        call!(library, cuDeviceGet(&mut device => *mut i32, 0 => i32))?;
        call!(library, cuDeviceGetName(name.as_mut_ptr() => *mut u8, 128 => i32, device => i32))?;
        call!(library, cuDevicePrimaryCtxRetain(&mut context => *mut *mut c_void, device => i32))?;
        call!(library, cuCtxSetCurrent(context => *mut c_void))?;
        call!(library, cuModuleLoadData(&mut module => *mut *mut c_void, ptx.as_ptr().cast() => *const c_void))?;
        let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_string();
        Ok(Gpu { library, module, name })
    }

    /// What a primitive writes.
    pub(crate) fn run(&self, primitive: &crate::Primitive, shared_bytes: u32) -> Result<Vec<u32>, String> {
        let library = &self.library;
        let (mut function, mut input, mut out) = (std::ptr::null_mut::<c_void>(), 0u64, 0u64);
        let name = CString::new(format!("primitive_{}", primitive.name)).expect("a name");
        call!(library, cuModuleGetFunction(
            &mut function => *mut *mut c_void, self.module => *mut c_void, name.as_ptr() => *const std::ffi::c_char
        ))?;
        let bytes = |words: usize| 4 * words;
        let mut results = vec![0u32; primitive.out];
        call!(library, cuMemAlloc_v2(&mut input => *mut u64, bytes(primitive.input.len()) => usize))?;
        call!(library, cuMemAlloc_v2(&mut out => *mut u64, bytes(primitive.out) => usize))?;
        call!(library, cuMemcpyHtoD_v2(
            input => u64, primitive.input.as_ptr().cast() => *const c_void, bytes(primitive.input.len()) => usize
        ))?;
        call!(library, cuMemcpyHtoD_v2(out => u64, results.as_ptr().cast() => *const c_void, bytes(primitive.out) => usize))?;
        let mut block = crate::support::Buffers { input, out };
        let mut params = [std::ptr::from_mut(&mut block).cast::<c_void>()];
        let null = std::ptr::null_mut::<c_void>();
        call!(library, cuLaunchKernel(
            function => *mut c_void, 1 => u32, 1 => u32, 1 => u32, primitive.threads => u32, 1 => u32, 1 => u32,
            shared_bytes => u32, null => *mut c_void, params.as_mut_ptr() => *mut *mut c_void, null.cast() => *mut *mut c_void
        ))?;
        call!(library, cuMemcpyDtoH_v2(results.as_mut_ptr().cast() => *mut c_void, out => u64, bytes(primitive.out) => usize))?;
        call!(library, cuMemFree_v2(input => u64))?;
        call!(library, cuMemFree_v2(out => u64))?;
        Ok(results)
    }
}
