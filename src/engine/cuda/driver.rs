//! The calls of the CUDA driver that this crate makes itself, found at run time.
//!
//! Not through cudarc: it panics where the library or one of its calls is missing, and which calls it declares depends
//! on the toolkit that it found at its own build.

use crate::plan::launch::MapOf;
use crate::plan::params::TensorMap;
use crate::plan::{CudaDevice, CudaError, Reason};
use crate::problem::DType;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

const LIBRARY: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

/// Parameter blocks of more than 4096 bytes exist since this version.
const OLDEST: (u32, u32) = (12, 1);

/// CUDA_ERROR_NO_DEVICE
const NO_DEVICE: c_uint = 100;

/// Declares a table of calls, all of which a library has or none of which can be used.
macro_rules! calls {
    ($(#[$doc:meta])* $table:ident { $($name:ident($($ty:ty),*);)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case, reason = "the driver's names")]
        struct $table {
            $($name: unsafe extern "system" fn($($ty),*) -> c_uint,)*
        }

        impl $table {
            fn find(library: &Library) -> Result<Self, Reason> {
                Ok($table {
                    // SAFETY: the type is that of cuda.h for the symbol of this name.
                    $($name: *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }
                        .map_err(|_| Reason::MissingCall { call: stringify!($name) })?,)*
                })
            }
        }
    };
}

calls! {
    /// What every driver has.
    Queries {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut c_int, c_int);
        cuDeviceGetName(*mut c_char, c_int, c_int);
        cuDeviceGetAttribute(*mut c_int, c_int, c_int);
        cuGetErrorName(c_uint, *mut *const c_char);
    }
}

calls! {
    /// What drivers of CUDA 12 have. Libraries and kernels belong to no context.
    Launches {
        cuLibraryLoadData(
            *mut *mut c_void, *const c_void, *mut c_void, *mut c_void, c_uint, *mut c_void, *mut c_void, c_uint
        );
        cuLibraryGetKernel(*mut *mut c_void, *mut c_void, *const c_char);
        cuKernelSetAttribute(c_int, c_int, *mut c_void, c_int);
        cuLaunchKernel(
            *mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void,
            *mut *mut c_void
        );
        cuThreadExchangeStreamCaptureMode(*mut c_uint);
        cuTensorMapEncodeTiled(
            *mut c_void, c_uint, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32, c_uint, c_uint,
            c_uint, c_uint
        );
    }
}

/// A call that failed.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub(super) call: &'static str,
    pub(super) error: CudaError,
}

impl From<Failed> for Reason {
    fn from(Failed { call, error }: Failed) -> Self {
        Reason::Driver { call, error }
    }
}

/// The driver of this process, initialised.
pub(super) struct Driver {
    queries: Queries,
    launches: Result<Launches, Reason>,
    pub(super) version: (u32, u32),
    /// The functions above are in it; it is never unloaded.
    _library: Library,
}

/// A kernel as the driver knows it: for all devices and contexts, for as long as the process lives.
#[derive(Clone, Copy)]
pub(super) struct Kernel(*mut c_void);

// SAFETY: a handle that the driver takes from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A loaded image, never unloaded.
#[derive(Clone, Copy)]
pub(super) struct LoadedImage(*mut c_void);

// SAFETY: a handle that the driver takes from any thread.
unsafe impl Send for LoadedImage {}
// SAFETY: as above.
unsafe impl Sync for LoadedImage {}

/// The driver.
///
/// # Errors
/// Why there is none. A driver that fails to start is asked again the next time.
pub(super) fn driver() -> Result<&'static Driver, Reason> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    let started = Driver::start()?;
    Ok(DRIVER.get_or_init(|| started))
}

