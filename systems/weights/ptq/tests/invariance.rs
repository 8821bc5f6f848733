//! What holds whatever the network: whole numbers give what rounded floats give, sixteen bits what floats give.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_compiler::capture;
use kiln_core::{Context, random_stream};
use kiln_nn::initialise;
use kiln_ptq::arch::{Arch, ClassifierConfig, Input};
use kiln_ptq::checkpoint::Trained;
use kiln_ptq::data::{Examples, Numbers};
use kiln_ptq::quantiser::Calibrator;
use kiln_ptq::unit::Work;
use kiln_ptq::{Program, Quantiser};
use rand::RngExt;

/// An untrained network and random examples.
fn subject(arch: Arch) -> (Quantiser, Examples, Vec<Vec<f32>>) {
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
    let quantiser = Quantiser::calibrate(program, &examples, Calibrator::Minmax, &cx).unwrap();
    (quantiser, examples, logits.chunks(3).map(<[f32]>::to_vec).collect())
}

/// The largest difference over the largest size.
fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let size = b.iter().flatten().fold(0f32, |most, x| most.max(x.abs()));
    a.iter().flatten().zip(b.iter().flatten()).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / size
}

const ALL: [Arch; 3] = [Arch::Resnet, Arch::Mobilenet, Arch::Bert];

#[test]
fn folded_programs_compute_what_networks_compute_and_sixteen_bits_nearly_the_same() {
    for arch in ALL {
        let (quantiser, examples, logits) = subject(arch);
        assert!(distance(&quantiser.float_logits(&examples).unwrap(), &logits) < 1e-5, "{arch:?}");
        let sixteen = vec![16; quantiser.program.units.len()];
        assert!(distance(&quantiser.real_logits(&sixteen, &examples).unwrap(), &logits) < 1e-3, "{arch:?}");
    }
}

#[test]
fn every_product_convolution_and_table_is_a_unit() {
    for (arch, convolutions, linears, products, tables) in
        [(Arch::Resnet, 29, 1, 0, 0), (Arch::Mobilenet, 34, 1, 0, 0), (Arch::Bert, 0, 26, 8, 1)]
    {
        let (quantiser, ..) = subject(arch);
        let count =
            |wanted: fn(&Work) -> bool| quantiser.program.units.iter().filter(|u| wanted(&u.work)).count();
        assert_eq!(count(|work| matches!(work, Work::Conv(_))), convolutions, "{arch:?}");
        assert_eq!(count(|work| *work == Work::Linear), linears, "{arch:?}");
        assert_eq!(count(|work| *work == Work::Product), products, "{arch:?}");
        assert_eq!(count(|work| *work == Work::Table), tables, "{arch:?}");
    }
}

#[test]
fn whole_numbers_give_what_rounded_floats_give() {
    for arch in ALL {
        let (quantiser, examples, logits) = subject(arch);
        let all = vec![8; quantiser.program.units.len()];
        let whole = quantiser.real_logits(&all, &examples).unwrap();
        let rounded = quantiser.rounded_logits(&all, &examples).unwrap();
        // A number at the border of two steps may go either way, and later units amplify it.
        assert!(distance(&whole, &rounded) < 0.02, "{arch:?}: {}", distance(&whole, &rounded));
        assert!(distance(&whole, &logits) < 0.2, "{arch:?}: {}", distance(&whole, &logits));
    }
}

#[test]
fn each_unit_alone_gives_the_same_in_whole_numbers_and_rounded_floats() {
    for arch in ALL {
        let (quantiser, examples, _) = subject(arch);
        let units = quantiser.program.units.len();
        for (unit, precision) in (0..units).flat_map(|unit| [(unit, 8), (unit, 4)]) {
            let mut bits = vec![16; units];
            bits[unit] = precision;
            let whole = quantiser.real_logits(&bits, &examples).unwrap();
            let rounded = quantiser.rounded_logits(&bits, &examples).unwrap();
            let name = &quantiser.program.units[unit].name;
            assert!(
                distance(&whole, &rounded) < 5e-3,
                "{arch:?} {name} at {precision}: {}",
                distance(&whole, &rounded)
            );
        }
    }
}

#[test]
fn dependencies_are_symmetric_and_sensitivities_repeat() {
    let cx = Context::for_tests("unused");
    let (quantiser, examples, _) = subject(Arch::Bert);
    let found = quantiser.sensitivities(&examples, 1, true, &cx).unwrap();
    let again = quantiser.sensitivities(&examples, 1, true, &cx).unwrap();
    assert_eq!(found, again);
    for measured in [&found.eight, &found.four] {
        for (i, row) in measured.pair.iter().enumerate() {
            assert!(row[i] == 0.0 && row.iter().enumerate().all(|(j, &d)| d == measured.pair[j][i]));
        }
    }
}
