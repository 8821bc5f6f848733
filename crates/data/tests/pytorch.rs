//! Files that PyTorch 2.15 wrote (`torch.save`): a checkpoint, and a state dictionary in the format before version 1.6.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};

use kiln_core::HostTensor;
use kiln_data::{read_tensors, write_tensors};
use rand::RngExt;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

#[test]
fn every_type_and_layout_is_read_in_both_formats() {
    for name in ["checkpoint.pth", "legacy.pt"] {
        let file = read_tensors(&data(name)).unwrap();
        let expected = [
            ("conv.bias", HostTensor::float([2], vec![1.5, -2.0])),
            ("conv.weight", HostTensor::float([2, 3, 2], (0..12).map(|i| i as f32 / 4.0).collect())),
            ("half", HostTensor::float([1], vec![0.100_097_656])),
            ("mask", HostTensor::int([2], vec![1, 0])),
            ("norm.num_batches_tracked", HostTensor::int([], vec![7])),
            ("norm.running_mean", HostTensor::float([2], vec![0.5, 0.25])),
            ("turned", HostTensor::float([3, 2], vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0])),
        ];
        // The optimiser's state is left out.
        assert_eq!(file.names().collect::<Vec<_>>(), expected.each_ref().map(|(name, _)| *name));
        for (name, tensor) in expected {
            assert_eq!(file.get(name), Some(&tensor), "{name}");
        }
    }
}

#[test]
fn damaged_files_give_errors_that_name_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.pth");
    let mut rng = kiln_core::random_stream(0, "damage", 0);
    for name in ["checkpoint.pth", "legacy.pt"] {
        let whole = fs::read(data(name)).unwrap();
        let mut refused = 0;
        for trial in 0..600 {
            let mut bytes = whole.clone();
            if trial % 3 == 0 {
                bytes.truncate(rng.random_range(0..bytes.len()));
            } else {
                for _ in 0..=trial % 4 {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
            }
            fs::write(&path, bytes).unwrap();
            // What was changed may be a number, which nothing can notice.
            if let Err(error) = read_tensors(&path) {
                assert!(error.to_string().contains("damaged.pth"), "{error}");
                refused += 1;
            }
        }
        assert!(refused >= 200, "only {refused} of 600 refused");
    }
}

#[test]
fn what_is_no_file_of_pytorchs_is_refused_and_none_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.pth");
    assert!(read_tensors(&path).unwrap_err().to_string().contains("weights.pth"));
    fs::write(&path, "not a file of weights").unwrap();
    assert!(read_tensors(&path).unwrap_err().hint_text().unwrap().contains("torch.save"));
    let tensors = read_tensors(&data("legacy.pt")).unwrap();
    assert!(write_tensors(&path, &tensors).unwrap_err().hint_text().unwrap().contains(".safetensors"));
}
