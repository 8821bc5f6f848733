//! Untrained networks to quantise.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_compiler::capture;
use kiln_core::{Context, random_stream};
use kiln_nn::initialise;
use kiln_ptq::arch::{Arch, ClassifierConfig, Input};
use kiln_ptq::checkpoint::Trained;
use kiln_ptq::data::{Examples, Numbers};
use kiln_ptq::quantiser::Calibrator;
use kiln_ptq::{Program, QuantConfig, Quantiser};
use rand::RngExt;

/// An untrained network and random examples.
pub fn subject(arch: Arch) -> (Quantiser, Examples, Vec<Vec<f32>>) {
    subject_as(arch, QuantConfig { calibrator: Calibrator::Minmax, ..QuantConfig::default() })
}

/// The same, to be quantised in another way.
pub fn subject_as(arch: Arch, how: QuantConfig) -> (Quantiser, Examples, Vec<Vec<f32>>) {
    let cx = Context::for_tests("unused");
    let mut rng = random_stream(0, "examples", 0);
    let (input, shape, values) = match arch {
        Arch::Bert => {
            let ids = (0..6 * 7).map(|i| if i % 7 > 4 { 0 } else { rng.random_range(1..30) }).collect();
            (Input::Text { vocabulary: 30, length: 7 }, vec![7], Numbers::Ints(ids))
        }
        _ => {
            let pixels = (0..6 * 2 * 81).map(|_| rng.random()).collect();
            (Input::Image([2, 9, 9]), vec![2, 9, 9], Numbers::Floats(pixels))
        }
    };
    let config = ClassifierConfig { width: 0.25, ..ClassifierConfig::new(arch, input, 3) };
    let net = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device));
    let examples =
        Examples { shape, values, labels: vec![0, 1, 2, 0, 1, 2], classes: vec![String::new(); 3] };
    let all: Vec<usize> = (0..6).collect();
    let logits = net.forward(examples.tensors(&all, &cx.device)).into_data();
    let logits: Vec<f32> = logits.iter::<f32>().collect();
    let program = Program::new(capture(Box::new(Trained::new(config, net))).unwrap()).unwrap();
    let quantiser = Quantiser::calibrate(program, &examples, how, &cx).unwrap();
    (quantiser, examples, logits.chunks(3).map(<[f32]>::to_vec).collect())
}

/// The largest difference over the largest size.
pub fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let size = b.iter().flatten().fold(0f32, |most, x| most.max(x.abs()));
    a.iter().flatten().zip(b.iter().flatten()).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / size
}

/// All of them.
pub const ALL: [Arch; 3] = [Arch::Resnet, Arch::Mobilenet, Arch::Bert];
