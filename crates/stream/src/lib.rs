//! Streams of records between programs on one machine: one appends to a [log](LogWriter), any number
//! [read](LogReader) it, each from where it last was. With the feature `nats`, between machines too: `NatsWriter` and
//! `NatsReader` are the same for a subject of NATS JetStream.
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

#[cfg(feature = "nats")]
mod nats;
mod reader;
mod segment;
#[cfg(feature = "nats")]
pub mod testing;
mod writer;

#[cfg(feature = "nats")]
pub use nats::{NatsReader, NatsWriter, Receipts, Subject};
pub use reader::LogReader;
pub use segment::Record;
pub use writer::{LogOptions, LogWriter};
