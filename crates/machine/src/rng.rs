//! A small seeded generator for jitter and port choice: randomness as a parameter, so that a simulation replays.

/// `xorshift64*` (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", 2016). Not for
/// secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator for a seed; equal seeds give equal sequences.
    pub fn new(seed: u64) -> Self {
        // The state must not be zero; the multiplication spreads neighbouring seeds.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The bias of the remainder is below 2^-40 for the small bounds used here.
        if bound == 0 { 0 } else { (self.next_u64() >> 16) % bound }
    }
}
