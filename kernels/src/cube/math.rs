//! Elementary functions on f32 from products, sums and bits, because devices promise little about their own: a sine may
//! be off by 2⁻¹¹, an exponential by |x| units.
//!
//! The polynomials of [`exp`], [`tanh`], [`erf`] and the waves are those of the CPU backend. Division and square roots
//! are the device's (2.5 units in Vulkan, exact on CUDA).

use std::f32::consts::{FRAC_2_PI, LOG2_E};

use cubecl::prelude::*;

use super::storage::is_nan;

/// Largest argument of which [`sin`] and [`cos`] know what is left beyond full turns: the first parts of π/2 have 8 bits,
/// and 16 bits hold the number of quarters.
const WAVE_LIMIT: f32 = 100_000.0;

/// `eˣ`; overflows to infinity and underflows to 0.
#[cube]
pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons, not `clamp`, so that NaN passes.
    let raised = select(x < -104.0f32, -104.0f32, x);
    let limited = select(raised > 89.0f32, 89.0f32, raised);
    let n = (limited * LOG2_E).round();
    // ln 2 in two parts; the first has so few bits that its product with n is exact.
    let r = (limited - n * 0.693_359_4f32) - n * -2.121_944_4e-4f32;
    let mut p = 1.381_449_6e-3f32;
    p = p * r + 8.368_78e-3f32;
    p = p * r + 4.166_839_4e-2f32;
    p = p * r + 1.666_652e-1f32;
    p = p * r + 0.499_999_94f32;
    p = (p * (r * r) + r) + 1.0f32;
    // 2ⁿ in two factors, because n reaches −150 and 128.
    let whole = i32::cast_from(n);
    let half = whole >> 1i32;
    p * power_of_two(half) * power_of_two(whole - half)
}

#[cube]
fn power_of_two(n: i32) -> f32 {
    f32::reinterpret(u32::reinterpret(n + 127i32) << 23u32)
}

/// Natural logarithm.
#[cube]
pub(crate) fn ln(x: f32) -> f32 {
    let bits = u32::reinterpret(x);
    // Mantissas from √½ to √2: the largest argument of the series is 0.172.
    let shifted = bits - 0x3f3504f3u32;
    let exponent = f32::cast_from(i32::reinterpret(shifted) >> 23i32);
    let m = f32::reinterpret((shifted & 0x7fffffu32) + 0x3f3504f3u32) - 1.0f32;
    let s = m / (m + 2.0f32);
    let z = s * s;
    // ln(1 + m) = 2 (s + s³/3 + s⁵/5 + …); the next term is below 2⁻²⁸ of the sum.
    let mut p = 0.222_222_22f32;
    p = p * z + 0.285_714_3f32;
    p = p * z + 0.4f32;
    p = p * z + 0.666_666_7f32;
    let series = s * 2.0f32 + p * z * s;
    let value = exponent * 0.693_359_4f32 + (series + exponent * -2.121_944_4e-4f32);
    // Subnormals, 0, negative values, infinities and NaN are left to the device.
    let is_ordinary = bits - 0x800000u32 < 0x7f000000u32;
    let special = x.ln();
    select(is_ordinary, value, special)
}

/// `aᵇ`, also for a negative `a` with a whole `b`.
///
/// Relative error: 2 units more than the absolute error of `b ln a`.
#[cube]
pub(crate) fn pow(a: f32, b: f32) -> f32 {
    let magnitude = exp(b * ln(a.abs()));
    let is_whole = b.floor() == b;
    let half = b * 0.5f32;
    let is_odd = is_whole && half.floor() != half;
    let signed = select(is_odd && a < 0.0f32, -magnitude, magnitude);
    let not_a_number = f32::reinterpret(u32::reinterpret(a) | 0x7fc00000u32);
    let real = select(a < 0.0f32 && !is_whole, not_a_number, signed);
    select(b == 0.0f32 || a == 1.0f32, 1.0f32, real)
}

/// Hyperbolic tangent.
#[cube]
pub(crate) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let s = x * x;
    let mut p = f32::new(-6.274_238e-3);
    p = p * s + 2.107_167_7e-2f32;
    p = p * s + -5.385_231e-2f32;
    p = p * s + 1.333_258_6e-1f32;
    p = p * s + -0.333_333_17f32;
    let small = p * (s * a) + a;
    let large = 1.0f32 - 2.0f32 / (exp(2.0f32 * a) + 1.0f32);
    with_sign(select(a < 0.55f32, small, large), x)
}

