//! Stored inputs, and changes to them that are the same in every run.

use std::path::Path;

/// The inputs in a folder of `fuzz/corpus`, in the order of their names.
pub fn corpus(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut inputs: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            std::fs::read(entry.path()).ok().map(|bytes| (name, bytes))
        })
        .collect();
    inputs.sort();
    inputs
}

/// Numbers at which arithmetic tends to break.
const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "-1",
    "4095",
    "4294967296",
    "1152921504606846976",
    "9223372036854775807",
    "9223372036854771712",
    "18446744073709551615",
    "18446744073709551616",
    "1e300",
    "0.5",
];

pub struct Mutations(pub u64);

impl Mutations {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }

    /// One to four changes of bytes, ranges or numbers.
    pub fn change(&mut self, input: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = input.to_vec();
        for _ in 0..=self.below(4) {
            let (start, end) = (self.below(bytes.len() + 1), self.below(bytes.len() + 1));
            let range = start.min(end)..start.max(end);
            match self.below(6) {
                0 if start < bytes.len() => bytes[start] ^= 1 << self.below(8),
                1 if start < bytes.len() => bytes[start] = self.below(256) as u8,
                2 => drop(bytes.drain(range)),
                3 => {
                    let copied = bytes[range].to_vec();
                    bytes.splice(start..start, copied);
                }
                4 => {
                    let from = self.below(other.len() + 1);
                    bytes.splice(start.., other[from..].iter().copied());
                }
                _ => self.change_number(&mut bytes),
            }
        }
        bytes
    }

    fn change_number(&mut self, bytes: &mut Vec<u8>) {
        let is_digit = |byte: &u8| byte.is_ascii_digit();
        let starts: Vec<usize> = (0..bytes.len())
            .filter(|&at| is_digit(&bytes[at]) && (at == 0 || !is_digit(&bytes[at - 1])))
            .collect();
        let Some(&start) = starts.get(self.below(starts.len())) else { return };
        let length = bytes[start..].iter().take_while(|byte| is_digit(byte)).count();
        let number = NUMBERS[self.below(NUMBERS.len())];
        bytes.splice(start..start + length, number.bytes());
    }
}
