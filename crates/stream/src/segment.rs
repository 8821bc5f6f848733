//! Segments of a log and the records in them.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result};

/// What every segment begins with.
pub(crate) const MAGIC: &[u8; 8] = b"KILNLOG1";
/// Bytes of a record before its payload: length and checksum, both little-endian.
pub(crate) const HEADER: usize = 8;
/// Bytes of the longest payload.
pub(crate) const LONGEST: usize = 64 << 20;
const ENDING: &str = "log";

/// What one program tells others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number in the log, from 0.
    pub offset: u64,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// A file of consecutive records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Number of its first record.
    pub first: u64,
    pub path: PathBuf,
}

impl Segment {
    pub fn new(folder: &Path, first: u64) -> Self {
        Self { first, path: folder.join(format!("{first:020}.{ENDING}")) }
    }

    /// Those of a log, in order. Other files in the folder are not its own.
    pub fn all(folder: &Path) -> Result<Vec<Self>> {
        let mut segments = Vec::new();
        for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            let is_segment = path.extension().is_some_and(|ending| ending == ENDING);
            let name = path.file_stem().and_then(|name| name.to_str()).filter(|name| name.len() == 20);
            if let Some(first) = name.filter(|_| is_segment).and_then(|name| name.parse().ok()) {
                segments.push(Self { first, path });
            }
        }
        segments.sort_by_key(|segment| segment.first);
        Ok(segments)
    }
}

/// What comes next in a segment.
pub(crate) enum Next {
    Record(Vec<u8>),
    /// Nothing, or a part of a record.
    End,
    /// Bytes that are no record.
    Damaged(String),
}

/// The bytes of a record.
pub(crate) fn encode(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_le_bytes();
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend(length);
    bytes.extend(checksum(length, payload).to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Over the length too, so that a stretch of zeros is no record.
fn checksum(length: [u8; 4], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&length), payload)
}

/// Reads a record; `left` bytes of the segment are not read yet.
pub(crate) fn decode(from: &mut impl Read, left: u64) -> io::Result<Next> {
    if left < HEADER as u64 {
        return Ok(Next::End);
    }
    let (mut length, mut sum) = ([0; 4], [0; 4]);
    from.read_exact(&mut length)?;
    from.read_exact(&mut sum)?;
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > LONGEST {
        return Ok(Next::Damaged(format!("claims {bytes} bytes, and {LONGEST} are the most")));
    }
    if left - (HEADER as u64) < bytes as u64 {
        return Ok(Next::End);
    }
    let mut payload = vec![0; bytes];
    from.read_exact(&mut payload)?;
    match checksum(length, &payload) == u32::from_le_bytes(sum) {
        true => Ok(Next::Record(payload)),
        false => Ok(Next::Damaged("does not have its checksum".into())),
    }
}
