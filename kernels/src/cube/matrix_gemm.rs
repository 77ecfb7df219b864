//! Matrix products on matrix units; see `gemm` for what is multiplied, and `matrix_units` for when these can.
//!
//! | version | idea |
//! | --- | --- |
//! | 1 | planes own blocks of fragments, two blocks of summed elements in shared memory |
//!
//! A cube makes a tile of the result, each plane of it a part. While planes multiply one block of summed elements, units
//! already read the next one into registers; it is written to the other half of shared memory, so that one barrier per
//! block is enough. Sums leave fragments, whose layout is the device's own, through a patch of shared memory per plane, and
//! from there are finished and stored like those of `gemm`.
//!
//! # Easy to get wrong
//! - Staged rows are one vector longer than needed, so that rows below each other lie in different banks. Fragments begin
//!   at multiples of 32 bytes all the same, which units ask for.
//! - Tiles are visited in groups of rows: cubes that run at the same time share both operands in cache.

use cubecl::prelude::*;
use ltxc_ir::DType;

use super::call::{Call, Choice};
use super::gemm::{Extents, Product, right_row};
use super::matrix_units::{self as units, Load, PLANE, Unit};
use super::patches::{self, Patches};
use super::program::Tail;
use super::store::{Patch, Store, store_patch};
use super::tuning::{self, ProductTile};

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    tile: ProductTile,
    unit: Unit,
    lhs: Load,
    rhs: Load,
    out: DType,
    /// Whether the summed axis of the right operand is last in memory.
    is_transposed: bool,
    /// How rows of the left operand are made of an input, if they are no rows in memory.
    patches: Option<Patches>,
}

impl Blueprint {
    /// Vectors of a staged row of the left operand, of the right one, and those of both in one block.
    fn left_row(&self) -> u32 {
        self.tile.k / self.lhs.vector + 1
    }

    fn right_row(&self) -> u32 {
        (if self.is_transposed { self.tile.k } else { self.tile.n }) / self.rhs.vector + 1
    }

    fn left_block(&self) -> u32 {
        self.tile.m * self.left_row()
    }

    fn right_block(&self) -> u32 {
        (if self.is_transposed { self.tile.n } else { self.tile.k }) * self.right_row()
    }

    /// Vectors of a row of a block of the right operand.
    fn right_vectors(&self) -> u32 {
        self.right_row() - 1
    }

    /// A row of fragments of a plane, as it passes through shared memory.
    fn patch(&self) -> Patch {
        Patch { rows: self.unit.edge, columns: self.tile.plane_n(), row: self.tile.patch_row(), units: PLANE }
    }

    /// Rows of fragments of a plane, and columns.
    fn fragments(&self) -> (u32, u32) {
        (self.tile.plane_m() / self.unit.edge, self.tile.plane_n() / self.unit.edge)
    }
}

/// The unit that multiplies these operands, and how they are cut.
pub(crate) fn choose<R: Runtime>(product: &Product<'_>, call: &Call<'_, R>) -> Option<(Unit, ProductTile)> {
    let (properties, Choice { units: allowed, tile }) = (call.client.properties(), call.choice);
    let unit = units::unit(properties, &[call.args[0].ty.dtype, call.args[1].ty.dtype], allowed)?;
    let hardware = &properties.hardware;
    let tile = tuning::tuned_product(hardware, &unit, tile)
        .or_else(|| tuning::product(hardware, &unit, product.m, product.n, product.batches))?;
    Some((unit, tile))
}

pub(crate) fn launch<R: Runtime>(
    (unit, tile): (Unit, ProductTile),
    product: &Product<'_>,
    call: &Call<'_, R>,
) -> Result<(), String> {
    let last = if product.is_transposed { product.k } else { product.n };
    let channels = product.patches.as_ref().map_or(0, |(p, _)| p.channels);
    let blueprint = Blueprint {
        tile,
        unit,
        lhs: Load::new(&unit, call.args[0].ty.dtype, &[product.k, product.rows[0], product.batch[0], channels]),
        rhs: Load::new(&unit, call.args[1].ty.dtype, &[last, product.rows[1], product.batch[1]]),
        out: call.out.ty.dtype,
        is_transposed: product.is_transposed,
        patches: product.patches.as_ref().map(|(p, _)| p.without_numbers()),
    };
    match unit.element {
        DType::BF16 => launch_as::<half::bf16, R>(blueprint, product, call),
        DType::F16 => launch_as::<half::f16, R>(blueprint, product, call),
        _ => launch_as::<f32, R>(blueprint, product, call),
    }
}

