//! Loop programs: golden results, printed and parsed forms, and what the verifier refuses.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::Path;

use kiln_compiler::loops::{
    Buffer, Elements, Outcome, PASSES, Pass, Program, Value, check, default_passes, interpret, read_buffers,
    to_wasm,
};
use serde::Deserialize;
use serde_json::{Value as Json, json};

const MANY_STEPS: u64 = 1 << 24;

#[derive(Deserialize)]
struct Case {
    id: String,
    program: Program,
    expect: Json,
}

struct Golden {
    cases: Vec<Case>,
    arrays: BTreeMap<String, Buffer>,
}

impl Golden {
    fn read() -> Self {
        let file = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
        let text = std::fs::read_to_string(file("programs.json")).unwrap();
        let mut document: Json = serde_json::from_str(&text).unwrap();
        assert_eq!(document["format"], "kiln-loop-ir/1");
        let cases: Vec<Case> = serde_json::from_value(document["cases"].take()).unwrap();
        assert_eq!(cases.len(), 78);
        Self { cases, arrays: read_buffers(&file("arrays.npz")).unwrap() }
    }

    /// The arrays of a case, of its inputs (`in`) or outputs (`out`).
    fn arrays(&self, case: &Case, way: &str) -> BTreeMap<String, Buffer> {
        let prefix = format!("{}/{way}/", case.id);
        let of_case =
            self.arrays.iter().filter_map(|(key, buffer)| Some((key.strip_prefix(&prefix)?, buffer)));
        of_case.map(|(name, buffer)| (name.to_string(), buffer.clone())).collect()
    }
}

fn run(program: &Program, inputs: &BTreeMap<String, Buffer>) -> Outcome {
    interpret(program, &check(program).unwrap(), inputs, MANY_STEPS).unwrap()
}

/// Whether results agree: bit for bit, or where a program calls functions within 4 units in the last place or 1e-6.
fn agree(program: &Program, found: &Buffer, expected: &Buffer) -> bool {
    let text = program.to_string();
    if !["exp(", "sin(", "cos(", "tanh(", "erf(", "log("].iter().any(|call| text.contains(call)) {
        return found.same(expected);
    }
    let close = |at| match (found.get(at), expected.get(at)) {
        (Value::F32(a), Value::F32(b)) => {
            a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= (4.0 * f32::EPSILON * b.abs()).max(1e-6)
        }
        (a, b) => a.same(b),
    };
    found.shape == expected.shape && (0..expected.len()).all(close)
}

#[test]
fn golden_programs_have_their_results_and_traps() {
    let golden = Golden::read();
    let mut traps = 0;
    for case in &golden.cases {
        let outcome = run(&case.program, &golden.arrays(case, "in"));
        match (&case.expect, outcome) {
            (Json::String(ok), Ok(results)) if ok == "ok" => {
                let expected = golden.arrays(case, "out");
                assert_eq!(
                    results.keys().collect::<Vec<_>>(),
                    expected.keys().collect::<Vec<_>>(),
                    "{}",
                    case.id
                );
                for (name, expected) in &expected {
                    let found = &results[name];
                    assert!(agree(&case.program, found, expected), "{}: {name} is {found:?}", case.id);
                }
            }
            (Json::Object(trap), Err(found)) => {
                assert_eq!(trap["trap"], found.to_string(), "{}", case.id);
                traps += 1;
            }
            (expected, found) => panic!("{}: {found:?}, should be {expected}", case.id),
        }
    }
    assert_eq!(traps, 4);
}

