//! The innermost loop of every matrix product: a tile of the result held in registers.
//!
//! The left operand is a block of rows at a fixed distance ([`Tile::run`]'s `LDA`), so that all rows are reached from one
//! pointer; the right operand is a panel of [`width`] columns, row after row. A tile sums one block of k and is stored
//! or added at the end.
//!
//! | level | tile | registers |
//! | --- | --- | --- |
//! | AVX-512 | 12 × 32 | 24 sums, 2 of the panel, 1 of the block |
//! | AVX2 | 6 × 16 | 12 sums, 2, 1 |
//! | portable | 6 × 16 | as four-lane vectors: 24 sums of the 32 of AArch64 |

use super::simd::{Level, level};

/// Most columns that a panel has on any machine.
pub(crate) const MAX_WIDTH: usize = 32;

/// Most rows that a tile has on any machine.
pub(crate) const MAX_ROWS: usize = 12;

/// Columns of a panel on this machine.
#[inline]
pub(crate) fn width() -> usize {
    match level() {
        Level::Portable => portable::WIDTH,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::WIDTH,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => avx512::WIDTH,
    }
}

/// Most rows of a tile on this machine.
#[inline]
pub(crate) fn max_rows() -> usize {
    match level() {
        Level::Portable => portable::ROWS,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::ROWS,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => avx512::ROWS,
    }
}

/// What a tile does with what the result holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    /// Overwrites it.
    Set,
    /// Adds to it.
    Add,
}

/// One tile of `rows × columns` over `k` summed elements.
pub(crate) struct Tile {
    /// Summed elements.
    pub k: usize,
    /// First row of the left block; its rows are `LDA` apart.
    pub a: *const f32,
    /// The panel: `k` rows of [`width`].
    pub b: *const f32,
    /// Columns that are stored, at most [`width`].
    pub columns: usize,
    /// What happens to the result.
    pub store: Store,
    /// Fetched into the second cache on the way.
    pub fetch: Fetch,
}

/// Summed elements between two fetches: a line of f32.
const STEP: usize = 16;

/// Bytes of a line.
const LINE: usize = 64;

/// Memory from which the panel after this one is packed.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    /// The first element. Any address is allowed: it is only fetched.
    pub at: *const u8,
    /// Bytes from one summed index to the next.
    pub along: usize,
    /// Bytes from one column to the next.
    pub across: usize,
}

/// What a tile fetches: for every [`STEP`] summed elements a number of pieces at equal distances.
#[derive(Clone, Copy)]
pub(crate) struct Fetch {
    at: *const u8,
    /// From one step to the next.
    step: usize,
    /// From one piece to the next.
    distance: usize,
    pieces: usize,
    /// Whether a piece is two lines.
    is_pair: bool,
}

impl Fetch {
    /// Part `i` of `parts` of a panel.
    pub(crate) fn part(source: Source, i: usize, parts: usize) -> Fetch {
        // Either columns are runs of memory, and a step is a line of each, or summed indices are.
        let (distance, pieces, is_pair) = if source.along < source.across {
            (source.across, width(), false)
        } else {
            (source.along, STEP, width() * source.across > LINE)
        };
        let (first, end) = (pieces * i / parts, pieces * (i + 1) / parts);
        let at = source.at.wrapping_add(first * distance);
        Fetch { at, step: STEP * source.along, distance, pieces: end - first, is_pair }
    }
}

impl Tile {
    /// Computes the tile. `c` points to the first column of each of its rows.
    ///
    /// # Safety
    /// - `a` is valid for `c.len()` rows of `k` at distance `LDA`, `b` for `k · width()`;
    /// - every `c` is valid for `columns` and nothing else reads or writes there;
    /// - `c.len() ≤ max_rows()`, `columns ≤ width()`.
    #[inline]
    pub(crate) unsafe fn run<const LDA: usize>(&self, c: &[*mut f32]) {
        // SAFETY: the promises of the caller are those of the tables' entries; the level was found on this machine.
        unsafe {
            match level() {
                Level::Portable => portable::run::<LDA>(self, c),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::run::<LDA>(self, c),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => avx512::run::<LDA>(self, c),
            }
        }
    }
}

