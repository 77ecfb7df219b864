//! Matrix units: what multiplies whole fragments of matrices, tensor cores on CUDA and simdgroup matrices on Metal.
//!
//! A unit takes two operands of one element type and adds their product to sums in f32, all held by a plane of 32 units.
//! Operands that the element type holds exactly are widened on their way to shared memory; others, and so f32 on CUDA
//! whose units would cut its mantissa to 10 bits, are left to kernels that multiply element by element.

use cubecl::ir::features::MmaConfig;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind, StorageType};
use cubecl::prelude::*;
use ltxc_ir::DType;
use ltxc_ir::plan::MatrixUnit;

use super::storage;

/// Units of a plane.
pub(crate) const PLANE: u32 = 32;

/// A kind of matrix unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Unit {
    /// Type of both operands.
    pub(crate) element: DType,
    /// Edges of a fragment: rows of the left operand, columns of the right one and what is summed.
    pub(crate) edge: u32,
    /// Whether units of a plane see what others of it wrote to shared memory as soon as they meet.
    pub(crate) planes_meet: bool,
}

impl Unit {
    /// Elements of the vectors in which operands pass through shared memory.
    pub(crate) fn vector(&self) -> u32 {
        // Metal has vectors of four.
        if self.planes_meet { 16 / self.element.bytes() as u32 } else { 4 }
    }
}

/// The units that kernels know, best first.
const KNOWN: [MatrixUnit; 6] = [
    MatrixUnit { element: DType::BF16, edge: 16 },
    MatrixUnit { element: DType::BF16, edge: 8 },
    MatrixUnit { element: DType::F16, edge: 16 },
    MatrixUnit { element: DType::F16, edge: 8 },
    MatrixUnit { element: DType::F32, edge: 16 },
    MatrixUnit { element: DType::F32, edge: 8 },
];

/// The unit of a device for operands of some dtypes, if there is one and it is one of `allowed`.
pub(crate) fn unit(properties: &DeviceProperties, dtypes: &[DType], allowed: Option<&[MatrixUnit]>) -> Option<Unit> {
    let holds = |element: DType, dtype: DType| {
        element == dtype || element == DType::F32 || matches!(dtype, DType::F8E4M3 | DType::F8E5M2)
    };
    let fits = |unit: &MatrixUnit| {
        dtypes.iter().all(|&dtype| holds(unit.element, dtype)) && allowed.is_none_or(|allowed| allowed.contains(unit))
    };
    let found = KNOWN.into_iter().find(|unit| fits(unit) && has_unit(properties, unit))?;
    Some(Unit { element: found.element, edge: found.edge, planes_meet: found.edge == 16 })
}

/// The units of a device.
pub(crate) fn all(properties: &DeviceProperties) -> Vec<MatrixUnit> {
    KNOWN.into_iter().filter(|unit| has_unit(properties, unit)).collect()
}

fn has_unit(properties: &DeviceProperties, &MatrixUnit { element, edge }: &MatrixUnit) -> bool {
    let hardware = &properties.hardware;
    if hardware.plane_size_min != PLANE || hardware.plane_size_max != PLANE {
        return false;
    }
    let kind = match element {
        DType::BF16 => FloatKind::BF16,
        DType::F16 => FloatKind::F16,
        _ => FloatKind::F32,
    };
    let [ty, sum] = [kind, FloatKind::F32].map(|kind| StorageType::from(ElemType::Float(kind)));
    let config = MmaConfig { a_type: ty, b_type: ty, cd_type: sum, m: edge, n: edge, k: edge };
    properties.features.matmul.cmma.contains(&config) && properties.supports_type(ty)
}

/// How an operand in memory becomes vectors of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Load {
    pub(crate) dtype: DType,
    element: DType,
    /// Elements of a vector.
    pub(crate) vector: u32,
    /// Whether vectors lie in memory as such.
    pub(crate) is_aligned: bool,
}

impl Load {
    /// For an operand in whose memory vectors are at these distances.
    pub(crate) fn new(unit: &Unit, dtype: DType, distances: &[usize]) -> Load {
        let vector = unit.vector();
        let is_aligned = distances.iter().all(|d| d.is_multiple_of(vector as usize));
        Load { dtype, element: unit.element, vector, is_aligned }
    }

    /// Words that are bound as one vector.
    pub(crate) fn width(&self) -> usize {
        if self.is_aligned { self.vector as usize * self.dtype.bytes() / 4 } else { 1 }
    }
}

/// The vector from `base + first` on; elements from `base + end` on are 0.
#[cube]
pub(crate) fn along<E: Float, S: Size, W: Size>(
    memory: &Array<Vector<u32, W>>,
    base: u32,
    first: u32,
    end: u32,
    #[comptime] load: Load,
) -> Vector<E, S> {
    let mut values = Vector::<E, S>::new(E::new(0.0));
    if comptime!(load.is_aligned) {
        if first < end {
            values = whole::<E, S, W>(memory, base + first, load);
        }
    } else {
        #[unroll]
        for i in 0..comptime!(load.vector as usize) {
            let at = first + comptime!(i as u32);
            if at < end {
                values[i] = one::<E, W>(memory, base + at, load);
            }
        }
    }
    values
}

/// The vector at an element, of memory in which vectors lie as such.
#[cube]
pub(crate) fn whole<E: Float, S: Size, W: Size>(
    memory: &Array<Vector<u32, W>>,
    index: u32,
    #[comptime] load: Load,
) -> Vector<E, S> {
    let words = memory[(index / load.vector) as usize];
    if comptime!(load.dtype == load.element) {
        Vector::<E, S>::reinterpret(words)
    } else {
        let lanes = comptime!(storage::per_word(load.dtype));
        let mut values = Vector::<E, S>::empty();
        #[unroll]
        for i in 0..comptime!(load.vector as usize) {
            let word = words[comptime!(i / lanes as usize)];
            let bits = storage::extract(word, comptime!(i as u32 % lanes).runtime(), comptime!(4 / lanes));
            values[i] = E::cast_from(storage::decode(bits, comptime!(load.dtype)));
        }
        values
    }
}

/// An element of memory that is bound as vectors of one word.
#[cube]
pub(crate) fn one<E: Float, W: Size>(memory: &Array<Vector<u32, W>>, index: u32, #[comptime] load: Load) -> E {
    E::cast_from(storage::load_one::<W>(memory, index, comptime!(load.dtype)))
}

/// Waits until all units of the plane are here and see what each of them wrote to shared memory. Where planes do not
/// meet, the whole cube does.
#[cube]
pub(crate) fn meet(#[comptime] unit: Unit) {
    if comptime!(unit.planes_meet) {
        sync_plane();
    } else {
        sync_cube();
    }
}

/// An operand of a unit, before it is loaded.
#[cube]
pub(crate) fn operand<E: Float>(
    #[comptime] ident: cmma::MatrixIdent,
    #[comptime] layout: cmma::MatrixLayout,
    #[comptime] unit: Unit,
) -> cmma::Matrix<E> {
    let edge = comptime!(unit.edge as usize);
    // Kernels load operands before they multiply them.
    unsafe { cmma::Matrix::<E>::uninitialized(ident, edge, edge, edge, layout) }
}

/// Sums of a unit, all 0.
#[cube]
pub(crate) fn zeros(#[comptime] unit: Unit) -> cmma::Matrix<f32> {
    let edge = comptime!(unit.edge as usize);
    cmma::Matrix::<f32>::from_value(
        cmma::MatrixIdent::Accumulator,
        edge,
        edge,
        edge,
        cmma::MatrixLayout::Undefined,
        0.0f32,
    )
}
