//! How GGUF stores elements: plain numbers, and blocks of small integers with shared scales.
//!
//! Decoding is exact: each element is the value that the format defines, rounded once to f32.
//!
//! Source: docs/gguf.md and the block structures of ggml-common.h (ggml-org/ggml).

use half::{bf16, f16};

/// A way to store elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 4 bits, one scale for 32.
    Q4_0,
    /// 4 bits, one scale and minimum for 32.
    Q4_1,
    /// 5 bits, one scale for 32.
    Q5_0,
    /// 5 bits, one scale and minimum for 32.
    Q5_1,
    /// 8 bits, one scale for 32.
    Q8_0,
    /// 2 bits, scales of scales for 256.
    Q2K,
    /// 3 bits, scales of scales for 256.
    Q3K,
    /// 4 bits, scales of scales for 256.
    Q4K,
    /// 5 bits, scales of scales for 256.
    Q5K,
    /// 6 bits, scales of scales for 256.
    Q6K,
}

/// Decoded elements.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decoded {
    /// Values in the order of the file, which is that of the shape.
    pub values: Vec<f32>,
    /// The largest distance between neighbouring values that the file could express somewhere; 0 for plain numbers.
    pub step: f32,
}

impl BlockType {
    /// All that are read.
    pub const ALL: [BlockType; 13] = [
        BlockType::F32,
        BlockType::F16,
        BlockType::Bf16,
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::Q8_0,
        BlockType::Q2K,
        BlockType::Q3K,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
    ];

    /// Number in the file, name, elements and bytes of a block.
    fn facts(self) -> (u32, &'static str, usize, usize) {
        match self {
            BlockType::F32 => (0, "F32", 1, 4),
            BlockType::F16 => (1, "F16", 1, 2),
            BlockType::Bf16 => (30, "BF16", 1, 2),
            BlockType::Q4_0 => (2, "Q4_0", 32, 18),
            BlockType::Q4_1 => (3, "Q4_1", 32, 20),
            BlockType::Q5_0 => (6, "Q5_0", 32, 22),
            BlockType::Q5_1 => (7, "Q5_1", 32, 24),
            BlockType::Q8_0 => (8, "Q8_0", 32, 34),
            BlockType::Q2K => (10, "Q2_K", 256, 84),
            BlockType::Q3K => (11, "Q3_K", 256, 110),
            BlockType::Q4K => (12, "Q4_K", 256, 144),
            BlockType::Q5K => (13, "Q5_K", 256, 176),
            BlockType::Q6K => (14, "Q6_K", 256, 210),
        }
    }

    /// The type with this number.
    pub fn from_number(number: u32) -> Option<BlockType> {
        BlockType::ALL.into_iter().find(|ty| ty.facts().0 == number)
    }

