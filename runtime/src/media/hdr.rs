//! Colours with a high dynamic range: what the numbers of EXR files mean, and the signal that models see for them.
//!
//! Models see a signal in `[0, 1]`: ACEScct, a logarithm of light with AP1 primaries. 1 stands for 223 times the light of
//! diffuse white; what is brighter or negative is cut. LoRAs for a high dynamic range may know another logarithm, LogC3,
//! whose 1 is 55 times that light.
//!
//! Source: spec/media-io §6, spec/pipelines §9.12; S-2016-001 (ACEScct), IEC 61966-2-1 (primaries of sRGB).

/// What the numbers of an EXR file mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ColourSpace {
    /// Light, primaries of sRGB and BT.709.
    SrgbLinear,
    /// Light, primaries AP1.
    AcesCg,
    /// The signal itself.
    AcesCct,
    /// Light, primaries of sRGB, whose signal is LogC3 instead.
    LogC3,
}

/// Columns of a matrix that turns BT.709 into AP1, with the white of one adapted to that of the other (Bradford).
const BT709_TO_AP1: [[f64; 3]; 3] = [
    [0.613_097_402_4, 0.339_523_146_2, 0.047_379_451_4],
    [0.070_193_722_5, 0.916_353_879_1, 0.013_452_398_5],
    [0.020_615_592_9, 0.109_569_772_9, 0.869_814_634_2],
];

/// Its inverse.
const AP1_TO_BT709: [[f64; 3]; 3] = [
    [1.705_050_992_7, -0.621_792_120_7, -0.083_258_872_0],
    [-0.130_256_417_5, 1.140_804_736_6, -0.010_548_319_1],
    [-0.024_003_356_8, -0.128_968_976_1, 1.152_972_332_9],
];

impl ColourSpace {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ColourSpace::SrgbLinear => "SRGB_LINEAR",
            ColourSpace::AcesCg => "ACESCG",
            ColourSpace::AcesCct => "ACESCCT",
            ColourSpace::LogC3 => "LOGC3",
        }
    }

    /// The signal in `[0, 1]` of a colour of this space; what is not a number is black.
    pub fn to_signal(self, rgb: [f32; 3]) -> [f32; 3] {
        let rgb = rgb.map(|v| if v.is_nan() { 0.0 } else { f64::from(v) });
        let signal = match self {
            ColourSpace::SrgbLinear => product(&BT709_TO_AP1, rgb).map(acescct),
            ColourSpace::AcesCg => rgb.map(acescct),
            ColourSpace::AcesCct => rgb,
            ColourSpace::LogC3 => rgb.map(logc3),
        };
        // Infinite light times a negative coefficient is not a number either.
        signal.map(|v| if v.is_nan() { 0.0 } else { v.clamp(0.0, 1.0) as f32 })
    }

    /// The colour of this space for a signal, which is cut to `[0, 1]`.
    pub fn from_signal(self, signal: [f32; 3]) -> [f32; 3] {
        let signal = signal.map(|v| f64::from(v).clamp(0.0, 1.0));
        let rgb = match self {
            ColourSpace::SrgbLinear => product(&AP1_TO_BT709, signal.map(light_of_acescct)),
            ColourSpace::AcesCg => signal.map(light_of_acescct),
            ColourSpace::AcesCct => signal,
            ColourSpace::LogC3 => signal.map(light_of_logc3),
        };
        rgb.map(|v| v as f32)
    }

    /// What a screen without a high dynamic range shows of a signal, see [`displayed`].
    pub fn displayed(self, signal: [f32; 3]) -> [f32; 3] {
        displayed(self.light(signal))
    }

    /// Light with the primaries of BT.709 for a signal, whatever numbers files of this space have.
    pub fn light(self, signal: [f32; 3]) -> [f32; 3] {
        let light = match self {
            ColourSpace::LogC3 => ColourSpace::LogC3,
            // All others have the signal of ACEScct.
            _ => ColourSpace::SrgbLinear,
        };
        light.from_signal(signal)
    }

    /// The primaries red, green and blue, and the white, as `(x, y)`.
    pub fn primaries(self) -> [(f32, f32); 4] {
        match self {
            ColourSpace::SrgbLinear | ColourSpace::LogC3 => [(0.64, 0.33), (0.3, 0.6), (0.15, 0.06), (0.3127, 0.329)],
            ColourSpace::AcesCg | ColourSpace::AcesCct => {
                [(0.713, 0.293), (0.165, 0.83), (0.128, 0.044), (0.32168, 0.33767)]
            }
        }
    }
}

