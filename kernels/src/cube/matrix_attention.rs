//! Attention on matrix units, for head dims that are multiples of 16; see `attention` for what is computed, and
//! `matrix_units` for when these can.
//!
//! | version | idea |
//! | --- | --- |
//! | 1 | a plane owns rows of queries and all their columns; sums stay in fragments |
//!
//! A cube owns a block of queries of one head, which stay in shared memory; blocks of keys and values pass through it. A
//! plane multiplies its queries with the keys, writes the scores to a patch of its own, where the layout is known, turns
//! them into weights of the operands' type, and adds their product with the values to its sums.
//!
//! Weights are relative to a reference that follows the largest score of the row. As fragments can be scaled only on a
//! detour through the patch, the reference moves when a score exceeds it by [`SLACK`], which after the first blocks is
//! rare; what weights and their sum are relative to cancels in the end.
//!
//! # Easy to get wrong
//! - The sum of a row is that of its rounded weights, so that the result is a mean of values whatever was rounded.
//! - Hidden keys and keys that do not exist differ as in `attention`.

// The macro of kernels adds `_s` for the width `S`, beside the argument `s`.
#![allow(clippy::duplicate_underscore_argument)]

use cubecl::prelude::*;
use ltxc_ir::DType;
use ltxc_ir::ops::Attention;

use super::attention::{Extents, extents, last_key, score};
use super::call::{Call, Choice, to_u32};
use super::math;
use super::matrix_units::{self as units, Load, PLANE, Unit};
use super::program::{Tail, finished};
use super::storage;
use super::tuning::{self, AttentionTile};

/// How far a score may exceed the reference of its row: weights stay below 150, of which every dtype has room.
const SLACK: f32 = 5.0;

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    tile: AttentionTile,
    unit: Unit,
    q: Load,
    k: Load,
    v: Load,
    out: DType,
    /// Head dims of queries and keys, and of values.
    d: u32,
    e: u32,
}

impl Blueprint {
    /// Vectors of a staged query or key, and of a staged value.
    fn key_row(&self) -> u32 {
        self.tile.key_row(&self.unit, self.d)
    }

    fn value_row(&self) -> u32 {
        self.tile.key_row(&self.unit, self.e)
    }

    /// Where values are staged behind the keys, in vectors.
    fn values_at(&self) -> u32 {
        if self.tile.shares_stage { 0 } else { self.tile.keys * self.key_row() }
    }

    /// Columns of the result that pass through the patch together, from a multiple of its width on.
    fn chunk(&self, index: usize) -> u32 {
        (self.e - index as u32 * self.tile.keys).min(self.tile.keys)
    }

    fn chunks(&self) -> usize {
        self.e.div_ceil(self.tile.keys) as usize
    }
}

/// The unit that computes these heads, and how they are cut.
pub(crate) fn choose<R: Runtime>(call: &Call<'_, R>) -> Option<(Unit, AttentionTile)> {
    let [q, k, v] = [0, 1, 2].map(|i| call.args[i].ty);
    let (properties, Choice { units: allowed, tile }) = (call.client.properties(), call.choice);
    let unit = units::unit(properties, &[q.dtype, k.dtype, v.dtype], allowed)?;
    let (hardware, d, e) = (&properties.hardware, q.shape[3], v.shape[3]);
    let tile =
        tuning::tuned_attention(hardware, &unit, d, e, tile).or_else(|| tuning::attention(hardware, &unit, d, e))?;
    Some((unit, tile))
}

pub(crate) fn launch<R: Runtime>(
    (unit, tile): (Unit, AttentionTile),
    op: &Attention,
    call: &Call<'_, R>,
) -> Result<(), String> {
    let [q, k, v] = [0, 1, 2].map(|i| call.args[i].ty);
    let blueprint = Blueprint {
        tile,
        unit,
        q: Load::new(&unit, q.dtype, &[q.shape[3]]),
        k: Load::new(&unit, k.dtype, &[k.shape[3]]),
        v: Load::new(&unit, v.dtype, &[v.shape[3]]),
        out: call.out.ty.dtype,
        d: to_u32(q.shape[3])?,
        e: to_u32(v.shape[3])?,
    };
    match unit.element {
        DType::BF16 => launch_as::<half::bf16, R>(blueprint, op, call),
        DType::F16 => launch_as::<half::f16, R>(blueprint, op, call),
        _ => launch_as::<f32, R>(blueprint, op, call),
    }
}

