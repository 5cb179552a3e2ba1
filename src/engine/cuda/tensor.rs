//! Tensors in a GPU's memory, over whatever buffers cudarc knows.

use super::bind::Place;
use crate::problem::{DType, Element, Float, Tensor, TensorDesc};
use cudarc::driver::{CudaContext, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use half::{bf16, f16};
use std::fmt;

/// A tensor in a GPU's memory, to be read.
///
/// Made from anything that cudarc can read on a device ([`DevicePtr`]): a `CudaSlice`, a `CudaView`, a buffer of your own.
#[derive(Clone, Copy)]
pub struct CudaTensor<'a> {
    buffer: Buffer<'a>,
    offset: usize,
    desc: TensorDesc,
}

/// A tensor in a GPU's memory, to be written.
///
/// Made from anything that cudarc can write on a device ([`DevicePtrMut`]).
pub struct CudaTensorMut<'a> {
    buffer: BufferMut<'a>,
    offset: usize,
    desc: TensorDesc,
}

mod sealed {
    use cudarc::driver::{DevicePtr, DevicePtrMut};
    use half::{bf16, f16};

    /// A buffer whose owner is not known; its element type is.
    #[derive(Clone, Copy)]
    pub enum Buffer<'a> {
        F16(&'a dyn DevicePtr<f16>),
        BF16(&'a dyn DevicePtr<bf16>),
        F32(&'a dyn DevicePtr<f32>),
        Bool(&'a dyn DevicePtr<bool>),
        U32(&'a dyn DevicePtr<u32>),
        Bytes(&'a dyn DevicePtr<u8>),
    }

    pub enum BufferMut<'a> {
        F16(&'a mut dyn DevicePtrMut<f16>),
        BF16(&'a mut dyn DevicePtrMut<bf16>),
        F32(&'a mut dyn DevicePtrMut<f32>),
    }

    /// Puts a buffer of this element type into its variant.
    pub trait Read: Sized {
        fn read(buffer: &dyn DevicePtr<Self>) -> Buffer<'_>;
    }

    pub trait Write: Sized {
        fn write(buffer: &mut dyn DevicePtrMut<Self>) -> BufferMut<'_>;
    }
}
use sealed::{Buffer, BufferMut};

/// An element type of tensors in a GPU's memory: all of [`Element`]'s.
pub trait CudaElement: Element + sealed::Read {}
/// An element type that outputs in a GPU's memory may have: all of [`Float`]'s.
pub trait CudaFloat: Float + sealed::Write {}

macro_rules! element {
    ($($ty:ty, $variant:ident;)*) => {$(
        impl sealed::Read for $ty {
            fn read(buffer: &dyn DevicePtr<Self>) -> Buffer<'_> {
                Buffer::$variant(buffer)
            }
        }
        impl CudaElement for $ty {}
    )*};
}
element! { f16, F16; bf16, BF16; f32, F32; bool, Bool; u32, U32; }

macro_rules! float {
    ($($ty:ty, $variant:ident;)*) => {$(
        impl sealed::Write for $ty {
            fn write(buffer: &mut dyn DevicePtrMut<Self>) -> BufferMut<'_> {
                BufferMut::$variant(buffer)
            }
        }
        impl CudaFloat for $ty {}
    )*};
}
float! { f16, F16; bf16, BF16; f32, F32; }

/// Writes the constructors of both views, which differ in what they borrow.
macro_rules! device_view {
    ($view:ident, $element:ident, $pointer:ident, $erase:ident, $($mutability:tt)?) => {
        impl<'a> $view<'a> {
            /// A dense tensor, the last dimension fastest.
            pub fn contiguous<T: $element, const R: usize>(
                buffer: &'a $($mutability)? impl $pointer<T>,
                shape: [usize; R],
            ) -> Self {
                Self { buffer: T::$erase(buffer), offset: 0, desc: TensorDesc::contiguous(T::DTYPE, shape) }
            }

            /// `[batch, seq, heads, head_dim]`, dense in this order: what a linear projection produces.
            pub fn bshd<T: $element>(buffer: &'a $($mutability)? impl $pointer<T>, shape: [usize; 4]) -> Self {
                Self::contiguous(buffer, shape)
            }

            /// The same tensor stored as `[batch, heads, seq, head_dim]`; `shape` is given as stored.
            pub fn bhsd<T: $element>(buffer: &'a $($mutability)? impl $pointer<T>, shape: [usize; 4]) -> Self {
                Self { buffer: T::$erase(buffer), offset: 0, desc: TensorDesc::bhsd(T::DTYPE, shape) }
            }

            /// Any strides, in elements; index zero is element `offset` of the buffer.
            pub fn strided<T: $element, const R: usize>(
                buffer: &'a $($mutability)? impl $pointer<T>,
                offset: usize,
                shape: [usize; R],
                strides: [isize; R],
            ) -> Self {
                Self { buffer: T::$erase(buffer), offset, desc: TensorDesc::strided(T::DTYPE, shape, strides) }
            }

            /// The same for a number of dimensions known only at run time.
            ///
            /// `None` if there are more than [`MAX_RANK`](crate::MAX_RANK), or not as many strides as extents.
            pub fn from_slices<T: $element>(
                buffer: &'a $($mutability)? impl $pointer<T>,
                offset: usize,
                shape: &[usize],
                strides: &[isize],
            ) -> Option<Self> {
                let desc = TensorDesc::from_slices(T::DTYPE, shape, strides)?;
                Some(Self { buffer: T::$erase(buffer), offset, desc })
            }
        }

        impl Tensor for $view<'_> {
            fn desc(&self) -> TensorDesc {
                self.desc
            }
        }

        impl fmt::Debug for $view<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($view)).field("offset", &self.offset).field("desc", &self.desc).finish()
            }
        }
    };
}
device_view!(CudaTensor, CudaElement, DevicePtr, read,);
device_view!(CudaTensorMut, CudaFloat, DevicePtrMut, write, mut);

impl<'a> CudaTensor<'a> {
    /// A bool mask kept as bytes of 0 and 1, as most frameworks keep them; otherwise as [`strided`](Self::strided).
    pub fn mask<const R: usize>(
        buffer: &'a impl DevicePtr<u8>,
        offset: usize,
        shape: [usize; R],
        strides: [isize; R],
    ) -> Self {
        Self { buffer: Buffer::Bytes(buffer), offset, desc: TensorDesc::strided(DType::Bool, shape, strides) }
    }
}

/// Does the same with a buffer of whichever element type.
macro_rules! with_buffer {
    ($buffer:expr, $kind:ident { $($variant:ident),* }, $name:ident => $action:expr) => {
        match $buffer { $($kind::$variant($name) => $action,)* }
    };
}
macro_rules! read {
    ($buffer:expr, $name:ident => $action:expr) => {
        with_buffer!($buffer, Buffer { F16, BF16, F32, Bool, U32, Bytes }, $name => $action)
    };
}
macro_rules! write {
    ($buffer:expr, $name:ident => $action:expr) => {
        with_buffer!($buffer, BufferMut { F16, BF16, F32 }, $name => $action)
    };
}

/// A place on a device, and what must be dropped once the launch that uses it is on its stream.
pub(super) type Placed<'s> = (Place, SyncOnDrop<'s>);

impl CudaTensor<'_> {
    pub(super) fn bytes(&self) -> usize {
        read!(self.buffer, buffer => buffer.num_bytes())
    }

    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn context(&self) -> &CudaContext {
        read!(self.buffer, buffer => buffer.stream().context())
    }

    /// Has `stream` wait for what writes the buffer.
    pub(super) fn place<'s>(&'s self, stream: &'s CudaStream) -> Placed<'s> {
        let (address, guard) = read!(self.buffer, buffer => buffer.device_ptr(stream));
        (Place { buffer: address, offset: self.offset }, guard)
    }
}

impl CudaTensorMut<'_> {
    pub(super) fn bytes(&self) -> usize {
        write!(&self.buffer, buffer => buffer.num_bytes())
    }

    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn context(&self) -> &CudaContext {
        write!(&self.buffer, buffer => buffer.stream().context())
    }

    /// Has `stream` wait for what reads or writes the buffer.
    pub(super) fn place<'s>(&'s mut self, stream: &'s CudaStream) -> Placed<'s> {
        let offset = self.offset;
        let (address, guard) = write!(&mut self.buffer, buffer => buffer.device_ptr_mut(stream));
        (Place { buffer: address, offset }, guard)
    }
}