/// Light with the primaries of BT.709 as a screen without a high dynamic range shows it, in `[0, 1]`: what is brighter than
/// diffuse white is cut, the rest has the curve of sRGB. What is not a number is black.
///
/// Source: IEC 61966-2-1; ltx_pipelines/utils/media_io/exr.py, release 1.2.0, which makes previews so.
pub fn displayed(light: [f32; 3]) -> [f32; 3] {
    light.map(|v| {
        let v = if v.is_nan() { 0.0 } else { f64::from(v.clamp(0.0, 1.0)) };
        let shown = if v <= 0.003_130_8 { 12.92 * v } else { 1.055 * v.powf(1.0 / 2.4) - 0.055 };
        shown as f32
    })
}

/// Where the straight part of ACEScct ends, as light and as signal.
const LIGHT_BREAK: f64 = 0.007_812_5;
const SIGNAL_BREAK: f64 = 0.155_251_141_552_511;

/// Slope and start of the straight part.
const SLOPE: f64 = 10.540_237_741_654_5;
const START: f64 = 0.072_905_534_195_835_5;

/// ACEScct of an amount of light, in `[0, 1]`.
fn acescct(light: f64) -> f64 {
    let signal = if light <= LIGHT_BREAK { SLOPE * light + START } else { (light.log2() + 9.72) / 17.52 };
    signal.clamp(0.0, 1.0)
}

/// The inverse of [`acescct`] between its bounds.
fn light_of_acescct(signal: f64) -> f64 {
    if signal <= SIGNAL_BREAK { (signal - START) / SLOPE } else { (signal * 17.52 - 9.72).exp2() }
}

/// LogC3 at an exposure index of 800: `c log10(a x + b) + d` for light above the cut, `e x + f` below.
const LOGC3_CUT: f64 = 0.010_591;
const LOGC3_LOG: [f64; 4] = [5.555_556, 0.052_272, 0.247_190, 0.385_537];
const LOGC3_LINE: [f64; 2] = [5.367_655, 0.092_809];

fn logc3(light: f64) -> f64 {
    let ([a, b, c, d], [e, f]) = (LOGC3_LOG, LOGC3_LINE);
    if light > LOGC3_CUT { c * (a * light + b).log10() + d } else { e * light + f }
}

fn light_of_logc3(signal: f64) -> f64 {
    let ([a, b, c, d], [e, f]) = (LOGC3_LOG, LOGC3_LINE);
    if signal > e * LOGC3_CUT + f { (10f64.powf((signal - d) / c) - b) / a } else { (signal - f) / e }
}

