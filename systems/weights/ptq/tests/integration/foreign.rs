//! Networks of torchvision and Hugging Face compute what they compute there; see `tests/data/README.md`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::tensor::TensorData;
use clap::ValueEnum;
use kiln_compiler::loops::{Elements, read_buffers};
use kiln_core::{HostTensor, TensorFile, Values};
use kiln_ptq::Program;
use kiln_ptq::foreign::{Extents, Foreign};
use kiln_ptq::ready::Ready;
use kiln_ptq::unit::Work;

const EXTENTS: Extents = Extents { image: 32, length: 9, heads: Some(2) };

fn weights(name: &str) -> TensorFile {
    TensorFile::read(&Path::new("tests/data").join(format!("{name}.safetensors"))).unwrap()
}

#[test]
fn weights_of_other_libraries_give_their_logits() {
    for (name, units) in [("resnet18", 21), ("resnet50", 54), ("mobilenet_v2", 53), ("bert", 19)] {
        let arch = Foreign::from_str(name, false).unwrap();
        let graph = arch.graph(weights(name), EXTENTS).unwrap();
        let io = read_buffers(&Path::new("tests/data").join(format!("{name}_io.npz"))).unwrap();
        let x = io["x"].to_tensor();
        let Elements::F64(expected) = &io["y"].elements else { panic!("logits are doubles") };
        let shape = [&[1], &io["x"].shape[1..]].concat();
        let one = |row: usize| {
            let count: usize = shape.iter().product();
            match &io["x"].elements {
                Elements::F32(x) => TensorData::new(x[row * count..][..count].to_vec(), shape.clone()),
                Elements::I64(x) => TensorData::new(x[row * count..][..count].to_vec(), shape.clone()),
                _ => panic!("{:?}", x.dtype()),
            }
        };
        let program = Program::new(graph.clone()).unwrap();
        assert_eq!(program.units.len(), units, "{name}");
        assert!(program.units.iter().all(|unit| unit.weight.is_empty() == (unit.work == Work::Product)));
        let ready: Vec<Ready> = program.units.iter().map(Ready::float).collect();
        let size = expected.iter().fold(0f64, |most, y| most.max(y.abs()));
        for row in 0..2 {
            for outputs in [graph.run(&[one(row)]).unwrap(), program.run(&[one(row)], &ready).unwrap()] {
                let found: Vec<f32> = outputs[0].iter::<f32>().collect();
                for (found, expected) in found.iter().zip(&expected[row * 3..]) {
                    let apart = (f64::from(*found) - expected).abs();
                    assert!(apart < 1e-4 * size, "{name}: {found}, should be {expected}");
                }
            }
        }
        assert!(program.with_batch(8, &ready).is_some(), "{name} takes several examples at once");
    }
}

#[test]
fn a_misfit_is_named() {
    let said = |name: &str, change: &dyn Fn(&mut TensorFile)| {
        let mut file = weights(name);
        change(&mut file);
        Foreign::from_str(name, false).unwrap().graph(file, EXTENTS).unwrap_err().to_string()
    };
    let missing = said("resnet18", &|file| _ = file.take("layer2.1.bn2.running_var").unwrap());
    assert!(missing.contains("layer2.1.bn2.running_var"), "{missing}");
    let misshapen = said("resnet18", &|file| {
        file.insert("layer1.0.conv2.weight", HostTensor::float([4, 3, 3, 3], vec![0.0; 108]));
    });
    assert!(
        misshapen.contains("\"layer1.0.conv2.weight\" has the shape [4, 3, 3, 3], must have [any, 4, 3, 3]"),
        "{misshapen}"
    );
    let more = said("bert", &|file| file.insert("cls.predictions.bias", HostTensor::float([1], vec![0.0])));
    assert!(more.contains("holds \"cls.predictions.bias\", which is no part of bert"), "{more}");
    let infinite = said("mobilenet_v2", &|file| {
        let mut tensor = file.take("classifier.1.bias").unwrap();
        if let Values::Float(values) = &mut tensor.values {
            values[1] = f32::NAN;
        }
        file.insert("classifier.1.bias", tensor);
    });
    assert!(infinite.contains("\"classifier.1.bias\" has a number that is not finite"), "{infinite}");
    let no_shortcut = said("resnet18", &|file| _ = file.take("layer2.0.downsample.0.weight").unwrap());
    assert!(no_shortcut.contains("layer2.0.downsample.0.weight"), "{no_shortcut}");
    let heads = Foreign::Bert.graph(weights("bert"), Extents { heads: Some(3), ..EXTENTS });
    assert!(heads.unwrap_err().to_string().contains("--heads 3 does not divide the width 16"));
    let long = Foreign::Bert.graph(weights("bert"), Extents { length: 13, ..EXTENTS });
    assert!(long.unwrap_err().to_string().contains("--length 13 is not between 1 and 12"));
}
