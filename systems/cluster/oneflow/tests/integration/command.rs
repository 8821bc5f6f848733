//! The verbs from the command line, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_compiler::capture;
use kiln_core::testing::Desk;
use kiln_core::{HostTensor, System, TensorFile};
use kiln_data::{read_tensors, write_tensors};
use kiln_oneflow::OneFlow;

const MLP: &str = "--case mlp --inputs 6 --hidden 8 --classes 3 --batch 8";

fn desk() -> Desk {
    let desk = Desk::new(&OneFlow);
    let mut rows = TensorFile::new();
    let values = (0..40 * 6).map(|at| ((at * 7) % 11) as f32 / 11.0).collect();
    rows.insert("x", HostTensor::float([40, 6], values));
    rows.insert("y", HostTensor::int([40], (0..40).map(|at| at % 3).collect()));
    write_tensors(&desk.path("rows.npz"), &rows).unwrap();
    desk
}

#[test]
fn the_algebra_is_told() {
    let desk = desk();
    let rows = desk.json("signatures");
    assert!(rows.as_array().unwrap().len() > 100);
    assert_eq!(desk.json("signatures --op matmul")[0]["op"], "Matmul");
    let boxing = desk.json("boxing --from S0,P --to S1,B --shape 8x6 --mesh 2x2 --check");
    assert_eq!(boxing["bytes"], boxing["bytes_sent"]);
    let select = desk.json("select --linear batch=64,features=512,classes=100000 --devices 8");
    assert!(select["by_weight_sbp"][0]["bytes"].as_f64() > select["best"]["bytes"].as_f64());
    for (registers, makespan) in [("1,1", 42.0), ("2,2", 33.0)] {
        let actors =
            desk.json(&format!("actors --durations 2,1,3 --registers {registers} --pieces 10 --svg @a.svg"));
        assert_eq!(actors["makespan"], makespan);
    }
    assert!(std::fs::read_to_string(desk.path("a.svg")).unwrap().starts_with("<svg"));

    desk.assert_refused("signatures --op nothing", "no row for \"nothing\"");
    desk.assert_refused(
        "boxing --from S2 --to B --shape 8x6 --mesh 2",
        "S2 splits axis 2 of a tensor of shape [8, 6]",
    );
    desk.assert_refused("boxing --from Pmax --to P --shape 8 --mesh 2", "Pmax cannot become P");
    desk.assert_refused("boxing --from S0 --to B --shape 8x6 --mesh 2x2", "the mesh [2, 2] has 2");
    desk.assert_refused("boxing --from Q --to B --shape 8x6 --mesh 2", "\"Q\" is no SBP");
    desk.assert_refused("boxing --from B --to B --shape 8x6 --mesh 0", "no mesh of devices");
    desk.assert_refused("boxing --from S0 --to B --shape 99999999999x99999999999 --mesh 2", "has more than");
    desk.assert_refused("boxing --from S0 --to B --shape 99999x99999 --mesh 2 --check", "at most 16777216");
    desk.assert_refused("boxing --from S0 --to B --shape 8 --mesh 100000 --check", "at most 1024 threads");
    desk.assert_refused("select --linear batch=64,features=512 --devices 8", "all needed");
    desk.assert_refused("select --linear batch=64,features=0,classes=2 --devices 8", "at least 1");
    desk.assert_refused("actors --durations 2,1 --registers 0 --pieces 3", "has 0 registers");
    desk.assert_refused("actors --durations 2,1,1 --registers 1 --pieces 3", "3 durations with 1 channels");
    desk.assert_refused("actors --durations=-1,1 --registers 1 --pieces 3", "-1 is no duration");
}

