//! Shaders are valid WGSL, and say what a device needs to run them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use kiln_compiler::capture;
use kiln_compiler::loops::{Dispatch, Program, WgslProgram, check, default_passes, to_wgsl};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use serde_json::Value;

use crate::networks::{Example, Frozen};

fn shaders(program: &Program) -> kiln_core::Result<WgslProgram> {
    to_wgsl(program, &check(program).unwrap())
}

/// Parses and validates every kernel, and compares its bindings with the list.
fn assert_valid(written: &WgslProgram, what: &str) {
    for (number, kernel) in written.kernels.iter().enumerate() {
        let text = &kernel.text;
        let module = naga::front::wgsl::parse_str(text)
            .unwrap_or_else(|e| panic!("{what}, kernel {number}: {}\n{text}", e.emit_to_string(text)));
        Validator::new(ValidationFlags::all(), Capabilities::empty())
            .validate(&module)
            .unwrap_or_else(|e| panic!("{what}, kernel {number}: {}\n{text}", e.emit_to_string(text)));
        let bound = module.global_variables.iter().filter(|(_, variable)| variable.binding.is_some());
        assert_eq!(bound.count(), kernel.bindings.len(), "{what}, kernel {number}");
        assert!(written.dispatches.contains(&Dispatch::Run(number)), "{what}");
        assert!(kernel.bindings.len() <= written.storage_buffers);
    }
}

#[test]
fn golden_programs_become_valid_shaders_unless_they_have_64_bit_floats() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/programs.json");
    let document: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (mut written, mut refused) = (0, 0);
    for case in document["cases"].as_array().unwrap() {
        let mut program: Program = serde_json::from_value(case["program"].clone()).unwrap();
        for how in ["as written", "after the passes"] {
            match shaders(&program) {
                Ok(shaders) => {
                    assert_valid(&shaders, &format!("{} {how}", case["id"]));
                    written += 1;
                }
                Err(refusal) => {
                    let refusal = format!("{refusal:?}");
                    let expected = ["f64", "does not fit 32 bits", "inside of a loop"];
                    assert!(
                        expected.iter().any(|words| refusal.contains(words)),
                        "{}: {refusal}",
                        case["id"]
                    );
                    refused += 1;
                }
            }
            default_passes().iter().for_each(|pass| pass.apply(&mut program).unwrap());
        }
    }
    assert!(written > refused, "{written} written, {refused} refused");
}

#[test]
fn networks_become_valid_shaders_with_an_invocation_an_element() {
    let bert = Example::Bert { layers: 1, heads: 2 };
    let llama = Example::Llama { layers: 1, heads: 2 };
    for (example, shape) in [(bert, vec![2, 3, 8]), (llama, vec![1, 5, 8])] {
        let graph = capture(Box::new(Frozen { example, input: shape.clone() })).unwrap();
        let (program, constants) = graph.clone().to_loops().unwrap();
        let written = shaders(&program).unwrap();
        assert_valid(&written, &format!("{example:?}"));
        for name in constants.keys().chain([&graph.inputs[0].port.name, &graph.outputs[0].port.name]) {
            assert!(written.buffers.iter().any(|buffer| buffer.name == *name && buffer.io.is_some()));
        }
        assert!(written.kernels.len() > 10);
    }
}

#[test]
fn independent_turns_are_invocations_and_others_run_in_one() {
    let groups = |text: &str| -> Vec<[usize; 2]> {
        let program: Program = text.parse().unwrap();
        let written = shaders(&program).unwrap();
        assert_valid(&written, text);
        written.kernels.iter().map(|kernel| kernel.workgroups).collect()
    };
    // 30 rows of 10 columns: 300 invocations in groups of 64.
    let rows = "program p(in X: f32[30, 10], out Y: f32[30, 10]) { for i in 0 count 30 { for j in 0 count 10 { Y[i, j] = X[i, j] } } }";
    assert_eq!(groups(rows), [[5, 1]]);
    let scan = "program p(inout X: f32[100]) { for i in 1 count 99 { X[i] = X[i] + X[i - 1] } }";
    assert_eq!(groups(scan), [[1, 1]]);
    // More groups than a device runs along one axis.
    let many = "program p(out Y: f32[10000000]) { for i in 0 count 10000000 { Y[i] = 1.0f32 } }";
    let [[x, y]] = groups(many)[..] else { panic!("one kernel") };
    assert!(x <= 65_535 && y > 1 && x * y * 64 >= 10_000_000 && (x * y - x) * 64 < 10_000_000, "{x} {y}");
}

#[test]
fn what_wgsl_has_not_is_refused_with_the_place() {
    for (text, words) in [
        ("program p(out Y: f64[2]) { Y[0] = 1.0f64 }", "\"Y\" holds f64"),
        ("program p(out Y: i64[2]) { Y[0] = 5000000000 }", "5000000000 does not fit 32 bits"),
        (
            "program p(out Y: f32[2]) { for i in 0 count 2 { alloc T: f32[9999] on heap { T[i] = 1.0f32\nY[i] = T[0] } } }",
            "\"T\" of 9999 elements is made inside of a loop",
        ),
    ] {
        let program: Program = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        let refusal = shaders(&program).unwrap_err().to_string();
        assert!(refusal.contains(words), "{refusal}");
    }
}
