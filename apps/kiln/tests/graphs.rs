//! Every system's network as a graph: captured, run beside the network itself, made smaller; and loop programs.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kiln::SYSTEMS;
use kiln::compiler::loops::{Buffer, Elements, check, read_buffers, to_wasm, write_buffers};
use kiln::compiler::{Executor, Graph, GraphPass, OnnxOptions, capture};
use kiln::core::testing::Desk;
use kiln::core::{Network, Port, PortKind, random_stream};

use burn::backend::DispatchTensor;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::RngExt;

/// Systems whose models are no networks.
const WITHOUT_NETWORK: [&str; 1] = ["connectome"];

/// A model of a system, trained for a step or two; whole numbers in its inputs are below the second part.
fn tiny_model(desk: &Desk, slug: &str) -> (PathBuf, i64) {
    let rows = |names: &str| {
        let row = |i: usize| format!("{},{},{},{}\n", i % 7, i % 5, i % 3, ["up", "down"][i % 2]);
        format!("{names}\n{}", (0..24).map(row).collect::<String>())
    };
    let below = match slug {
        "gla" => {
            desk.write("a.txt", "to be or not to be. ".repeat(40));
            desk.json("train --text @a.txt --out @m --steps 2 --d-model 16 --layers 1 --heads 2 --seq-len 32 --batch 2");
            256
        }
        "tcnca" => {
            desk.write("a.txt", "to be or not to be. ".repeat(40));
            desk.json(
                "train --task lm --text @a.txt --out @m --steps 2 --dim 8 --layers 2 --mixer tcn,ema --z-dim 4 --h-dim 8 \
                 --ffn-dim 8 --kernel 3 --dilation 2 --blocks 2 --chunk 8 --batch 4 --seq-len 16",
            );
            256
        }
        "kronecker-attention" => {
            desk.run("match3 --n 5 --modulus 7 --count 24 --out @ids.jsonl").unwrap();
            desk.run(
                "train --data @ids.jsonl --input fourier:7 --dim 16 --heads 2 --steps 2 --batch 4 --out @m",
            )
            .unwrap();
            7
        }
        "tabpfn" => {
            desk.json(
                "fit-prior --emsize 16 --layers 1 --heads 2 --hidden 16 --max-features 5 --max-classes 3 --rows 32 \
                 --batch 2 --steps 2 --out @m",
            );
            3
        }
        "hypernet" => {
            desk.write("rows.csv", rows("a,b,writer,label"));
            desk.json(
                "train --data @rows.csv --target-col label --task-col writer --target mlp:2-4-2 --hidden 6 --emb-dim 3 \
                 --chunk 8 --steps 2 --batch 8 --out @m",
            );
            3
        }
        "mip" => {
            let row = |i: usize| format!("{},9,9,5,5,5,0,0,{},{}\n", i % 5, i % 3, ["up", "down"][i % 2]);
            desk.write(
                "data.csv",
                format!("a,b,c,d,e,f,g,h,i,label\n{}", (0..12).map(row).collect::<String>()),
            );
            desk.json("train --data @data.csv --arch mlp:4 --hidden 4,6 --batch 4 --steps 2 --out @h");
            desk.json("export --model @h --gamma 0.5 --to @m");
            2
        }
        "neumeta" => {
            let pixels = |i: usize| (0..64).map(|p| format!("{},", (i * p) % 10)).collect::<String>();
            let row = |i: usize| format!("{}{}\n", pixels(i), ["up", "down"][i % 2]);
            let names: String = (0..64).map(|p| format!("p{p},")).collect();
            desk.write("data.csv", format!("{names}label\n{}", (0..40).map(row).collect::<String>()));
            desk.json("pretrain --data @data.csv --arch small --width 4 --batch 4 --steps 2 --out @m");
            2
        }
        "stitch" => {
            let pixels = |i: usize| (0..16).map(|p| format!("{},", (i * p) % 10)).collect::<String>();
            let row = |i: usize| format!("{}{}\n", pixels(i), ["up", "down"][i % 2]);
            let names: String = (0..16).map(|p| format!("p{p},")).collect();
            desk.write("data.csv", format!("{names}label\n{}", (0..40).map(row).collect::<String>()));
            desk.json("anchor --width 4 --depth 2 --heads 2 --patch 2 --batch 4 --data @data.csv --steps 2 --out @m");
            2
        }
        "megatron" => {
            desk.write("a.txt", "to be or not to be. ".repeat(40));
            desk.json("train --data @a.txt --out @m --steps 2 --hidden 16 --layers 2 --heads 2 --seq 16 --batch 4 --tensor 2");
            256
        }
        "oneflow" => {
            desk.json("train --case hybrid-gpt --out @m --steps 2 --batch 4 --seq 8 --hidden 8 --heads 2 --layers 1 --mesh 2");
            256
        }
        "ptq" => {
            let pixels = |i: usize| (0..16).map(|p| format!("{},", (i * p) % 10)).collect::<String>();
            let row = |i: usize| format!("{}{}\n", pixels(i), ["up", "down"][i % 2]);
            let names: String = (0..16).map(|p| format!("p{p},")).collect();
            desk.write("data.csv", format!("{names}label\n{}", (0..40).map(row).collect::<String>()));
            desk.json(
                "train --arch mobilenetv2-s --width 0.125 --batch 4 --data @data.csv --steps 2 --out @m",
            );
            2
        }
        "eeg" => {
            desk.json("simulate --site a --recordings 8 --seconds 3 --channels C3,O1 --out @a");
            desk.json("prepare --in @a --labels @a/labels.csv --channels C3,O1 --tmin 0 --out @p");
            desk.json("train --data @p --window 150 --width 0.1 --batch 4 --epochs 1 --out @m");
            2
        }
        "btsbot" => {
            desk.write("c.json", r#"{"channels": [2, 3], "kernel": 3, "meta_hidden": [8, 8]}"#);
            desk.json("simulate --sources 12 --out @s");
            desk.json("extract --packets @s/packets --labels @s/sources.csv --out @a");
            desk.json(
                "train --triplets @a/triplets.npy --candidates @a/candidates.csv --config @c.json --crop 15 --epochs 1 \
                 --batch 8 --n-max 2 --out @m",
            );
            2
        }
        "chest-xray" => {
            desk.json("phantom --n 30 --size 32 --out @d");
            desk.json("train --images @d/images --net resnet18 --width 0.0625 --size 32 --folds 1 --epochs 1 --batch 8 --out @m");
            2
        }
        other => panic!("say here how to make a model of {other}"),
    };
    (desk.path("m"), below)
}

/// Random numbers for a port.
fn random_input(port: &Port, below: i64, number: u64) -> TensorData {
    let mut rng = random_stream(0, "input", number);
    let count = port.shape.iter().product();
    match port.kind {
        PortKind::Float => {
            TensorData::new((0..count).map(|_| rng.random::<f32>()).collect::<Vec<_>>(), port.shape.clone())
        }
        PortKind::Int => TensorData::new(
            (0..count).map(|_| rng.random_range(0..below)).collect::<Vec<_>>(),
            port.shape.clone(),
        ),
    }
}

/// A tensor of whatever rank on the CPU.
fn to_dispatch(port: &Port, data: &TensorData) -> DispatchTensor {
    let device = Device::flex();
    /// One arm a rank.
    macro_rules! by_rank {
        ($($rank:literal),+) => {
            match (port.kind, port.shape.len()) {
                $((PortKind::Float, $rank) => Tensor::<$rank>::from_data(data.clone(), &device).into_dispatch(),
                (PortKind::Int, $rank) => Tensor::<$rank, Int>::from_data(data.clone(), &device).into_dispatch(),)+
                (_, rank) => panic!("an input of rank {rank}"),
            }
        };
    }
    by_rank!(1, 2, 3, 4)
}

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

#[test]
fn every_network_and_its_graph_compute_the_same() {
    for system in SYSTEMS.iter().filter(|system| !WITHOUT_NETWORK.contains(&system.card().slug)) {
        let slug = system.card().slug;
        let desk = Desk::new(*system);
        let (model, below) = tiny_model(&desk, slug);
        let network = system.network(&model, &desk.cx).unwrap();
        let inputs: Vec<TensorData> = network
            .inputs()
            .iter()
            .zip(0..)
            .map(|(port, number)| random_input(port, below, number))
            .collect();
        let tensors =
            network.inputs().iter().zip(&inputs).map(|(port, data)| to_dispatch(port, data)).collect();
        let outputs = network.forward(tensors);
        let outputs: Vec<Vec<f32>> = network
            .outputs()
            .iter()
            .zip(outputs)
            .map(|(port, output)| match port.shape.len() {
                1 => floats(&Tensor::<1>::from_dispatch(output).into_data()),
                2 => floats(&Tensor::<2>::from_dispatch(output).into_data()),
                3 => floats(&Tensor::<3>::from_dispatch(output).into_data()),
                _ => floats(&Tensor::<4>::from_dispatch(output).into_data()),
            })
            .collect();
        let mut graph = capture(network).unwrap();
        let bytes = graph.to_onnx_bytes().unwrap_or_else(|e| panic!("{slug}: {e}"));
        let again =
            Graph::from_onnx_bytes(&bytes, &OnnxOptions::default()).unwrap_or_else(|e| panic!("{slug}: {e}"));
        assert_eq!((&again.kind, again.inputs.len()), (&graph.kind, graph.inputs.len()));
        assert_close(&again.run(&inputs).unwrap(), &outputs, &format!("{slug} as ONNX"));
        for pass in [None, Some(GraphPass::FoldConstants), Some(GraphPass::Cse), Some(GraphPass::Dce)] {
            if let Some(pass) = pass {
                pass.apply(&mut graph).unwrap();
            }
            assert_close(&graph.run(&inputs).unwrap(), &outputs, &format!("{slug} after {pass:?}"));
        }
        assert_same_as_loops(&graph, &inputs, &outputs, slug);
        let mut compiled = Executor::new(graph).unwrap();
        // The second time the memory is full of what the first left.
        for time in ["first", "second"] {
            assert_close(
                &compiled.run(&inputs).unwrap(),
                &outputs,
                &format!("{slug} compiled, the {time} time"),
            );
        }
    }
}

/// As a WebAssembly module.
fn assert_same_as_loops(graph: &Graph, inputs: &[TensorData], outputs: &[Vec<f32>], slug: &str) {
    let (program, mut buffers) = graph.clone().to_loops().unwrap_or_else(|error| panic!("{slug}: {error}"));
    for (input, data) in graph.inputs.iter().zip(inputs) {
        buffers.insert(input.port.name.clone(), Buffer::from_tensor(data).unwrap());
    }
    let results = to_wasm(&program, &check(&program).unwrap()).unwrap().run(&buffers).unwrap().unwrap();
    let found: Vec<TensorData> =
        graph.outputs.iter().map(|output| results[&output.port.name].to_tensor()).collect();
    assert_close(&found, outputs, &format!("{slug} as WebAssembly"));
}

fn assert_close(found: &[TensorData], outputs: &[Vec<f32>], what: &str) {
    for (found, expected) in found.iter().map(floats).zip(outputs) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= 2e-5 * (1.0 + b.abs()), "{what}: {a}, should be {b}");
        }
    }
}