#[test]
fn printed_and_serialised_programs_come_back_the_same() {
    for Case { id, program, .. } in Golden::read().cases {
        let text = program.to_string();
        let parsed: Program = text.parse().unwrap_or_else(|e| panic!("{id}: {e}\n{text}"));
        assert_eq!(parsed.to_string(), text, "{id}");
        assert_eq!(serde_json::to_value(&parsed).unwrap(), serde_json::to_value(&program).unwrap(), "{id}");
    }
    let every_form = r#"program all(in X: f64[2, 3], inout B: bool[], out I: i32[4]) {
  assert B[] | true, "a \"quoted\"\n\u{7}text"
  alloc t: i64[] on heap {
    let v = select(B[], -5, 9223372036854775807) {
      if not(v <= t[]) & B[] {
        unrolled for i in v - 1 count floordiv(v, 2) {
          I[i % 4] = cast_i32(fma(X[0, i], -inf_f64, nan_f64) + abs(neg(1e-300f64))) << 3i32
        }
      } else {
        B[] = min(-0.0f32, 1.5f32) == max(inf_f32, 3.4028235e38f32)
      }
    }
  }
}
"#;
    let program: Program = every_form.parse().unwrap();
    assert_eq!(program.to_string(), every_form);
    check(&program).unwrap();
    let json = serde_json::to_string(&program).unwrap();
    assert_eq!(serde_json::from_str::<Program>(&json).unwrap().to_string(), every_form);
}

#[test]
fn the_verifier_names_the_place_that_is_wrong() {
    for (body, words) in [
        ("Y[0] = X[0]", "body[0].store.value: is of type f32, must be i32"),
        ("X[0] = 1.0f32", "body[0].store: \"X\" is an input"),
        ("Y[i] = 1i32", "body[0].store.idx[0]: \"i\" is not known here"),
        ("Y[0, 0] = 1i32", "\"Y\" has 1 axes and gets 2 indices"),
        ("Y[1i32] = 1i32", "idx[0]: is of type i32, must be i64"),
        ("Y[0] = Y", "\"Y\" is a buffer, not a value"),
        ("let z = 1 {\n Y[0] = z[0]\n}", "\"z\" is a value, not a buffer"),
        ("let z = 1 {\n}\nY[z] = 1i32", "body[1].store.idx[0]: \"z\" is not known"),
        ("Y[0] = floordiv(X[0], X[0])", "bin(floordiv): floordiv does not take f32"),
        ("Y[0] = cast_i32(exp(1i32))", "call(exp): exp does not take i32"),
        ("Y[0] = 1i32 + 1", "bin(add).[2]: is of type i64, must be i32"),
        ("assert 1, \"one\"", "assert.cond: is of type i64, must be bool"),
        ("for let in 0 count 1 {\n}", "\"let\" is no name"),
        ("alloc t: f32[65536, 65536] on heap {\n}", "too large"),
    ] {
        let text = format!("program p(in X: f32[4], out Y: i32[4]) {{\n{body}\n}}\n");
        let program: Program = text.parse().unwrap_or_else(|e| panic!("{body}: {e}"));
        let refusal = check(&program).unwrap_err().to_string();
        assert!(refusal.contains(words), "{body}: {refusal}");
    }
    let twice = "program p(in X: f32[1], out X: f32[1]) {\n}";
    assert!(check(&twice.parse().unwrap()).unwrap_err().to_string().contains("names two parameters"));
}

