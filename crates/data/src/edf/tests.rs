use kiln_core::random_stream;
use rand::RngExt;

use super::*;
use crate::shared_dir;

fn signal(label: &str, samples_per_record: usize, format: EdfFormat) -> EdfSignal {
    let limit = if format == EdfFormat::Edf { 1 << 15 } else { 1 << 23 };
    EdfSignal {
        label: label.into(),
        transducer: "cup".into(),
        unit: "uV".into(),
        physical_min: -3276.8,
        physical_max: 3276.7,
        digital_min: -limit,
        digital_max: limit - 1,
        prefilter: "HP:0.1Hz".into(),
        samples_per_record,
    }
}

/// Two signals of different rates in three records of half a second.
fn recording(format: EdfFormat) -> (EdfHeader, Vec<Vec<i32>>) {
    let header = EdfHeader {
        format,
        kind: EdfKind::Plain,
        patient: "X X X X".into(),
        recording: "Startdate X X X X".into(),
        start_date: "15.09.05".into(),
        start_time: "10.18.42".into(),
        declared_records: Some(3),
        record_seconds: 0.5,
        signals: vec![signal("EEG FP1-REF", 5, format), signal("EMG", 2, format)],
    };
    let mut rng = random_stream(0, "edf", 0);
    let limit = header.signals[0].digital_max;
    let samples = [15, 6].map(|count| (0..count).map(|_| rng.random_range(-limit - 1..=limit)).collect());
    (header, samples.into())
}

fn annotations() -> Vec<Annotation> {
    let one = |onset, duration, text: &str| Annotation { onset, duration, text: text.into() };
    vec![one(0.0, None, "eyes closed"), one(0.7, Some(0.25), "spike"), one(0.8, None, "Größe")]
}

/// A file in a folder of its own.
fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.edf");
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn written(format: EdfFormat, annotations: &[Annotation]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.edf");
    let (header, samples) = recording(format);
    write_edf(&path, &header, &samples, annotations).unwrap();
    std::fs::read(path).unwrap()
}

/// Everything that a file holds, read in every way.
fn read_all(path: &Path) -> Result<(Vec<Vec<i32>>, Vec<Annotation>)> {
    let mut reader = EdfReader::open(path)?;
    let all: Vec<usize> = (0..reader.header().signals.len()).collect();
    let digital = reader.read_digital(&all, 0..reader.records())?;
    let _ = reader.read(&all, 0..reader.records());
    let _ = (reader.stretches()?, reader.header().start());
    Ok((digital, reader.annotations()?))
}

#[test]
fn what_is_written_is_read_back_to_the_last_digit() {
    for format in [EdfFormat::Edf, EdfFormat::Bdf] {
        let (header, samples) = recording(format);
        let (_folder, path) = file(&written(format, &[]));
        let mut reader = EdfReader::open(&path).unwrap();
        assert_eq!(*reader.header(), header);
        assert!(reader.warnings().is_empty());
        assert_eq!(reader.read_digital(&[0, 1], 0..3).unwrap(), samples);
        // One record, one signal, in another order.
        assert_eq!(reader.read_digital(&[1, 0], 1..2).unwrap(), [&samples[1][2..4], &samples[0][5..10]]);
        let (gain, offset) = header.signals[0].scale().unwrap();
        let physical = reader.read(&[0], 2..3).unwrap();
        assert!(physical[0].iter().zip(&samples[0][10..]).all(|(p, &d)| *p == f64::from(d) * gain + offset));
        assert_eq!((header.rate(0), header.rate(1)), (10.0, 4.0));
        assert_eq!(header.start().unwrap(), "2005-09-15T10:18:42");
    }
}

#[test]
fn annotations_survive_and_leave_samples_as_they_are() {
    for format in [EdfFormat::Edf, EdfFormat::Bdf] {
        let (_folder, path) = file(&written(format, &annotations()));
        let (digital, found) = read_all(&path).unwrap();
        assert_eq!(digital[..2], recording(format).1);
        assert_eq!(found, annotations());
    }
}

#[test]
fn records_of_a_recording_with_gaps_come_in_stretches() {
    let bytes = written(EdfFormat::Edf, &annotations());
    let place = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|w| w == what).unwrap();
    let mut gaps = bytes.clone();
    let at = place(&gaps, b"EDF+C");
    gaps[at..at + 5].copy_from_slice(b"EDF+D");
    let at = place(&gaps, b"+0.5\x14\x14");
    gaps[at..at + 4].copy_from_slice(b"+9.5");
    let at = gaps.windows(4).rposition(|w| w == b"+1\x14\x14").unwrap();
    gaps[at..at + 4].copy_from_slice(b"+X\x14\x14");
    let (_folder, path) = file(&gaps);
    let mut reader = EdfReader::open(&path).unwrap();
    // The third record does not say when it begins, and is taken to follow the second.
    let stretches = reader.stretches().unwrap();
    assert_eq!(stretches, [Stretch { start: 0.0, records: 0..1 }, Stretch { start: 9.5, records: 1..3 }]);
    assert!(reader.warnings()[0].contains("1 annotations are malformed"));
    let (_folder, path) = file(&bytes);
    assert_eq!(EdfReader::open(&path).unwrap().stretches().unwrap().len(), 1);
}

