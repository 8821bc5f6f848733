//! The tinyshakespeare text, embedded so that experiments run without any download. Provenance and
//! licence are in `assets/README.md`.

const TEXT: &[u8] = include_bytes!("../assets/shakespeare.txt");
const TRAIN_BYTES: usize = 1_003_854;
const VALID_BYTES: usize = 55_770;

/// The first 90 %.
pub fn train() -> &'static [u8] {
    &TEXT[..TRAIN_BYTES]
}

/// The next 5 %, for early stopping.
pub fn valid() -> &'static [u8] {
    &TEXT[TRAIN_BYTES..TRAIN_BYTES + VALID_BYTES]
}

/// The last 5 %, on which figures are reported.
pub fn test() -> &'static [u8] {
    &TEXT[TRAIN_BYTES + VALID_BYTES..]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fowler–Noll–Vo hash, 64 bit.
    fn checksum(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    #[test]
    fn the_text_is_the_published_one() {
        assert_eq!(TEXT.len(), 1_115_394);
        assert_eq!(test().len(), 55_770);
        assert_eq!(checksum(TEXT), 0x4016_c93c_3be7_4c18);
        let distinct: std::collections::BTreeSet<u8> = TEXT.iter().copied().collect();
        assert_eq!(distinct.len(), 65);
    }

    #[test]
    fn the_cuts_are_those_of_the_shared_files() {
        let Some(shared) = crate::shared_dir() else {
            println!("skipped: no shared data");
            return;
        };
        for (name, slice) in [("train", train()), ("valid", valid()), ("test", test())] {
            let file = std::fs::read(shared.join(format!("data/tinyshakespeare/{name}.txt"))).unwrap();
            assert_eq!(checksum(&file), checksum(slice), "{name}.txt");
        }
    }
}