#[test]
fn malformed_text_and_json_are_refused() {
    for (text, words) in [
        ("", "line 1, column 1: the end of the line stands where \"program\" should"),
        ("program p() {\n  Y[0] = \n}", "line 3, column 1: \"}\" stands where a value should"),
        ("program p(in X: f16[2]) {}", "a type: f32"),
        ("program p() { Y[0] = 1.5 }", "a number such as"),
        ("program p() { Y[0] = tan(1) }", "not \"tan\""),
        ("program p() { Y[0] = min(1) }", "2 operands of min (not 1)"),
        ("program p() {} and more", "the end of the text"),
        ("program p() { assert true, \"open }", "text in quotation marks"),
        ("program p(in X: f32[99999999999999999999]) {}", "an extent"),
    ] {
        let refusal = text.parse::<Program>().unwrap_err().to_string();
        assert!(refusal.contains(words), "{text}: {refusal}");
    }
    let deep = format!("program p() {{ Y[0] = {}1{} }}", "(".repeat(5000), ")".repeat(5000));
    assert!(deep.parse::<Program>().unwrap_err().to_string().contains("nested less deeply"));
    for json in [
        json!({"name": "p", "params": [], "body": [], "more": 1}),
        json!({"name": "p", "params": [], "body": [{"store": {"buf": "Y", "idx": []}}]}),
        json!({"name": "p", "params": [], "body": [{"loop": {}}]}),
        json!({"name": "p", "params": [], "body": [{"assert": {"cond": {"i32": 1u64 << 40}, "msg": ""}}]}),
        json!({"name": "p", "params": [], "body": [{"assert": {"cond": {"f32": "infinite"}, "msg": ""}}]}),
    ] {
        assert!(serde_json::from_value::<Program>(json.clone()).is_err(), "{json}");
    }
}

#[test]
fn inputs_that_do_not_fit_are_named_and_endless_programs_are_stopped() {
    let program: Program =
        "program p(in X: f32[2], out Y: f32[2]) { for i in 0 count 9223372036854775807 { } }"
            .parse()
            .unwrap();
    let checked = check(&program).unwrap();
    let of = |elements| BTreeMap::from([("X".to_string(), Buffer { shape: vec![2], elements })]);
    let good = of(Elements::F32(vec![1.0, 2.0]));
    let endless = interpret(&program, &checked, &good, 1000).unwrap();
    assert_eq!(endless.unwrap_err().to_string(), "step limit");
    for (inputs, words) in [
        (BTreeMap::new(), "input \"X\": is missing; it is f32[2]"),
        (of(Elements::F64(vec![1.0, 2.0])), "input \"X\": is f64[2], the program needs f32[2]"),
    ] {
        let refusal = interpret(&program, &checked, &inputs, 1000).unwrap_err().to_string();
        assert!(refusal.contains(words), "{refusal}");
    }
}

#[test]
fn no_pass_changes_what_a_program_does() {
    let golden = Golden::read();
    let mut lists: Vec<Vec<Pass>> = PASSES
        .iter()
        .map(|name| vec![Pass::parse(name).or_else(|_| Pass::parse(&format!("{name}:4"))).unwrap()])
        .collect();
    lists.push(default_passes());
    lists.push(default_passes().into_iter().rev().collect());
    lists.push(vec![
        Pass::Split { factor: 3 },
        Pass::Split { factor: 2 },
        Pass::Unroll { most: 100 },
        Pass::Simplify,
    ]);
    lists.push(vec![Pass::Reorder, Pass::FuseLoops, Pass::HoistInvariant, Pass::Vectorize { width: 4 }]);
    for case in &golden.cases {
        let inputs = golden.arrays(case, "in");
        let expected = run(&case.program, &inputs);
        for passes in &lists {
            let mut program = case.program.clone();
            passes.iter().for_each(|pass| pass.apply(&mut program).unwrap());
            assert_same(&program, run(&program, &inputs), &expected);
            let again: Program = program.to_string().parse().unwrap();
            assert_eq!(again.to_string(), program.to_string());
        }
    }
}