#[test]
fn whole_records_of_a_cut_or_growing_file_are_read() {
    let bytes = written(EdfFormat::Edf, &[]);
    let (_folder, path) = file(&bytes[..bytes.len() - 3]);
    let mut reader = EdfReader::open(&path).unwrap();
    assert_eq!(reader.records(), 2);
    assert!(reader.warnings()[0].contains("2 of 3 records"), "{:?}", reader.warnings());
    assert_eq!(reader.read_digital(&[1], 0..2).unwrap()[0], recording(EdfFormat::Edf).1[1][..4]);
    assert!(reader.read_digital(&[1], 0..3).is_err() && reader.read_digital(&[2], 0..1).is_err());

    let mut unknown = bytes.clone();
    unknown[236..244].copy_from_slice(b"-1      ");
    let (_folder, path) = file(&unknown);
    assert_eq!(EdfReader::open(&path).unwrap().records(), 3);
    let mut longer = bytes.clone();
    longer.extend([0; 20]);
    let (_folder, path) = file(&longer);
    let reader = EdfReader::open(&path).unwrap();
    assert!(reader.records() == 3 && reader.warnings()[0].contains("20 bytes"), "{:?}", reader.warnings());
}

#[test]
fn what_is_wrong_in_a_header_is_named() {
    let bytes = written(EdfFormat::Edf, &[]);
    // Signal fields of two signals: physical minimum at 256 + 2 (16 + 80 + 8), and so on by 16.
    let physical = 256 + 2 * 104;
    for (at, text, words) in [
        (0, "PDF     ", "begins with \"PDF\""),
        (184, "512     ", "claims 512 bytes, but 2 signals need 768"),
        (252, "9999", "but 9999 signals need"),
        (252, "0   ", "has no signals"),
        (252, "-1  ", "number of signals is \"-1\""),
        (236, "-2      ", "claims -2 records"),
        (236, "0       ", "holds no whole record"),
        (236, "?       ", "number of records is \"?\""),
        (244, "0       ", "last 0 seconds"),
        (244, "nan     ", "last NaN seconds"),
        (physical, "inf     ", "signal 1 \"EEG FP1-REF\": physical minimum is inf"),
        (physical + 32, "-99999  ", "digital minimum is -99999, not a whole number from -32768 to 32767"),
        (physical + 64 + 160, "99999999", "holds no whole record"),
        (physical + 64 + 160, "-5      ", "samples in a record is \"-5\""),
    ] {
        let mut damaged = bytes.clone();
        damaged[at..at + text.len()].copy_from_slice(text.as_bytes());
        let (_folder, path) = file(&damaged);
        let error = EdfReader::open(&path).unwrap_err();
        assert!(error.to_string().contains(words), "{text}: {error}");
        assert!(error.to_string().contains("a.edf") && error.hint_text().is_some());
    }
    // A signal whose unit is unknown spoils itself alone.
    let mut damaged = bytes;
    damaged[physical..physical + 8].copy_from_slice(b"3276.7  ");
    let (_folder, path) = file(&damaged);
    let mut reader = EdfReader::open(&path).unwrap();
    let error = reader.read(&[0], 0..3).unwrap_err().to_string();
    assert!(
        error.contains("signal 1 \"EEG FP1-REF\": physical minimum and maximum are both 3276.7"),
        "{error}"
    );
    reader.read(&[1], 0..3).unwrap();
}

#[test]
fn a_file_cut_at_any_byte_is_read_or_refused() {
    for bytes in [written(EdfFormat::Edf, &annotations()), written(EdfFormat::Bdf, &annotations())] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.edf");
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let result = read_all(&path);
            assert_eq!(result.is_ok(), cut >= 1024 + (bytes.len() - 1024) / 3, "{cut}");
        }
    }
}

#[test]
fn flipped_bytes_never_do_more_than_change_what_is_read() {
    let mut rng = random_stream(0, "flip", 0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.edf");
    let mut refused = 0;
    for round in 0..4000 {
        let format = if round % 2 == 0 { EdfFormat::Edf } else { EdfFormat::Bdf };
        let mut bytes =
            if round < 2000 { written_once(format).clone() } else { digits_flipped(format, &mut rng) };
        for _ in 0..rng.random_range(1..5) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        std::fs::write(&path, &bytes).unwrap();
        match read_all(&path) {
            // Never more samples than there are bytes.
            Ok((digital, _)) => assert!(digital.iter().map(Vec::len).sum::<usize>() * 2 <= bytes.len()),
            Err(error) => {
                assert!(error.to_string().contains("a.edf"), "{error}");
                refused += 1;
            }
        }
    }
    assert!((500..3999).contains(&refused), "{refused}");
}

fn written_once(format: EdfFormat) -> &'static Vec<u8> {
    use std::sync::OnceLock;
    static FILES: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    FILES[usize::from(format == EdfFormat::Bdf)].get_or_init(|| written(format, &annotations()))
}

