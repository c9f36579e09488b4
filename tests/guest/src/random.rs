//! A sequence that looks random and is the same everywhere.

/// xorshift64*.
pub struct Random(u64);

impl Random {
    /// The sequence that `seed` starts.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// The next number, less than `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}
