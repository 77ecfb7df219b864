//! One launch: what is bound, and how many units run.
//!
//! CUDA compilers assume that nothing else points to what a kernel only reads. An operand that the result may lie on is
//! therefore an argument that could be written (`&mut`), although kernels only read it.

use cubecl::prelude::*;
use cubecl::server::Handle;
use ltxc_ir::ops::PadMode;
use ltxc_ir::plan::MatrixUnit;
use ltxc_ir::{Float, TensorType};

use super::CubeTensor;
use super::compose::Composed;
use super::index::numbers;
use super::program::{SourcesLaunch, TailLaunch};
use super::storage;
use super::store::{StoreLaunch, Stored};

/// Units of a cube where nothing is shared between them.
pub(crate) const UNITS: u32 = 128;

/// A kernel call on a device.
pub(crate) struct Call<'a, R: Runtime> {
    pub(crate) client: &'a ComputeClient<R>,
    pub(crate) args: &'a [CubeTensor<'a>],
    /// The result; with stores only its type, which is that of what is computed.
    pub(crate) out: &'a CubeTensor<'a>,
    pub(crate) workspace: Option<&'a CubeTensor<'a>>,
    /// What happens to elements before they are stored. Only kernels that finish elements are called with any.
    pub(crate) tail: Option<&'a Bound<'a>>,
    /// Where elements go instead of the result. Only products and convolutions are called with any.
    pub(crate) stores: Option<&'a Stores<'a>>,
    /// What a convolution does to its first operand where it reads it.
    pub(crate) front: Option<&'a Front>,
    pub(crate) choice: Choice<'a>,
}

/// Which of several kernels a call takes, and how its work is cut. By default the device decides.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Choice<'a> {
    /// Matrix units that it may use, of those that the device has; otherwise all of them.
    pub(crate) units: Option<&'a [MatrixUnit]>,
    /// Number of the tile in the tables of the kernel, if it was measured.
    pub(crate) tile: Option<u32>,
}

/// What stands in front of a convolution that does it itself.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    /// Slope of a leaky ReLU, if there is one.
    pub(crate) slope: Option<Float>,
    /// Then pads, per spatial axis.
    pub(crate) pads: Vec<PadAxis>,
}

/// A pad along an axis: elements in front, and what stands outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PadAxis {
    pub(crate) lo: usize,
    pub(crate) mode: PadMode,
}

/// A program with its operands.
pub(crate) struct Bound<'a> {
    pub(crate) composed: &'a Composed,
    pub(crate) reads: Vec<CubeTensor<'a>>,
    pub(crate) overlaps: Vec<CubeTensor<'a>>,
}

/// A store with the results of its copies.
pub(crate) struct Stores<'a> {
    pub(crate) stored: &'a Stored,
    pub(crate) outs: Vec<CubeTensor<'a>>,
}

