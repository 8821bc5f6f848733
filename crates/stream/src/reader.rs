//! Reading a log, also while it is written.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result};

use crate::segment::{HEADER, MAGIC, Next, Record, Segment, decode};
use crate::writer::check_magic;

/// Reads records in order.
#[derive(Debug)]
pub struct LogReader {
    folder: PathBuf,
    /// Number of the next record.
    offset: u64,
    open: Option<Open>,
}

/// The segment that is read.
#[derive(Debug)]
struct Open {
    segment: Segment,
    file: BufReader<File>,
    /// Where in it the next record begins.
    at: u64,
}

impl LogReader {
    /// Goes to a record, which need not be there yet.
    ///
    /// # Errors
    /// When there is no log, the record was deleted, or what comes before it in its segment is damaged.
    pub fn open(folder: &Path, offset: u64) -> Result<Self> {
        let segments = Segment::all(folder)?;
        let Some(first) = segments.first().map(|segment| segment.first) else {
            return Err(Error::input(folder.display(), "holds no log").hint("a writer makes one"));
        };
        if offset < first {
            let found = format!("no longer has record {offset}: it begins with record {first}");
            return Err(Error::input(folder.display(), found).hint(format!("read from {first} on")));
        }
        let segment = segments.into_iter().rfind(|segment| segment.first <= offset);
        let begin = segment.as_ref().map_or(0, |segment| segment.first);
        let mut reader = Self { folder: folder.into(), offset: begin, open: None };
        if let Some(segment) = segment {
            reader.enter(segment)?;
        }
        while reader.offset < offset {
            if reader.next_record()?.is_none() {
                let found = format!("ends with record {}, before record {offset}", reader.offset);
                return Err(Error::input(folder.display(), found).hint(
                    "is it the log that was read before? Read it from its beginning, or name the other",
                ));
            }
        }
        Ok(reader)
    }

    /// Number of the record that comes next.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next record; `None` where it is not there yet.
    ///
    /// # Errors
    /// When the log is damaged there, or cannot be read.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            let Some(open) = &mut self.open else { return Ok(None) };
            let failed = |e| Error::io("read", &open.segment.path)(e);
            let size = open.file.get_ref().metadata().map_err(failed)?.len();
            if open.at == 0 {
                if size < MAGIC.len() as u64 {
                    return Ok(None);
                }
                check_magic(&mut open.file, &open.segment)?;
                open.at = MAGIC.len() as u64;
            }
            match decode(&mut open.file, size.saturating_sub(open.at)).map_err(failed)? {
                Next::Record(payload) => {
                    open.at += (HEADER + payload.len()) as u64;
                    self.offset += 1;
                    return Ok(Some(Record { offset: self.offset - 1, payload }));
                }
                Next::Damaged(found) => {
                    let found = format!("record {} {found}, at byte {}", self.offset, open.at);
                    return Err(Error::input(open.segment.path.display(), found)
                        .hint("the file was changed after it was written, or the disk fails"));
                }
                Next::End => {
                    // What was read of a record that is not whole is read again.
                    let at = open.at;
                    open.file.seek(SeekFrom::Start(at)).map_err(failed)?;
                    let mut segments = Segment::all(&self.folder)?.into_iter();
                    let Some(later) = segments.find(|later| later.first > open.segment.first) else {
                        return Ok(None);
                    };
                    let grown = open.file.get_ref().metadata().map_err(failed)?.len() > size;
                    if later.first == self.offset {
                        self.enter(later)?;
                    } else if !grown {
                        let found = format!(
                            "ends before record {}, and the next segment begins with record {}",
                            self.offset, later.first
                        );
                        return Err(Error::input(open.segment.path.display(), found)
                            .hint("the file was cut off after it was written"));
                    }
                }
            }
        }
    }

    fn enter(&mut self, segment: Segment) -> Result<()> {
        let file = File::open(&segment.path).map_err(Error::io("read", &segment.path))?;
        self.open = Some(Open { segment, file: BufReader::new(file), at: 0 });
        Ok(())
    }
}
