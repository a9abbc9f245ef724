//! Output whose every byte can be checked: what is at an offset follows from the offset.

use std::io::{self, Write};

use crate::random::Random;

/// Bytes of one block; blocks are generated on their own, so that a gigabyte needs no gigabyte.
const BLOCK: usize = 8192;

/// The first `length` bytes. Lines of 0 to 300 bytes, each byte value in them; the last line has no newline unless it
/// happens to fall there.
pub fn bytes(length: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(length);
    for index in 0..length.div_ceil(BLOCK) {
        all.extend_from_slice(&block(index as u64));
    }
    all.truncate(length);
    all
}

/// Writes the first `length` bytes.
pub fn write(length: usize, to: &mut impl Write) -> io::Result<()> {
    let mut left = length;
    let mut index = 0;
    while left > 0 {
        let block = block(index);
        let part = &block[..left.min(BLOCK)];
        to.write_all(part)?;
        left -= part.len();
        index += 1;
    }
    Ok(())
}

fn block(index: u64) -> Vec<u8> {
    let mut random = Random::new(index);
    let mut block = format!("block {index} ").into_bytes();
    let mut line = random.below(300);
    while block.len() < BLOCK {
        if line == 0 {
            block.push(b'\n');
            line = random.below(300);
        } else {
            let byte = u8::try_from(random.below(256)).unwrap_or_default();
            block.push(if byte == b'\n' { b'.' } else { byte });
            line -= 1;
        }
    }
    block
}
