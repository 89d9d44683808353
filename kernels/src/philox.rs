//! Random numbers that are a pure function of seed, name and position (Salmon et al., "Parallel random
//! numbers: as easy as 1, 2, 3", SC 2011), so that any part of a tensor can be made at any time.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One block of Philox4x32 with ten rounds: four random words for a counter and a key.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) =
            ((second >> 32) as u32 ^ c1 ^ k0, second as u32, (first >> 32) as u32 ^ c3 ^ k1, first as u32);
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// As [`philox4x32`], for loops over many blocks: words in the lower halves of 64 bits, so that a vector
/// instruction makes both halves of a product. What is in the upper halves of the result says nothing.
#[inline(always)]
pub(crate) fn philox4x32_wide(counter: [u64; 4], key: [u32; 2]) -> [u64; 4] {
    let multiply = |word: u64, multiplier: u32| (word & 0xffff_ffff) * u64::from(multiplier);
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let (first, second) = (multiply(c0, MULTIPLIERS[0]), multiply(c2, MULTIPLIERS[1]));
        (c0, c1) = ((second >> 32) ^ c1 ^ u64::from(k0), second);
        (c2, c3) = ((first >> 32) ^ c3 ^ u64::from(k1), first);
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// A stream of random numbers, addressed by position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    key: u64,
}

impl Stream {
    /// The stream of `name` under `seed`.
    pub fn new(seed: u64, name: &str) -> Self {
        Self { seed, key: key_of_name(name) }
    }

    /// Two random words of a position.
    fn words(&self, position: u64) -> [u32; 2] {
        let block = position / 2;
        let counter = [block as u32, (block >> 32) as u32, self.key as u32, (self.key >> 32) as u32];
        let words = philox4x32(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        if position.is_multiple_of(2) { [words[0], words[1]] } else { [words[2], words[3]] }
    }

    /// A whole number that is uniform over all of u64.
    pub fn integer(&self, position: u64) -> u64 {
        let [low, high] = self.words(position);
        u64::from(high) << 32 | u64::from(low)
    }

    /// A number in [0, 1), in steps of 2^-53.
    pub fn uniform(&self, position: u64) -> f64 {
        (self.integer(position) >> 11) as f64 * 2f64.powi(-53)
    }

    /// A number of the standard normal distribution, by the transform of Box and Muller (1958).
    pub fn normal(&self, position: u64) -> f64 {
        let [first, second] = self.words(position);
        // In (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * ((f64::from(first) + 1.0) * 2f64.powi(-32)).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * f64::from(second) * 2f64.powi(-32)).cos()
    }
}

/// The 64-bit FNV-1a hash of a name.
pub fn key_of_name(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_vectors_come_out() {
        // From the authors' own known answers (Random123, kat_vectors).
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let wide = philox4x32_wide(counter.map(u64::from), [0xa409_3822, 0x299f_31d0]);
        assert_eq!(wide.map(|word| word as u32), philox4x32(counter, [0xa409_3822, 0x299f_31d0]));
        assert_eq!(key_of_name(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(key_of_name("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let stream = Stream::new(7, "moments");
        let count = 100_000;
        let mean = |value: &dyn Fn(u64) -> f64| (0..count).map(value).sum::<f64>() / count as f64;
        assert!((mean(&|i| stream.uniform(i)) - 0.5).abs() < 0.005);
        assert!(mean(&|i| stream.normal(i)).abs() < 0.02);
        assert!((mean(&|i| stream.normal(i).powi(2)) - 1.0).abs() < 0.03);
        assert!((0..count).all(|i| (0.0..1.0).contains(&stream.uniform(i)) && stream.normal(i).is_finite()));
    }
}
