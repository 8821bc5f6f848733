//! What holds whatever the network: whole numbers give what rounded floats give, sixteen bits what floats give.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use crate::subject::{ALL, distance, subject, subject_as};
use kiln_core::Context;
use kiln_ptq::arch::Arch;
use kiln_ptq::data::Examples;
use kiln_ptq::quantise::{Metric, logits, score};
use kiln_ptq::ready::Ready;
use kiln_ptq::unit::{Pair, Scales, Work};
use kiln_ptq::{Granularity, QuantConfig, Quantiser};

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
fn bytes_between_units_give_what_floats_between_them_give_bit_for_bit() {
    for (arch, least) in [(Arch::Resnet, 16), (Arch::Mobilenet, 24), (Arch::Bert, 0)] {
        let (quantiser, examples, _) = subject(arch);
        let units = quantiser.program.units.len();
        let mixed: Vec<u8> = (0..units).map(|at| [8, 4, 8, 16, 4][at % 5]).collect();
        for bits in [vec![8; units], vec![4; units], mixed] {
            let (fused, apart) = (quantiser.real(&bits), quantiser.apart(&bits));
            let found = logits(&quantiser.program, &fused, &examples).unwrap();
            assert_eq!(found, logits(&quantiser.program, &apart, &examples).unwrap(), "{arch:?} {bits:?}");
            let bytes =
                fused.iter().filter(|ready| matches!(ready, Ready::Whole { to: Some(_), .. })).count();
            assert!(bytes >= least || bits.contains(&16), "{arch:?}: {bytes}");
        }
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
    for granularity in [Granularity::Layer, Granularity::Tensor] {
        let (quantiser, examples, _) =
            subject_as(Arch::Bert, QuantConfig { granularity, ..QuantConfig::default() });
        let found = quantiser.sensitivities(&examples, 1, true, &cx).unwrap();
        let again = quantiser.sensitivities(&examples, 1, true, &cx).unwrap();
        assert_eq!(found, again);
        for measured in [&found.eight, &found.four] {
            for (i, row) in measured.pair.iter().enumerate() {
                assert!(row[i] == 0.0 && row.iter().enumerate().all(|(j, &d)| d == measured.pair[j][i]));
            }
            // Activations that are parts of their own have curvature and noise too.
            let rounded = measured.noise.iter().filter(|&&noise| noise > 0.0).count();
            let products = quantiser.program.units.iter().filter(|unit| unit.work == Work::Product).count();
            let whole = granularity == Granularity::Layer;
            assert_eq!(rounded, measured.noise.len() - if whole { products } else { 0 });
        }
    }
}

/// The mean loss with some parts rounded and the others as they were, the whole network computed anew.
fn loss_with(quantiser: &Quantiser, parts: &[usize], bits: u8, examples: &Examples) -> f64 {
    let mut ready: Vec<Ready> = quantiser.program.units.iter().map(Ready::float).collect();
    for &part in parts {
        let unit = quantiser.parts[part].unit;
        ready[unit] =
            Ready::rounded(&quantiser.program.units[unit], &quantiser.numbers(unit, Pair::of(bits)));
    }
    let program = quantiser.program.with_batch(examples.len(), &ready).unwrap();
    -score(&logits(&program, &ready, examples).unwrap(), &examples.labels, Metric::Loss)
}

#[test]
fn losses_from_kept_prefixes_are_those_of_whole_networks_bit_for_bit() {
    let cx = Context::for_tests("unused");
    for arch in ALL {
        let (quantiser, examples, _) = subject(arch);
        let found = quantiser.sensitivities(&examples, 0, true, &cx).unwrap();
        let loss = loss_with(&quantiser, &[], 8, &examples);
        assert_eq!(found.loss, loss, "{arch:?}");
        let parts = quantiser.parts.len();
        for (bits, measured) in [(8, &found.eight), (4, &found.four)] {
            for part in 0..parts {
                let alone = loss_with(&quantiser, &[part], bits, &examples) - loss;
                assert_eq!(measured.single[part], alone, "{arch:?}, part {part} at {bits}");
            }
            for (i, j) in [(0, 1), (0, parts - 1), (parts / 2, parts / 2 + 3), (parts - 2, parts - 1)] {
                let both = loss_with(&quantiser, &[i, j], bits, &examples);
                let beyond = both - loss - measured.single[i] - measured.single[j];
                assert_eq!(measured.pair[i][j], beyond, "{arch:?}, parts {i} and {j} at {bits}");
            }
        }
    }
}

#[test]
fn tensors_apart_give_the_same_in_whole_numbers_and_rounded_floats() {
    for arch in ALL {
        let granularity = Granularity::Tensor;
        let (quantiser, examples, _) =
            subject_as(arch, QuantConfig { granularity, ..QuantConfig::default() });
        let parts = quantiser.parts.len();
        let tables = quantiser.program.units.iter().filter(|unit| unit.work == Work::Table).count();
        assert_eq!(parts, 2 * quantiser.program.units.len() - tables);
        // Neighbours of every two precisions: weights and input of a unit, or those of two units.
        for (first, (weight, input)) in
            (0..parts - 1).flat_map(|part| [(part, (4, 8)), (part, (8, 4)), (part, (16, 4)), (part, (4, 16))])
        {
            let mut bits = vec![16; parts];
            (bits[first], bits[first + 1]) = (weight, input);
            let whole = quantiser.real_logits(&bits, &examples).unwrap();
            let rounded = quantiser.rounded_logits(&bits, &examples).unwrap();
            let name = &quantiser.parts[first].name;
            let apart = distance(&whole, &rounded);
            assert!(apart < 0.05, "{arch:?} {name} at {weight} and {input}: {apart}");
        }
    }
    assert_eq!(Pair { weight: 4, input: 16 }.wider(), 16);
}

#[test]
fn an_equalised_network_computes_what_it_computed_with_weights_of_one_range() {
    for (arch, pairs) in [(Arch::Resnet, 16), (Arch::Mobilenet, 24), (Arch::Bert, 0)] {
        let (quantiser, examples, logits_before) = subject(arch);
        let mut program = quantiser.program.clone();
        assert_eq!(program.equalise(), pairs, "{arch:?}");
        let ready: Vec<Ready> = program.units.iter().map(Ready::float).collect();
        let after = logits(&program, &ready, &examples).unwrap();
        let apart = distance(&after, &logits_before);
        assert!(apart < 1e-4, "{arch:?}: {apart}");
        if pairs > 0 {
            let both = program.units.iter().zip(&quantiser.program.units);
            assert!(both.filter(|(a, b)| a.weight != b.weight).count() > pairs / 2, "{arch:?}");
        }
        // What is equalised already stays as it is.
        let mut again = program.clone();
        again.equalise();
        for (a, b) in again.units.iter().zip(&program.units) {
            assert!(a.weight.iter().zip(&b.weight).all(|(a, b)| (a - b).abs() < 1e-2 * (1e-3 + b.abs())));
        }
    }
}

#[test]
fn corrected_biases_take_away_the_mean_error() {
    // The untrained network of inverted residuals makes hardly any logits that could be wrong.
    for arch in [Arch::Resnet, Arch::Bert] {
        let mean_errors = |bias_correct: bool| -> Vec<f32> {
            let how = QuantConfig { bias_correct, scales: Scales::Tensor, ..QuantConfig::default() };
            let (quantiser, examples, _) = subject_as(arch, how);
            let mut bits = vec![16; quantiser.parts.len()];
            *bits.last_mut().unwrap() = 4;
            let found = quantiser.rounded_logits(&bits, &examples).unwrap();
            let expected = quantiser.float_logits(&examples).unwrap();
            let mean = |class: usize| {
                let errors =
                    found.iter().zip(&expected).map(|(found, expected)| found[class] - expected[class]);
                errors.sum::<f32>() / found.len() as f32
            };
            (0..3).map(mean).collect()
        };
        let size = |errors: &[f32]| errors.iter().map(|e| e * e).sum::<f32>().sqrt();
        let (plain, corrected) = (size(&mean_errors(false)), size(&mean_errors(true)));
        assert!(corrected < 0.3 * plain, "{arch:?}: {corrected} and {plain}");
    }
}

#[test]
fn weights_in_groups_leave_inputs_alone_and_cost_their_scales() {
    let (plain, examples, _) = subject(Arch::Bert);
    let (quantiser, ..) = subject_as(Arch::Bert, QuantConfig { group: Some(32), ..QuantConfig::default() });
    let four = vec![4; quantiser.parts.len()];
    let grouped: Vec<usize> = (0..quantiser.program.units.len())
        .filter(|&at| quantiser.program.units[at].work == Work::Linear)
        .collect();
    assert!(!grouped.is_empty());
    for &at in &grouped {
        assert_eq!(quantiser.pairs(&four)[at], Pair { weight: 4, input: 16 });
        assert_eq!(plain.pairs(&four)[at], Pair::of(4));
    }
    assert!(quantiser.bytes(&four).0 >= plain.bytes(&four).0);
    for &at in &grouped {
        let mut bits = vec![16; four.len()];
        bits[at] = 4;
        let whole = quantiser.real_logits(&bits, &examples).unwrap();
        let rounded = quantiser.rounded_logits(&bits, &examples).unwrap();
        assert!(distance(&whole, &rounded) < 1e-4, "{}", distance(&whole, &rounded));
    }
}
