//! What holds whatever the network: whole numbers give what rounded floats give, sixteen bits what floats give.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use crate::subject::{ALL, distance, subject};
use kiln_core::Context;
use kiln_ptq::arch::Arch;
use kiln_ptq::unit::Work;

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