impl<R: Runtime> Call<'_, R> {
    /// Operand `index` as words.
    pub(crate) fn arg(&self, index: usize) -> ArrayArg<R> {
        // Nothing of an empty operand is read, and devices refuse empty bindings.
        let tensor = &self.args[index];
        if tensor.ty.elements() == 0 { self.out() } else { bind(tensor) }
    }

    /// The result as words.
    pub(crate) fn out(&self) -> ArrayArg<R> {
        bind(self.out)
    }

    /// What is written.
    pub(crate) fn written(&self) -> &[CubeTensor<'_>] {
        self.stores.map_or(std::slice::from_ref(self.out), |stores| &stores.outs)
    }

    /// What is written, as words.
    pub(crate) fn outs(&self) -> SequenceArg<R, Array<u32>> {
        self.written().iter().map(bind).collect()
    }

    /// Where elements are stored in that.
    ///
    /// # Errors
    /// A number beyond u32.
    pub(crate) fn store(&self) -> Result<StoreLaunch<R>, String> {
        let stored = self.stores.map(|stores| stores.stored);
        let places = stored.map(|stored| stored.places.clone()).unwrap_or_default();
        Ok(StoreLaunch::new(numbers(stored.iter().flat_map(|stored| stored.numbers.iter().copied()))?, places))
    }

    /// What stands outside of the first operand, per spatial axis.
    pub(crate) fn outside(&self) -> Vec<PadMode> {
        self.front.iter().flat_map(|front| &front.pads).map(|pad| pad.mode).collect()
    }

    /// Elements of a pad in front of the first operand along a spatial axis.
    pub(crate) fn before(&self, axis: usize) -> usize {
        self.front.and_then(|front| front.pads.get(axis)).map_or(0, |pad| pad.lo)
    }

    /// Slope of a leaky ReLU through which the first operand is read.
    pub(crate) fn slope(&self) -> Option<Float> {
        self.front.and_then(|front| front.slope)
    }

    /// What happens to elements before they are stored.
    ///
    /// # Errors
    /// A number beyond u32.
    pub(crate) fn tail(&self) -> Result<TailLaunch<R>, String> {
        let program = self.tail.map(|t| t.composed.program.clone()).unwrap_or_default();
        Ok(TailLaunch::new(sources(self.tail)?, program, self.out.ty.dtype))
    }

    /// The start of the workspace as `words` words.
    ///
    /// # Errors
    /// If it is smaller.
    pub(crate) fn scratch(&self, words: usize) -> Result<Handle, String> {
        let handle = self.workspace.map(|w| w.handle.clone()).filter(|h| h.size_in_used() >= 4 * words as u64);
        handle.ok_or_else(|| format!("the workspace is smaller than {} bytes", 4 * words))
    }

    /// Cubes of [`UNITS`] for `n` units.
    ///
    /// # Errors
    /// If the device cannot count them.
    pub(crate) fn linear(&self, n: usize) -> Result<(CubeCount, CubeDim), String> {
        Ok((self.cubes(n.div_ceil(UNITS as usize))?, CubeDim::new_1d(UNITS)))
    }

    /// `n` cubes or a few more, which are spread over two axes if one cannot count them; kernels use the linear position.
    ///
    /// # Errors
    /// If two cannot either.
    pub(crate) fn cubes(&self, n: usize) -> Result<CubeCount, String> {
        let (most_x, most_y, _) = self.client.properties().hardware.max_cube_count;
        let y = n.div_ceil(most_x as usize).max(1);
        let x = n.div_ceil(y);
        // The linear position is 32 bits wide, and so is that of units.
        if y > most_y as usize || x * y * UNITS as usize > u32::MAX as usize {
            return Err(format!("{n} cubes are more than the device counts"));
        }
        Ok(CubeCount::Static(x as u32, y as u32, 1))
    }
}

/// What a program reads, nothing without one.
///
/// # Errors
/// A number beyond u32.
pub(crate) fn sources<R: Runtime>(bound: Option<&Bound<'_>>) -> Result<SourcesLaunch<R>, String> {
    let mut scalars = SequenceArg::new();
    bound.iter().flat_map(|b| &b.composed.scalars).for_each(|&v| scalars.push(v as f32));
    Ok(SourcesLaunch::new(
        bound.iter().flat_map(|b| &b.reads).map(bind).collect(),
        bound.iter().flat_map(|b| &b.overlaps).map(bind).collect(),
        numbers(bound.iter().flat_map(|b| b.composed.numbers.iter().copied()))?,
        scalars,
    ))
}

/// A tensor as words.
pub(crate) fn bind<R: Runtime>(tensor: &CubeTensor<'_>) -> ArrayArg<R> {
    bind_words(tensor.handle.clone(), storage::words(tensor.ty.dtype, tensor.ty.elements()))
}

/// The first `words` words of some memory.
pub(crate) fn bind_words<R: Runtime>(handle: Handle, words: usize) -> ArrayArg<R> {
    // SAFETY: `check_tensor` saw that the memory of tensors holds their words, and `Call::scratch` that of workspaces.
    unsafe { ArrayArg::from_raw_parts(handle, words) }
}

/// Checks that kernels can count the elements of a tensor, and gives its bytes.
pub(crate) fn check_extent(ty: &TensorType) -> Result<usize, String> {
    let bytes = ty.checked_bytes().ok_or_else(|| format!("{ty} is too large"))?;
    // Units and elements are counted in 32 bits, with room for what the last cube counts beyond the end.
    if ty.elements() > (u32::MAX - (1 << 16)) as usize {
        return Err(format!("{ty} has more elements than kernels count"));
    }
    Ok(bytes)
}

/// Checks that kernels can address a tensor, and that its memory holds whole words of it.
pub(crate) fn check_tensor(tensor: &CubeTensor<'_>) -> Result<(), String> {
    let ty: &TensorType = tensor.ty;
    let bytes = check_extent(ty)?;
    let need = bytes.next_multiple_of(4) as u64;
    let held = tensor.handle.size_in_used();
    if held < need { Err(format!("{ty} needs {need} bytes of memory, has {held}")) } else { Ok(()) }
}

/// A number as kernels count.
///
/// # Errors
/// Beyond u32.
pub(crate) fn to_u32(value: usize) -> Result<u32, String> {
    u32::try_from(value).map_err(|_| format!("{value} is more than kernels count"))
}
