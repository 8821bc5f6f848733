//! Against the reference: its lists of networks, its least-squares layers and its logits.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_core::{Context, TensorFile};
use kiln_stitch::anchor::{Cost, Extent, Grid, Outline};
use kiln_stitch::golden::{Arch, forward};
use kiln_stitch::space::{Direction, Pairs, SpaceConfig, StitchSpace};
use serde_json::{Value, json};

fn space_file() -> Value {
    serde_json::from_str(include_str!("../data/stitch_space.json")).unwrap()
}

/// An anchor of which only the number of blocks matters.
fn blocks(depth: usize) -> Outline {
    Outline {
        image: [1, 1, 1],
        classes: 2,
        stages: vec![0; depth],
        extents: vec![Extent { channels: 1, grid: Grid::Tokens(1) }; depth + 1],
        embed: Cost::default(),
        blocks: vec![Cost::default(); depth],
        head: Cost::default(),
    }
}

/// What the golden file says of a space, in its own form; a layer is called by its number within its pair.
fn listed(space: &StitchSpace) -> Value {
    let number = |layer: usize| space.layers()[layer].number;
    let configurations: Vec<Value> = space
        .configurations()
        .iter()
        .map(|c| {
            let cuts: Vec<[usize; 2]> = c.cuts.iter().map(|cut| [cut.after, cut.before]).collect();
            let layers: Vec<usize> = c.cuts.iter().map(|cut| number(cut.layer)).collect();
            json!({ "anchors": c.anchors, "cuts": cuts, "layers": layers })
        })
        .collect();
    let layers = space.layers().iter().map(|joint| joint.number + 1).max();
    json!({ "num_layers": layers, "num_configs": space.len(), "configs": configurations })
}

#[test]
fn spaces_are_those_of_the_reference() {
    let file = space_file();
    for (depth, kernel, stride, near) in
        [(12, 2, 1, true), (12, 2, 2, true), (6, 2, 1, true), (5, 3, 2, true), (4, 2, 1, false)]
    {
        let config = SpaceConfig {
            kernel,
            stride,
            include_m0: true,
            direction: Direction::Fast,
            pairs: if near { Pairs::Nearest } else { Pairs::All },
            max_anchors: if near { 2 } else { 3 },
        };
        let space = StitchSpace::new(vec![blocks(depth); 3], &config).unwrap();
        let name = format!("near{}", if near { "True" } else { "False" });
        let expected = &file[format!("reference_depth{depth}_k{kernel}_s{stride}_{name}")];
        assert!(!expected.is_null());
        assert_eq!(&listed(&space), expected, "depth {depth}, kernel {kernel}, stride {stride}");
    }
}

#[test]
fn the_cuts_of_a_pair_leave_out_whole_rears_and_span_unequal_depths() {
    let file = space_file();
    for (front, rear) in [(4, 4), (6, 6), (3, 5), (4, 9), (12, 24)] {
        let space = StitchSpace::new(vec![blocks(front), blocks(rear)], &SpaceConfig::default()).unwrap();
        let expected = &file[format!("kiln_pairs_{front}_{rear}_k2_s1")];
        let cuts: Vec<_> = space.configurations()[2..].iter().map(|c| c.cuts[0]).collect();
        let pairs: Vec<[usize; 2]> = cuts.iter().map(|cut| [cut.after, cut.before]).collect();
        assert_eq!(json!(pairs), expected["cuts"], "{front} and {rear} blocks");
        assert_eq!(json!(cuts.iter().map(|cut| cut.layer).collect::<Vec<_>>()), expected["layers"]);
        assert_eq!(json!(space.layers().len()), expected["num_layers"]);
    }
    // The paper's own: 67 networks of three anchors with twelve blocks.
    assert_eq!(StitchSpace::new(vec![blocks(12); 3], &SpaceConfig::default()).unwrap().len(), 67);
}

fn assert_close(found: &TensorFile, golden: &TensorFile, name: &str, relative: f32, absolute: f32) {
    let (found, expected) = (found.get(name).unwrap(), golden.get(name).unwrap());
    assert_eq!(found.shape, expected.shape, "{name}");
    for (a, b) in found.as_floats().unwrap().iter().zip(expected.as_floats().unwrap()) {
        assert!((a - b).abs() <= absolute + relative * b.abs(), "{name}: {a}, should be {b}");
    }
}

#[test]
fn layers_and_logits_of_every_network_are_those_of_the_reference() {
    let golden = TensorFile::read("tests/data/stitch_vit.safetensors".as_ref()).unwrap();
    let arch = Arch::read("tests/data/stitch_vit.json".as_ref()).unwrap();
    let found = forward(&arch, golden.clone(), "x", &Context::for_tests("unused")).unwrap();
    let expected: Vec<&str> =
        golden.names().filter(|name| name.starts_with("logits.") || name.starts_with("stitch")).collect();
    assert_eq!(expected.len(), 3 + 16 + 12);
    for name in &expected {
        match name.starts_with("logits.") {
            true => assert_close(&found, &golden, name, 1e-4, 1e-5),
            false => assert_close(&found, &golden, name, 1e-3, 1e-5),
        }
    }
    assert_eq!(found.names().count(), expected.len());
}
