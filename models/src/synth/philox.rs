//! Philox4x32-10, a counter-based generator: any number of any stream without state, the same on every machine.
//!
//! The 64-bit key is the seed. The 128-bit counter is the block number (low half) and the stream (high half); the stream
//! of a tensor is the first eight bytes of the BLAKE3 hash of its name, so that a tensor keeps its values when others are
//! added.
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The four words for one counter.
pub fn block(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    let product = |m: u32, c: u32| {
        let p = m as u64 * c as u64;
        ((p >> 32) as u32, p as u32)
    };
    for _ in 0..ROUNDS {
        let (high0, low0) = product(MULTIPLIERS[0], counter[0]);
        let (high1, low1) = product(MULTIPLIERS[1], counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// The numbers of one tensor, in order.
pub struct Stream {
    key: [u32; 2],
    stream: [u32; 2],
    next: u64,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream called `name` under `seed`.
    pub fn new(seed: u64, name: &str) -> Stream {
        let hash = blake3::hash(name.as_bytes());
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|b| hash.as_bytes()[4 * i + b]));
        Stream { key: [seed as u32, (seed >> 32) as u32], stream: [word(0), word(1)], next: 0, words: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.used == 4 {
            self.words = block(self.key, [self.next as u32, (self.next >> 32) as u32, self.stream[0], self.stream[1]]);
            self.next += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next number in [0, 1), a multiple of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// The next number of a uniform distribution with mean 0 and variance 1.
    pub fn centred(&mut self) -> f32 {
        (2.0 * self.uniform() - 1.0) * 3f32.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors that the authors publish with their implementation (Random123 kat_vectors).
    #[test]
    fn known_answers() {
        assert_eq!(block([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(block([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let digits_of_pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            block([0xa409_3822, 0x299f_31d0], digits_of_pi),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_are_independent_and_of_unit_variance() {
        let draw = |seed, name| {
            let mut stream = Stream::new(seed, name);
            (0..4000).map(|_| stream.centred()).collect::<Vec<f32>>()
        };
        let a = draw(1, "a");
        assert_eq!(a, draw(1, "a"));
        assert_ne!(a, draw(2, "a"));
        assert_ne!(a, draw(1, "b"));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
