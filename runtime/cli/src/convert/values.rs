//! Elements of tensors on their way from one dtype to another, some at a time.
//!
//! # Easy to get wrong
//! - fp8 is what the reader makes of it: `bf16(value · scale)`, also on its way to f32.
//! - A weight goes to fp8 with a scale of its own, `max |w| / 448`; values are multiplied by `448 / max |w|` in f32, limited to
//!   ±448 and rounded to the nearest, ties to even.
//! - A number that f16 has no room for is an error, not infinity.
//!
//! Source of the scheme: spec/transformer §9.1, §10.

use std::io::Write;

use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use ltxc_ir::DType;
use ltxc_ir::eval::f8_to_f64;
use ltxc_models::TensorDirectory;
use ltxc_models::checkpoint::{Checkpoint, StoredType};
use rayon::prelude::*;

/// Elements that are in memory at a time.
const PIECE: usize = 1 << 22;

/// Largest value of e4m3.
const MOST_FP8: f32 = 448.0;

/// The elements of a tensor as they are stored.
#[derive(Clone, Copy)]
pub struct Elements<'a> {
    bytes: &'a [u8],
    dtype: DType,
    /// What fp8 is multiplied by.
    scale: f32,
}

impl<'a> Elements<'a> {
    /// Elements of a dtype that is floating point and no fp8.
    pub fn plain(bytes: &'a [u8], dtype: DType) -> Elements<'a> {
        Elements { bytes, dtype, scale: 1.0 }
    }

    /// Those of the tensor `key` of a checkpoint.
    ///
    /// # Errors
    /// A dtype that is no floating point, or fp8 with scales of another scheme.
    pub fn of(checkpoint: &'a Checkpoint, key: &str) -> Result<Elements<'a>> {
        let (found, bytes) = (checkpoint.tensor(key), checkpoint.data(key));
        let (found, bytes) = found.zip(bytes).with_context(|| format!("`{}` has no `{key}`", checkpoint.name()))?;
        if let Some(problem) = checkpoint.unsupported_type(key) {
            bail!("`{key}` of `{}` is {problem}; leave its dtype as it is", checkpoint.name());
        }
        let StoredType::Known(dtype) = found.stored.dtype else { bail!("`{key}` is no number that ltxc knows") };
        let scale = checkpoint.data(&format!("{key}_scale")).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        let scale = scale.filter(|_| is_fp8(dtype)).map_or(1.0, f32::from_le_bytes);
        Ok(Elements { bytes, dtype, scale })
    }

    /// Dtype that the reader gives them: that of the file, or bf16 for fp8.
    pub fn read_dtype(&self) -> DType {
        if is_fp8(self.dtype) { DType::BF16 } else { self.dtype }
    }

    /// Their values, some at a time.
    fn pieces(&self) -> impl Iterator<Item = Vec<f32>> {
        let decoder = Decoder::of(self.dtype, self.scale);
        self.bytes.chunks(PIECE * self.dtype.bytes()).map(move |piece| decoder.decode(piece))
    }

    /// Writes them as `dtype`: f32, bf16 or f16.
    ///
    /// # Errors
    /// Values that f16 has no room for, or a disk that fails. `key` is for the message.
    pub fn write_as(&self, key: &str, dtype: DType, out: &mut dyn Write) -> Result<()> {
        for values in self.pieces() {
            if dtype == DType::F16 && values.par_iter().any(|v| v.is_finite() && !f16::from_f32(*v).is_finite()) {
                bail!("`{key}` has values beyond 65504, which f16 has no room for; choose bf16");
            }
            out.write_all(&encoded(dtype, &values))?;
        }
        Ok(())
    }

    /// The same in memory.
    ///
    /// # Errors
    /// As for [`Elements::write_as`].
    pub fn to_vec(self, key: &str, dtype: DType) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write_as(key, dtype, &mut bytes)?;
        Ok(bytes)
    }

    /// What the values of the whole tensor are multiplied by to fill the range of fp8; a reader multiplies by its inverse.
    ///
    /// # Errors
    /// Values that are not finite.
    pub fn fp8_factor(&self, key: &str) -> Result<f32> {
        let magnitude = |v: &f32| if v.is_nan() { f32::INFINITY } else { v.abs() };
        let largest = |values: Vec<f32>| values.par_iter().map(magnitude).max_by(f32::total_cmp);
        let largest = self.pieces().filter_map(largest).fold(0.0, f32::max);
        match largest {
            0.0 => Ok(1.0),
            most if most.is_finite() => Ok(MOST_FP8 / most),
            _ => bail!(
                "`{key}` has values that are not finite, which fp8 has no room for; find out why with `ltxc debug weights`"
            ),
        }
    }

    /// Writes them as fp8 (e4m3), multiplied by what [`Elements::fp8_factor`] gave.
    ///
    /// # Errors
    /// A disk that fails.
    pub fn write_fp8(&self, factor: f32, out: &mut dyn Write) -> Result<()> {
        for values in self.pieces() {
            let codes: Vec<u8> = values.par_iter().map(|v| e4m3(v * factor)).collect();
            out.write_all(&codes)?;
        }
        Ok(())
    }
}

fn is_fp8(dtype: DType) -> bool {
    matches!(dtype, DType::F8E4M3 | DType::F8E5M2)
}

/// Stored elements to f32.
enum Decoder {
    F32,
    Bf16,
    F16,
    Table(Box<[f32; 256]>),
}

impl Decoder {
    fn of(dtype: DType, scale: f32) -> Decoder {
        match dtype {
            DType::BF16 => Decoder::Bf16,
            DType::F16 => Decoder::F16,
            DType::F8E4M3 | DType::F8E5M2 => {
                let exponent = if dtype == DType::F8E4M3 { 4 } else { 5 };
                let value = |code: usize| bf16::from_f32(f8_to_f64(code as u8, exponent) as f32 * scale).to_f32();
                Decoder::Table(Box::new(std::array::from_fn(value)))
            }
            _ => Decoder::F32,
        }
    }