/// Asks for the line at `p` in the first cache. Any address is allowed.
#[inline(always)]
fn fetch_now(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks for the line at `p` in the second cache. Any address is allowed.
#[inline(always)]
fn fetch_soon(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Defines `tile::<R, LDA>` for one instruction set. `VECTORS` vectors of `LANES` make the width.
macro_rules! tile_kernel {
    ($rows:literal: $($r:literal)+, $vectors:literal x $lanes:literal, $(#[$features:meta])?) => {
        pub(super) const ROWS: usize = $rows;
        pub(super) const WIDTH: usize = $vectors * $lanes;

        /// # Safety
        /// As for [`Tile::run`], with the features of this level.
        $(#[$features])?
        pub(super) unsafe fn run<const LDA: usize>(t: &Tile, c: &[*mut f32]) {
            // SAFETY: passed on to the caller.
            unsafe {
                match c.len() {
                    $($r => tile::<$r, LDA>(t, c),)+
                    _ => debug_assert!(c.is_empty(), "a tile has at most {ROWS} rows"),
                }
            }
        }

        /// # Safety
        /// As for [`Tile::run`] with `R` rows.
        $(#[$features])?
        unsafe fn tile<const R: usize, const LDA: usize>(t: &Tile, c: &[*mut f32]) {
            let (a, b) = (t.a, t.b);
            // SAFETY: the caller promises `R` rows at `a`, `k` rows of the panel at `b` and `columns` at every `c`; `row`
            // has the width of the panel.
            unsafe {
                let mut sums = [[splat(0.0); $vectors]; R];
                let mut p = 0;
                while p < t.k {
                    let step = p / STEP;
                    let mut line = t.fetch.at.wrapping_add(step * t.fetch.step);
                    for _ in 0..t.fetch.pieces {
                        fetch_soon(line);
                        if t.fetch.is_pair {
                            fetch_soon(line.wrapping_add(LINE));
                        }
                        line = line.wrapping_add(t.fetch.distance);
                    }
                    if step < R {
                        let c = *c.get_unchecked(step);
                        (0..WIDTH / 16).for_each(|line| fetch_now(c.wrapping_add(line * 16)));
                        // A row of the tile below.
                        (0..LDA / 16).for_each(|line| fetch_now(a.wrapping_add((R + step) * LDA + line * 16)));
                    }
                    let end = t.k.min(p + STEP);
                    while p < end {
                        let panel: [Vector; $vectors] = std::array::from_fn(|v| load(b.add(p * WIDTH + v * $lanes)));
                        for r in 0..R {
                            let x = splat(*a.add(r * LDA + p));
                            for v in 0..$vectors {
                                sums[r][v] = fma(x, panel[v], sums[r][v]);
                            }
                        }
                        p += 1;
                    }
                }
                for r in 0..R {
                    let c = *c.get_unchecked(r);
                    if t.columns == WIDTH {
                        for v in 0..$vectors {
                            let y = c.add(v * $lanes);
                            let sum = if t.store == Store::Add { add(load(y), sums[r][v]) } else { sums[r][v] };
                            put(y, sum);
                        }
                    } else {
                        let mut row = [0f32; WIDTH];
                        for v in 0..$vectors {
                            put(row.as_mut_ptr().add(v * $lanes), sums[r][v]);
                        }
                        for (j, &sum) in row[..t.columns].iter().enumerate() {
                            let y = c.add(j);
                            *y = if t.store == Store::Add { *y + sum } else { sum };
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{LINE, STEP, Store, Tile, fetch_now, fetch_soon};
    use std::arch::x86_64::{
        __m512 as Vector, _mm512_add_ps as add, _mm512_fmadd_ps as fma, _mm512_loadu_ps as load,
        _mm512_set1_ps as splat, _mm512_storeu_ps as put,
    };
    tile_kernel!(12: 1 2 3 4 5 6 7 8 9 10 11 12, 2 x 16, #[target_feature(enable = "avx512f")]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{LINE, STEP, Store, Tile, fetch_now, fetch_soon};
    use std::arch::x86_64::{
        __m256 as Vector, _mm256_add_ps as add, _mm256_fmadd_ps as fma, _mm256_loadu_ps as load,
        _mm256_set1_ps as splat, _mm256_storeu_ps as put,
    };
    tile_kernel!(6: 1 2 3 4 5 6, 2 x 8, #[target_feature(enable = "avx2,fma")]);
}

mod portable {
    use super::{LINE, STEP, Store, Tile, fetch_now, fetch_soon};

    type Vector = [f32; 4];

    #[inline(always)]
    fn splat(x: f32) -> Vector {
        [x; 4]
    }

    /// # Safety
    /// `p` is valid for four floats.
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Vector {
        // SAFETY: passed on to the caller.
        unsafe { p.cast::<Vector>().read_unaligned() }
    }

    /// # Safety
    /// `p` is valid for four floats.
    #[inline(always)]
    unsafe fn put(p: *mut f32, v: Vector) {
        // SAFETY: passed on to the caller.
        unsafe { p.cast::<Vector>().write_unaligned(v) }
    }

    #[inline(always)]
    fn add(a: Vector, b: Vector) -> Vector {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn fma(a: Vector, b: Vector, c: Vector) -> Vector {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    tile_kernel!(6: 1 2 3 4 5 6, 4 x 4,);
}
