//! Matrix products: `matmul`, and convolutions whose left matrix is a view of the input.
//!
//! | version | idea |
//! | --- | --- |
//! | 1 | tiles in shared memory, a block of sums per unit in registers |
//!
//! A cube makes a tile of the result. For each block of summed elements its units load both operands into shared memory,
//! widened to f32, as vectors of four; then every unit multiplies what it needs of them. The left block is stored by
//! rows, summed elements adjacent, and so is the right one if its summed axis is last in memory; else that is stored as
//! it lies. Rows of a block are one vector longer than needed, so that units that read below each other hit different
//! banks.
//!
//! # Easy to get wrong
//! - Units own four adjacent columns each, then the next four behind those of all others. Right rows are therefore stored
//!   by column modulo 4 first: units next to each other read rows next to each other.

use cubecl::prelude::*;
use ltxc_ir::DType;

use super::call::{Call, to_u32};
use super::matrix_gemm;
use super::patches::{self, Patches};
use super::program::{Tail, finished};
use super::storage::{self, load_four, load_one, words_of_four};
use super::store::{Store, store_patch, store_word};
use super::tile::{self, Tile};

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    tile: Tile,
    lhs: DType,
    rhs: DType,
    out: DType,
    /// Whether the summed axis of the right operand is last in memory.
    is_transposed: bool,
    /// Whether vectors of four of the operands lie in memory as such.
    is_lhs_aligned: bool,
    is_rhs_aligned: bool,
    /// How rows of the left operand are made of an input, if they are no rows in memory.
    patches: Option<Patches>,
}

/// A product of `batches` pairs of matrices. Strides count elements.
pub(crate) struct Product<'a> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) batches: usize,
    /// Distance of rows, and of batches, of the left operand, of the right one and of the result.
    pub(crate) rows: [usize; 3],
    pub(crate) batch: [usize; 3],
    pub(crate) is_transposed: bool,
    /// The view of the left operand, and its numbers.
    pub(crate) patches: Option<(Patches, &'a [u32])>,
}

/// The numbers of a [`Product`], as an argument of a kernel.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Extents {
    pub(crate) m: u32,
    pub(crate) n: u32,
    pub(crate) k: u32,
    pub(crate) batches: u32,
    pub(crate) lhs_row: u32,
    pub(crate) rhs_row: u32,
    pub(crate) out_row: u32,
    pub(crate) lhs_batch: u32,
    pub(crate) rhs_batch: u32,
    pub(crate) out_batch: u32,
    /// Channels of a group in the input of the view, and the numbers of its axes.
    pub(crate) channels: u32,
    pub(crate) axes: Sequence<u32>,
}

impl Product<'_> {
    /// # Errors
    /// A number beyond u32.
    pub(crate) fn extents<R: Runtime>(&self) -> Result<ExtentsLaunch<R>, String> {
        let mut axes = SequenceArg::new();
        self.patches.iter().flat_map(|(_, numbers)| numbers.iter()).for_each(|&n| axes.push(n));
        let [lhs_row, rhs_row, out_row] = self.rows.map(to_u32);
        let [lhs_batch, rhs_batch, out_batch] = self.batch.map(to_u32);
        Ok(ExtentsLaunch::new(
            to_u32(self.m)?,
            to_u32(self.n)?,
            to_u32(self.k)?,
            to_u32(self.batches)?,
            lhs_row?,
            rhs_row?,
            out_row?,
            lhs_batch?,
            rhs_batch?,
            out_batch?,
            to_u32(self.patches.as_ref().map_or(1, |(p, _)| p.channels))?,
            axes,
        ))
    }
}