    /// Name of the format.
    pub fn name(self) -> &'static str {
        self.facts().1
    }

    /// Elements of a block.
    pub fn elements(self) -> usize {
        self.facts().2
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        self.facts().3
    }

    /// The elements in `bytes`, which are whole blocks; a rest is ignored.
    pub fn decode(self, bytes: &[u8]) -> Decoded {
        let mut out = Out { values: Vec::with_capacity(bytes.len() / self.bytes() * self.elements()), step: 0.0 };
        for block in bytes.chunks_exact(self.bytes()) {
            match self {
                BlockType::F32 => out.values.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
                BlockType::F16 => out.values.push(half(block, 0)),
                BlockType::Bf16 => out.values.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
                BlockType::Q4_0 => out.halves(half(block, 0), 0.0, 8, |j| nibble(&block[2..], j)),
                BlockType::Q4_1 => out.halves(half(block, 0), half(block, 2), 0, |j| nibble(&block[4..], j)),
                BlockType::Q5_0 => out.halves(half(block, 0), 0.0, 16, |j| five(&block[2..6], &block[6..], j)),
                BlockType::Q5_1 => {
                    out.halves(half(block, 0), half(block, 2), 0, |j| five(&block[4..8], &block[8..], j))
                }
                BlockType::Q8_0 => {
                    let d = half(block, 0);
                    out.scaled(d, block[2..].iter().map(|&q| f32::from(q as i8)));
                }
                BlockType::Q2K => out.q2(block),
                BlockType::Q3K => out.q3(block),
                BlockType::Q4K => out.q45(&block[..16], &[], &block[16..]),
                BlockType::Q5K => out.q45(&block[..16], &block[16..48], &block[48..]),
                BlockType::Q6K => out.q6(block),
            }
        }
        Decoded { values: out.values, step: out.step }
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Element `j` of 32 in 16 bytes: low halves first.
fn nibble(bytes: &[u8], j: usize) -> i32 {
    i32::from(if j < 16 { bytes[j] & 15 } else { bytes[j - 16] >> 4 })
}

/// The same with a fifth bit in `high`.
fn five(high: &[u8], bytes: &[u8], j: usize) -> i32 {
    nibble(bytes, j) | i32::from(high[j / 8] >> (j % 8) & 1) << 4
}

/// The eight 6-bit scales and minima that 4- and 5-bit blocks have in 12 bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = match j {
        0..4 => (packed[j] & 63, packed[j + 4] & 63),
        _ => (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

struct Out {
    values: Vec<f32>,
    step: f32,
}

impl Out {
    fn scaled(&mut self, d: f32, integers: impl Iterator<Item = f32>) {
        self.step = self.step.max(d.abs());
        self.values.extend(integers.map(|q| q * d));
    }

    /// 32 elements `(q − zero) · d + m`.
    fn halves(&mut self, d: f32, m: f32, zero: i32, q: impl Fn(usize) -> i32) {
        self.step = self.step.max(d.abs());
        self.values.extend((0..32).map(|j| (q(j) - zero) as f32 * d + m));
    }

    /// `scales[16] q[64] d dmin`: 16 groups of 16; bytes of `q` hold four groups that are 32 apart.
    fn q2(&mut self, block: &[u8]) {
        let (scales, q) = (&block[..16], &block[16..80]);
        let (d, min) = (half(block, 80), half(block, 82));
        for (group, &packed) in scales.iter().enumerate() {
            let (part, shift, half) = (group / 8, group % 8 / 2 * 2, group % 2);
            let (scale, low) = (d * f32::from(packed & 15), min * f32::from(packed >> 4));
            self.step = self.step.max(scale.abs());
            let from = part * 32 + half * 16;
            self.values.extend(q[from..from + 16].iter().map(|&b| scale * f32::from(b >> shift & 3) - low));
        }
    }

    /// `high[32] q[64] scales[12] d`: as for 2 bits, with a third bit that is missing where 4 is to be taken away.
    fn q3(&mut self, block: &[u8]) {
        let (high, q, packed, d) = (&block[..32], &block[32..96], &block[96..108], half(block, 108));
        for group in 0..16 {
            let low = if group < 8 { packed[group] & 15 } else { packed[group - 8] >> 4 };
            let scale = i32::from(low | (packed[8 + group % 4] >> (group / 4 * 2) & 3) << 4) - 32;
            let scale = d * scale as f32;
            self.step = self.step.max(scale.abs());
            let (part, shift, half) = (group / 8, group % 8 / 2 * 2, group % 2);
            let bit = part * 4 + group % 8 / 2;
            for (l, high) in high.iter().enumerate().skip(half * 16).take(16) {
                let value = i32::from(q[part * 32 + l] >> shift & 3) - if high >> bit & 1 == 1 { 0 } else { 4 };
                self.values.push(scale * value as f32);
            }
        }
    }

    /// `d dmin scales[12]`, fifth bits or none, `q[128]`: 8 groups of 32, two in the halves of the same bytes.
    fn q45(&mut self, head: &[u8], high: &[u8], q: &[u8]) {
        let (d, min, packed) = (half(head, 0), half(head, 2), &head[4..16]);
        for group in 0..8 {
            let (scale, low) = scale_and_min(packed, group);
            let (scale, low) = (d * scale, min * low);
            self.step = self.step.max(scale.abs());
            let shift = group % 2 * 4;
            for l in 0..32 {
                let fifth = high.get(l).map_or(0, |&b| (b >> group & 1) << 4);
                self.values.push(scale * f32::from(q[group / 2 * 32 + l] >> shift & 15 | fifth) - low);
            }
        }
    }

    /// `low[128] high[64] scales[16] d`: two halves of 128, in which four runs of 32 share bytes.
    fn q6(&mut self, block: &[u8]) {
        let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(block, 208));
        for i in 0..256 {
            let (part, run, l) = (i / 128, i % 128 / 32, i % 32);
            let bits = low[part * 64 + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
            let top = high[part * 32 + l] >> (run * 2) & 3;
            let scale = d * f32::from(scales[i / 16] as i8);
            self.step = self.step.max(scale.abs());
            self.values.push(scale * (i32::from(bits | top << 4) - 32) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type, places of its f16 numbers, and what `gguf.quants.dequantize` (gguf 0.19.0, PyPI) gives for the block
    /// `(37 i + 11) mod 256` with 0.0123 and −0.057 in these places: Σ value · (index + 1), the sixth and the seventh last.
    const EXPECTED: [(BlockType, &[usize], f64, f64, f64); 10] = [
        (BlockType::Q4_0, &[0], -6.37066650390625, 0.07379150390625, 0.02459716796875),
        (BlockType::Q4_1, &[0, 2], 18.885650634765625, 0.0413818359375, 0.11517333984375),
        (BlockType::Q5_0, &[0], 1.37744140625, -0.17218017578125, -0.159881591796875),
        (BlockType::Q5_1, &[0, 2], 67.07150268554688, 0.090576171875, 0.2381591796875),
        (BlockType::Q8_0, &[0], -99.37255859375, 0.17218017578125, -0.17218017578125),
        (BlockType::Q2K, &[80, 82], 17602.46173095703, 0.0, 0.318603515625),
        (BlockType::Q3K, &[108], 2178.6326599121094, -1.3282470703125, 0.51654052734375),
        (BlockType::Q4K, &[0, 2], 153223.46459960938, 4.432373046875, 2.95452880859375),
        (BlockType::Q5K, &[0, 2], 257203.17114257812, 4.432373046875, 3.69244384765625),
        (BlockType::Q6K, &[208], 9647.255249023438, 18.2510986328125, -2.95166015625),
    ];

    #[test]
    fn blocks_decode_to_the_bit() {
        for (ty, halves, sum, sixth, near_end) in EXPECTED {
            let mut block: Vec<u8> = (0..ty.bytes()).map(|i| (37 * i + 11) as u8).collect();
            for (at, value) in halves.iter().zip([0.0123, -0.057]) {
                block[*at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
            }
            let values = ty.decode(&block).values;
            assert_eq!(values.len(), ty.elements(), "{ty:?}");
            let found: f64 = values.iter().zip(1..).map(|(&v, i)| f64::from(v) * f64::from(i)).sum();
            let some = [5, values.len() - 7].map(|i| f64::from(values[i]));
            assert_eq!((found, some), (sum, [sixth, near_end]), "{ty:?}");
        }
    }

    #[test]
    fn plain_numbers_and_rests() {
        assert_eq!(BlockType::F32.decode(&1.5f32.to_le_bytes()), Decoded { values: vec![1.5], step: 0.0 });
        assert_eq!(BlockType::F16.decode(&f16::from_f32(-2.0).to_le_bytes()).values, [-2.0]);
        assert_eq!(BlockType::Bf16.decode(&[0x80, 0x3f, 7]).values, [1.0]);
        assert!(BlockType::Q4_0.decode(&[0; 17]).values.is_empty());
        for ty in BlockType::ALL {
            assert_eq!(BlockType::from_number(ty.facts().0), Some(ty));
        }
    }
}
