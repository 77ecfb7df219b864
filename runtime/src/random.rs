//! Random numbers: a counter-based generator, so that a draw depends only on seed, stream name and element index, never
//! on device, tiling or thread count.
//!
//! Philox 4×32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key is the 64-bit seed, the
//! counter is (block index, stream), where the stream number is the first 8 bytes of the BLAKE3 hash of the stream's
//! name. Each block of four 32-bit words gives four normal values by the Box–Muller transform in f64, rounded to f32, or
//! one uniform value.

/// One named stream of normal values.
#[derive(Clone, Debug)]
pub struct NormalStream(Stream);

/// One named stream of uniform values.
#[derive(Clone, Debug)]
pub struct UniformStream(Stream);

/// One named stream of blocks of random words.
#[derive(Clone, Debug)]
struct Stream {
    key: [u32; 2],
    stream: [u32; 2],
}

impl Stream {
    fn new(seed: u64, name: &str) -> Stream {
        let hash = blake3::hash(name.as_bytes());
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|j| hash.as_bytes()[i + j]));
        Stream { key: [seed as u32, (seed >> 32) as u32], stream: [word(0), word(4)] }
    }

    /// The words of block `index`.
    fn block(&self, index: u64) -> [u32; 4] {
        philox([index as u32, (index >> 32) as u32, self.stream[0], self.stream[1]], self.key)
    }
}

impl UniformStream {
    /// The stream `name` of `seed`.
    pub fn new(seed: u64, name: &str) -> UniformStream {
        UniformStream(Stream::new(seed, name))
    }

    /// Value number `index`, in `[0, 1)`.
    pub fn at(&self, index: u64) -> f64 {
        let [high, low, ..] = self.0.block(index);
        // The 53 bits that an f64 below 1 can have.
        (((u64::from(high) << 32) | u64::from(low)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl NormalStream {
    /// The stream `name` of `seed`.
    pub fn new(seed: u64, name: &str) -> NormalStream {
        NormalStream(Stream::new(seed, name))
    }

    /// The first `n` values, standard normal.
    pub fn draw(&self, n: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(n.next_multiple_of(4));
        for block in 0..n.div_ceil(4) as u64 {
            let words = self.0.block(block);
            out.extend(box_muller(words[0], words[1]));
            out.extend(box_muller(words[2], words[3]));
        }
        out.truncate(n);
        out
    }
}

/// Two independent normal values from two uniform words.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    const SCALE: f64 = 1.0 / 4294967296.0; // 2^-32
    // Half a step away from 0, so that the logarithm is finite.
    let radius = (-2.0 * ((a as f64 + 0.5) * SCALE).ln()).sqrt();
    let angle = std::f64::consts::TAU * (b as f64 + 0.5) * SCALE;
    [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
}

/// Philox 4×32 with 10 rounds.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let (p0, p1) = (MULTIPLIERS[0] * counter[0] as u64, MULTIPLIERS[1] * counter[2] as u64);
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's kat_vectors for philox4x32-10.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn values_are_standard_normal_and_a_prefix_of_a_longer_draw() {
        let stream = NormalStream::new(10, "stage1.video");
        let (long, short) = (stream.draw(100_000), stream.draw(7));
        assert_eq!(long[..7], short);
        let mean = long.iter().map(|&v| v as f64).sum::<f64>() / 1e5;
        let var = long.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 4.0 / 1e5f64.sqrt() && (var.sqrt() - 1.0).abs() < 4.0 / 2e5f64.sqrt(), "{mean} {var}");
    }

    #[test]
    fn uniform_values_fill_the_unit_interval() {
        let stream = UniformStream::new(42, "enhance");
        let values: Vec<f64> = (0..100_000).map(|i| stream.at(i)).collect();
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));
        let mean = values.iter().sum::<f64>() / 1e5;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 4.0 / 12e5f64.sqrt() && (var - 1.0 / 12.0).abs() < 1e-3, "{mean} {var}");
    }

    #[test]
    fn streams_and_seeds_differ() {
        let draw = |seed, name| NormalStream::new(seed, name).draw(4);
        assert_ne!(draw(1, "a"), draw(1, "b"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
    }
}
