//! Global tensors computed at once, and random numbers that do not depend on how a tensor is split.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::backend::ir::{FloatOperationIr, OperationIr, RandomOpIr};
use burn::tensor::{DType, Distribution, TensorData};
use kiln_cluster::run_threads;
use kiln_compiler::builder::Builder;
use kiln_compiler::{Boundary, Graph};
use kiln_core::{Port, PortKind};
use kiln_oneflow::exchange::Lines;
use kiln_oneflow::{Compiler, GlobalTensor, Logical, NdSbp, Placement, Rank, Run};

fn counted(shape: [usize; 2]) -> TensorData {
    TensorData::new((0..shape[0] * shape[1]).map(|at| (at % 7) as f32 - 3.0).collect::<Vec<_>>(), shape)
}

#[test]
fn operations_on_global_tensors_give_what_one_device_gives() {
    let (x, w, b) = (counted([5, 4]), counted([4, 6]), counted([1, 6]));
    let forward = |mesh: &[usize], of_x: &str, of_w: &str| {
        let ranks = run_threads(mesh.iter().product(), |world| {
            let lines = Lines::new(&world, mesh)?;
            let x = GlobalTensor::from_whole(&lines, &x, of_x.parse()?)?;
            let w = GlobalTensor::from_whole(&lines, &w, of_w.parse()?)?;
            let b = GlobalTensor::from_whole(&lines, &b, NdSbp::broadcast(mesh.len()))?;
            let product = x.matmul(&w)?;
            let form = product.sbp().to_string();
            Ok((form, product.add(&b)?.relu()?.to_whole()?))
        });
        ranks.unwrap().swap_remove(0)
    };
    let (_, expected) = forward(&[1], "B", "B");
    // The paper's two examples on two axes, and one on one.
    for (mesh, of_x, of_w, of_y) in
        [(&[2, 2][..], "S0,B", "B,S1", "S0,S1"), (&[2, 2], "S0,S1", "B,S0", "S0,P"), (&[3], "S1", "S0", "P")]
    {
        let (form, found) = forward(mesh, of_x, of_w);
        assert_eq!(form, of_y);
        assert_eq!(found, expected, "{of_x} {of_w}");
    }
}

#[test]
fn misplaced_parts_are_refused() {
    run_threads(2, |world| {
        let lines = Lines::new(&world, &[2])?;
        let told = |text: &str, shape: &[usize]| {
            let local = TensorData::new(vec![0f32; 4], [2, 2]);
            GlobalTensor::from_local(&lines, local, shape, text.parse().unwrap()).err().unwrap().to_string()
        };
        assert!(told("S0", &[6, 2]).contains("S0 of [6, 2] has"), "{}", told("S0", &[6, 2]));
        assert!(told("S2", &[4, 2]).contains("S2 splits axis 2"));
        let (x, y) = (counted([2, 3]), counted([2, 3]));
        let [x, y] =
            [x, y].map(|data| GlobalTensor::from_whole(&lines, &data, "S0".parse().unwrap()).unwrap());
        assert!(x.matmul(&y).err().unwrap().to_string().contains("have no matrix product"));
        Ok(())
    })
    .unwrap();
}

/// `y = x + mask`, where the mask is drawn.
fn dropout() -> Logical {
    let mut builder = Builder::new(0);
    let x = builder.provided(&[6, 5], DType::F32);
    let distribution = Distribution::Bernoulli(0.5);
    let random = builder.other(|id| {
        let op = RandomOpIr::create([6, 5].into(), DType::F32, distribution, || id);
        OperationIr::Float(DType::F32, FloatOperationIr::Random(op))
    });
    let y = builder.add(&x, &random.unwrap()).unwrap();
    let port = |name: &str| Port { name: name.into(), kind: PortKind::Float, shape: vec![6, 5] };
    let graph = Graph {
        kind: "test".into(),
        inputs: vec![Boundary { port: port("x"), tensor: x.id }],
        outputs: vec![Boundary { port: port("y"), tensor: y.id }],
        operations: builder.operations,
        constants: builder.constants,
    };
    Logical::of(graph).unwrap()
}

#[test]
fn random_numbers_are_the_same_for_every_split() {
    let logical = dropout();
    let zeros = TensorData::new(vec![0f32; 30], [6, 5]);
    let mut seen: Vec<TensorData> = Vec::new();
    for (mesh, hint) in [(&[1][..], "B"), (&[2], "S0"), (&[3], "S1"), (&[2, 2], "S0,S1"), (&[2, 2], "B,S0")] {
        let placement = Placement::mesh(mesh).unwrap();
        let physical =
            Compiler::new(logical.clone()).hint("x", hint.parse().unwrap()).compile(&placement).unwrap();
        let run = Run { seed: 4, pieces: 2, ..Run::default() };
        let mut ranks = run_threads(placement.len(), |world| {
            let rank = Rank::new(&physical, &logical, &world)?;
            let done = rank.run(&run, &|_| Ok(vec![zeros.clone()]))?;
            done.outputs.into_iter().map(|mut piece| rank.output(0, piece.swap_remove(0))).collect()
        })
        .unwrap();
        let pieces: Vec<TensorData> = ranks.swap_remove(0);
        assert_ne!(pieces[0], pieces[1]);
        let share = pieces[0].iter::<f32>().sum::<f32>() / 30.0;
        assert!((0.2..0.8).contains(&share), "{share}");
        if seen.is_empty() {
            seen = pieces;
        } else {
            assert_eq!(pieces, seen, "{hint} on {mesh:?}");
        }
    }
}