fn kiln(folder: &Path, line: &str) -> Output {
    let words = line.split_whitespace();
    Command::new(env!("CARGO_BIN_EXE_kiln")).args(words).current_dir(folder).output().unwrap()
}

fn succeed(folder: &Path, line: &str) -> String {
    let output = kiln(folder, line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(folder: &Path, line: &str, words: &str) {
    let output = kiln(folder, line);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains(words) && !said.contains("internal error"),
        "{line}: {said}"
    );
}

#[test]
fn graphs_are_shown_run_and_made_smaller_from_the_command_line() {
    let gla = SYSTEMS.iter().find(|system| system.card().slug == "gla").unwrap();
    let desk = Desk::new(*gla);
    tiny_model(&desk, "gla");
    let here = desk.path("");
    let text = succeed(&here, "graph show --model m --svg g.svg");
    assert!(text.contains(" = Matmul(") && text.contains("output \"logits\""), "{text}");
    assert!(std::fs::read_to_string(here.join("g.svg")).unwrap().starts_with("<svg"));
    succeed(&here, "export --model m --out g");
    assert_eq!(succeed(&here, "graph show --graph g"), text);
    let steps = succeed(&here, "--json graph optimise --graph g --out small");
    let steps: serde_json::Value = serde_json::from_str(&steps).unwrap();
    let count = |at: usize| steps["steps"][at]["operations"].as_u64().unwrap();
    assert!(count(3) < count(0), "{steps}");
    let ports = text.lines().next().unwrap();
    assert!(ports.contains("i64[1, ") || ports.contains("i64["), "{ports}");
    let shape: Vec<usize> =
        ports.split(['[', ']']).nth(1).unwrap().split(", ").map(|n| n.parse().unwrap()).collect();
    let ids = Buffer {
        elements: Elements::I64((0..shape.iter().product::<usize>() as i64).map(|i| i % 256).collect()),
        shape,
    };
    let name = ports.split('"').nth(1).unwrap().to_string();
    write_buffers(&here.join("in.npz"), &[(name, ids)].into()).unwrap();
    succeed(&here, "graph run --graph g --inputs in.npz --out whole.npz --repeat 2");
    succeed(&here, "graph run --graph small --inputs in.npz --out small.npz");
    let [whole, small] = ["whole.npz", "small.npz"].map(|name| read_buffers(&here.join(name)).unwrap());
    assert_eq!(whole["logits"].shape, small["logits"].shape);
    refused(&here, "graph optimise --graph g --passes fuse --out x", "there are: fold-constants, cse, dce");
    refused(&here, "graph run --graph g --inputs whole.npz --out x.npz", "it holds: logits");
    refused(&here, "graph show", "--graph <DIR>|--model <DIR>");
}

/// Networks that `kiln oneflow train` refuses, with words of its reason.
const NOT_TRAINED: [(&str, &str); 1] = [("hypernet", "no weight of the network's file is a constant")];

#[test]
fn every_network_trains_on_two_devices_and_in_two_stages_as_on_one() {
    for system in SYSTEMS.iter().filter(|system| !WITHOUT_NETWORK.contains(&system.card().slug)) {
        let slug = system.card().slug;
        let desk = Desk::new(*system);
        let (model, below) = tiny_model(&desk, slug);
        let here = desk.path("");
        let graph = capture(system.network(&model, &desk.cx).unwrap()).unwrap();
        let batch = graph.inputs[0].port.shape[0];
        let taken = graph.inputs.iter().any(|input| input.port.name == "y");
        let output = &graph.outputs[0].port;
        // Some outputs have several rows for an example.
        let shape = match output.shape[0] / batch {
            1 => output.shape.clone(),
            each => [&[batch, each], &output.shape[1..]].concat(),
        };
        let target = Port { name: if taken { "target" } else { "y" }.into(), shape, ..output.clone() };
        let ports = graph.inputs.iter().map(|input| &input.port).chain([&target]);
        let rows = ports.zip(0..).map(|(port, number)| {
            let data = random_input(port, below, number);
            (port.name.clone(), Buffer::from_tensor(&data).unwrap())
        });
        write_buffers(&here.join("rows.npz"), &rows.collect()).unwrap();
        let line = |out: &str, more: &str| {
            let data = format!("--data rows.npz --loss squared --batch {batch} --steps 2");
            format!("oneflow train --model m {data} --optimiser sgd --lr 1e-3 {more} --out {out}")
        };
        if let Some((_, why)) = NOT_TRAINED.iter().find(|(known, _)| *known == slug) {
            refused(&here, &line("one", "--mesh 1"), why);
            continue;
        }
        let losses = |out: &str, more: &str| -> Vec<f64> {
            succeed(&here, &line(out, more));
            let log = std::fs::read_to_string(here.join(out).join("log.csv")).unwrap();
            log.lines().skip(1).map(|line| line.split_once(',').unwrap().1.parse().unwrap()).collect()
        };
        let one = losses("one", "--mesh 1");
        for (out, more) in [("two", "--mesh 2"), ("stages", "--mesh 1 --stages 2")] {
            for (a, b) in losses(out, more).iter().zip(&one) {
                assert!((a - b).abs() <= 1e-4 * b.abs(), "{slug} {more}: {a}, must be {b}");
            }
            // What was written is a model of the same system.
            system.network(&here.join(out), &desk.cx).unwrap_or_else(|e| panic!("{slug}: {e}"));
        }
    }
}

/// A language model with the loss of its next characters.
struct WithLoss(Box<dyn Network>);

impl Network for WithLoss {
    fn kind(&self) -> &str {
        "with-loss"
    }

    fn inputs(&self) -> Vec<Port> {
        let mut inputs = self.0.inputs();
        inputs.push(Port { name: "targets".into(), ..inputs[0].clone() });
        inputs
    }

    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "loss".into(), kind: PortKind::Float, shape: vec![1] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.0.move_to(device);
    }

    fn forward(&self, mut inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let targets = Tensor::<2, Int>::from_dispatch(inputs.pop().unwrap());
        let logits = Tensor::<3>::from_dispatch(self.0.forward(inputs).remove(0));
        let scores = log_softmax(logits, 2).gather(2, targets.unsqueeze_dim(2));
        vec![scores.mean().neg().into_dispatch()]
    }
}

