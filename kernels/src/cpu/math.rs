//! Elementary functions of one f32 that vectorise: no branches, no tables, no library calls.
//!
//! The polynomials are minimax fits (Remez exchange in 40-digit arithmetic, weighted for relative error of the function)
//! made for this file; the error of each fit is below a quarter of an ulp, so what remains is rounding. The tests walk
//! through the floats and compare with f64.

use std::f32::consts::LOG2_E;

/// Adding it rounds to the nearest integer, which then stands in the low bits of the sum.
const ROUND_F32: f32 = 12_582_912.0; // 1.5 · 2^23
const ROUND_F64: f64 = 6_755_399_441_055_744.0; // 1.5 · 2^52

/// ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;

/// π/2 in two parts.
const HALF_PI_HI: f64 = std::f64::consts::FRAC_PI_2;
const HALF_PI_LO: f64 = 6.123_233_995_736_766e-17;

/// Largest argument for which [`sin`] and [`cos`] reduce the range accurately.
pub(crate) const TRIG_LIMIT: f32 = 1_048_576.0; // 2^20

/// `eˣ`; overflows to infinity, and to 0 through subnormals.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons, not `clamp`, so that NaN passes.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND_F32);
    let n = shifted - ROUND_F32;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let p = 1.381_449_6e-3f32;
    let p = p.mul_add(r, 8.368_78e-3);
    let p = p.mul_add(r, 4.166_839_4e-2);
    let p = p.mul_add(r, 1.666_652e-1);
    let p = p.mul_add(r, 0.499_999_94);
    let p = p.mul_add(r * r, r) + 1.0;
    // 2ⁿ in two factors, because n reaches −150 and 128.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND_F32.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let s = x * x;
    let p = -6.274_238e-3f32;
    let p = p.mul_add(s, 2.107_167_7e-2);
    let p = p.mul_add(s, -5.385_231e-2);
    let p = p.mul_add(s, 1.333_258_6e-1);
    let p = p.mul_add(s, -0.333_333_17);
    let small = p.mul_add(s * a, a);
    let large = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    let y = if a < 0.55 { small } else { large };
    y.copysign(x)
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x` where positive, else `slope · x`.
#[inline(always)]
pub(crate) fn leaky_relu(x: f32, slope: f32) -> f32 {
    if x > 0.0 { x } else { x * slope }
}

/// `x / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `0.5 x (1 + tanh u)` with `u = √(2/π) (x + 0.044715 x³)`, computed as `x / (1 + e⁻²ᵘ)`, which is the same.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
    let u = x * (x * x).mul_add(0.044_715, 1.0);
    x / (1.0 + exp(-TWICE_SQRT_2_OVER_PI * u))
}

/// Error function.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let a = x.abs();
    let s = x * x;
    let p = -6.090_348e-4f32;
    let p = p.mul_add(s, 5.011_96e-3);
    let p = p.mul_add(s, -2.677_890_7e-2);
    let p = p.mul_add(s, 1.128_214_1e-1);
    let p = p.mul_add(s, -3.761_252_3e-1);
    let p = p.mul_add(s, 1.283_791_5e-1);
    let small = p.mul_add(a, a);
    // 1 − erf = exp(−(t + t P(t))); erf(4) rounds to 1. The comparison lets NaN pass.
    let t = if a > 4.0 { 4.0 } else { a };
    let p = 5.295_934_6e-6f32;
    let p = p.mul_add(t, -4.992_779_5e-5);
    let p = p.mul_add(t, -2.749_807_2e-5);
    let p = p.mul_add(t, 2.869_289_8e-3);
    let p = p.mul_add(t, -2.257_588e-2);
    let p = p.mul_add(t, 1.051_697_4e-1);
    let p = p.mul_add(t, 6.356_730_3e-1);
    let p = p.mul_add(t, 1.285_414_6e-1);
    let large = 1.0 - exp(-p.mul_add(t, t));
    let y = if a < 0.9 { small } else { large };
    y.copysign(x)
}

/// Sine for `|x| ≤` [`TRIG_LIMIT`].
#[inline(always)]
pub(crate) fn sin(x: f32) -> f32 {
    let (quadrant, r) = reduce(x);
    quarter_wave(quadrant, r)
}

