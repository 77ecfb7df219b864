//! Elements in memory.
//!
//! Every tensor is bound as 32-bit words, because WGSL has no narrower type and words serve every other device as well:
//! elements of 2 and 1 bytes lie 2 and 4 in a word, the first in the lowest bits. Arithmetic is f32; [`decode`] and
//! [`encode`] stand at the two ends of every kernel. A word is written by one unit, which owns all elements in it.

use cubecl::prelude::*;
use ltxc_ir::DType;

/// Elements in a word.
pub(crate) fn per_word(dtype: DType) -> u32 {
    4 / dtype.bytes() as u32
}

/// Words of `elements` elements.
pub(crate) fn words(dtype: DType, elements: usize) -> usize {
    elements.div_ceil(per_word(dtype) as usize)
}

/// The value of an element.
#[cube]
pub(crate) fn load(memory: &Array<u32>, index: u32, #[comptime] dtype: DType) -> f32 {
    decode(load_bits(memory, index, comptime!(dtype.bytes() as u32)), dtype)
}

/// The bits of an element of 1, 2 or 4 bytes, in the low end.
#[cube]
pub(crate) fn load_bits(memory: &Array<u32>, index: u32, #[comptime] bytes: u32) -> u32 {
    if comptime!(bytes == 4) {
        memory[index as usize]
    } else if comptime!(bytes == 2) {
        extract(memory[(index >> 1u32) as usize], index & 1u32, 2u32)
    } else {
        extract(memory[(index >> 2u32) as usize], index & 3u32, 1u32)
    }
}

/// Element `lane` of a word.
#[cube]
pub(crate) fn extract(word: u32, lane: u32, #[comptime] bytes: u32) -> u32 {
    if comptime!(bytes == 4) {
        word
    } else if comptime!(bytes == 2) {
        (word >> (lane << 4u32)) & 0xffffu32
    } else {
        (word >> (lane << 3u32)) & 0xffu32
    }
}

/// The values of four elements from `index` on, a multiple of 4; vectors of `N` words hold so many.
#[cube]
pub(crate) fn load_four<N: Size>(
    memory: &Array<Vector<u32, N>>,
    index: u32,
    #[comptime] dtype: DType,
) -> Vector<f32, Const<4>> {
    let words = memory[(index / 4u32) as usize];
    let mut values = Vector::<f32, Const<4>>::empty();
    let lanes = comptime!(per_word(dtype));
    #[unroll]
    for i in 0..4usize {
        let bits =
            extract(words[comptime!(i / lanes as usize)], comptime!(i as u32 % lanes).runtime(), comptime!(4 / lanes));
        values[i] = decode(bits, dtype);
    }
    values
}

/// The value of an element of memory that is bound as vectors of one word.
#[cube]
pub(crate) fn load_one<N: Size>(memory: &Array<Vector<u32, N>>, index: u32, #[comptime] dtype: DType) -> f32 {
    let lanes = comptime!(per_word(dtype));
    let words = memory[(index / lanes) as usize];
    decode(extract(words[0usize], index % lanes, comptime!(4 / lanes)), dtype)
}

/// Words of four elements.
pub(crate) fn words_of_four(dtype: DType) -> usize {
    dtype.bytes()
}

/// The bits of an element at the place of `lane` in its word.
#[cube]
pub(crate) fn place(bits: u32, lane: u32, #[comptime] bytes: u32) -> u32 {
    if comptime!(bytes == 4) { bits } else { bits << (lane * comptime!(8 * bytes)) }
}

/// The value of the bits of an element; truth values are 0 and 1.
#[cube]
pub(crate) fn decode(bits: u32, #[comptime] dtype: DType) -> f32 {
    match comptime!(dtype) {
        DType::F32 => f32::reinterpret(bits),
        DType::BF16 => f32::reinterpret(bits << 16u32),
        DType::F16 => widen(bits, 5u32, 10u32),
        DType::F8E5M2 => widen(bits, 5u32, 2u32),
        DType::F8E4M3 => widen(bits, 4u32, 3u32),
        DType::I8 => f32::cast_from(sign_extended(bits)),
        DType::I32 => f32::cast_from(i32::reinterpret(bits)),
        DType::U8 | DType::U32 | DType::Bool => f32::cast_from(bits),
    }
}