pub(crate) fn launch<R: Runtime>(product: &Product<'_>, call: &Call<'_, R>) -> Result<(), String> {
    if let Some(choice) = matrix_gemm::choose(product, call) {
        return matrix_gemm::launch(choice, product, call);
    }
    let [lhs, rhs] = [0, 1].map(|i| &call.args[i]);
    let tile = tile::choose(call, product.m * product.batches, product.n);
    let is_aligned = |distances: &[usize]| distances.iter().all(|d| d.is_multiple_of(4));
    let is_lhs_aligned = is_aligned(&[product.k, product.rows[0], product.batch[0]])
        && product.patches.as_ref().is_none_or(|(p, _)| p.channels.is_multiple_of(4));
    // Vectors run along the last axis in memory.
    let last = if product.is_transposed { product.k } else { product.n };
    let is_rhs_aligned = is_aligned(&[last, product.rows[1], product.batch[1]]);
    let blueprint = Blueprint {
        tile,
        lhs: lhs.ty.dtype,
        rhs: rhs.ty.dtype,
        out: call.out.ty.dtype,
        is_transposed: product.is_transposed,
        is_lhs_aligned,
        is_rhs_aligned,
        patches: product.patches.as_ref().map(|(p, _)| p.without_numbers()),
    };
    let cubes = tile.cubes(product.m, product.n) * product.batches;
    let width = |dtype: DType, is_aligned: bool| if is_aligned { words_of_four(dtype) } else { 1 };
    // SAFETY: rows, columns and summed elements beyond the matrices are not read, and not written.
    unsafe {
        gemm::launch_unchecked::<R>(
            call.client,
            call.cubes(cubes)?,
            CubeDim::new_1d(tile.units()),
            width(lhs.ty.dtype, is_lhs_aligned),
            width(rhs.ty.dtype, is_rhs_aligned),
            call.arg(0),
            call.arg(1),
            call.outs(),
            call.tail()?,
            call.store()?,
            product.extents()?,
            blueprint,
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn gemm<LhsWidth: Size, RhsWidth: Size>(
    lhs: &Array<Vector<u32, LhsWidth>>,
    rhs: &Array<Vector<u32, RhsWidth>>,
    outs: &mut Sequence<Array<u32>>,
    tail: &Tail,
    store: &Store,
    extents: &Extents,
    #[comptime] blueprint: Blueprint,
) {
    let (m, n, k) = (extents.m, extents.n, extents.k);
    let tile = comptime!(blueprint.tile);
    let units = comptime!(tile.units());
    let vectors = comptime!(tile.k / 4);
    let (units_m, units_n) = comptime!((tile.units_m(), tile.units_n()));
    let (unit_m, unit_n) = comptime!((tile.unit_m, tile.unit_n));

    let tiles_m = m.div_ceil(tile.m);
    let tiles_n = n.div_ceil(tile.n);
    let cube = CUBE_POS as u32;
    let batch = cube / (tiles_m * tiles_n);
    let first_row = (cube % tiles_m) * tile.m;
    let first_column = ((cube / tiles_m) % tiles_n) * tile.n;
    let unit = UNIT_POS;
    let (unit_row, unit_column) = (unit / units_n, unit % units_n);

    let mut left = SharedMemory::<Vector<f32, Const<4>>>::new(comptime!((tile.m * (vectors + 1)) as usize));
    let mut right = SharedMemory::<Vector<f32, Const<4>>>::new(comptime!((tile.n * (vectors + 1)) as usize));

    if batch < extents.batches {
        let mut sums = Array::<f32>::new(comptime!((unit_m * unit_n) as usize));
        #[unroll]
        for i in 0..comptime!((unit_m * unit_n) as usize) {
            sums[i] = 0.0f32;
        }

        // A unit loads the same summed elements of some rows.
        let vector = unit % vectors;
        let row_step = comptime!(units / vectors);
        let slots = comptime!(tile.m / row_step);
        let mut starts = Sequence::<i32>::new();
        if comptime!(blueprint.patches.is_some()) {
            #[unroll]
            for s in 0..comptime!(slots as usize) {
                let row = first_row + unit / vectors + comptime!(s as u32 * row_step);
                let patches = comptime!(blueprint.patches.clone().unwrap_or_default());
                patches::push_start(&mut starts, row, &extents.axes, patches);
            }
        }

        let mut start = 0u32;
        while start < k {
            let summed = start + vector * 4u32;
            if comptime!(blueprint.patches.is_some()) {
                #[unroll]
                for s in 0..comptime!(slots as usize) {
                    let own = unit / vectors + comptime!(s as u32 * row_step);
                    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
                    if first_row + own < m {
                        values = patches::four::<LhsWidth>(
                            lhs,
                            &starts,
                            summed,
                            k,
                            &extents.axes,
                            extents.channels,
                            batch * extents.lhs_batch,
                            s,
                            comptime!(blueprint.lhs),
                            comptime!(blueprint.is_lhs_aligned),
                            comptime!(blueprint.patches.clone().unwrap_or_default()),
                        );
                    }
                    left[(own * comptime!(vectors + 1) + vector) as usize] = values;
                }
            } else {
                for s in 0..slots {
                    let own = unit / vectors + s * row_step;
                    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
                    if first_row + own < m {
                        values = four_along::<LhsWidth>(
                            lhs,
                            batch * extents.lhs_batch + (first_row + own) * extents.lhs_row,
                            summed,
                            k,
                            comptime!(blueprint.lhs),
                            comptime!(blueprint.is_lhs_aligned),
                        );
                    }
                    left[(own * comptime!(vectors + 1) + vector) as usize] = values;
                }
            }
            for s in 0..comptime!(tile.n * vectors / units) {
                let at = unit + s * units;
                if comptime!(blueprint.is_transposed) {
                    let (own, vector) = (at / vectors, at % vectors);
                    let column = first_column + own;
                    let summed = start + vector * 4u32;
                    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
                    if column < n {
                        values = four_along::<RhsWidth>(
                            rhs,
                            batch * extents.rhs_batch + column * extents.rhs_row,
                            summed,
                            k,
                            comptime!(blueprint.rhs),
                            comptime!(blueprint.is_rhs_aligned),
                        );
                    }
                    let row = (own % 4u32) * comptime!(tile.n / 4) + own / 4u32;
                    right[(row * comptime!(vectors + 1) + vector) as usize] = values;
                } else {
                    let own = at / comptime!(tile.n / 4);
                    let column = at % comptime!(tile.n / 4);
                    let summed = start + own;
                    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
                    if summed < k {
                        let row = right_row(summed, extents, comptime!(blueprint.patches.clone()));
                        values = four_along::<RhsWidth>(
                            rhs,
                            batch * extents.rhs_batch + row * extents.rhs_row,
                            first_column + column * 4u32,
                            n,
                            comptime!(blueprint.rhs),
                            comptime!(blueprint.is_rhs_aligned),
                        );
                    }
                    right[at as usize] = values;
                }
            }
            sync_cube();
            for v in 0..vectors {
                let mut a = Sequence::<Vector<f32, Const<4>>>::new();
                #[unroll]
                for i in 0..comptime!(unit_m as usize) {
                    a.push(left[((unit_row + comptime!(i as u32 * units_m)) * comptime!(vectors + 1) + v) as usize]);
                }
                if comptime!(blueprint.is_transposed) {
                    #[unroll]
                    for j in 0..comptime!(unit_n as usize) {
                        let row = comptime!((j as u32 % 4) * (tile.n / 4) + (j as u32 / 4) * units_n) + unit_column;
                        let b = right[(row * comptime!(vectors + 1) + v) as usize];
                        #[unroll]
                        for i in 0..comptime!(unit_m as usize) {
                            let own = *a.index(i);
                            let mut sum = sums[comptime!(i * unit_n as usize + j)];
                            #[unroll]
                            for c in 0..4usize {
                                sum += own[c] * b[c];
                            }
                            sums[comptime!(i * unit_n as usize + j)] = sum;
                        }
                    }
                } else {
                    #[unroll]
                    for c in 0..4usize {
                        #[unroll]
                        for j in 0..comptime!(unit_n as usize / 4) {
                            let row = (v * 4u32 + comptime!(c as u32)) * comptime!(tile.n / 4);
                            let b = right[(row + unit_column + comptime!(j as u32 * units_n)) as usize];
                            #[unroll]
                            for i in 0..comptime!(unit_m as usize) {
                                let own = *a.index(i);
                                #[unroll]
                                for l in 0..4usize {
                                    let at = comptime!(i * unit_n as usize + j * 4 + l);
                                    sums[at] += own[c] * b[l];
                                }
                            }
                        }
                    }
                }
            }
            sync_cube();
            start += tile.k;
        }

        let lanes = comptime!(storage::per_word(blueprint.out));
        if comptime!(store.places.are_adjacent()) {
            #[unroll]
            for i in 0..comptime!(unit_m as usize) {
                let row = first_row + unit_row + comptime!(i as u32 * units_m);
                if row < m {
                    let base = result_row(row, batch, extents, comptime!(blueprint.patches.clone()));
                    #[unroll]
                    for j in 0..comptime!((unit_n / lanes) as usize) {
                        let first = comptime!(j as u32 * lanes);
                        let column =
                            first_column + (unit_column + comptime!(first / 4 * units_n)) * 4u32 + comptime!(first % 4);
                        // Words lie in one row: what begins inside ends inside.
                        if column < n {
                            let mut word = 0u32;
                            #[unroll]
                            for l in 0..comptime!(lanes as usize) {
                                let sum = sums[comptime!(i * unit_n as usize + first as usize + l)];
                                let position = base + column + comptime!(l as u32);
                                word |= finished(sum, position, comptime!(l as u32).runtime(), tail);
                            }
                            store_word(word, base + column, outs, store, lanes);
                        }
                    }
                }
            }
        } else {
            // Lanes of a word are sums of different units.
            let patch = comptime!(tile.patch());
            let mut shared = SharedMemory::<f32>::new(comptime!((patch.rows * patch.row) as usize));
            #[unroll]
            for i in 0..comptime!(unit_m as usize) {
                #[unroll]
                for j in 0..comptime!(unit_n as usize) {
                    let column = (unit_column + comptime!(j as u32 / 4 * units_n)) * 4u32 + comptime!(j as u32 % 4);
                    shared[(unit_row * comptime!(patch.row) + column) as usize] =
                        sums[comptime!(i * unit_n as usize + j)];
                }
                sync_cube();
                store_patch(
                    &shared,
                    0u32,
                    first_row + comptime!(i as u32 * units_m),
                    first_column,
                    batch,
                    unit,
                    extents,
                    tail,
                    store,
                    outs,
                    patch,
                    comptime!(blueprint.out),
                    comptime!(blueprint.patches.clone()),
                );
                sync_cube();
            }
        }
    }
}

/// The row of the right operand for a summed element.
#[cube]
pub(crate) fn right_row(summed: u32, extents: &Extents, #[comptime] patches: Option<Patches>) -> u32 {
    if comptime!(patches.clone().is_some_and(|p| !p.is_dense)) {
        patches::weight_row(summed, &extents.axes, extents.channels, comptime!(patches.unwrap_or_default()))
    } else {
        summed
    }
}

/// The element of the result at which a row of a batch begins.
#[cube]
pub(crate) fn result_row(row: u32, batch: u32, extents: &Extents, #[comptime] patches: Option<Patches>) -> u32 {
    let place = if comptime!(patches.clone().is_some_and(|p| !p.is_dense)) {
        patches::result_row(row, &extents.axes, comptime!(patches.unwrap_or_default()))
    } else {
        row
    };
    batch * extents.out_batch + place * extents.out_row
}

/// Four adjacent elements from `base + first`, 0 from `base + end` on.
#[cube]
pub(crate) fn four_along<N: Size>(
    memory: &Array<Vector<u32, N>>,
    base: u32,
    first: u32,
    end: u32,
    #[comptime] dtype: DType,
    #[comptime] is_aligned: bool,
) -> Vector<f32, Const<4>> {
    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
    if is_aligned {
        if first < end {
            values = load_four::<N>(memory, base + first, dtype);
        }
    } else {
        #[unroll]
        for i in 0..4usize {
            let at = first + comptime!(i as u32);
            if at < end {
                values[i] = load_one::<N>(memory, base + at, dtype);
            }
        }
    }
    values
}
