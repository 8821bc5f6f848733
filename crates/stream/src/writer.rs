//! Appending to a log.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result};

use crate::segment::{HEADER, LONGEST, MAGIC, Next, Segment, decode, encode};

/// How a log is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    /// Bytes after which a new segment begins.
    pub segment_bytes: u64,
    /// Records after which the disk must have them; `None` leaves that to the operating system, whose crash, unlike that
    /// of the program, can then lose the newest ones.
    pub sync_every: Option<u64>,
}

impl Default for LogOptions {
    /// Segments of 64 MiB, every record on disk.
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, sync_every: Some(1) }
    }
}

/// Appends records to a log. There is one at a time.
#[derive(Debug)]
pub struct LogWriter {
    folder: PathBuf,
    options: LogOptions,
    /// Held as long as the writer lives.
    _lock: File,
    segment: Segment,
    file: File,
    bytes: u64,
    end: u64,
    unsynced: u64,
    cut_off: u64,
}

impl LogWriter {
    /// Opens a log, which is made where there is none. Bytes at its end that are no whole record are cut off.
    ///
    /// # Errors
    /// When another writer has it, or it cannot be written.
    pub fn open(folder: &Path, options: LogOptions) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let lock_path = folder.join("lock");
        let lock = File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::input(folder.display(), "is being written by another program")
                    .hint("a log has one writer at a time"));
            }
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", &lock_path)(e)),
        }
        let segment = Segment::all(folder)?.pop().unwrap_or_else(|| Segment::new(folder, 0));
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&segment.path)
            .map_err(Error::io("open", &segment.path))?;
        let (records, good) = whole_records(&mut file, &segment)?;
        let found = file.metadata().map_err(Error::io("read", &segment.path))?.len();
        let cut_off = found - good;
        if cut_off > 0 {
            file.set_len(good).map_err(Error::io("write", &segment.path))?;
        }
        file.seek(SeekFrom::Start(good)).map_err(Error::io("write", &segment.path))?;
        let end = segment.first + records;
        let mut writer = Self {
            folder: folder.into(),
            options,
            _lock: lock,
            segment,
            file,
            bytes: good,
            end,
            unsynced: 0,
            cut_off,
        };
        if good == 0 {
            writer.begin_segment()?;
        }
        Ok(writer)
    }

    /// Number that the next record gets.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes that a crash had left at the end, and that were cut off.
    pub fn cut_off(&self) -> u64 {
        self.cut_off
    }

    /// Appends a record and returns its number.
    ///
    /// # Errors
    /// When it has more than 64 MiB or cannot be written; the log is then as before.
    pub fn append(&mut self, payload: &[u8]) -> Result<u64> {
        if payload.len() > LONGEST {
            return Err(Error::usage(format!(
                "a record of {} bytes does not fit a log, whose records have at most {LONGEST}",
                payload.len()
            )));
        }
        if self.bytes > MAGIC.len() as u64 && self.bytes >= self.options.segment_bytes {
            self.sync()?;
            self.segment = Segment::new(&self.folder, self.end);
            self.file =
                File::create_new(&self.segment.path).map_err(Error::io("create", &self.segment.path))?;
            self.begin_segment()?;
        }
        let record = encode(payload);
        if let Err(e) = self.file.write_all(&record) {
            // What is there of it would be taken for damage once more follows.
            _ = self.file.set_len(self.bytes).and_then(|()| self.file.seek(SeekFrom::Start(self.bytes)));
            return Err(Error::io("write", &self.segment.path)(e));
        }
        self.bytes += record.len() as u64;
        self.end += 1;
        self.unsynced += 1;
        if self.options.sync_every.is_some_and(|every| self.unsynced >= every) {
            self.sync()?;
        }
        Ok(self.end - 1)
    }

    /// Returns when everything so far is on disk.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("write", &self.segment.path))?;
        self.unsynced = 0;
        Ok(())
    }

    /// Deletes segments all of whose records come before one; how many records that were.
    ///
    /// # Errors
    /// When a file cannot be deleted.
    pub fn drop_before(&mut self, offset: u64) -> Result<u64> {
        let segments = Segment::all(&self.folder)?;
        let mut dropped = 0;
        for pair in segments.windows(2).filter(|pair| pair[1].first <= offset) {
            fs::remove_file(&pair[0].path).map_err(Error::io("delete", &pair[0].path))?;
            dropped += pair[1].first - pair[0].first;
        }
        Ok(dropped)
    }

    fn begin_segment(&mut self) -> Result<()> {
        let path = &self.segment.path;
        self.file.set_len(0).map_err(Error::io("write", path))?;
        self.file.write_all(MAGIC).map_err(Error::io("write", path))?;
        self.bytes = MAGIC.len() as u64;
        // The folder, too, must know of the file after a crash.
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(Error::io("write", &self.folder))
    }
}

/// How many whole records a segment begins with, and where they end; 0 where not even its first bytes are whole.
fn whole_records(file: &mut File, segment: &Segment) -> Result<(u64, u64)> {
    let failed = |e| Error::io("read", &segment.path)(e);
    let size = file.metadata().map_err(failed)?.len();
    if size < MAGIC.len() as u64 {
        return Ok((0, 0));
    }
    let mut from = BufReader::new(file);
    check_magic(&mut from, segment)?;
    let (mut records, mut at) = (0, MAGIC.len() as u64);
    while let Next::Record(payload) = decode(&mut from, size - at).map_err(failed)? {
        records += 1;
        at += (HEADER + payload.len()) as u64;
    }
    Ok((records, at))
}

pub(crate) fn check_magic(from: &mut impl Read, segment: &Segment) -> Result<()> {
    let mut magic = [0; MAGIC.len()];
    from.read_exact(&mut magic).map_err(Error::io("read", &segment.path))?;
    if magic != *MAGIC {
        return Err(Error::input(segment.path.display(), "is no segment of a log")
            .hint("a log is a folder of its own, written by Kiln"));
    }
    Ok(())
}