impl Driver {
    fn start() -> Result<Self, Reason> {
        // SAFETY: loading the driver library runs its initialisers, which is what every CUDA program does first.
        let library = LIBRARY.iter().find_map(|&name| unsafe { Library::new(name) }.ok());
        let library = library.ok_or_else(|| Reason::NoDriver { searched: LIBRARY.join(", ") })?;
        let queries = Queries::find(&library)?;
        let launches = Launches::find(&library);
        let mut driver = Driver { queries, launches, version: (0, 0), _library: library };
        // SAFETY: takes no pointer; the only flag is 0.
        match unsafe { (driver.queries.cuInit)(0) } {
            NO_DEVICE => return Err(Reason::NoDevice),
            code => driver.check("cuInit", code)?,
        }
        let mut version = 0;
        // SAFETY: writes one number.
        driver.check("cuDriverGetVersion", unsafe { (driver.queries.cuDriverGetVersion)(&mut version) })?;
        driver.version = (version.unsigned_abs() / 1000, version.unsigned_abs() % 1000 / 10);
        Ok(driver)
    }

    fn check(&self, call: &'static str, code: c_uint) -> Result<(), Failed> {
        if code == 0 {
            return Ok(());
        }
        let mut name = ptr::null();
        // SAFETY: writes a pointer to a string that lives as long as the library, or null for a number it does not know.
        unsafe { (self.queries.cuGetErrorName)(code, &mut name) };
        let name = if name.is_null() {
            "unknown to the driver".into()
        } else {
            // SAFETY: not null, hence a C string.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        Err(Failed { call, error: CudaError { code, name } })
    }

    pub(super) fn devices(&self) -> Result<Vec<CudaDevice>, Reason> {
        let mut count = 0;
        // SAFETY: writes one number.
        self.check("cuDeviceGetCount", unsafe { (self.queries.cuDeviceGetCount)(&mut count) })?;
        (0..count).map(|ordinal| Ok(self.device(ordinal)?)).collect()
    }

    fn handle(&self, ordinal: c_int) -> Result<c_int, Failed> {
        let mut device = 0;
        // SAFETY: writes one number.
        self.check("cuDeviceGet", unsafe { (self.queries.cuDeviceGet)(&mut device, ordinal) })?;
        Ok(device)
    }

    fn device(&self, ordinal: c_int) -> Result<CudaDevice, Failed> {
        let device = self.handle(ordinal)?;
        let attribute = |attribute: Attribute| -> Result<u32, Failed> {
            let mut value = 0;
            // SAFETY: writes one number.
            let code = unsafe { (self.queries.cuDeviceGetAttribute)(&mut value, attribute as c_int, device) };
            self.check("cuDeviceGetAttribute", code)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let mut name = [0u8; 256];
        // SAFETY: writes at most as many bytes as it is told, a zero byte last.
        let code = unsafe { (self.queries.cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
        self.check("cuDeviceGetName", code)?;
        let name = CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned());
        Ok(CudaDevice {
            ordinal: ordinal as usize,
            name: name.unwrap_or_default(),
            compute_capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    }

    /// Whether it can load and launch code of this version of CUDA.
    pub(super) fn supports(&self, toolkit: (u32, u32)) -> Result<(), Reason> {
        // Code of any minor version runs on a driver of the same major one.
        let need = OLDEST.max((toolkit.0, 0));
        if self.version < need {
            return Err(Reason::OldDriver { have: self.version, need });
        }
        self.launches.as_ref().map(|_| ()).map_err(Reason::clone)
    }

    fn launches(&self) -> Result<&Launches, Reason> {
        self.launches.as_ref().map_err(Reason::clone)
    }

    /// Loads machine code, or PTX that ends with a zero byte, for all devices.
    pub(super) fn load(&self, image: &[u128]) -> Result<LoadedImage, Reason> {
        let launches = self.launches()?;
        // Loading may be the first call of a thread that is capturing a graph. It enqueues nothing, so that the strict
        // modes, which forbid it, have nothing to protect.
        const RELAXED: c_uint = 2;
        let mut mode = RELAXED;
        // SAFETY: exchanges one number.
        let code = unsafe { (launches.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        self.check("cuThreadExchangeStreamCaptureMode", code)?;
        let mut loaded = ptr::null_mut();
        let none = ptr::null_mut();
        // SAFETY: the driver copies the image; no options are passed.
        let code =
            unsafe { (launches.cuLibraryLoadData)(&mut loaded, image.as_ptr().cast(), none, none, 0, none, none, 0) };
        // SAFETY: puts back what was there.
        let put_back = unsafe { (launches.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        self.check("cuLibraryLoadData", code)?;
        self.check("cuThreadExchangeStreamCaptureMode", put_back)?;
        Ok(LoadedImage(loaded))
    }

    /// The entry point of this name, allowed that much dynamic shared memory on a device.
    pub(super) fn kernel(
        &self,
        image: LoadedImage,
        name: &CStr,
        shared_bytes: u32,
        ordinal: usize,
    ) -> Result<Kernel, Reason> {
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
        let launches = self.launches()?;
        let mut kernel = ptr::null_mut();
        // SAFETY: `image` comes from cuLibraryLoadData and is never unloaded.
        let code = unsafe { (launches.cuLibraryGetKernel)(&mut kernel, image.0, name.as_ptr()) };
        self.check("cuLibraryGetKernel", code)?;
        let device = self.handle(ordinal as c_int)?;
        let bytes = shared_bytes as c_int;
        // SAFETY: `kernel` comes from cuLibraryGetKernel, `device` from cuDeviceGet.
        let code = unsafe { (launches.cuKernelSetAttribute)(MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes, kernel, device) };
        self.check("cuKernelSetAttribute", code)?;
        Ok(Kernel(kernel))
    }

    /// A tensor map for 16-bit elements. Looks at no memory of the device and enqueues nothing.
    pub(super) fn tensor_map(&self, dtype: DType, of: &MapOf) -> Result<TensorMap, Reason> {
        // Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_…, …_SWIZZLE_128B, …_L2_PROMOTION_L2_256B; no interleave, zeros outside.
        const FLOAT16: c_uint = 6;
        const BFLOAT16: c_uint = 9;
        const SWIZZLE_128B: c_uint = 3;
        const L2_256B: c_uint = 3;
        let launches = self.launches()?;
        let ty = if dtype == DType::BF16 { BFLOAT16 } else { FLOAT16 };
        let (mut map, ones) = (TensorMap::default(), [1u32; 4]);
        // SAFETY: writes a map, whose alignment and size are those it wants; reads arrays of as many numbers as the rank says.
        // The address is only noted.
        let code = unsafe {
            (launches.cuTensorMapEncodeTiled)(
                ptr::from_mut(&mut map).cast(),
                ty,
                4,
                of.address as *mut c_void,
                of.extents.as_ptr(),
                of.strides.as_ptr(),
                of.boxed.as_ptr(),
                ones.as_ptr(),
                0,
                SWIZZLE_128B,
                L2_256B,
                0,
            )
        };
        self.check("cuTensorMapEncodeTiled", code)?;
        Ok(map)
    }

    /// Puts a kernel of one parameter on a stream; on the null stream, of the current context.
    ///
    /// # Safety
    /// `params` is the kernel's parameter block, the launch is within its limits, `stream` is a live stream, and what
    /// the kernel does with the addresses in the block is sound when its turn comes.
    pub(super) unsafe fn launch<P>(
        &self,
        kernel: Kernel,
        [blocks, threads, shared_bytes]: [u32; 3],
        params: &P,
        stream: *mut c_void,
    ) -> Result<(), Reason> {
        let launches = self.launches()?;
        let mut block = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: as the caller promises; the driver copies the block before it returns.
        let code = unsafe {
            (launches.cuLaunchKernel)(
                kernel.0,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                shared_bytes,
                stream,
                block.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        Ok(self.check("cuLaunchKernel", code)?)
    }
}