fn launch_as<E: Float + CubeElement, R: Runtime>(
    blueprint: Blueprint,
    op: &Attention,
    call: &Call<'_, R>,
) -> Result<(), String> {
    let [b, t, n] = [0, 1, 2].map(|a| call.args[0].ty.shape[a]);
    let cubes = b * n * t.div_ceil(blueprint.tile.queries(&blueprint.unit) as usize);
    // SAFETY: queries and keys beyond the operands are not read, and not written.
    unsafe {
        attend::launch_unchecked::<E, R>(
            call.client,
            call.cubes(cubes)?,
            CubeDim::new_1d(blueprint.tile.units()),
            blueprint.q.vector as usize,
            blueprint.q.width(),
            blueprint.k.width(),
            blueprint.v.width(),
            call.arg(0),
            call.arg(1),
            call.arg(2),
            call.out(),
            call.tail()?,
            extents(op, call)?,
            blueprint,
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn attend<E: Float, S: Size, QueryWidth: Size, KeyWidth: Size, ValueWidth: Size>(
    q: &Array<Vector<u32, QueryWidth>>,
    k: &Array<Vector<u32, KeyWidth>>,
    v: &Array<Vector<u32, ValueWidth>>,
    out: &mut Array<u32>,
    tail: &Tail,
    extents: &Extents,
    #[comptime] blueprint: Blueprint,
) {
    let (t, n, s, m) = (extents.t, extents.n, extents.s, extents.m);
    let (tile, unit) = comptime!((blueprint.tile, blueprint.unit));
    let edge = comptime!(unit.edge);
    let vector = comptime!(unit.vector());
    let (d, e) = comptime!((blueprint.d, blueprint.e));
    let queries = comptime!(tile.queries(&unit));
    let (key_row, value_row) = comptime!((blueprint.key_row(), blueprint.value_row()));
    let values_at = comptime!(blueprint.values_at());
    // Rows of fragments of a plane; fragments of its scores, and of its result, in a row.
    let (rows, score_fragments, fragments) = comptime!((tile.rows as usize, tile.keys / edge, e / edge));

    let cube = CUBE_POS as u32;
    let row_blocks = t.div_ceil(queries);
    let first_row = (cube % row_blocks) * queries;
    let head = (cube / row_blocks) % n;
    let batch = cube / (row_blocks * n);
    let key_head = head / (n / m);
    let (plane, lane) = (UNIT_POS / PLANE, UNIT_POS % PLANE);
    let plane_row = plane * comptime!(tile.rows * edge);
    // Units that share the softmax of a row, and vectors of 4 that each has of it.
    let sharers = comptime!(PLANE / edge);
    let own_vectors = comptime!((tile.keys / 4 / sharers) as usize);
    let (own_row, part) = (lane / sharers, lane % sharers);

    let mut query_stage = SharedMemory::<Vector<E, S>>::new_aligned(comptime!((queries * key_row) as usize), 128usize);
    let mut stage =
        SharedMemory::<Vector<E, S>>::new_aligned(comptime!(tile.stage_vectors(&unit, d, e) as usize), 128usize);
    let patch_row = comptime!(tile.patch_row() / 4);
    let patch_size = comptime!(edge * patch_row);
    let mut patch =
        SharedMemory::<Vector<f32, Const<4>>>::new_aligned(comptime!((tile.planes * patch_size) as usize), 128usize);
    let weight_row = comptime!(tile.weight_row(&unit) / 4);
    let weight_size = comptime!(tile.rows * edge * weight_row);
    let mut weights =
        SharedMemory::<Vector<E, Const<4>>>::new_aligned(comptime!((tile.planes * weight_size) as usize), 128usize);
    let own_patch = plane * patch_size;
    let own_weights = plane * weight_size;

    if batch < extents.b {
        let mut sums = Sequence::<cmma::Matrix<f32>>::new();
        #[unroll]
        for _i in 0..comptime!(rows * fragments as usize) {
            sums.push(units::zeros(unit));
        }
        let mut scores = Sequence::<cmma::Matrix<f32>>::new();
        #[unroll]
        for _i in 0..comptime!(rows * score_fragments as usize) {
            scores.push(units::zeros(unit));
        }
        let mut left = Sequence::<cmma::Matrix<E>>::new();
        #[unroll]
        for _i in 0..rows {
            left.push(units::operand::<E>(cmma::MatrixIdent::A, cmma::MatrixLayout::RowMajor, unit));
        }
        let key = units::operand::<E>(cmma::MatrixIdent::B, cmma::MatrixLayout::ColMajor, unit);
        let value = units::operand::<E>(cmma::MatrixIdent::B, cmma::MatrixLayout::RowMajor, unit);
        let mut row_max = Array::<f32>::new(rows);
        let mut row_sum = Array::<f32>::new(rows);
        #[unroll]
        for i in 0..rows {
            row_max[i] = f32::new(comptime!(f32::MIN));
            row_sum[i] = 0.0f32;
        }

        stage_rows::<E, S, QueryWidth>(
            &mut query_stage,
            q,
            (batch * t * n + head) * d,
            n * d,
            first_row,
            t,
            0u32,
            queries,
            d,
            key_row,
            comptime!(blueprint.q),
            comptime!(tile.units()),
        );

        let end = last_key(first_row + queries, extents);
        let mut first_key = 0u32;
        while first_key < end {
            stage_rows::<E, S, KeyWidth>(
                &mut stage,
                k,
                (batch * s * m + key_head) * d,
                m * d,
                first_key,
                s,
                0u32,
                comptime!(tile.keys),
                d,
                key_row,
                comptime!(blueprint.k),
                comptime!(tile.units()),
            );
            if comptime!(!tile.shares_stage) {
                stage_rows::<E, S, ValueWidth>(
                    &mut stage,
                    v,
                    (batch * s * m + key_head) * e,
                    m * e,
                    first_key,
                    s,
                    values_at,
                    comptime!(tile.keys),
                    e,
                    value_row,
                    comptime!(blueprint.v),
                    comptime!(tile.units()),
                );
            }
            sync_cube();

            #[unroll]
            for i in 0..comptime!(rows * score_fragments as usize) {
                cmma::fill(scores.index(i), 0.0f32);
            }
            #[unroll]
            for step in 0..comptime!((d / edge) as usize) {
                let dim = comptime!(step as u32 * edge / vector);
                #[unroll]
                for i in 0..rows {
                    let from = ((plane_row + comptime!(i as u32 * edge)) * key_row + dim) as usize;
                    cmma::load(
                        left.index(i),
                        &query_stage.slice(from, from + 1),
                        comptime!(key_row * vector).runtime(),
                    );
                }
                #[unroll]
                for j in 0..comptime!(score_fragments as usize) {
                    let from = comptime!((j as u32 * edge * key_row + dim) as usize).runtime();
                    cmma::load(&key, &stage.slice(from, from + 1), comptime!(key_row * vector).runtime());
                    #[unroll]
                    for i in 0..rows {
                        let sum = scores.index(comptime!(i * score_fragments as usize + j));
                        cmma::execute::<E, E, f32, f32>(left.index(i), &key, sum, sum);
                    }
                }
            }

            #[unroll]
            for i in 0..rows {
                #[unroll]
                for j in 0..comptime!(score_fragments as usize) {
                    let from = (own_patch + comptime!(j as u32 * edge / 4)) as usize;
                    cmma::store(
                        &mut patch.slice_mut(from, from + 1),
                        scores.index(comptime!(i * score_fragments as usize + j)),
                        comptime!(patch_row * 4).runtime(),
                        cmma::MatrixLayout::RowMajor,
                    );
                }
                units::meet(unit);
                let row = first_row + plane_row + comptime!(i as u32 * edge) + own_row;
                let mut found = Array::<Vector<f32, Const<4>>>::new(own_vectors);
                let mut largest = f32::new(comptime!(f32::MIN));
                #[unroll]
                for c in 0..own_vectors {
                    let at = part + comptime!(c as u32 * sharers);
                    let mut four = patch[(own_patch + own_row * patch_row + at) as usize];
                    #[unroll]
                    for l in 0..4usize {
                        let key = first_key + at * 4u32 + comptime!(l as u32);
                        let score = score(four[l], batch, head, row, key, extents);
                        largest = select(key < s && score > largest, score, largest);
                        four[l] = score;
                    }
                    found[c] = four;
                }
                #[unroll]
                for c in 0..comptime!(sharers.ilog2() as usize) {
                    let other = plane_shuffle_xor(largest, comptime!(1u32 << c).runtime());
                    largest = select(other > largest, other, largest);
                }
                let before = row_max[i];
                let moves = largest > before + SLACK;
                let reference = select(moves, largest, before);
                let factor = exp(before - reference, unit);
                row_max[i] = reference;
                let mut total = 0f32.runtime();
                #[unroll]
                for c in 0..own_vectors {
                    let at = part + comptime!(c as u32 * sharers);
                    let four = found[c];
                    let mut own = Vector::<E, Const<4>>::empty();
                    #[unroll]
                    for l in 0..4usize {
                        let exists = first_key + at * 4u32 + comptime!(l as u32) < s;
                        let weight = E::cast_from(select(exists, exp(four[l] - reference, unit), 0.0f32));
                        total += f32::cast_from(weight);
                        own[l] = weight;
                    }
                    let row_at = own_weights + (comptime!(i as u32 * edge) + own_row) * weight_row;
                    weights[(row_at + at) as usize] = own;
                }
                #[unroll]
                for c in 0..comptime!(sharers.ilog2() as usize) {
                    total += plane_shuffle_xor(total, comptime!(1u32 << c).runtime());
                }
                row_sum[i] = row_sum[i] * factor + total;

                // The units of a plane decide together, or all planes of a cube do what only some of them need.
                let mut is_scaled = first_key > 0u32;
                if comptime!(unit.planes_meet) {
                    is_scaled = plane_any(moves && first_key > 0u32);
                }
                if is_scaled {
                    units::meet(unit);
                    #[unroll]
                    for chunk in 0..comptime!(blueprint.chunks()) {
                        let columns = comptime!((blueprint.chunk(chunk) / edge) as usize);
                        let first = comptime!(i * fragments as usize + chunk * score_fragments as usize);
                        #[unroll]
                        for j in 0..columns {
                            let from = (own_patch + comptime!(j as u32 * edge / 4)) as usize;
                            cmma::store(
                                &mut patch.slice_mut(from, from + 1),
                                sums.index(comptime!(first + j)),
                                comptime!(patch_row * 4).runtime(),
                                cmma::MatrixLayout::RowMajor,
                            );
                        }
                        units::meet(unit);
                        #[unroll]
                        for c in 0..own_vectors {
                            let at = (own_patch + own_row * patch_row + part + comptime!(c as u32 * sharers)) as usize;
                            patch[at] = patch[at] * Vector::new(factor);
                        }
                        units::meet(unit);
                        #[unroll]
                        for j in 0..columns {
                            let from = (own_patch + comptime!(j as u32 * edge / 4)) as usize;
                            cmma::load_with_layout(
                                sums.index(comptime!(first + j)),
                                &patch.slice(from, from + 1),
                                comptime!(patch_row * 4).runtime(),
                                cmma::MatrixLayout::RowMajor,
                            );
                        }
                        units::meet(unit);
                    }
                }
                units::meet(unit);
            }

            if comptime!(tile.shares_stage) {
                sync_cube();
                stage_rows::<E, S, ValueWidth>(
                    &mut stage,
                    v,
                    (batch * s * m + key_head) * e,
                    m * e,
                    first_key,
                    s,
                    values_at,
                    comptime!(tile.keys),
                    e,
                    value_row,
                    comptime!(blueprint.v),
                    comptime!(tile.units()),
                );
                sync_cube();
            }
            #[unroll]
            for step in 0..comptime!(score_fragments as usize) {
                #[unroll]
                for i in 0..rows {
                    let from =
                        (own_weights + comptime!(i as u32 * edge * weight_row + step as u32 * edge / 4)) as usize;
                    cmma::load(left.index(i), &weights.slice(from, from + 1), comptime!(weight_row * 4).runtime());
                }
                #[unroll]
                for j in 0..comptime!(fragments as usize) {
                    let from =
                        comptime!((values_at + step as u32 * edge * value_row + j as u32 * edge / vector) as usize)
                            .runtime();
                    cmma::load(&value, &stage.slice(from, from + 1), comptime!(value_row * vector).runtime());
                    #[unroll]
                    for i in 0..rows {
                        let sum = sums.index(comptime!(i * fragments as usize + j));
                        cmma::execute::<E, E, f32, f32>(left.index(i), &value, sum, sum);
                    }
                }
            }
            sync_cube();
            first_key += tile.keys;
        }

        let lanes = comptime!(storage::per_word(blueprint.out));
        #[unroll]
        for i in 0..rows {
            let inverse = 1.0f32 / row_sum[i];
            #[unroll]
            for chunk in 0..comptime!(blueprint.chunks()) {
                let columns = comptime!(blueprint.chunk(chunk));
                #[unroll]
                for j in 0..comptime!((columns / edge) as usize) {
                    let from = (own_patch + comptime!(j as u32 * edge / 4)) as usize;
                    cmma::store(
                        &mut patch.slice_mut(from, from + 1),
                        sums.index(comptime!(i * fragments as usize + chunk * score_fragments as usize + j)),
                        comptime!(patch_row * 4).runtime(),
                        cmma::MatrixLayout::RowMajor,
                    );
                }
                units::meet(unit);
                let words = comptime!(columns / lanes);
                for pass in 0..comptime!(edge * words / PLANE) {
                    let at = pass * PLANE + lane;
                    let (patch_at, word) = (at / words, at % words);
                    let factor = plane_shuffle(inverse, patch_at * sharers);
                    let row = first_row + plane_row + comptime!(i as u32 * edge) + patch_at;
                    // Words lie in one head: what begins inside ends inside.
                    if row < t {
                        let column = word * lanes;
                        let base = ((batch * t + row) * n + head) * e + comptime!(chunk as u32 * tile.keys) + column;
                        let four = patch[(own_patch + patch_at * patch_row + column / 4u32) as usize];
                        let mut bits = 0u32;
                        #[unroll]
                        for l in 0..comptime!(lanes as usize) {
                            let sum = of_word(four, column % 4u32, lanes, l);
                            let position = base + comptime!(l as u32);
                            bits |= finished(sum * factor, position, comptime!(l as u32).runtime(), tail);
                        }
                        out[(base / lanes) as usize] = bits;
                    }
                }
                units::meet(unit);
            }
        }
    }
}

/// Element `l` of a word of `lanes` elements that begins at element `first` of a vector, a multiple of `lanes`.
#[cube]
fn of_word(four: Vector<f32, Const<4>>, first: u32, #[comptime] lanes: u32, #[comptime] l: usize) -> f32 {
    if comptime!(lanes == 4) {
        four[l]
    } else if comptime!(lanes == 2) {
        select(first == 0u32, four[l], four[comptime!(l + 2)])
    } else {
        let front = select(first == 0u32, four[0usize], four[1usize]);
        let back = select(first == 2u32, four[2usize], four[3usize]);
        select(first < 2u32, front, back)
    }
}

/// Brings `count` rows from `first` on to shared memory; rows from `end` on are 0.
#[cube]
fn stage_rows<E: Float, S: Size, W: Size>(
    stage: &mut SharedMemory<Vector<E, S>>,
    memory: &Array<Vector<u32, W>>,
    base: u32,
    distance: u32,
    first: u32,
    end: u32,
    #[comptime] at: u32,
    #[comptime] count: u32,
    #[comptime] dims: u32,
    #[comptime] stage_row: u32,
    #[comptime] load: Load,
    #[comptime] all_units: u32,
) {
    let vectors = comptime!(dims / load.vector);
    let is_even = comptime!((count * vectors).is_multiple_of(all_units));
    #[unroll]
    for pass in 0..comptime!((count * vectors).div_ceil(all_units) as usize) {
        let index = UNIT_POS + comptime!(pass as u32 * all_units);
        let (row, own) = (index / vectors, index % vectors);
        if comptime!(is_even) || row < count {
            let mut values = Vector::<E, S>::new(E::new(0.0));
            if first + row < end {
                values = units::whole::<E, S, W>(memory, base + (first + row) * distance + own * load.vector, load);
            }
            stage[(at + row * stage_row + own) as usize] = values;
        }
    }
}

/// `eˣ` for weights of the element type: what they are rounded to forgives two units of f32.
#[cube]
fn exp(x: f32, #[comptime] unit: Unit) -> f32 {
    if comptime!(unit.element == DType::F32) { math::exp(x) } else { x.exp() }
}
