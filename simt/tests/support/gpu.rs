//! Small kernels on whatever CUDA driver the process finds, called directly.

use bytemuck::Zeroable;
use libloading::Library;
use simt::TensorMap;
use std::ffi::{CString, c_void};

/// A device.
pub(crate) struct Gpu {
    library: Library,
    pub(crate) name: String,
    pub(crate) compute_capability: (i32, i32),
}

/// A module loaded on it.
pub(crate) struct Module(*mut c_void);

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
    pub(crate) fn open(library: &str) -> Result<Self, String> {
        // SAFETY: loading the driver runs its initialisers.
        let library = unsafe { Library::new(library) }.map_err(|error| error.to_string())?;
        let (mut device, mut context) = (0i32, std::ptr::null_mut());
        let mut name = [0u8; 128];
        call!(library, cuInit(0 => u32))?;
        call!(library, cuDeviceGet(&mut device => *mut i32, 0 => i32))?;
        call!(library, cuDeviceGetName(name.as_mut_ptr() => *mut u8, 128 => i32, device => i32))?;
        let mut capability = [0i32; 2];
        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        for (number, attribute) in capability.iter_mut().zip([75, 76]) {
            call!(library, cuDeviceGetAttribute(number => *mut i32, attribute => i32, device => i32))?;
        }
        call!(library, cuDevicePrimaryCtxRetain(&mut context => *mut *mut c_void, device => i32))?;
        call!(library, cuCtxSetCurrent(context => *mut c_void))?;
        let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_string();
        Ok(Gpu { library, name, compute_capability: (capability[0], capability[1]) })
    }

    pub(crate) fn load(&self, ptx: &str) -> Result<Module, String> {
        let mut module = std::ptr::null_mut();
        call!(self.library, cuModuleLoadData(&mut module => *mut *mut c_void, ptx.as_ptr().cast() => *const c_void))?;
        Ok(Module(module))
    }

    /// The tensor of the bulk copies at this address.
    fn map(&self, address: u64) -> Result<TensorMap, String> {
        // CU_TENSOR_MAP_DATA_TYPE_FLOAT16, …_INTERLEAVE_NONE, …_SWIZZLE_128B, …_L2_PROMOTION_NONE, …_FLOAT_OOB_FILL_NONE
        const TYPE: u32 = 6;
        const SWIZZLE: u32 = 3;
        let mut map = TensorMap::zeroed();
        let steps = [1u32; 4];
        call!(self.library, cuTensorMapEncodeTiled(
            (&raw mut map).cast() => *mut c_void, TYPE => u32, 4 => u32, address as *mut c_void => *mut c_void,
            crate::TENSOR.as_ptr() => *const u64, crate::STRIDES.as_ptr() => *const u64,
            crate::TENSOR_BOX.as_ptr() => *const u32, steps.as_ptr() => *const u32,
            0 => u32, SWIZZLE => u32, 0 => u32, 0 => u32
        ))?;
        Ok(map)
    }

    /// What a primitive writes.
    pub(crate) fn run(&self, module: &Module, primitive: &crate::Primitive) -> Result<Vec<u32>, String> {
        let library = &self.library;
        let (mut function, mut input, mut out) = (std::ptr::null_mut::<c_void>(), 0u64, 0u64);
        let name = CString::new(format!("primitive_{}", primitive.name)).expect("a name");
        call!(library, cuModuleGetFunction(
            &mut function => *mut *mut c_void, module.0 => *mut c_void, name.as_ptr() => *const std::ffi::c_char
        ))?;
        let bytes = |words: usize| 4 * words;
        let mut results = vec![0u32; primitive.out];
        call!(library, cuMemAlloc_v2(&mut input => *mut u64, bytes(primitive.input.len()) => usize))?;
        call!(library, cuMemAlloc_v2(&mut out => *mut u64, bytes(primitive.out) => usize))?;
        call!(library, cuMemcpyHtoD_v2(
            input => u64, primitive.input.as_ptr().cast() => *const c_void, bytes(primitive.input.len()) => usize
        ))?;
        call!(library, cuMemcpyHtoD_v2(out => u64, results.as_ptr().cast() => *const c_void, bytes(primitive.out) => usize))?;
        let mut plain = crate::support::Buffers { input, out };
        let mut failed = None;
        let mut mapped = primitive.mapped(input, out, |address| {
            self.map(address).unwrap_or_else(|error| {
                failed = Some(error);
                TensorMap::zeroed()
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let block = match primitive.set() {
            crate::Set::Plain => (&raw mut plain).cast::<c_void>(),
            crate::Set::Sm90a => (&raw mut mapped).cast::<c_void>(),
        };
        let mut params = [block];
        let null = std::ptr::null_mut::<c_void>();
        call!(library, cuLaunchKernel(
            function => *mut c_void, 1 => u32, 1 => u32, 1 => u32, primitive.threads => u32, 1 => u32, 1 => u32,
            primitive.shared_bytes() => u32, null => *mut c_void, params.as_mut_ptr() => *mut *mut c_void, null.cast() => *mut *mut c_void
        ))?;
        call!(library, cuMemcpyDtoH_v2(results.as_mut_ptr().cast() => *mut c_void, out => u64, bytes(primitive.out) => usize))?;
        call!(library, cuMemFree_v2(input => u64))?;
        call!(library, cuMemFree_v2(out => u64))?;
        Ok(results)
    }
}
