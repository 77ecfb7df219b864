//! `attention`: softmax over blocks of keys, corrected as larger scores appear, so that scores of a whole row are never
//! kept.
//!
//! A cube owns a block of queries of one head, and some columns of its result. For each block of keys it multiplies
//! queries and keys, summing over head dims that pass through shared memory in chunks, replaces the scores by
//! exponentials relative to the largest score so far, and adds their product with the values to sums in registers. Any
//! head dim is possible; columns beyond those of a cube repeat the scores.
//!
//! # Easy to get wrong
//! - A hidden key has a score of [`HIDDEN_SCORE`], not −∞: if a bias makes all visible scores lower still, the hidden
//!   ones win. Keys behind the last one do not exist at all, whatever the scores are.

use cubecl::prelude::*;
use ltxc_ir::ops::{Attention, HIDDEN_SCORE};
use ltxc_ir::{DType, TensorType};

use super::call::{Call, to_u32};
use super::gemm::four_along;
use super::index::{broadcast_strides, numbers};
use super::math::exp;
use super::matrix_attention;
use super::program::{Tail, finished};
use super::storage::{self, load, words_of_four};
use super::tile::{self, Heads};

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    tile: Heads,
    q: DType,
    k: DType,
    v: DType,
    out: DType,
    /// Whether vectors of four lie in memory as such.
    is_aligned: bool,
}

/// Extents of a call and what is done to scores, as an argument of a kernel.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Extents {
    /// Batches, queries and their heads.
    pub(crate) b: u32,
    pub(crate) t: u32,
    pub(crate) n: u32,
    /// Keys and their heads.
    pub(crate) s: u32,
    pub(crate) m: u32,
    /// Head dims of queries and keys, and of values.
    pub(crate) d: u32,
    pub(crate) e: u32,
    scale: f32,
    /// What is added to scores, if anything is, and its strides.
    bias: Sequence<Array<u32>>,
    bias_strides: Sequence<u32>,
    #[cube(comptime)]
    has_bias: bool,
    #[cube(comptime)]
    is_causal: bool,
}

/// # Errors
/// A number beyond u32.
pub(crate) fn extents<R: Runtime>(op: &Attention, call: &Call<'_, R>) -> Result<ExtentsLaunch<R>, String> {
    let [q, v] = [0, 2].map(|i| call.args[i].ty);
    let [b, t, n, d] = [0, 1, 2, 3].map(|a| q.shape[a]);
    let [s, m, e] = [1, 2, 3].map(|a| v.shape[a]);
    let bias_strides = match call.args.get(3) {
        Some(bias) => broadcast_strides(&bias.ty.shape, &[b, n, t, s]),
        None => Vec::new(),
    };
    let bias = (3..call.args.len()).map(|i| call.arg(i)).collect();
    let [b, t, n, d, s, m, e] = [b, t, n, d, s, m, e].map(to_u32);
    Ok(ExtentsLaunch::new(
        b?,
        t?,
        n?,
        s?,
        m?,
        d?,
        e?,
        op.scale.0 as f32,
        bias,
        numbers(bias_strides)?,
        call.args.len() > 3,
        op.causal,
    ))
}

/// The score of a query and a key whose product is known.
#[cube]
#[allow(clippy::collapsible_if)] // one of the conditions is known when the kernel is built
pub(crate) fn score(product: f32, batch: u32, head: u32, row: u32, key: u32, extents: &Extents) -> f32 {
    let mut score = product * extents.scale;
    if comptime!(extents.has_bias) {
        if row < extents.t && key < extents.s {
            let at = batch * *extents.bias_strides.index(0usize)
                + head * *extents.bias_strides.index(1usize)
                + row * *extents.bias_strides.index(2usize)
                + key * *extents.bias_strides.index(3usize);
            score += load(extents.bias.index(0usize), at, DType::F32);
        }
    }
    if comptime!(extents.is_causal) {
        let is_hidden = key > row + (extents.s - extents.t);
        score = select(is_hidden, f32::new(comptime!(HIDDEN_SCORE as f32)), score);
    }
    score
}

/// The end of the keys that matter to queries before `end_row`: without a bias, no hidden key can have the largest score
/// of a row.
#[cube]
pub(crate) fn last_key(end_row: u32, extents: &Extents) -> u32 {
    let mut end = extents.s;
    if comptime!(extents.is_causal && !extents.has_bias) {
        let visible = end_row + (extents.s - extents.t);
        end = select(visible < extents.s, visible, extents.s);
    }
    end
}