#[test]
fn the_gradient_of_a_language_model_is_the_slope_of_its_loss() {
    for slug in ["gla", "tcnca"] {
        let system = SYSTEMS.iter().find(|system| system.card().slug == slug).unwrap();
        let desk = Desk::new(*system);
        let (model, below) = tiny_model(&desk, slug);
        let graph = capture(Box::new(WithLoss(system.network(&model, &desk.cx).unwrap()))).unwrap();
        let inputs: Vec<TensorData> = graph
            .inputs
            .iter()
            .zip(0..)
            .map(|(input, number)| random_input(&input.port, below, number))
            .collect();
        let parameters: Vec<_> =
            graph.constants.iter().filter(|(_, data)| data.dtype().is_float()).map(|(id, _)| *id).collect();
        let names: Vec<String> = parameters.iter().map(|id| format!("%{}", id.value())).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let gradients = graph.gradient("loss", &names).unwrap().run(&inputs).unwrap();
        let length = gradients[1..].iter().flat_map(floats).map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        assert!(length > 1e-3, "{slug}");
        // Along the gradient the loss grows by its length.
        let step = 5e-4;
        let moved = |by: f64| {
            let mut graph = graph.clone();
            for (id, gradient) in parameters.iter().zip(&gradients[1..]) {
                let data = &graph.constants[id];
                let values = floats(data).into_iter().zip(floats(gradient));
                let values: Vec<f32> =
                    values.map(|(x, slope)| (f64::from(x) + by * f64::from(slope) / length) as f32).collect();
                let data = TensorData::new(values, data.shape().clone());
                graph.constants.insert(*id, data);
            }
            f64::from(floats(&graph.run(&inputs).unwrap()[0])[0])
        };
        let slope = (moved(step) - moved(-step)) / (2.0 * step);
        assert!((slope - length).abs() <= 2e-3 * length, "{slug}: {slope}, should be {length}");
    }
}