fn product(matrix: &[[f64; 3]; 3], v: [f64; 3]) -> [f64; 3] {
    matrix.map(|row| row[0] * v[0] + row[1] * v[1] + row[2] * v[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACES: [ColourSpace; 4] =
        [ColourSpace::SrgbLinear, ColourSpace::AcesCg, ColourSpace::AcesCct, ColourSpace::LogC3];

    #[track_caller]
    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{found}, expected {expected}");
    }

    #[test]
    fn acescct_has_the_published_values() {
        // S-2016-001: 0.18 is 0.4135884, the straight part meets the logarithm, 0 is its start.
        assert!((acescct(0.18) - 0.413_588_4).abs() < 1e-6);
        near(acescct(0.0), 0.072_905_534_195_835_5);
        near(acescct(LIGHT_BREAK), SIGNAL_BREAK);
        near((LIGHT_BREAK.log2() + 9.72) / 17.52, SIGNAL_BREAK);
        near(acescct(1.0), 9.72 / 17.52);
        near(light_of_acescct(1.0), 2f64.powf(7.8));
        assert_eq!((acescct(-1.0), acescct(1e9)), (0.0, 1.0));
        for i in 0..=1000 {
            let signal = f64::from(i) / 1000.0;
            near(acescct(light_of_acescct(signal)), signal);
        }
    }

    #[test]
    fn logc3_has_the_published_values() {
        // At an exposure index of 800, 0.18 is 0.391007 and 0 is 0.092809; both parts meet at the cut.
        assert!((logc3(0.18) - 0.391_007).abs() < 1e-6);
        near(logc3(0.0), 0.092_809);
        assert!((logc3(LOGC3_CUT) - logc3(LOGC3_CUT * (1.0 + 1e-9))).abs() < 2e-6);
        assert!((light_of_logc3(1.0) - 55.08).abs() < 0.01);
        for i in 0..=1000 {
            let signal = f64::from(i) / 1000.0;
            assert!((logc3(light_of_logc3(signal)) - signal).abs() < 2e-6, "{signal}");
        }
    }

    /// Matrices follow from primaries and whites; here they are derived with Bradford's adaptation.
    #[test]
    fn matrices_follow_from_the_primaries() {
        type Matrix = [[f64; 3]; 3];
        let multiply = |a: &Matrix, b: &Matrix| -> Matrix {
            std::array::from_fn(|i| std::array::from_fn(|j| (0..3).map(|k| a[i][k] * b[k][j]).sum()))
        };
        let inverse = |m: &Matrix| -> Matrix {
            let minor = |i: usize, j: usize| {
                let at = |r: usize, c: usize| m[(i + r) % 3][(j + c) % 3];
                at(1, 1) * at(2, 2) - at(1, 2) * at(2, 1)
            };
            let determinant: f64 = (0..3).map(|j| m[0][j] * minor(0, j)).sum();
            std::array::from_fn(|i| std::array::from_fn(|j| minor(j, i) / determinant))
        };
        let xyz = |(x, y): (f64, f64)| [x / y, 1.0, (1.0 - x - y) / y];
        let to_xyz = |space: ColourSpace, white: (f64, f64)| -> Matrix {
            let [r, g, b, _] = space.primaries().map(|(x, y)| xyz((decimal(x), decimal(y))));
            let columns: Matrix = std::array::from_fn(|i| [r[i], g[i], b[i]]);
            let scale = product(&inverse(&columns), xyz(white));
            columns.map(|row| [row[0] * scale[0], row[1] * scale[1], row[2] * scale[2]])
        };
        let white = |space: ColourSpace| {
            let (x, y) = space.primaries()[3];
            (decimal(x), decimal(y))
        };
        const BRADFORD: Matrix = [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]];
        let (from, to) = (ColourSpace::SrgbLinear, ColourSpace::AcesCg);
        let (a, b) = (product(&BRADFORD, xyz(white(from))), product(&BRADFORD, xyz(white(to))));
        let scaled: Matrix = std::array::from_fn(|i| BRADFORD[i].map(|v| v * b[i] / a[i]));
        let adapt = multiply(&inverse(&BRADFORD), &scaled);
        let derived = multiply(&inverse(&to_xyz(to, white(to))), &multiply(&adapt, &to_xyz(from, white(from))));
        let compare = |found: &Matrix, expected: &Matrix| {
            for (found, expected) in found.as_flattened().iter().zip(expected.as_flattened()) {
                assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
            }
        };
        compare(&derived, &BT709_TO_AP1);
        compare(&inverse(&derived), &AP1_TO_BT709);
        compare(&multiply(&BT709_TO_AP1, &AP1_TO_BT709), &[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]);
    }

    /// The decimal that an f32 was written as.
    fn decimal(v: f32) -> f64 {
        v.to_string().parse().expect("a number")
    }

    #[test]
    fn colours_survive_the_signal() {
        for space in SPACES {
            for rgb in [[0.18, 0.5, 0.02], [1.0, 1.0, 1.0], [0.9, 0.8, 0.7]] {
                let back = space.from_signal(space.to_signal(rgb));
                for (found, expected) in back.iter().zip(rgb) {
                    assert!((found - expected).abs() <= 2e-6 * (1.0 + expected), "{space:?}: {back:?} of {rgb:?}");
                }
            }
        }
        // White stays white in every space.
        let white = ColourSpace::SrgbLinear.to_signal([1.0; 3]);
        assert!(white.iter().all(|v| (v - white[0]).abs() < 1e-6), "{white:?}");
    }

    #[test]
    fn screens_show_light_with_the_curve_of_srgb() {
        let shown = displayed([0.214_041_14, 0.002, 7.0]);
        for (found, expected) in shown.iter().zip([0.5, 0.025_84, 1.0]) {
            assert!((found - expected).abs() < 1e-6, "{shown:?}");
        }
        assert_eq!(displayed([f32::NAN, -1.0, f32::INFINITY]), [0.0, 0.0, 1.0]);
        // A colour is the same colour whatever space its signal is of.
        let light = [0.4, 0.1, 0.7];
        for (space, own) in [(ColourSpace::SrgbLinear, light), (ColourSpace::LogC3, light)] {
            let found = space.displayed(space.to_signal(own));
            assert!(found.iter().zip(displayed(light)).all(|(a, b)| (a - b).abs() < 1e-5), "{space:?}: {found:?}");
        }
        let signal = ColourSpace::SrgbLinear.to_signal(light);
        for space in [ColourSpace::AcesCg, ColourSpace::AcesCct] {
            assert_eq!(space.displayed(signal), ColourSpace::SrgbLinear.displayed(signal));
        }
    }

    #[test]
    fn what_is_no_colour_becomes_one() {
        for space in SPACES {
            for rgb in [[f32::NAN; 3], [f32::INFINITY, 0.0, f32::NEG_INFINITY], [-1.0, 1e30, 0.5]] {
                let signal = space.to_signal(rgb);
                assert!(signal.iter().all(|v| (0.0..=1.0).contains(v)), "{space:?}: {signal:?}");
                assert!(space.from_signal(signal).iter().all(|v| v.is_finite()));
            }
        }
    }
}