#[test]
fn a_case_is_trained_resumed_predicted_and_run() {
    let desk = desk();
    let line = |out: &str, more: &str| format!("train {MLP} --data @rows.npz --out @{out} {more}");
    let whole = desk.json(&line("whole", "--mesh 2 --steps 12"));
    assert_eq!(
        (whole["steps"].as_u64(), whole["bytes_sent"].as_u64()),
        (Some(12), whole["bytes_predicted"].as_u64())
    );
    desk.json(&line("parts", "--mesh 2x2 --sbp model --steps 7"));
    desk.json(&line("parts", "--mesh 3 --steps 12 --resume"));
    let losses = |folder: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(desk.path(folder).join("log.csv")).unwrap();
        text.lines().skip(1).map(|line| line.split_once(',').unwrap().1.parse().unwrap()).collect()
    };
    let (whole, parts) = (losses("whole"), losses("parts"));
    assert_eq!((whole.len(), parts.len()), (12, 12));
    for (a, b) in whole.iter().zip(&parts) {
        assert!((a - b).abs() <= 1e-4 * b, "{whole:?} {parts:?}");
    }
    for file in
        ["config.json", "model.safetensors", "state.safetensors", "loss.svg", "trace.svg", "trace.json"]
    {
        assert!(desk.path("whole").join(file).exists(), "{file}");
    }
    let scores = desk.json("predict --model @whole --data @rows.npz --out @scores.npz");
    assert_eq!(scores["rows"], 40);
    assert_eq!(read_tensors(&desk.path("scores.npz")).unwrap().get("scores").unwrap().shape, [40, 3]);

    let graph = capture(OneFlow.network(&desk.path("whole"), &desk.cx).unwrap()).unwrap();
    graph.save(&desk.path("graph")).unwrap();
    let mut one = TensorFile::new();
    one.insert("x", HostTensor::float([1, 6], vec![0.5; 6]));
    write_tensors(&desk.path("x.npz"), &one).unwrap();
    for more in ["--mesh 2 --registers 0", "--mesh 2x2 --pieces 3", "--mesh 3 --sbp model --trace @t.svg"] {
        let run = desk.json(&format!("run --graph @graph --inputs @x.npz --check --out @y.npz {more}"));
        assert!(run["difference"].as_f64().unwrap() < 1e-5, "{run}");
        assert_eq!(run["bytes_sent"], run["bytes_predicted"]);
    }
    assert!(desk.path("t.svg").exists());
    let plan = desk.json("plan --graph @graph --mesh 2x2 --explain --hint x=S1,B --out @physical");
    assert_eq!(plan["stored"][0]["sbp"], "S1,B");
    for file in ["physical.json", "physical.svg", "physical.dot"] {
        assert!(desk.path("physical").join(file).exists(), "{file}");
    }

    desk.assert_refused(&line("whole", "--steps 3"), "holds a model already");
    desk.assert_refused(&line("whole", "--steps 3 --resume"), "12 steps were made");
    desk.assert_refused(
        &line("whole", "--steps 30 --resume --hidden 9").replacen("--hidden 8 ", "", 1),
        "is asked for",
    );
    desk.assert_refused(
        "run --graph @graph --inputs @rows.npz",
        "\"x\" has the shape [40, 6], the network reads [1, 6]",
    );
    desk.assert_refused("run --graph @graph --inputs @scores.npz", "has no array \"x\"");
    desk.assert_refused("run --graph @graph --pieces 0", "--pieces is 0");
    desk.assert_refused("run --graph @none", "none");
    desk.assert_refused("run", "--graph or --model is needed");
    desk.assert_refused("plan --graph @graph --hint y=S0", "the graph has no tensor \"y\"");
    desk.assert_refused("plan --graph @graph --hint x=S7", "x: S7 splits axis 7");
    desk.assert_refused("plan --graph @graph --hint x=P", "x is stored, and cannot be P");
    desk.assert_refused("plan --graph @graph --hint x", "NAME=SBP");
    desk.assert_refused("plan --graph @graph --memory 10B", "a device needs");
    desk.assert_refused("plan --graph @graph --sbp half", "--sbp is \"half\"");
    desk.assert_refused("plan", "one of --graph, --model and --case is needed");
    let mut weights = TensorFile::read(&desk.path("whole/model.safetensors")).unwrap();
    weights.insert("head.bias", HostTensor::float([3], vec![0.0, f32::NAN, 0.0]));
    weights.write(&desk.path("whole/model.safetensors")).unwrap();
    desk.assert_refused("predict --model @whole --data @rows.npz", "\"head.bias\" is NaN at 1");
}

#[test]
fn clicks_and_texts_are_read_and_bad_ones_refused() {
    let desk = desk();
    desk.write(
        "columns.toml",
        "label = \"click\"\nnumeric = [\"age\"]\ncategorical = [\"site\", \"page\"]\n",
    );
    let rows: String = (0..30).map(|at| format!("{},{},s{},p{}\n", at % 2, at, at % 3, at % 7)).collect();
    desk.write("clicks.csv", format!("click,age,site,page\n{rows}1,,s1,\n"));
    let wide = "train --case wide-deep --rows 50 --embedding 2 --hidden 4 --batch 4 --steps 3 --mesh 2";
    desk.json(&format!("{wide} --data @clicks.csv --columns @columns.toml --out @clicks"));
    assert_eq!(desk.json("predict --model @clicks --data @clicks.csv")["rows"], 31);
    desk.write("a.txt", "to be or not to be. ".repeat(20));
    let gpt = "train --case hybrid-gpt --seq 8 --hidden 8 --heads 2 --layers 1 --batch 4 --steps 3 --mesh 2";
    desk.json(&format!("{gpt} --data @a.txt --out @gpt"));
    assert_eq!(desk.json("predict --model @gpt --data @a.txt")["rows"], 392);

    let wide = |more: &str| format!("{wide} --out @bad {more}");
    desk.assert_refused(&wide("--data @clicks.csv"), "label");
    desk.write("labels.csv", "click,age,site,page\n2,1,a,b\n");
    desk.assert_refused(&wide("--data @labels.csv --columns @columns.toml"), "the label is 2");
    desk.write("words.csv", "click,age,site,page\n1,1,a,b\n0,old,a,b\n");
    desk.assert_refused(&wide("--data @words.csv --columns @columns.toml"), "\"old\"");
    desk.write("columns.toml", "label = 3");
    desk.assert_refused(&wide("--data @clicks.csv --columns @columns.toml"), "does not name columns");
    desk.write("short.txt", "short");
    desk.assert_refused(&format!("{gpt} --data @short.txt --out @bad"), "has 5 bytes, samples need 9");
    desk.assert_refused(
        &format!("{gpt} --out @bad").replace("--heads 2", "--heads 3"),
        "not divisible by 3 heads",
    );
    desk.assert_refused(&format!("train {MLP} --data @rows.npz --lr 0 --out @bad"), "--lr is 0");
    desk.assert_refused(&format!("train {MLP} --data @rows.npz --steps 0 --out @bad"), "--steps is 0");
    desk.assert_refused(
        &format!("train {MLP} --data @rows.npz --lr 1e30 --optimiser sgd --out @bad"),
        "the loss of step",
    );
    desk.assert_refused(&format!("train {MLP} --data @none.npz --out @bad"), "none.npz");
    desk.assert_refused(
        "train --case mlp --inputs 7 --classes 3 --data @rows.npz --out @bad",
        "\"x\" has the shape [40, 6]",
    );
    desk.assert_refused(
        "train --case mlp --inputs 6 --classes 2 --data @rows.npz --out @bad",
        "there are 2 classes",
    );
    assert!(!desk.path("bad/config.json").exists());
}
