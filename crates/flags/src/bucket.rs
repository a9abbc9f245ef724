//! Who gets which variant of a split: a pure function of the flag's name, the variant's name and the key of whoever asks.
//!
//! The variants are gone through in the order of their names, so that it does not matter how they are written. At each one
//! a number is drawn by hashing `FLAG NUL VARIANT NUL KEY`, and the variant is taken with the probability that its share has
//! of what is left, itself included:
//!
//! ```text
//! take variant i  if  hash / 2^32  <  share(i) / (share(i) + share(i+1) + … + share(n))
//! ```
//!
//! The last one is always taken. So each variant gets its share, and when one share grows at the cost of others, everybody
//! who had that variant keeps it, wherever it stands in the order: its own probability can only rise, and those before it
//! can only fall. (Ranges of one hash side by side keep this only for the first variant.) Two flags draw independently,
//! because the flag's name is hashed too.
//!
//! The hash is `MurmurHash3_x86_32` with seed 0 over UTF-8, which exists in every language. All arithmetic is on integers,
//! so every machine comes to the same result.

/// `MurmurHash3_x86_32` by Austin Appleby (public domain).
pub fn murmur3(bytes: &[u8], seed: u32) -> u32 {
    const C1: u32 = 0xcc9e_2d51;
    const C2: u32 = 0x1b87_3593;
    let scramble = |k: u32| k.wrapping_mul(C1).rotate_left(15).wrapping_mul(C2);
    let (blocks, tail) = bytes.as_chunks::<4>();
    let mut hash = seed;
    for block in blocks {
        hash ^= scramble(u32::from_le_bytes(*block));
        hash = hash.rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    }
    if !tail.is_empty() {
        hash ^= scramble(tail.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)));
    }
    // The length counts modulo 2^32, as in the original.
    hash ^= u32::try_from(bytes.len() & 0xffff_ffff).unwrap_or(0);
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// Position of the variant that `key` gets of `shares`: names with shares in thousandths of a percent point, any sum.
/// `None` if all shares are 0.
pub fn choose<'v>(flag: &str, shares: impl Iterator<Item = (&'v str, u32)> + Clone, key: &str) -> Option<usize> {
    let mut left: u64 = shares.clone().map(|(_, share)| u64::from(share)).sum();
    let mut input = Vec::with_capacity(flag.len() + key.len() + 32);
    for (position, (variant, share)) in shares.enumerate() {
        let share = u64::from(share);
        if share == 0 {
            continue;
        }
        if share == left {
            return Some(position);
        }
        input.clear();
        for part in [flag.as_bytes(), b"\0", variant.as_bytes(), b"\0", key.as_bytes()] {
            input.extend_from_slice(part);
        }
        // hash / 2^32 < share / left, without a division.
        if u128::from(murmur3(&input, 0)) * u128::from(left) < u128::from(share) << 32 {
            return Some(position);
        }
        left -= share;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors that are published with other implementations.
    #[test]
    fn the_hash_is_murmur3() {
        for (text, seed, expected) in [
            ("", 0, 0),
            ("", 1, 0x514e_28b7),
            ("", 0xffff_ffff, 0x81f1_6f39),
            ("test", 0, 0xba6b_d213),
            ("test", 0x9747_b28c, 0x704b_81dc),
            ("Hello, world!", 0, 0xc036_3e43),
            ("Hello, world!", 0x9747_b28c, 0x2488_4cba),
            ("The quick brown fox jumps over the lazy dog", 0, 0x2e4f_f723),
            ("The quick brown fox jumps over the lazy dog", 0x9747_b28c, 0x2fa8_26cd),
        ] {
            assert_eq!(murmur3(text.as_bytes(), seed), expected, "{text} {seed:x}");
        }
    }

    /// Who is in must not change with a version of Orchestra: people would change sides. Worked out by another program.
    #[test]
    fn assignments_are_pinned() {
        let shares = [("blue", 10_000), ("green", 20_000), ("none", 70_000)];
        let chosen: Vec<usize> =
            (0..24).filter_map(|n| choose("checkout", shares.into_iter(), &format!("user-{n}"))).collect();
        assert_eq!(chosen, [2, 0, 1, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 2, 1, 2, 2, 2, 2]);
    }

    #[test]
    fn nothing_and_everything() {
        assert_eq!(choose("f", [("a", 0), ("b", 0)].into_iter(), "x"), None);
        assert_eq!(choose("f", std::iter::empty(), "x"), None);
        for key in ["", "x", "\0"] {
            assert_eq!(choose("f", [("a", 0), ("b", 100_000), ("c", 0)].into_iter(), key), Some(1));
        }
        assert!(choose("f", [("a", u32::MAX), ("b", u32::MAX)].into_iter(), "x").is_some());
    }
}
