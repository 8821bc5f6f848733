//! Streams of records between programs on one machine: one appends to a [log](LogWriter), any number
//! [read](LogReader) it, each from where it last was.
//!
//! A log is a folder of segments, files named by the number of their first record. A record is its length in bytes, a
//! CRC-32C of that length and the payload, and the payload. What a crash leaves half written at the end is cut off when
//! the log is next written to; damage anywhere else is an error and never skipped.
//!
//! ```
//! use kiln_stream::{LogOptions, LogReader, LogWriter};
//!
//! # fn main() -> kiln_core::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! let folder = folder.path().join("alerts");
//! let mut writer = LogWriter::open(&folder, LogOptions::default())?;
//! writer.append(b"first")?;
//! writer.append(b"second")?;
//!
//! let mut reader = LogReader::open(&folder, 1)?;
//! assert_eq!(reader.next_record()?.map(|record| record.payload), Some(b"second".to_vec()));
//! assert_eq!(reader.next_record()?, None); // until more is appended
//! # Ok(())
//! # }
//! ```

mod reader;
mod segment;
mod writer;

pub use reader::LogReader;
pub use segment::Record;
pub use writer::{LogOptions, LogWriter};