#[test]
fn models_go_to_onnx_and_back_and_gradients_are_written_from_the_command_line() {
    let gla = SYSTEMS.iter().find(|system| system.card().slug == "gla").unwrap();
    let desk = Desk::new(*gla);
    tiny_model(&desk, "gla");
    let here = desk.path("");
    succeed(&here, "graph export --model m --onnx m.onnx");
    let said = succeed(&here, "--json graph import --onnx m.onnx --out g");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["outputs"][0]["name"], "logits");
    succeed(&here, "graph show --graph g");
    let said = succeed(&here, "graph grad --graph g --loss logits --wrt %1 --out d");
    assert!(said.contains("d_logits [") && said.contains("d_%1 ["), "{said}");
    refused(&here, "graph grad --graph g --loss loss --wrt %1 --out d2", "it has: logits");
    refused(&here, "graph import --onnx m.onnx --dim batch=8 --out x", "all sizes are fixed in the file");
    refused(&here, "graph import --onnx m.onnx --dim batch --out x", "NAME=SIZE");
    refused(&here, "graph import --onnx none.onnx --out x", "none.onnx");
    let whole = std::fs::read(here.join("m.onnx")).unwrap();
    std::fs::write(here.join("cut.onnx"), &whole[..whole.len() / 2]).unwrap();
    refused(&here, "graph import --onnx cut.onnx --out x", "cut.onnx: is not a complete ONNX file");
    assert!(!here.join("x").exists());

    // A graph whose shapes were tampered with is refused without a word from Burn.
    let text = std::fs::read_to_string(here.join("g/graph.json")).unwrap();
    let shape =
        text.split("\"axes\":[").nth(1).map(|rest| rest.split(']').next().unwrap().to_string()).unwrap();
    let damaged = text.replace(&format!("\"axes\":[{shape}]"), "\"axes\":[0,9]");
    std::fs::write(here.join("g/graph.json"), damaged).unwrap();
    let ports = graph_inputs(&here.join("g"));
    write_buffers(&here.join("in.npz"), &ports).unwrap();
    for (target, start) in [("interp", "error: operation "), ("cpu", "error: an operation ")] {
        let output =
            kiln(&here, &format!("graph run --graph g --inputs in.npz --out out.npz --target {target}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.starts_with(start) && said.contains("does not fit its operands"), "{target}: {said}");
        assert!(!here.join("out.npz").exists());
    }
}

/// Zeros for every input of a saved graph.
fn graph_inputs(folder: &Path) -> std::collections::BTreeMap<String, Buffer> {
    let graph = Graph::load(folder).unwrap();
    let zeros = |port: &Port| {
        let count = port.shape.iter().product();
        let elements = match port.kind {
            PortKind::Float => Elements::F32(vec![0.0; count]),
            PortKind::Int => Elements::I64(vec![0; count]),
        };
        (port.name.clone(), Buffer { elements, shape: port.shape.clone() })
    };
    graph.inputs.iter().map(|input| zeros(&input.port)).collect()
}

#[test]
fn programs_are_compiled_and_run_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let program = "program relu(in X: f32[5], out Y: f32[5]) {\n  vectorized for i in 0 count 5 {\n    Y[i] = max(X[i], 0.0f32)\n  }\n}\n";
    std::fs::write(here.join("relu.txt"), program).unwrap();
    let x = Buffer { shape: vec![5], elements: Elements::F32(vec![-1.0, 2.0, -0.0, 4.0, f32::NEG_INFINITY]) };
    write_buffers(&here.join("in.npz"), &[("X".to_string(), x)].into()).unwrap();
    for options in
        ["--target interp --passes none", "--target interp", "--target wasm --passes simplify,split:2", ""]
    {
        succeed(here, &format!("compile run --program relu.txt {options} --inputs in.npz --out out.npz"));
        let y = &read_buffers(&here.join("out.npz")).unwrap()["Y"];
        assert_eq!(y.elements, Elements::F32(vec![0.0, 2.0, 0.0, 4.0, 0.0]), "{options}");
    }
    succeed(here, "compile build --program relu.txt --out built");
    assert!(std::fs::read(here.join("built/module.wasm")).unwrap().starts_with(b"\0asm"));
    let layout = std::fs::read_to_string(here.join("built/layout.json")).unwrap();
    assert!(layout.contains("\"offset\":32") && layout.contains("\"io\":\"out\""), "{layout}");
    // What was written compiles again, from either form.
    succeed(here, "compile build --program built/program.json --passes none --out again");
    succeed(here, "compile build --program built/program.txt --passes none --out again");
    let texts =
        ["built", "again"].map(|name| std::fs::read_to_string(here.join(name).join("program.txt")).unwrap());
    assert_eq!(texts[0], texts[1]);
    std::fs::write(here.join("bad.txt"), program.replace("X[i]", "X[i + 9]")).unwrap();
    refused(here, "compile run --program bad.txt --inputs in.npz --out trap.npz", "trapped: out of bounds");
    assert!(!here.join("trap.npz").exists());
    std::fs::write(here.join("worse.txt"), program.replace("max", "mox")).unwrap();
    succeed(here, "compile build --program relu.txt --target wgsl --out shaders");
    let shader = std::fs::read_to_string(here.join("shaders/kernel0.wgsl")).unwrap();
    assert!(shader.contains("@compute") && shader.contains("max(b0["), "{shader}");
    let plan: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(here.join("shaders/plan.json")).unwrap()).unwrap();
    assert_eq!(plan["kernels"][0]["bindings"], serde_json::json!([0, 1]), "{plan}");
    refused(
        here,
        "compile run --program relu.txt --target wgsl --inputs in.npz --out x.npz",
        "runs no shaders",
    );
    std::fs::write(here.join("wide.txt"), program.replace("f32[5]", "f64[5]").replace("0.0f32", "0.0f64"))
        .unwrap();
    refused(here, "compile build --program wide.txt --target wgsl --out wide", "holds f64");
    assert!(!here.join("wide").exists());
    refused(here, "compile build --program worse.txt --out x", "not \"mox\"");
    refused(here, "compile build --program relu.txt --passes fly --out x", "there are: simplify");
    refused(here, "compile build --program none.txt --out x", "none.txt");
    refused(here, "compile build", "--program");
}