fn after(pass: &str, body: &str) -> String {
    let text = format!("program p(inout X: i64[64], inout Y: i64[8, 8]) {{\n{body}\n}}\n");
    let mut program: Program = text.parse().unwrap();
    check(&program).unwrap();
    Pass::parse(pass).unwrap().apply(&mut program).unwrap();
    let text = program.to_string();
    let inside = text.split_once("{\n").unwrap().1.trim_end().strip_suffix('}').unwrap();
    inside.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

#[test]
fn simplify_uses_the_laws_of_integers_and_leaves_traps() {
    for (body, expected) in [
        ("X[0] = (X[1] + 2) + 3", "X[0] = X[1] + 5"),
        ("X[0] = (1 * X[1]) - 0", "X[0] = X[1]"),
        ("X[0] = X[1] * 0", "X[0] = X[1] * 0"), // the load may trap
        (
            "for i in 0 count 4 {\nX[i] = i * 0 + select(1 < 2, i, 7 / 0)\n}",
            "for i in 0 count 4 {; X[i] = i; }",
        ),
        ("X[0] = 1 / 0", "X[0] = 1 / 0"),
        ("if 2 < 1 {\nX[0] = 1\n} else {\nX[0] = 2\n}", "X[0] = 2"),
        ("for i in 3 count 0 {\nX[i] = 1\n}", ""),
        ("X[0] = cast_i64(1.5f32 + 1.0f32)", "X[0] = 2"),
    ] {
        assert_eq!(after("simplify", body), expected, "{body}");
    }
}

#[test]
fn loops_are_parallel_only_where_turns_are_independent() {
    let independent = [
        "X[i] = X[i] + 1",
        "X[i * 4 + 1] = X[i * 4 + 3] + X[i * 4]",
        "for j in 0 count 8 {\nY[i, j] = Y[i, 7 - j] + 1\n}",
        "for j in 0 count 4 {\nX[i * 4 + j] = j\n}",
        "alloc t: i64[1] on stack {\nt[0] = i\nX[i] = t[0]\n}",
        "let k = i * 2 {\nX[k] = X[k + 1]\n}",
    ];
    let dependent = [
        "X[0] = i",
        "X[i + 1] = X[i]",
        "X[i * 2] = X[i * 2 + 2]",
        "for j in 0 count 5 {\nX[i * 4 + j] = j\n}",
        "X[X[i]] = i",
        "X[floormod(i, 4)] = i",
        "Y[i, 0] = Y[0, i]",
        "X[i * -9223372036854775808] = i", // wraps: turns 0 and 2 write one element
    ];
    for (bodies, word) in [(&independent[..], "parallel for"), (&dependent[..], "for")] {
        for body in bodies {
            let found = after("parallelise", &format!("for i in 0 count 8 {{\n{body}\n}}"));
            assert!(found.starts_with(&format!("{word} i")), "{body}: {found}");
        }
    }
    let taken = after("parallelise", "parallel for i in 0 count 8 {\nX[0] = i\n}");
    assert!(taken.starts_with("for i"), "{taken}");
}

#[test]
fn borders_are_peeled_and_blocks_leave_a_rest() {
    let peeled = after("loop-partition", "for i in 0 count 10 {\nif i >= 2 & i < 8 {\nX[i] = 1\n}\n}");
    assert_eq!(peeled.matches("for ").count(), 3, "{peeled}");
    assert!(peeled.contains("if true & true {; X["), "{peeled}");
    let blocks = after("vectorize:4", "vectorized for i in 0 count 10 {\nX[i] = 1\n}");
    assert!(
        blocks.contains("vectorized for i_lane in 0 count 4 {; X[(i_min + (i_block * 4)) + i_lane] = 1"),
        "{blocks}"
    );
    let scan = after("vectorize:4", "vectorized for i in 1 count 10 {\nX[i] = X[i - 1]\n}");
    assert_eq!(scan, "for i in 1 count 10 {; X[i] = X[i - 1]; }");
    let straight = after("unroll:3", "unrolled for i in 5 count 3 {\nX[i] = i\n}");
    assert_eq!(straight, "X[5 + 0] = 5 + 0; X[5 + 1] = 5 + 1; X[5 + 2] = 5 + 2");
    for (pass, words) in
        [("fly", "there are: simplify"), ("split", "needs a number"), ("split:0", "needs a number")]
    {
        let refusal = Pass::parse(pass).unwrap_err();
        assert!(format!("{refusal:?}").contains(words), "{refusal:?}");
    }
}

#[test]
fn what_is_the_same_in_every_turn_is_computed_before_the_loop() {
    let nest =
        "for i in 0 count 8 {\nfor j in 0 count 8 {\nX[i * 8 + j] = i * 8 + j * (3 * 5) + X[3 * 5]\n}\n}";
    assert_eq!(
        after("hoist-invariant", nest),
        "let i_same = 3 * 5 {; for i in 0 count 8 {; let j_same = i * 8 {; let j_same_1 = i_same {; \
         for j in 0 count 8 {; X[j_same + j] = (j_same + (j * j_same_1)) + X[j_same_1]; }; }; }; }; }"
    );
    // The load may trap, and another turn may change it.
    let load = "for i in 0 count 8 {\nX[i] = X[3] / i\n}";
    assert_eq!(after("hoist-invariant", load), "for i in 0 count 8 {; X[i] = X[3] / i; }");
}

#[test]
fn neighbouring_loops_are_joined_where_their_turns_do_not_meet() {
    let pair = |a: &str, b: &str| format!("for i in 0 count 8 {{\n{a}\n}}\nfor k in 0 count 8 {{\n{b}\n}}");
    for (a, b, loops) in [
        ("X[i] = i", "X[k] = X[k] + 1", 1),
        ("X[i] = i", "Y[k, 0] = X[k]", 1),
        ("X[i] = i", "X[k] = X[7 - k]", 2),
        ("X[i] = i", "Y[0, k] = X[k + 1]", 2),
        ("X[i] = X[i + 1]", "X[k + 1] = k", 2),
        ("X[i] = 7 / X[i]", "Y[0, k] = k", 2), // which trap comes first would change
    ] {
        let found = after("fuse-loops", &pair(a, b));
        assert_eq!(found.matches("for ").count(), loops, "{a}, {b}: {found}");
    }
    let other_turns =
        after("fuse-loops", "for i in 0 count 8 {\nX[i] = i\n}\nfor k in 1 count 8 {\nX[k] = k\n}");
    assert_eq!(other_turns.matches("for ").count(), 2, "{other_turns}");
}

#[test]
fn loops_are_exchanged_so_that_elements_follow_one_another() {
    let nest = |body: &str| {
        format!("for i in 0 count 8 {{\nfor j in 0 count 8 {{\nfor k in 0 count 8 {{\n{body}\n}}\n}}\n}}")
    };
    let product = after("reorder", &nest("Y[i, j] = Y[i, j] + X[i * 8 + k] * X[k * 8 + j]"));
    assert!(
        product.starts_with("for i in 0 count 8 {; for k in 0 count 8 {; for j in 0 count 8 {"),
        "{product}"
    );
    let scan =
        after("reorder", "for i in 1 count 7 {\nfor j in 0 count 7 {\nY[j, i] = Y[j + 1, i - 1]\n}\n}");
    assert!(scan.starts_with("for i in 1 count 7 {; for j"), "{scan}");
    let triangle = after("reorder", "for i in 0 count 8 {\nfor j in 0 count i {\nY[j, i] = 1\n}\n}");
    assert!(triangle.starts_with("for i in 0 count 8 {; for j"), "{triangle}");
}

fn run_as_wasm(program: &Program, inputs: &BTreeMap<String, Buffer>) -> Outcome {
    to_wasm(program, &check(program).unwrap()).unwrap().run(inputs).unwrap()
}

fn assert_same(program: &Program, found: Outcome, expected: &Outcome) {
    match (found, expected) {
        (Ok(found), Ok(expected)) => {
            assert_eq!(found.len(), expected.len());
            for (name, found) in &found {
                assert!(
                    found.same(&expected[name]),
                    "{name} is {found:?}, should be {:?}: {program}",
                    expected[name]
                );
            }
        }
        (found, expected) => assert_eq!(&found, expected, "{program}"),
    }
}

#[test]
fn webassembly_does_what_the_interpreter_does() {
    let golden = Golden::read();
    for case in &golden.cases {
        let inputs = golden.arrays(case, "in");
        let expected = run(&case.program, &inputs);
        assert_same(&case.program, run_as_wasm(&case.program, &inputs), &expected);
        let mut optimised = case.program.clone();
        default_passes().iter().for_each(|pass| pass.apply(&mut optimised).unwrap());
        assert_same(&case.program, run_as_wasm(&optimised, &inputs), &expected);
    }
}

/// Values at which operations go wrong if they can.
fn odd_values(dtype: &str) -> Elements {
    match dtype {
        "f32" => Elements::F32(vec![
            0.0,
            -0.0,
            1.5,
            -2.5,
            1e30,
            -1e30,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1e-40,
        ]),
        "f64" => Elements::F64(vec![
            0.0,
            -0.0,
            1.5,
            -2.5,
            1e300,
            -3e9,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::NAN,
            5e-324,
        ]),
        "i32" => Elements::I32(vec![0, 1, -1, 7, -7, 31, 33, i32::MAX, i32::MIN, i32::MIN + 1]),
        _ => Elements::I64(vec![0, 1, -1, 7, -7, 63, 65, i64::MAX, i64::MIN, i64::MIN + 1]),
    }
}

#[test]
fn every_operation_agrees_on_odd_values_on_every_target() {
    let floats = ["f32", "f64"];
    let ints = ["i32", "i64"];
    let mut programs = Vec::new();
    let mut add = |dtype: &str, result: &str, value: &str| {
        let body = format!("for i in 0 count 10 {{ for j in 0 count 10 {{ Y[i, j] = {value} }} }}");
        programs.push((
            dtype.to_string(),
            format!("program p(in X: {dtype}[10], out Y: {result}[10, 10]) {{ {body} }}"),
        ));
    };
    for dtype in floats.into_iter().chain(ints) {
        for op in ["+", "-", "*", "/", "%"] {
            let nonzero =
                if ints.contains(&dtype) && "/%".contains(op) { "X[1 + floormod(j, 9)]" } else { "X[j]" };
            add(dtype, dtype, &format!("X[i] {op} {nonzero}"));
        }
        ["min", "max"].iter().for_each(|op| add(dtype, dtype, &format!("{op}(X[i], X[j])")));
        ["==", "!=", "<", "<=", ">", ">="]
            .iter()
            .for_each(|op| add(dtype, "bool", &format!("X[i] {op} X[j]")));
        ["f32", "f64", "i32", "i64", "bool"]
            .iter()
            .for_each(|to| add(dtype, to, &format!("cast_{to}(X[i])")));
        ["neg", "abs"].iter().for_each(|op| add(dtype, dtype, &format!("{op}(X[i])")));
    }
    for dtype in ints {
        ["<<", ">>", "&", "|", "^"].iter().for_each(|op| add(dtype, dtype, &format!("X[i] {op} X[j]")));
        ["floordiv", "floormod"]
            .iter()
            .for_each(|op| add(dtype, dtype, &format!("{op}(X[i], X[1 + floormod(j, 9)])")));
        add(dtype, dtype, "not(X[i])");
    }
    for dtype in floats {
        ["exp", "log", "sqrt", "sin", "cos", "tanh", "erf", "floor", "ceil"]
            .iter()
            .for_each(|f| add(dtype, dtype, &format!("{f}(X[i])")));
        add(dtype, dtype, "fma(X[i], X[j], X[2])");
    }
    for (dtype, text) in programs {
        let program: Program = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        let inputs =
            BTreeMap::from([("X".to_string(), Buffer { shape: vec![10], elements: odd_values(&dtype) })]);
        let expected = run(&program, &inputs);
        assert!(expected.is_ok(), "{text}: {expected:?}");
        assert_same(&program, run_as_wasm(&program, &inputs), &expected);
    }
}

#[test]
fn lanes_and_unchecked_indices_change_no_result_and_no_trap() {
    let body = [
        // Lanes, with a value that all turns share, a comparison and a rest of up to three turns.
        "Y[i] = select(X[i] > X[0], X[i] * X[3] - 0.5f32, sqrt(abs(X[i])))",
        "Y[i] = Y[i] + X[i + 2]",
        // No lanes: turns that depend on each other, and a stride.
        "Y[i + 1] = Y[i] + X[i]",
        "Y[i * 2] = X[i]",
        // Indices that a condition keeps within, that nothing keeps within, and that wrap in 32 bits.
        "if (i - 3 >= 0) & (i - 3 < 4) { Y[i - 3] = X[i] }",
        "Y[i] = X[i - 1]",
        "Y[i] = X[i64(2147483647i32 + 1i32) - 2147483648 + i]",
        "let k = 2147483647i32 + 1i32 { Y[i64(k)] = X[i] }",
    ];
    let mut trapped = 0;
    for (body, count) in body.into_iter().flat_map(|body| (0..12).map(move |count| (body, count))) {
        let text = format!(
            "program p(in X: f32[14], out Y: f32[14]) {{ vectorized for i in 0 count {count} {{ {body} }} }}"
        );
        let text = text.replace("i64(", "cast_i64(");
        let program: Program = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        let values = (0..14).map(|i| [0.5, -1.5, f32::NAN, 3.0, -0.0, f32::INFINITY, 7.25][i % 7]).collect();
        let x = Buffer { shape: vec![14], elements: Elements::F32(values) };
        let inputs = BTreeMap::from([("X".to_string(), x)]);
        let expected = run(&program, &inputs);
        trapped += usize::from(expected.is_err());
        assert_same(&program, run_as_wasm(&program, &inputs), &expected);
    }
    assert!(trapped > 12, "{trapped}");
    // Lanes are really there: the same loop without the mark is another module.
    let modules = ["vectorized for", "for"].map(|word| {
        let text =
            format!("program p(in X: f32[8], out Y: f32[8]) {{ {word} i in 0 count 8 {{ Y[i] = X[i] }} }}");
        let program: Program = text.parse().unwrap();
        to_wasm(&program, &check(&program).unwrap()).unwrap().bytes.len()
    });
    assert!(modules[0] > modules[1], "{modules:?}");
}

#[test]
fn lowest_integers_and_zero_divisors_wrap_and_trap() {
    let of = |value: &str, a: i64, b: i64| {
        let program: Program =
            format!("program p(in X: i64[2], out Y: i64[]) {{ Y[] = {value} }}").parse().unwrap();
        let elements = Elements::I64(vec![a, b]);
        let inputs = BTreeMap::from([("X".to_string(), Buffer { shape: vec![2], elements })]);
        let outcome = run(&program, &inputs);
        assert_same(&program, run_as_wasm(&program, &inputs), &outcome);
        outcome.map(|results| results["Y"].get(0))
    };
    let [div, rem, floordiv, floormod] =
        ["X[0] / X[1]", "X[0] % X[1]", "floordiv(X[0], X[1])", "floormod(X[0], X[1])"];
    for (value, a, b, expected) in [
        (div, i64::MIN, -1, i64::MIN),
        (floordiv, i64::MIN, -1, i64::MIN),
        (rem, i64::MIN, -1, 0),
        (floormod, i64::MIN, -1, 0),
        (div, -7, 2, -3),
        (rem, -7, 2, -1),
        (floordiv, -7, 2, -4),
        (floormod, -7, 2, 1),
        (floormod, 7, -2, -1),
    ] {
        assert_eq!(of(value, a, b).unwrap(), Value::I64(expected), "{value} of {a} and {b}");
    }
    for value in [div, rem, floordiv, floormod] {
        assert_eq!(of(value, 5, 0).unwrap_err().to_string(), "division by zero", "{value}");
    }
}
