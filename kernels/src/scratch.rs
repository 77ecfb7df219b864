//! Places in memory that calls use in turn.

/// Every place starts at a multiple of this, which every device accepts.
pub const ALIGNMENT: u64 = 512;

/// Reserves places, each as early as it fits.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Start and end of what is reserved, in order.
    taken: Vec<(u64, u64)>,
    peak: u64,
}

impl Scratch {
    /// Where `bytes` bytes fit. Nothing has no place of its own, but an address.
    pub fn reserve(&mut self, bytes: u64) -> u64 {
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX);
        let mut start = 0;
        let mut index = 0;
        for &(taken, end) in &self.taken {
            if taken - start >= bytes {
                break;
            }
            start = end;
            index += 1;
        }
        let end = start.saturating_add(bytes);
        self.taken.insert(index, (start, end));
        self.peak = self.peak.max(end);
        start
    }

    /// Gives the place that starts at `start` back.
    pub fn release(&mut self, start: u64) {
        self.taken.retain(|&(taken, _)| taken != start);
    }

    /// Bytes that hold everything that was ever reserved.
    pub fn peak(&self) -> u64 {
        self.peak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_reused_and_never_overlap() {
        let mut scratch = Scratch::default();
        assert_eq!([scratch.reserve(1), scratch.reserve(513), scratch.reserve(0)], [0, 512, 1536]);
        scratch.release(512);
        assert_eq!(scratch.reserve(1025), 2048, "what is free is too small");
        assert_eq!([scratch.reserve(512), scratch.reserve(512)], [512, 1024]);
        assert_eq!(scratch.peak(), 2048 + 1536);
        assert_eq!(Scratch::default().peak(), 0);
    }
}
