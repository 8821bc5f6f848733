//! Frames on a data connection: a header of 64 bytes and the payload, all little-endian.
//!
//! | bytes | content |
//! |---|---|
//! | 0–3 | `KLN1` |
//! | 4–7 | operation, element, reduction, algorithm; zero for none |
//! | 8–15 | group |
//! | 16–23 | number of the collective call |
//! | 24–31 | elements the call is about |
//! | 32–39 | bytes of payload |
//! | 40–47 | arrival on an emulated link, nanoseconds of the system clock |
//! | 48–51 | root or tag |
//! | 52–55 | whether there is a root or tag, and whether the sender has ended its work |
//! | 56–59 | zero |
//! | 60–63 | CRC-32 of what is above |

use crate::ElementKind;
use crate::call::{Algorithm, Call, Operation};
use crate::element::Op;
use crate::transport::Header;

pub const HEADER: usize = 64;

/// More than this is not a message but a mistake.
pub const LARGEST: u64 = 1 << 36;

const MAGIC: [u8; 4] = *b"KLN1";

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    Message(Header),
    /// The sender has ended its work; nothing follows.
    Goodbye,
}

impl Frame {
    pub fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        bytes[..4].copy_from_slice(&MAGIC);
        match self {
            Self::Goodbye => bytes[53] = 1,
            Self::Message(header) => {
                let Call { operation, element, reduction, algorithm, root, count } = header.call;
                bytes[4] = operation as u8;
                bytes[5] = element as u8;
                bytes[6] = reduction.map_or(0, |op| op as u8 + 1);
                bytes[7] = algorithm.map_or(0, |algorithm| algorithm as u8);
                let numbers = [header.group, header.sequence, count, header.length, header.due];
                for (place, number) in bytes[8..48].chunks_exact_mut(8).zip(numbers) {
                    place.copy_from_slice(&number.to_le_bytes());
                }
                bytes[48..52].copy_from_slice(&root.unwrap_or(0).to_le_bytes());
                bytes[52] = u8::from(root.is_some());
            }
        }
        let check = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// Reads a header; says what is wrong with it otherwise.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, String> {
        if bytes[..4] != MAGIC {
            return Err(format!("a frame begins with {:?} instead of {:?}", &bytes[..4], MAGIC));
        }
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if half(60) != crc32fast::hash(&bytes[..60]) {
            return Err("a frame's header has a wrong checksum".into());
        }
        if bytes[53] == 1 {
            return Ok(Self::Goodbye);
        }
        let operation = Operation::ALL.into_iter().find(|&known| known as u8 == bytes[4]);
        let element = ElementKind::ALL.into_iter().find(|&known| known as u8 == bytes[5]);
        let (Some(operation), Some(element)) = (operation, element) else {
            return Err(format!("a frame has operation {} on element {}", bytes[4], bytes[5]));
        };
        let header = Header {
            group: number(8),
            sequence: number(16),
            call: Call {
                operation,
                element,
                reduction: Op::ALL.into_iter().find(|&known| known as u8 + 1 == bytes[6]),
                algorithm: Algorithm::ALL.into_iter().find(|&known| known as u8 == bytes[7]),
                root: (bytes[52] == 1).then(|| half(48)),
                count: number(24),
            },
            length: number(32),
            due: number(40),
        };
        if header.length > LARGEST {
            return Err(format!("a frame announces {} bytes; at most {LARGEST} are sent", header.length));
        }
        Ok(Self::Message(header))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let call = Call::new(Operation::AllReduce, ElementKind::Bf16, 1 << 40);
        let call = call.reducing(Op::Avg).by(Algorithm::Canonical).rooted(7);
        Header { group: u64::MAX - 1, sequence: 3, call, length: 12, due: 9 }
    }

    #[test]
    fn headers_survive_the_way() {
        for frame in [Frame::Message(header()), Frame::Goodbye] {
            assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = Frame::Message(header()).encode();
        for bit in 0..8 * HEADER {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_frame_longer_than_anything_is_refused() {
        let long = Frame::Message(Header { length: LARGEST + 1, ..header() }).encode();
        assert!(Frame::decode(&long).unwrap_err().contains("at most"));
    }
}