#[test]
fn a_model_is_compiled_and_its_module_computes_what_the_graph_does() {
    let gla = SYSTEMS.iter().find(|system| system.card().slug == "gla").unwrap();
    let desk = Desk::new(*gla);
    tiny_model(&desk, "gla");
    let here = desk.path("");
    succeed(&here, "export --model m --out g");
    succeed(&here, "compile build --graph g --out built");
    for file in ["module.wasm", "layout.json", "constants.npz"] {
        assert!(here.join("built").join(file).exists(), "{file}");
    }
    let graph = Graph::load(&here.join("g")).unwrap();
    let ids = Buffer::from_tensor(&random_input(&graph.inputs[0].port, 256, 0)).unwrap();
    write_buffers(&here.join("in.npz"), &[("ids".to_string(), ids)].into()).unwrap();
    let table = succeed(&here, "graph run --graph g --inputs in.npz --out cpu.npz --repeat 2 --profile");
    assert!(table.contains("Matmul") && table.contains("constants"), "{table}");
    refused(&here, "graph run --graph g --inputs in.npz --out x.npz --target interp --profile", "compiled");
    succeed(&here, "graph run --graph g --inputs in.npz --out interp.npz --target interp");
    succeed(&here, "compile run --model m --inputs in.npz --out wasm.npz");
    let [cpu, interp, wasm] = ["cpu", "interp", "wasm"].map(|name| {
        let arrays = read_buffers(&here.join(format!("{name}.npz"))).unwrap();
        arrays["logits"].to_tensor()
    });
    assert_close(&[cpu], &[floats(&interp)], "compiled");
    assert_close(&[wasm], &[floats(&interp)], "WebAssembly");
}