fn launch_as<E: Float + CubeElement, R: Runtime>(
    blueprint: Blueprint,
    product: &Product<'_>,
    call: &Call<'_, R>,
) -> Result<(), String> {
    let cubes = blueprint.tile.cubes(product.m, product.n) * product.batches;
    // SAFETY: rows, columns and summed elements beyond the matrices are not read, and not written.
    unsafe {
        multiply::launch_unchecked::<E, R>(
            call.client,
            call.cubes(cubes)?,
            CubeDim::new_1d(blueprint.tile.units()),
            blueprint.lhs.vector as usize,
            blueprint.lhs.width(),
            blueprint.rhs.width(),
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
fn multiply<E: Float, S: Size, LhsWidth: Size, RhsWidth: Size>(
    lhs: &Array<Vector<u32, LhsWidth>>,
    rhs: &Array<Vector<u32, RhsWidth>>,
    outs: &mut Sequence<Array<u32>>,
    tail: &Tail,
    store: &Store,
    extents: &Extents,
    #[comptime] blueprint: Blueprint,
) {
    let (m, n, k) = (extents.m, extents.n, extents.k);
    let (tile, unit) = comptime!((blueprint.tile, blueprint.unit));
    let edge = comptime!(unit.edge);
    let (fragments_m, fragments_n) = comptime!(blueprint.fragments());
    let (left_row, right_row) = comptime!((blueprint.left_row(), blueprint.right_row()));
    let (left_block, right_block) = comptime!((blueprint.left_block(), blueprint.right_block()));
    let vector = comptime!(blueprint.lhs.vector);

    let tiles_m = m.div_ceil(tile.m);
    let tiles_n = n.div_ceil(tile.n);
    let cube = CUBE_POS as u32;
    let batch = cube / (tiles_m * tiles_n);
    // Groups of rows of tiles, columns of a group one after the other.
    let in_batch = cube % (tiles_m * tiles_n);
    let group_tiles = tiles_n * tile.group;
    let group = in_batch / group_tiles;
    let first_tile = group * tile.group;
    let left_over = tiles_m - first_tile;
    let group_rows = select(left_over < tile.group, left_over, comptime!(tile.group).runtime());
    let in_group = in_batch % group_tiles;
    let first_row = (first_tile + in_group % group_rows) * tile.m;
    let first_column = (in_group / group_rows) * tile.n;

    let plane = UNIT_POS / PLANE;
    let plane_row = (plane / tile.planes_n) * comptime!(tile.plane_m());
    let plane_column = (plane % tile.planes_n) * comptime!(tile.plane_n());

    let mut left = SharedMemory::<Vector<E, S>>::new_aligned(comptime!((2 * left_block) as usize), 128usize);
    let mut right = SharedMemory::<Vector<E, S>>::new_aligned(comptime!((2 * right_block) as usize), 128usize);

    if batch < extents.batches {
        let mut sums = Sequence::<cmma::Matrix<f32>>::new();
        #[unroll]
        for _i in 0..comptime!((fragments_m * fragments_n) as usize) {
            sums.push(units::zeros(unit));
        }
        let a = units::operand::<E>(cmma::MatrixIdent::A, cmma::MatrixLayout::RowMajor, unit);
        let mut b = Sequence::<cmma::Matrix<E>>::new();
        #[unroll]
        for _j in 0..comptime!(fragments_n as usize) {
            b.push(units::operand::<E>(cmma::MatrixIdent::B, comptime!(right_layout(&blueprint)), unit));
        }

        let mut starts = Sequence::<i32>::new();
        if comptime!(blueprint.patches.is_some()) {
            #[unroll]
            for s in 0..comptime!(tile.left_slots(vector) as usize) {
                let row = first_row + left_own(s, comptime!(blueprint.clone()));
                let patches = comptime!(blueprint.patches.clone().unwrap_or_default());
                patches::push_start(&mut starts, row, &extents.axes, patches);
            }
        }

        let mut left_next = Array::<Vector<E, S>>::new(comptime!(tile.left_slots(vector) as usize));
        let mut right_next = Array::<Vector<E, S>>::new(comptime!(tile.right_slots(vector) as usize));
        read_left::<E, S, LhsWidth>(
            &mut left_next,
            lhs,
            &starts,
            first_row,
            0u32,
            batch,
            extents,
            comptime!(blueprint.clone()),
        );
        read_right::<E, S, RhsWidth>(
            &mut right_next,
            rhs,
            first_column,
            0u32,
            batch,
            extents,
            comptime!(blueprint.clone()),
        );
        write::<E, S>(&left_next, &right_next, &mut left, &mut right, 0u32, comptime!(blueprint.clone()));
        sync_cube();

        let mut half = 0u32;
        let mut start = 0u32;
        while start < k {
            let following = start + tile.k;
            if following < k {
                read_left::<E, S, LhsWidth>(
                    &mut left_next,
                    lhs,
                    &starts,
                    first_row,
                    following,
                    batch,
                    extents,
                    comptime!(blueprint.clone()),
                );
                read_right::<E, S, RhsWidth>(
                    &mut right_next,
                    rhs,
                    first_column,
                    following,
                    batch,
                    extents,
                    comptime!(blueprint.clone()),
                );
            }
            #[unroll]
            for step in 0..comptime!((tile.k / edge) as usize) {
                let summed = comptime!(step as u32 * edge);
                #[unroll]
                for j in 0..comptime!(fragments_n as usize) {
                    let column = plane_column + comptime!(j as u32 * edge);
                    let at = if comptime!(blueprint.is_transposed) {
                        column * right_row + comptime!(summed / vector)
                    } else {
                        column / vector + comptime!(summed * right_row)
                    };
                    let from = (half * right_block + at) as usize;
                    cmma::load(b.index(j), &right.slice(from, from + 1), comptime!(right_row * vector).runtime());
                }
                #[unroll]
                for i in 0..comptime!(fragments_m as usize) {
                    let row = plane_row + comptime!(i as u32 * edge);
                    let from = (half * left_block + row * left_row + comptime!(summed / vector)) as usize;
                    cmma::load(&a, &left.slice(from, from + 1), comptime!(left_row * vector).runtime());
                    #[unroll]
                    for j in 0..comptime!(fragments_n as usize) {
                        let sum = sums.index(comptime!(i * fragments_n as usize + j));
                        cmma::execute::<E, E, f32, f32>(&a, b.index(j), sum, sum);
                    }
                }
            }
            if following < k {
                write::<E, S>(
                    &left_next,
                    &right_next,
                    &mut left,
                    &mut right,
                    1u32 - half,
                    comptime!(blueprint.clone()),
                );
            }
            sync_cube();
            half = 1u32 - half;
            start = following;
        }

        // SAFETY: behind the last barrier nobody reads what was staged.
        unsafe {
            left.free();
            right.free();
        }
        let patch = comptime!(blueprint.patch());
        let patch_row = comptime!(patch.row);
        let mut shared =
            SharedMemory::<f32>::new_aligned(comptime!((tile.planes() * edge * patch_row) as usize), 128usize);
        let own = plane * comptime!(edge * patch_row);
        #[unroll]
        for i in 0..comptime!(fragments_m as usize) {
            #[unroll]
            for j in 0..comptime!(fragments_n as usize) {
                let from = (own + comptime!(j as u32 * edge)) as usize;
                cmma::store(
                    &mut shared.slice_mut(from, from + 1),
                    sums.index(comptime!(i * fragments_n as usize + j)),
                    comptime!(patch_row).runtime(),
                    cmma::MatrixLayout::RowMajor,
                );
            }
            units::meet(unit);
            store_patch(
                &shared,
                own,
                first_row + plane_row + comptime!(i as u32 * edge),
                first_column + plane_column,
                batch,
                UNIT_POS % PLANE,
                extents,
                tail,
                store,
                outs,
                patch,
                comptime!(blueprint.out),
                comptime!(blueprint.patches.clone()),
            );
            units::meet(unit);
        }
    }
}

/// How the right operand lies in shared memory.
fn right_layout(blueprint: &Blueprint) -> cmma::MatrixLayout {
    if blueprint.is_transposed { cmma::MatrixLayout::ColMajor } else { cmma::MatrixLayout::RowMajor }
}

/// The row of the tile that a unit reads in one of its slots.
#[cube]
fn left_own(#[comptime] slot: usize, #[comptime] blueprint: Blueprint) -> u32 {
    let vectors = comptime!(blueprint.tile.k / blueprint.lhs.vector);
    UNIT_POS / vectors + comptime!(slot as u32 * (blueprint.tile.units() / vectors))
}

/// Reads the vectors that a unit has of a block of the left operand.
#[cube]
fn read_left<E: Float, S: Size, W: Size>(
    next: &mut Array<Vector<E, S>>,
    lhs: &Array<Vector<u32, W>>,
    starts: &Sequence<i32>,
    first_row: u32,
    start: u32,
    batch: u32,
    extents: &Extents,
    #[comptime] blueprint: Blueprint,
) {
    let offset = batch * extents.lhs_batch;
    let (tile, load) = comptime!((blueprint.tile, blueprint.lhs));
    let summed = start + UNIT_POS % comptime!(tile.k / load.vector) * comptime!(load.vector);
    #[unroll]
    for s in 0..comptime!(tile.left_slots(load.vector) as usize) {
        let row = first_row + left_own(s, comptime!(blueprint.clone()));
        let mut values = Vector::<E, S>::new(E::new(0.0));
        if row < extents.m {
            if comptime!(blueprint.patches.is_some()) {
                values = patches::vector::<E, S, W>(
                    lhs,
                    starts,
                    summed,
                    extents.k,
                    &extents.axes,
                    extents.channels,
                    offset,
                    s,
                    load,
                    comptime!(blueprint.patches.clone().unwrap_or_default()),
                );
            } else {
                values = units::along::<E, S, W>(lhs, offset + row * extents.lhs_row, summed, extents.k, load);
            }
        }
        next[s] = values;
    }
}

/// Reads the vectors that a unit has of a block of the right operand.
#[cube]
fn read_right<E: Float, S: Size, W: Size>(
    next: &mut Array<Vector<E, S>>,
    rhs: &Array<Vector<u32, W>>,
    first_column: u32,
    start: u32,
    batch: u32,
    extents: &Extents,
    #[comptime] blueprint: Blueprint,
) {
    let offset = batch * extents.rhs_batch;
    let (tile, load) = comptime!((blueprint.tile, blueprint.rhs));
    let vectors = comptime!(blueprint.right_vectors());
    let along = UNIT_POS % vectors * comptime!(load.vector);
    #[unroll]
    for s in 0..comptime!(tile.right_slots(load.vector) as usize) {
        let own = UNIT_POS / vectors + comptime!(s as u32 * (tile.units() / vectors));
        let mut values = Vector::<E, S>::new(E::new(0.0));
        if comptime!(blueprint.is_transposed) {
            let column = first_column + own;
            if column < extents.n {
                let row = offset + column * extents.rhs_row;
                values = units::along::<E, S, W>(rhs, row, start + along, extents.k, load);
            }
        } else {
            let summed = start + own;
            if summed < extents.k {
                let row = offset + right_row(summed, extents, comptime!(blueprint.patches.clone())) * extents.rhs_row;
                values = units::along::<E, S, W>(rhs, row, first_column + along, extents.n, load);
            }
        }
        next[s] = values;
    }
}

/// Writes what was read to one half of shared memory.
#[cube]
fn write<E: Float, S: Size>(
    left_next: &Array<Vector<E, S>>,
    right_next: &Array<Vector<E, S>>,
    left: &mut SharedMemory<Vector<E, S>>,
    right: &mut SharedMemory<Vector<E, S>>,
    half: u32,
    #[comptime] blueprint: Blueprint,
) {
    let tile = comptime!(blueprint.tile);
    let vector = comptime!(blueprint.lhs.vector);
    #[unroll]
    for s in 0..comptime!(tile.left_slots(vector) as usize) {
        let own = left_own(s, comptime!(blueprint.clone()));
        let at = half * comptime!(blueprint.left_block()) + own * comptime!(blueprint.left_row());
        left[(at + UNIT_POS % comptime!(tile.k / vector)) as usize] = left_next[s];
    }
    let vectors = comptime!(blueprint.right_vectors());
    #[unroll]
    for s in 0..comptime!(tile.right_slots(vector) as usize) {
        let own = UNIT_POS / vectors + comptime!(s as u32 * (tile.units() / vectors));
        let at = half * comptime!(blueprint.right_block()) + own * comptime!(blueprint.right_row());
        right[(at + UNIT_POS % vectors) as usize] = right_next[s];
    }
}