/// Cosine for `|x| ≤` [`TRIG_LIMIT`].
#[inline(always)]
pub(crate) fn cos(x: f32) -> f32 {
    let (quadrant, r) = reduce(x);
    quarter_wave(quadrant.wrapping_add(1), r)
}

/// The nearest multiple of π/2 and what is left, in `[−π/4, π/4]`. In f64: at 1e5 an f32 reduction has lost all digits.
#[inline(always)]
fn reduce(x: f32) -> (u32, f32) {
    let x = x as f64;
    let shifted = x.mul_add(std::f64::consts::FRAC_2_PI, ROUND_F64);
    let n = shifted - ROUND_F64;
    let r = n.mul_add(-HALF_PI_LO, n.mul_add(-HALF_PI_HI, x));
    (shifted.to_bits() as u32, r as f32)
}

/// `sin(quadrant · π/2 + r)`.
#[inline(always)]
fn quarter_wave(quadrant: u32, r: f32) -> f32 {
    let s = r * r;
    let p = 2.718_237_2e-6f32;
    let p = p.mul_add(s, -1.983_932_7e-4);
    let p = p.mul_add(s, 8.333_329e-3);
    let p = p.mul_add(s, -1.666_666_7e-1);
    let sine = p.mul_add(s * r, r);
    let p = 2.443_773e-5f32;
    let p = p.mul_add(s, -1.388_736_1e-3);
    let p = p.mul_add(s, 4.166_664_7e-2);
    let cosine = p.mul_add(s * s, s.mul_add(-0.5, 1.0));
    let y = if quadrant & 1 == 0 { sine } else { cosine };
    f32::from_bits(y.to_bits() ^ ((quadrant & 2) << 30))
}

#[cfg(test)]
mod tests {
    /// Largest error in units of the last place over every 97th float of `lo..=hi`, both signs.
    #[track_caller]
    fn check(f: fn(f32) -> f32, exact: fn(f64) -> f64, lo: f32, hi: f32, ulps: f64) {
        let mut worst = (0.0, 0.0);
        for bits in (lo.to_bits()..=hi.to_bits()).step_by(97) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let (found, want) = (f(x), exact(x as f64));
                let rounded = want as f32;
                if rounded.is_infinite() || rounded == 0.0 {
                    assert_eq!(found, rounded, "at {x:e}");
                    continue;
                }
                let ulp = (rounded.abs().next_up() - rounded.abs()) as f64;
                let error = (found as f64 - want).abs() / ulp;
                if error > worst.0 {
                    worst = (error, x);
                }
            }
        }
        assert!(worst.0 <= ulps, "{} ulp at {:e}", worst.0, worst.1);
    }

    #[test]
    fn exp_is_accurate() {
        check(super::exp, f64::exp, 1e-8, 103.0, 1.1);
        assert_eq!(super::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(super::exp(f32::INFINITY), f32::INFINITY);
        assert!(super::exp(f32::NAN).is_nan());
        assert_eq!(super::exp(0.0), 1.0);
    }

    #[test]
    fn tanh_is_accurate() {
        check(super::tanh, f64::tanh, 1e-8, 100.0, 2.0);
        assert!(super::tanh(f32::NAN).is_nan());
    }

    #[test]
    fn trigonometry_is_accurate_far_out() {
        check(super::sin, f64::sin, 1e-6, 1e6, 2.0);
        check(super::cos, f64::cos, 1e-6, 1e6, 2.0);
    }

    #[test]
    fn erf_is_accurate() {
        let exact = |x| ltxc_ir::ops::Unary::Erf.apply(x);
        check(super::erf, exact, 1e-8, 10.0, 2.0);
        assert!(super::erf(f32::NAN).is_nan());
    }

    #[test]
    fn gates_are_accurate() {
        check(super::silu, |x| x / (1.0 + (-x).exp()), 1e-6, 80.0, 3.0);
        check(super::sigmoid, |x| 1.0 / (1.0 + (-x).exp()), 1e-6, 80.0, 3.0);
        let exact = |x: f64| {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            x / (1.0 + (-2.0 * u).exp())
        };
        // Three roundings of an argument of up to 4.4 change the exponential by 3 · 4.4 ulp at most.
        check(super::gelu, exact, 1e-6, 2.0, 14.0);
    }
}