/// The bits of the element nearest to a value: floats round to nearest, ties to even; integers truncate and saturate;
/// truth is what is not 0.
#[cube]
pub(crate) fn encode(value: f32, #[comptime] dtype: DType) -> u32 {
    match comptime!(dtype) {
        DType::F32 => u32::reinterpret(value),
        DType::BF16 => {
            let bits = u32::reinterpret(value);
            let rounded = (bits + (0x7fffu32 + ((bits >> 16u32) & 1u32))) >> 16u32;
            select(is_nan(value), (bits >> 16u32) | 0x40u32, rounded)
        }
        DType::F16 => narrow(value, 5u32, 10u32),
        DType::F8E5M2 => narrow(value, 5u32, 2u32),
        DType::F8E4M3 => narrow(value, 4u32, 3u32),
        DType::I8 => u32::reinterpret(truncated(value, -128.0, 127.0)) & 0xffu32,
        DType::U8 => u32::reinterpret(truncated(value, 0.0, 255.0)),
        DType::I32 => {
            // The largest f32 below 2^31; what is larger saturates to a value that no f32 has.
            let inside = u32::reinterpret(truncated(value, -2147483648.0, 2147483520.0));
            select(value >= 2147483648.0f32, 0x7fffffffu32, inside)
        }
        DType::U32 => {
            let limited = clamp_number(value, 0.0, 4294967040.0);
            select(value >= 4294967296.0f32, 0xffffffffu32, u32::cast_from(limited))
        }
        DType::Bool => select(value != 0.0f32, 1u32, 0u32),
    }
}

/// Rounds to a narrower float and back.
#[cube]
pub(crate) fn rounded(value: f32, #[comptime] dtype: DType) -> f32 {
    decode(encode(value, dtype), dtype)
}

/// Whether a value is NaN, by its bits: shader compilers may assume that comparisons meet none.
#[cube]
pub(crate) fn is_nan(value: f32) -> bool {
    (u32::reinterpret(value) & 0x7fffffffu32) > 0x7f800000u32
}

/// A byte as signed integer.
#[cube]
pub(crate) fn sign_extended(bits: u32) -> i32 {
    i32::reinterpret(bits << 24u32) >> 24i32
}

/// A value limited to a range, 0 for NaN.
#[cube]
fn clamp_number(value: f32, #[comptime] lo: f32, #[comptime] hi: f32) -> f32 {
    let number = select(is_nan(value), 0.0f32, value);
    let above = select(number < f32::new(lo), f32::new(lo), number);
    select(above > f32::new(hi), f32::new(hi), above)
}

/// The integer towards 0 in a range of i32.
#[cube]
fn truncated(value: f32, #[comptime] lo: f32, #[comptime] hi: f32) -> i32 {
    i32::cast_from(clamp_number(value, lo, hi))
}

/// The value of a float of `exponent` and `mantissa` bits. With 4 exponent bits only the last code is not a number, and
/// infinities are missing (e4m3fn).
#[cube]
fn widen(bits: u32, #[comptime] exponent: u32, #[comptime] mantissa: u32) -> f32 {
    let sign = (bits >> (exponent + mantissa)) << 31u32;
    let magnitude = bits & comptime!((1 << (exponent + mantissa)) - 1);
    let bias = comptime!((1u32 << (exponent - 1)) - 1);
    let shift = comptime!(23 - mantissa);
    let normal = (magnitude << shift) + comptime!((127 - bias) << 23);
    // Through an integer, because devices may take subnormals for 0.
    let tiny = f32::cast_from(magnitude) * f32::new(comptime!(2f32.powi(1 - bias as i32 - mantissa as i32)));
    let is_tiny = magnitude < comptime!(1u32 << mantissa);
    let finite = select(is_tiny, u32::reinterpret(tiny), normal);
    let special = if comptime!(exponent == 4) {
        select(magnitude == 0x7fu32, 0x7fc00000u32, finite)
    } else {
        let code = comptime!(((1u32 << exponent) - 1) << mantissa);
        select(magnitude >= code, (magnitude << shift) | 0x7f800000u32, finite)
    };
    f32::reinterpret(special | sign)
}

/// The inverse of [`widen`]; e4m3 saturates, the others overflow to infinity.
#[cube]
fn narrow(value: f32, #[comptime] exponent: u32, #[comptime] mantissa: u32) -> u32 {
    let bits = u32::reinterpret(value);
    let sign = (bits >> 31u32) << (exponent + mantissa);
    let magnitude = bits & 0x7fffffffu32;
    let bias = comptime!((1u32 << (exponent - 1)) - 1);
    let shift = comptime!(23 - mantissa);
    let odd = (magnitude >> shift) & 1u32;
    let normal =
        ((magnitude + (comptime!((1u32 << (shift - 1)) - 1) + odd)) >> shift) - comptime!((127 - bias) << mantissa);
    // Adding a power of two whose last bit is the smallest subnormal rounds to a multiple of that.
    let anchor = comptime!(2f32.powi(1 - bias as i32 - mantissa as i32 + 23));
    let tiny = u32::reinterpret(f32::reinterpret(magnitude) + f32::new(anchor)) - comptime!(anchor.to_bits());
    let is_tiny = magnitude < comptime!((128 - bias) << 23);
    let finite = select(is_tiny, tiny, normal);
    let largest = comptime!(if exponent == 4 { 0x7e } else { ((1u32 << exponent) - 1) << mantissa });
    let limited = select(finite > largest, largest.runtime(), finite);
    // The last code but for f16, whose NaN has the first mantissa bit.
    let nan = comptime!(if mantissa == 10 { 0x7e00u32 } else { 0x7fu32 });
    select(magnitude > 0x7f800000u32, nan.runtime(), limited) | sign
}