    fn decode(&self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Decoder::F32 => bytes.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Decoder::Bf16 => bytes.par_chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Decoder::F16 => bytes.par_chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Decoder::Table(values) => bytes.par_iter().map(|&code| values[usize::from(code)]).collect(),
        }
    }
}

fn encoded(dtype: DType, values: &[f32]) -> Vec<u8> {
    let width = dtype.bytes();
    let mut bytes = vec![0; values.len() * width];
    bytes.par_chunks_exact_mut(width).zip(values).for_each(|(to, &value)| match dtype {
        DType::BF16 => to.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        DType::F16 => to.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        _ => to.copy_from_slice(&value.to_le_bytes()),
    });
    bytes
}

/// The nearest e4m3, ties to even, limited to ±448; `x` is no NaN.
fn e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let x = x.abs().min(MOST_FP8);
    // Below 2^-6 codes are multiples of 2^-9.
    if x < 0.015625 {
        return sign | (x * 512.0).round_ties_even() as u8;
    }
    let bits = x.to_bits();
    // Half of the last bit that stays, and one less if that bit is even: ties go to even.
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

#[cfg(test)]
mod tests {
    use ltxc_ir::eval::f64_to_f8;

    use super::*;

    #[test]
    fn e4m3_is_the_one_of_the_evaluator() {
        // Every f32 with 12 leading bits of mantissa, in and beyond the range of fp8.
        for bits in (0x3400_0000u32..0x4480_0000).step_by(1 << 11).flat_map(|b| [b.saturating_sub(1), b, b + 1]) {
            let x = f32::from_bits(bits);
            for x in [x, -x] {
                assert_eq!(e4m3(x), f64_to_f8(x.into(), 4), "{x}");
            }
        }
        assert_eq!((e4m3(0.0), e4m3(-0.0), e4m3(1e9)), (0, 0x80, 0x7e));
    }

    #[test]
    fn fp8_comes_back_within_its_precision() {
        let values: Vec<f32> = (0..4096).map(|i| ((i * 37 % 4096) as f32 - 2048.0) / 700.0).collect();
        let bytes = encoded(DType::F32, &values);
        let elements = Elements::plain(&bytes, DType::F32);
        let factor = elements.fp8_factor("w").unwrap();
        let (mut codes, scale) = (Vec::new(), 1.0 / factor);
        elements.write_fp8(factor, &mut codes).unwrap();
        let back = Elements { bytes: &codes, dtype: DType::F8E4M3, scale };
        let back = back.to_vec("w", DType::F32).unwrap();
        let back = Elements::plain(&back, DType::F32).pieces().flatten().collect::<Vec<_>>();
        // Half of the last of 3 bits, and one rounding to bf16; below the smallest normal code half of its step.
        for (a, b) in values.iter().zip(&back) {
            assert!((a - b).abs() <= (a.abs() * (0.0625 + 0.004)).max(scale / 1024.0), "{a} {b}");
        }
        assert_eq!(Elements::plain(&[0; 8], DType::F32).fp8_factor("w").unwrap(), 1.0);
        assert!(Elements::plain(&f32::NAN.to_le_bytes(), DType::F32).fp8_factor("w").is_err());
        assert!(Elements::plain(&f32::INFINITY.to_le_bytes(), DType::F32).fp8_factor("w").is_err());
    }

    #[test]
    fn f16_has_no_room_for_everything() {
        let large = 1e5f32.to_le_bytes();
        assert!(Elements::plain(&large, DType::F32).to_vec("w", DType::F16).is_err());
        assert_eq!(Elements::plain(&large, DType::F32).to_vec("w", DType::BF16).unwrap().len(), 2);
        let infinite = f32::INFINITY.to_le_bytes();
        assert_eq!(
            Elements::plain(&infinite, DType::F32).to_vec("w", DType::F16).unwrap(),
            f16::INFINITY.to_le_bytes()
        );
    }
}