/// Digits of the header become other digits: numbers that still are numbers.
fn digits_flipped(format: EdfFormat, rng: &mut impl rand::Rng) -> Vec<u8> {
    let mut bytes = written_once(format).clone();
    let digits: Vec<usize> = (184..1024).filter(|&at| bytes[at].is_ascii_digit()).collect();
    let at = digits[rng.random_range(0..digits.len())];
    bytes[at] = b'0' + rng.random_range(0..10u8);
    bytes
}

#[test]
fn what_does_not_fit_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.edf");
    let refused = |change: &dyn Fn(&mut EdfHeader, &mut Vec<Vec<i32>>), words: &str| {
        let (mut header, mut samples) = recording(EdfFormat::Edf);
        change(&mut header, &mut samples);
        let error = write_edf(&path, &header, &samples, &[]).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!path.exists());
    };
    refused(&|header, _| header.patient = "Å".into(), "not plain ASCII");
    refused(&|header, _| header.signals[0].label = "a".repeat(17), "longer than its field");
    refused(&|_, samples| samples[0][3] = 40000, "the sample 40000 is outside");
    refused(&|_, samples| samples[1].truncate(5), "5 samples, 2 a record");
    refused(&|_, samples| samples[1].truncate(4), "has 2 records, others 3");
    refused(&|header, _| header.signals[1].physical_max = -3276.8, "both -3276.8");
    refused(&|header, _| header.record_seconds = 0.0, "records of 0 seconds");
}

#[test]
fn real_recordings_are_read_as_pyedflib_does() {
    let Some(shared) = shared_dir() else {
        eprintln!("skipped: no shared data");
        return;
    };
    for name in ["eeg.edf", "ok_header.bdf"] {
        let expected = format!("{}_expected.json", name.replace('.', "_"));
        let expected = std::fs::read_to_string(shared.join("golden/eeg").join(expected)).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
        let mut reader = EdfReader::open(&shared.join("data/eeg-samples").join(name)).unwrap();
        assert!(reader.warnings().is_empty(), "{:?}", reader.warnings());
        let signals: Vec<usize> = (0..reader.header().signals.len())
            .filter(|&s| !reader.header().signals[s].is_annotation())
            .collect();
        assert_eq!(signals.len() as u64, expected["n_signals"].as_u64().unwrap());
        assert_eq!(reader.seconds(), expected["duration_s"].as_f64().unwrap());
        let start = reader.header().start().unwrap().replace('T', " ");
        assert_eq!(start, expected["startdate"].as_str().unwrap());
        let samples = reader.read(&signals, 0..reader.records()).unwrap();
        for (place, (&at, samples)) in signals.iter().zip(&samples).enumerate() {
            let signal = &reader.header().signals[at];
            assert_eq!(signal.label, expected["labels"][place].as_str().unwrap());
            assert_eq!(signal.unit, expected["units"][place].as_str().unwrap());
            assert_eq!(reader.header().rate(at), expected["sample_rates"][place].as_f64().unwrap());
            assert_eq!(samples.len() as u64, expected["n_samples"][place].as_u64().unwrap());
            let range = signal.physical_max - signal.physical_min;
            let close = |found: f64, expected: &serde_json::Value, what: &str| {
                let expected = expected.as_f64().unwrap();
                assert!(
                    (found - expected).abs() <= 1e-6 * range,
                    "{name} {place} {what}: {found} {expected}"
                );
            };
            let mean = samples.iter().sum::<f64>() / samples.len() as f64;
            let variance = samples.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / samples.len() as f64;
            close(mean, &expected["mean"][place], "mean");
            close(variance.sqrt(), &expected["std"][place], "deviation");
            for (found, expected) in
                samples.iter().zip(expected["first8"][place].as_array().into_iter().flatten())
            {
                close(*found, expected, "sample");
            }
        }
        let texts = expected["annotations"][2].as_array().unwrap();
        let found = reader.annotations().unwrap();
        assert_eq!(found.len(), texts.len());
        for (place, (found, text)) in found.iter().zip(texts).enumerate() {
            assert_eq!(found.text, text.as_str().unwrap());
            let onset: f64 = expected["annotations"][0][place].as_str().unwrap().parse().unwrap();
            assert_eq!((found.onset, found.duration), (onset, None));
        }
    }
    let reader = EdfReader::open(&shared.join("data/eeg-samples/broken_header.bdf")).unwrap();
    assert!(reader.records() == 2 && reader.warnings()[0].contains("does not say how many"));
}
