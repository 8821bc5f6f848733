//! Logs: what is written is read, crashes lose nothing whole, and damage is told.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use kiln_stream::{LogOptions, LogReader, LogWriter};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SMALL: LogOptions = LogOptions { segment_bytes: 200, sync_every: None };

/// Payload number `number`: of all lengths from nothing to 70 bytes.
fn payload(number: u64) -> Vec<u8> {
    (0..number * 31 % 71).map(|at| (number * 7 + at) as u8).collect()
}

fn write(folder: &Path, numbers: std::ops::Range<u64>) {
    let mut writer = LogWriter::open(folder, SMALL).unwrap();
    assert_eq!(writer.end(), numbers.start);
    for number in numbers {
        assert_eq!(writer.append(&payload(number)).unwrap(), number);
    }
}

/// All records from `offset` on, whose contents are checked.
fn read(folder: &Path, offset: u64) -> u64 {
    let mut reader = LogReader::open(folder, offset).unwrap();
    let mut next = offset;
    while let Some(record) = reader.next_record().unwrap() {
        assert_eq!((record.offset, record.payload), (next, payload(next)));
        next += 1;
    }
    assert_eq!(reader.offset(), next);
    next
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "log"));
    paths.sort();
    paths
}

#[test]
fn records_are_read_from_anywhere_over_segments_and_writers() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("a/log");
    write(&log, 0..40);
    write(&log, 40..60);
    assert!(segments(&log).len() > 5);
    for offset in 0..=60 {
        assert_eq!(read(&log, offset), 60);
    }
    let refusal = LogReader::open(&log, 61).unwrap_err().to_string();
    assert!(refusal.contains("ends with record 60, before record 61"), "{refusal}");
}

#[test]
fn a_reader_follows_a_writer() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path();
    write(log, 0..1);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = LogWriter::open(log, SMALL).unwrap();
            (1..2000).for_each(|number| assert_eq!(writer.append(&payload(number)).unwrap(), number));
        });
        let mut reader = LogReader::open(log, 0).unwrap();
        for number in 0..2000 {
            let record = loop {
                if let Some(record) = reader.next_record().unwrap() {
                    break record;
                }
                thread::yield_now();
            };
            assert_eq!((record.offset, record.payload), (number, payload(number)));
        }
    });
}

#[test]
fn a_log_cut_off_anywhere_keeps_every_whole_record_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    write(&whole, 0..12);
    let last = segments(&whole).pop().unwrap();
    let bytes = fs::read(&last).unwrap();
    let first: u64 = last.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    for length in 0..=bytes.len() {
        let log = folder.path().join(length.to_string());
        fs::create_dir(&log).unwrap();
        segments(&whole)
            .iter()
            .for_each(|path| _ = fs::copy(path, log.join(path.file_name().unwrap())).unwrap());
        fs::write(log.join(last.file_name().unwrap()), &bytes[..length]).unwrap();
        // As long as nobody writes, a reader waits for the rest.
        let kept = read(&log, 0);
        let ends: Vec<usize> = (first..12)
            .scan(8, |at, number| {
                *at += 8 + payload(number).len();
                Some(*at)
            })
            .collect();
        assert_eq!(kept, first + ends.iter().filter(|end| **end <= length).count() as u64, "cut at {length}");
        write(&log, kept..kept + 3);
        assert_eq!(read(&log, 0), kept + 3);
    }
    // A crash of the machine can leave zeros.
    let mut zeros = bytes.clone();
    zeros.extend([0; 100]);
    fs::write(&last, zeros).unwrap();
    let writer = LogWriter::open(&whole, SMALL).unwrap();
    assert_eq!((writer.end(), writer.cut_off()), (12, 100));
}

#[test]
fn a_changed_byte_is_told_and_never_read() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path();
    write(log, 0..30);
    let mut rng = StdRng::seed_from_u64(3);
    let paths = segments(log);
    for _ in 0..300 {
        let path = &paths[rng.random_range(0..paths.len() - 1)];
        let whole = fs::read(path).unwrap();
        let mut bytes = whole.clone();
        let at = rng.random_range(0..bytes.len());
        bytes[at] ^= rng.random_range(1..=255u8);
        fs::write(path, &bytes).unwrap();
        let outcome = LogReader::open(log, 0).and_then(|mut reader| {
            let mut next = 0;
            while let Some(record) = reader.next_record()? {
                assert_eq!(record.payload, payload(next));
                next += 1;
            }
            Ok(next)
        });
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(path.file_name().unwrap().to_str().unwrap()), "byte {at}: {error}");
        fs::write(path, whole).unwrap();
    }
    assert_eq!(read(log, 0), 30);
}

#[test]
fn old_segments_can_be_dropped_and_there_is_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path();
    write(log, 0..30);
    let mut writer = LogWriter::open(log, SMALL).unwrap();
    let refusal = LogWriter::open(log, SMALL).unwrap_err().to_string();
    assert!(refusal.contains("is being written by another program"), "{refusal}");
    let dropped = writer.drop_before(20).unwrap();
    assert!(dropped > 10 && dropped <= 20, "{dropped}");
    assert_eq!(read(log, dropped), 30);
    let refusal = LogReader::open(log, 0).unwrap_err().to_string();
    assert!(refusal.contains(&format!("begins with record {dropped}")), "{refusal}");
    // The last segment stays.
    assert!(writer.drop_before(u64::MAX).unwrap() + dropped < 30);
    assert_eq!(segments(log).len(), 1);
}

#[test]
fn what_is_no_log_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| LogReader::open(path, 0).unwrap_err().to_string();
    assert!(refusal(&folder.path().join("none")).contains("none"));
    assert!(refusal(folder.path()).contains("holds no log"));
    fs::write(folder.path().join("00000000000000000000.log"), "a text of somebody").unwrap();
    let mut reader = LogReader::open(folder.path(), 0).unwrap();
    assert!(reader.next_record().unwrap_err().to_string().contains("is no segment of a log"));
    assert!(
        LogWriter::open(folder.path(), SMALL).unwrap_err().to_string().contains("is no segment of a log")
    );
    let refusal =
        LogWriter::open(&folder.path().join("new"), SMALL).unwrap().append(&vec![0; (64 << 20) + 1]);
    assert!(refusal.unwrap_err().to_string().contains("does not fit a log"));
}