/// `1 / (1 + e⁻ˣ)`.
#[cube]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0f32 / (1.0f32 + exp(-x))
}

/// `x / (1 + e⁻ˣ)`.
#[cube]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0f32 + exp(-x))
}

/// `0.5 x (1 + tanh u)` with `u = √(2/π) (x + 0.044715 x³)`, computed as `x / (1 + e⁻²ᵘ)`, which is the same.
#[cube]
pub(crate) fn gelu(x: f32) -> f32 {
    let u = x * (x * x * 0.044_715f32 + 1.0f32);
    x / (1.0f32 + exp(u * -1.595_769f32))
}

/// Error function.
#[cube]
pub(crate) fn erf(x: f32) -> f32 {
    let a = x.abs();
    let s = x * x;
    let mut p = f32::new(-6.090_348e-4);
    p = p * s + 5.011_96e-3f32;
    p = p * s + -2.677_890_7e-2f32;
    p = p * s + 1.128_214_1e-1f32;
    p = p * s + -3.761_252_3e-1f32;
    p = p * s + 1.283_791_5e-1f32;
    let small = p * a + a;
    // 1 − erf = exp(−(t + t P(t))); erf(4) rounds to 1. The comparison lets NaN pass.
    let t = select(a > 4.0f32, 4.0f32, a);
    let mut q = 5.295_934_6e-6f32;
    q = q * t + -4.992_779_5e-5f32;
    q = q * t + -2.749_807_2e-5f32;
    q = q * t + 2.869_289_8e-3f32;
    q = q * t + -2.257_588e-2f32;
    q = q * t + 1.051_697_4e-1f32;
    q = q * t + 6.356_730_3e-1f32;
    q = q * t + 1.285_414_6e-1f32;
    let large = 1.0f32 - exp(-(q * t + t));
    with_sign(select(a < 0.9f32, small, large), x)
}

/// Sine. Beyond [`WAVE_LIMIT`] the device's own.
#[cube]
pub(crate) fn sin(x: f32) -> f32 {
    let wave = quarter_wave(x, 0u32);
    let own = x.sin();
    select(x.abs() > WAVE_LIMIT, own, wave)
}

/// Cosine. Beyond [`WAVE_LIMIT`] the device's own.
#[cube]
pub(crate) fn cos(x: f32) -> f32 {
    let wave = quarter_wave(x, 1u32);
    let own = x.cos();
    select(x.abs() > WAVE_LIMIT, own, wave)
}

/// `sin(x + quadrants · π/2)`.
#[cube]
fn quarter_wave(x: f32, quadrants: u32) -> f32 {
    let n = (x * FRAC_2_PI).round();
    let quadrant = u32::reinterpret(i32::cast_from(n)) + quadrants;
    let first = (x - n * 1.5703125f32) - n * 4.825_592e-4f32;
    let r = ((first - n * 1.266_598_7e-6f32) - n * 9.895_302e-10f32) - n * 2.563_344_2e-12f32;
    let s = r * r;
    let mut p = 2.718_237_2e-6f32;
    p = p * s + -1.983_932_7e-4f32;
    p = p * s + 8.333_329e-3f32;
    p = p * s + -1.666_666_7e-1f32;
    let sine = p * (s * r) + r;
    let mut q = 2.443_773e-5f32;
    q = q * s + -1.388_736_1e-3f32;
    q = q * s + 4.166_664_7e-2f32;
    let cosine = q * (s * s) + (s * -0.5f32 + 1.0f32);
    let value = select((quadrant & 1u32) == 0u32, sine, cosine);
    f32::reinterpret(u32::reinterpret(value) ^ ((quadrant & 2u32) << 30u32))
}

/// The magnitude of one value with the sign of another.
#[cube]
fn with_sign(magnitude: f32, sign: f32) -> f32 {
    f32::reinterpret((u32::reinterpret(magnitude) & 0x7fffffffu32) | (u32::reinterpret(sign) & 0x80000000u32))
}

/// The larger value; NaN on the left survives, and on the right too.
#[cube]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    select(a > b || is_nan(a), a, b)
}

/// The smaller value; NaN on the left survives, and on the right too.
#[cube]
pub(crate) fn smaller(a: f32, b: f32) -> f32 {
    select(a < b || is_nan(a), a, b)
}