/// Whether words of the result lie in one head each.
pub(crate) fn is_whole(out: &TensorType) -> bool {
    out.shape[3].is_multiple_of(storage::per_word(out.dtype) as usize)
}

pub(crate) fn launch<R: Runtime>(op: &Attention, call: &Call<'_, R>) -> Result<(), String> {
    if let Some(choice) = matrix_attention::choose(call) {
        return matrix_attention::launch(choice, op, call);
    }
    let [q, k, v] = [0, 1, 2].map(|i| call.args[i].ty);
    let [b, t, n, d] = [0, 1, 2, 3].map(|a| q.shape[a]);
    let e = v.shape[3];
    let tile = tile::heads(call, e);
    let is_aligned = d.is_multiple_of(4) && e.is_multiple_of(4);
    let blueprint = Blueprint { tile, q: q.dtype, k: k.dtype, v: v.dtype, out: call.out.ty.dtype, is_aligned };
    let cubes = b * n * t.div_ceil(tile.queries as usize) * e.div_ceil(tile.columns as usize);
    let width = |dtype: DType| if is_aligned { words_of_four(dtype) } else { 1 };
    // SAFETY: queries, keys, dims and columns beyond the operands are not read, and not written.
    unsafe {
        attend::launch_unchecked::<R>(
            call.client,
            call.cubes(cubes)?,
            CubeDim::new_1d(tile.units()),
            width(q.dtype),
            width(k.dtype),
            width(v.dtype),
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
fn attend<QueryWidth: Size, KeyWidth: Size, ValueWidth: Size>(
    q: &Array<Vector<u32, QueryWidth>>,
    k: &Array<Vector<u32, KeyWidth>>,
    v: &Array<Vector<u32, ValueWidth>>,
    out: &mut Array<u32>,
    tail: &Tail,
    extents: &Extents,
    #[comptime] blueprint: Blueprint,
) {
    let (t, n, d) = (extents.t, extents.n, extents.d);
    let (s, m, e) = (extents.s, extents.m, extents.e);
    let tile = comptime!(blueprint.tile);
    let units = comptime!(tile.units());
    let (units_m, units_n) = comptime!((tile.units_m, tile.units_n));
    let unit_rows = comptime!(tile.queries / units_m);
    let key_vectors = comptime!(tile.keys / units_n / 4);
    let column_vectors = comptime!(tile.columns / units_n / 4);
    let vectors = comptime!(tile.chunk / 4);
    // Units that share the softmax of a row.
    let sharers = comptime!(units / tile.queries);
    let p_stride = comptime!(tile.keys / 4 + 1);

    let cube = CUBE_POS as u32;
    let row_blocks = t.div_ceil(tile.queries);
    let column_blocks = e.div_ceil(tile.columns);
    let first_row = (cube % row_blocks) * tile.queries;
    let first_column = ((cube / row_blocks) % column_blocks) * tile.columns;
    let head = (cube / (row_blocks * column_blocks)) % n;
    let batch = cube / (row_blocks * column_blocks * n);
    let key_head = head / (n / m);
    let unit = UNIT_POS;
    let (unit_row, unit_column) = (unit / units_n, unit % units_n);
    let (own_row, part) = (unit / sharers, unit % sharers);

    let mut stage = SharedMemory::<Vector<f32, Const<4>>>::new(comptime!(tile.stage_vectors() as usize));
    let mut p = SharedMemory::<Vector<f32, Const<4>>>::new(comptime!((tile.queries * p_stride) as usize));
    let mut shared = SharedMemory::<f32>::new(comptime!(units as usize));
    let mut factors = SharedMemory::<f32>::new(comptime!(tile.queries as usize));

    if batch < extents.b {
        let mut sums = Array::<f32>::new(comptime!((unit_rows * column_vectors * 4) as usize));
        #[unroll]
        for i in 0..comptime!((unit_rows * column_vectors * 4) as usize) {
            sums[i] = 0.0f32;
        }
        let mut row_max = f32::new(comptime!(f32::MIN));
        let mut row_sum = 0f32.runtime();

        let end = last_key(first_row + tile.queries, extents);
        let mut first_key = 0u32;
        while first_key < end {
            let mut scores = Array::<f32>::new(comptime!((unit_rows * key_vectors * 4) as usize));
            #[unroll]
            for i in 0..comptime!((unit_rows * key_vectors * 4) as usize) {
                scores[i] = 0.0f32;
            }
            let mut dim = 0u32;
            while dim < d {
                for i in 0..comptime!(tile.queries * vectors / units) {
                    let at = unit + i * units;
                    let (row, vector) = (at / vectors, at % vectors);
                    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
                    if first_row + row < t {
                        let base = ((batch * t + first_row + row) * n + head) * d;
                        values = four_along::<QueryWidth>(
                            q,
                            base,
                            dim + vector * 4u32,
                            d,
                            comptime!(blueprint.q),
                            comptime!(blueprint.is_aligned),
                        );
                    }
                    stage[(row * comptime!(vectors + 1) + vector) as usize] = values;
                }
                for i in 0..comptime!(tile.keys * vectors / units) {
                    let at = unit + i * units;
                    let (key, vector) = (at / vectors, at % vectors);
                    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
                    if first_key + key < s {
                        let base = ((batch * s + first_key + key) * m + key_head) * d;
                        values = four_along::<KeyWidth>(
                            k,
                            base,
                            dim + vector * 4u32,
                            d,
                            comptime!(blueprint.k),
                            comptime!(blueprint.is_aligned),
                        );
                    }
                    // By key modulo 4 first, as in `gemm`.
                    let row = (key % 4u32) * comptime!(tile.keys / 4) + key / 4u32;
                    stage[((row + tile.queries) * comptime!(vectors + 1) + vector) as usize] = values;
                }
                sync_cube();
                for vector in 0..vectors {
                    let mut a = Sequence::<Vector<f32, Const<4>>>::new();
                    #[unroll]
                    for i in 0..comptime!(unit_rows as usize) {
                        a.push(
                            stage[((unit_row + comptime!(i as u32 * units_m)) * comptime!(vectors + 1) + vector)
                                as usize],
                        );
                    }
                    #[unroll]
                    for j in 0..comptime!((key_vectors * 4) as usize) {
                        let row = comptime!(tile.queries + (j as u32 % 4) * (tile.keys / 4) + (j as u32 / 4) * units_n)
                            + unit_column;
                        let other = stage[(row * comptime!(vectors + 1) + vector) as usize];
                        #[unroll]
                        for i in 0..comptime!(unit_rows as usize) {
                            let own = *a.index(i);
                            let mut sum = scores[comptime!(i * key_vectors as usize * 4 + j)];
                            #[unroll]
                            for c in 0..4usize {
                                sum += own[c] * other[c];
                            }
                            scores[comptime!(i * key_vectors as usize * 4 + j)] = sum;
                        }
                    }
                }
                sync_cube();
                dim += tile.chunk;
            }

            #[unroll]
            for i in 0..comptime!(unit_rows as usize) {
                let row = unit_row + comptime!(i as u32 * units_m);
                #[unroll]
                for j in 0..comptime!(key_vectors as usize) {
                    let column = unit_column + comptime!(j as u32 * units_n);
                    let mut values = Vector::<f32, Const<4>>::empty();
                    #[unroll]
                    for c in 0..4usize {
                        let key = first_key + column * 4u32 + comptime!(c as u32);
                        let product = scores[comptime!(i * key_vectors as usize * 4 + j * 4 + c)];
                        values[c] = score(product, batch, head, first_row + row, key, extents);
                    }
                    p[(row * p_stride + column) as usize] = values;
                }
            }
            sync_cube();

            let mut largest = row_max;
            for i in 0..comptime!(tile.keys / 4 / sharers) {
                let at = part + i * sharers;
                let values = p[(own_row * p_stride + at) as usize];
                #[unroll]
                for c in 0..4usize {
                    let exists = first_key + at * 4u32 + comptime!(c as u32) < s;
                    largest = select(exists && values[c] > largest, values[c], largest);
                }
            }
            shared[unit as usize] = largest;
            sync_cube();
            for i in 0..sharers {
                let other = shared[(own_row * sharers + i) as usize];
                largest = select(other > largest, other, largest);
            }
            let factor = exp(row_max - largest);
            let mut total = 0f32.runtime();
            for i in 0..comptime!(tile.keys / 4 / sharers) {
                let at = part + i * sharers;
                let values = p[(own_row * p_stride + at) as usize];
                let mut weights = Vector::<f32, Const<4>>::empty();
                #[unroll]
                for c in 0..4usize {
                    let exists = first_key + at * 4u32 + comptime!(c as u32) < s;
                    let weight = select(exists, exp(values[c] - largest), 0.0f32);
                    weights[c] = weight;
                    total += weight;
                }
                p[(own_row * p_stride + at) as usize] = weights;
            }
            sync_cube();
            shared[unit as usize] = total;
            if part == 0u32 {
                factors[own_row as usize] = factor;
            }
            sync_cube();
            row_sum *= factor;
            for i in 0..sharers {
                row_sum += shared[(own_row * sharers + i) as usize];
            }
            row_max = largest;

            #[unroll]
            for i in 0..comptime!(unit_rows as usize) {
                let factor = factors[(unit_row + comptime!(i as u32 * units_m)) as usize];
                #[unroll]
                for j in 0..comptime!((column_vectors * 4) as usize) {
                    let at = comptime!(i * column_vectors as usize * 4 + j);
                    sums[at] *= factor;
                }
            }
            let mut chunk = 0u32;
            while chunk < tile.keys {
                for i in 0..comptime!(tile.chunk * tile.columns / 4 / units) {
                    let at = unit + i * units;
                    let (row, vector) = (at / comptime!(tile.columns / 4), at % comptime!(tile.columns / 4));
                    let key = first_key + chunk + row;
                    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
                    if key < s {
                        let base = ((batch * s + key) * m + key_head) * e;
                        values = four_along::<ValueWidth>(
                            v,
                            base,
                            first_column + vector * 4u32,
                            e,
                            comptime!(blueprint.v),
                            comptime!(blueprint.is_aligned),
                        );
                    }
                    stage[at as usize] = values;
                }
                sync_cube();
                for vector in 0..vectors {
                    let mut a = Sequence::<Vector<f32, Const<4>>>::new();
                    #[unroll]
                    for i in 0..comptime!(unit_rows as usize) {
                        let row = unit_row + comptime!(i as u32 * units_m);
                        a.push(p[(row * p_stride + chunk / 4u32 + vector) as usize]);
                    }
                    #[unroll]
                    for c in 0..4usize {
                        let row = (vector * 4u32 + comptime!(c as u32)) * comptime!(tile.columns / 4);
                        #[unroll]
                        for j in 0..comptime!(column_vectors as usize) {
                            let other = stage[(row + unit_column + comptime!(j as u32 * units_n)) as usize];
                            #[unroll]
                            for i in 0..comptime!(unit_rows as usize) {
                                let own = *a.index(i);
                                #[unroll]
                                for l in 0..4usize {
                                    let at = comptime!((i * column_vectors as usize + j) * 4 + l);
                                    sums[at] += own[c] * other[l];
                                }
                            }
                        }
                    }
                }
                sync_cube();
                chunk += tile.chunk;
            }
            first_key += tile.keys;
        }

        if part == 0u32 {
            factors[own_row as usize] = 1.0f32 / row_sum;
        }
        sync_cube();
        let lanes = comptime!(storage::per_word(blueprint.out));
        #[unroll]
        for i in 0..comptime!(unit_rows as usize) {
            let row = unit_row + comptime!(i as u32 * units_m);
            if first_row + row < t {
                let factor = factors[row as usize];
                let base = ((batch * t + first_row + row) * n + head) * e;
                #[unroll]
                for j in 0..comptime!((column_vectors * 4 / lanes) as usize) {
                    let first = comptime!(j as u32 * lanes);
                    let column =
                        first_column + (unit_column + comptime!(first / 4 * units_n)) * 4u32 + comptime!(first % 4);
                    // Words lie in one head: what begins inside ends inside.
                    if column < e {
                        let mut word = 0u32;
                        #[unroll]
                        for l in 0..comptime!(lanes as usize) {
                            let sum = sums[comptime!(i * column_vectors as usize * 4 + first as usize + l)];
                            let position = base + column + comptime!(l as u32);
                            word |= finished(sum * factor, position, comptime!(l as u32).runtime(), tail);
                        }
                        out[((base + column) / lanes) as usize] = word;
                    }
                }
            }
        }
    }
}
