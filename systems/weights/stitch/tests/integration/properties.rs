//! What must hold of any stitchable network, whatever its weights.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Context, HostTensor, TensorFile};
use kiln_data::{Images, Matrix};
use kiln_nn::{AdamW, initialise};
use kiln_ops::cross_entropy;
use kiln_stitch::anchor::{Anchor, Feature};
use kiln_stitch::checkpoint::{Interface, SnConfig, export, open, open_single, save};
use kiln_stitch::data::Scaling;
use kiln_stitch::family::{AnchorConfig, AnchorNet, ResnetConfig, SwinConfig, VitConfig};
use kiln_stitch::snnet::{SnNet, SnNetConfig};
use kiln_stitch::space::{Configuration, Cut, Direction, Joint, Pairs, SpaceConfig, StitchSpace};
use kiln_stitch::stitch::StitchLayer;
use rand_distr::{Distribution, StandardNormal};

const IMAGE: [usize; 3] = [1, 8, 8];

fn vit(width: usize) -> AnchorConfig {
    AnchorConfig::Vit(VitConfig { image: IMAGE, patch: 4, width, depth: 3, heads: 2, classes: 3 })
}

fn resnet(width: usize) -> AnchorConfig {
    AnchorConfig::Resnet(ResnetConfig { image: IMAGE, patch: 1, width, depths: vec![1, 2, 1], classes: 3 })
}

fn swin(width: usize) -> AnchorConfig {
    let depths = vec![1, 2, 1];
    AnchorConfig::Swin(SwinConfig { image: IMAGE, patch: 1, width, depths, heads: 2, window: 2, classes: 3 })
}

fn cx() -> Context {
    Context::for_tests("unused")
}

fn draw(config: &AnchorConfig, stream: u64) -> AnchorNet {
    initialise(&Device::flex(), &mut cx().rng("test", stream), |device| config.init(device))
}

fn images(count: usize) -> Tensor<4> {
    let mut rng = cx().rng("images", 0);
    let pixels: Vec<f32> = (0..count * 64).map(|_| StandardNormal.sample(&mut rng)).collect();
    Tensor::from_data(TensorData::new(pixels, [count, 1, 8, 8]), &Device::flex())
}

fn net(configs: &[AnchorConfig], space: SpaceConfig) -> SnNet<AnchorNet> {
    let anchors = configs.iter().zip(0..).map(|(config, stream)| draw(config, stream)).collect();
    let config = SnNetConfig::new(anchors).with_space(space);
    config.draw(&mut cx().rng("test", 9), &Device::flex()).unwrap()
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |largest, (a, b)| largest.max((a - b).abs()))
}

/// Every kind of space: transformers, three of them with everything allowed, convolutions, windows, and convolutions
/// before windows.
fn nets() -> Vec<(Vec<AnchorConfig>, SnNet<AnchorNet>)> {
    let all = SpaceConfig {
        kernel: 3,
        include_m0: true,
        direction: Direction::Both,
        pairs: Pairs::All,
        max_anchors: 3,
        ..SpaceConfig::default()
    };
    let plain = SpaceConfig::default;
    [
        (vec![vit(4), vit(6)], plain()),
        (vec![vit(4), vit(6), vit(8)], all),
        (vec![resnet(2), resnet(4)], plain()),
        (vec![swin(4), swin(8)], plain()),
        (vec![resnet(2), swin(8)], SpaceConfig { direction: Direction::Both, ..plain() }),
    ]
    .into_iter()
    .map(|(configs, space)| (configs.clone(), net(&configs, space)))
    .collect()
}

/// An anchor and a twin of it, joined by these cuts, each with a layer of its own.
fn twins(anchor: &AnchorNet, cuts: &[(usize, usize)]) -> SnNet<AnchorNet> {
    let joined = cuts.iter().enumerate().map(|(layer, &(after, before))| Configuration {
        anchors: vec![0, 1],
        cuts: vec![Cut { after, before, layer }],
    });
    let configurations = [0, 1].map(Configuration::anchor).into_iter().chain(joined).collect();
    let layers = (0..cuts.len()).map(|number| Joint { front: 0, rear: 1, number }).collect();
    let space = StitchSpace::from_parts(vec![anchor.outline(); 2], configurations, layers).unwrap();
    SnNet::over(vec![anchor.clone(), anchor.clone()], space, None, &Device::flex()).unwrap()
}

#[test]
fn a_network_stitched_to_itself_gives_the_same_logits() {
    for (config, cuts) in [(vit(8), &[(0, 1), (1, 2)][..]), (resnet(4), &[(1, 2)]), (swin(8), &[(1, 2)])] {
        let anchor = draw(&config, 0);
        let mut net = twins(&anchor, cuts);
        let fits = net.fit(images(40), &cx()).unwrap();
        assert!(fits.iter().all(|fit| fit.residual < 1e-9), "{fits:?}");
        let expected = values(anchor.forward(images(5)));
        let merits = net.alignments(images(40), &cx()).unwrap();
        assert!(merits.iter().all(|(_, merit)| (merit - 1.0).abs() < 1e-12), "{merits:?}");
        for id in 2..net.space().len() {
            let found = values(net.forward_with(id, images(5)).unwrap());
            assert!(distance(&found, &expected) < 1e-4, "{}", net.space().configurations()[id].name());
        }
    }
}

#[test]
fn the_target_of_a_cut_is_what_the_rear_block_takes_also_of_the_first_block() {
    let anchor = draw(&vit(8), 0);
    let mut net = twins(&anchor, &[(1, 0), (0, 2)]);
    net.fit(images(40), &cx()).unwrap();
    let rows = |x: Feature| {
        let x: Tensor<2> = x.into_tokens().flatten(0, 1);
        let [rows, columns] = x.dims();
        Matrix::new(rows, columns, values(x).into_iter().map(f64::from).collect())
    };
    let embedded = anchor.embed(images(40));
    let after = |blocks| rows(anchor.run(0..blocks, embedded.clone()));
    for (layer, (given, taken)) in [(after(2), after(0)), (after(1), after(2))].into_iter().enumerate() {
        let expected = StitchLayer::fit(&given, &taken, &Device::flex()).unwrap();
        assert_eq!(values(net.stitches[layer].map.weight.val()), values(expected.map.weight.val()));
    }
}

#[test]
fn costs_are_those_of_the_parts_that_run() {
    for (_, net) in nets() {
        for (id, configuration) in net.space().configurations().iter().enumerate() {
            let single = net.export(id).unwrap();
            let cost = net.space().cost(configuration);
            let file = TensorFile::from_module(&single);
            let trained = file.names().filter(|name| !name.contains("running_"));
            let params: usize = trained.map(|name| file.get(name).unwrap().as_floats().unwrap().len()).sum();
            assert_eq!(cost.params, params as u64, "{}", configuration.name());
        }
    }
}

#[test]
fn a_network_on_its_own_gives_the_same_logits_bit_for_bit_also_from_disk() {
    let cx = cx();
    for (networks, net) in nets() {
        let interface = Interface {
            classes: ["a", "b", "c"].map(String::from).into(),
            white: 1.0,
            scaling: Scaling { mean: vec![0.1], std: vec![0.3] },
        };
        let config = SnConfig::of(&net, networks, interface, None);
        let dir = tempfile::tempdir().unwrap();
        let folder = kiln_core::ModelFolder::new(dir.path().join("m"));
        save(&folder, &config, &net).unwrap();
        let (again, reopened) = open(folder.path(), &cx).unwrap();
        assert_eq!((&again, reopened.space()), (&config, net.space()));
        for id in 0..net.space().len() {
            let expected = values(net.forward_with(id, images(3)).unwrap());
            assert_eq!(values(reopened.forward_with(id, images(3)).unwrap()), expected);
            let to = dir.path().join(id.to_string());
            assert_eq!(values(export(&config, &net, id, &to).unwrap().forward(images(3))), expected);
            assert_eq!(values(open_single(&to, &cx).unwrap().net.forward(images(3))), expected);
        }
    }
}

#[test]
fn images_do_not_see_one_another() {
    for (_, net) in nets() {
        let order = Tensor::<1, Int>::from_data(TensorData::new(vec![2i64, 0, 1], [3]), &Device::flex());
        for id in 0..net.space().len() {
            let together = net.forward_with(id, images(3)).unwrap().select(0, order.clone());
            let moved = net.forward_with(id, images(3).select(0, order.clone())).unwrap();
            assert!(distance(&values(together), &values(moved)) < 1e-5);
        }
    }
}

#[test]
fn a_step_changes_what_ran_and_leaves_the_rest_to_the_last_bit() {
    for (_, net) in nets() {
        for id in [0, net.space().len() - 1] {
            let configuration = net.space().configurations()[id].clone();
            let before = TensorFile::from_module(&net);
            let mut training = net.clone().train();
            // A second step would show momentum of what does not run.
            let mut adam = AdamW::new(0.5, 0.0);
            for _ in 0..2 {
                let classes = Tensor::<1, Int>::zeros([3], &Device::flex());
                let logits = training.forward_with(id, images(3)).unwrap();
                let gradients = cross_entropy(logits, classes, &Default::default()).mean().backward();
                training = adam.step(training, gradients, 0.01).0;
            }
            let after = TensorFile::from_module(&training.valid());
            let depths = |anchor: usize| net.space().outlines()[anchor].depth();
            let legs: Vec<_> = configuration.legs(depths).collect();
            let last = legs.len() - 1;
            let runs = |name: &str| {
                let parts: Vec<&str> = name.split('.').collect();
                if parts[0] == "stitches" {
                    return configuration.cuts.iter().any(|cut| cut.layer.to_string() == parts[1]);
                }
                let place = legs.iter().position(|(anchor, _)| anchor.to_string() == parts[1]);
                place.is_some_and(|place| match parts[2] {
                    "blocks" => legs[place].1.contains(&parts[3].parse().unwrap()),
                    "norm" | "head" | "fc" => place == last,
                    _ => place == 0,
                })
            };
            for name in before.names() {
                let same = before.get(name) == after.get(name);
                assert_eq!(same, !runs(name), "{name} under {}", configuration.name());
            }
        }
    }
}

#[test]
fn frozen_anchors_stay_and_of_low_rank_layers_only_the_product_moves() {
    for configs in [[vit(4), vit(6)], [resnet(2), resnet(4)]] {
        let anchors = configs.iter().map(|config| draw(config, 0)).collect();
        let config = SnNetConfig::new(anchors).with_rank(Some(1));
        let mut net = config.draw(&mut cx().rng("test", 1), &Device::flex()).unwrap().freeze_anchors();
        net.fit(images(40), &cx()).unwrap();
        let id = net.space().len() - 1;
        let whole = values(net.forward_with(id, images(3)).unwrap());
        assert_eq!(values(net.export(id).unwrap().forward(images(3))), whole, "the product is zero at first");
        let before = TensorFile::from_module(&net);
        let mut training = net.train();
        let mut adam = AdamW::new(0.5, 0.0);
        for _ in 0..2 {
            let classes = Tensor::<1, Int>::zeros([3], &Device::flex());
            let logits = training.forward_with(id, images(3)).unwrap();
            let gradients = cross_entropy(logits, classes, &Default::default()).mean().backward();
            training = adam.step(training, gradients, 0.01).0;
        }
        let net = training.valid();
        let after = TensorFile::from_module(&net);
        let layer = net.space().configurations()[id].cuts[0].layer;
        for name in before.names() {
            let moves = name.starts_with(&format!("stitches.{layer}.low_rank."));
            assert_eq!(before.get(name) != after.get(name), moves, "{name}");
        }
        let stitched = values(net.forward_with(id, images(3)).unwrap());
        assert_eq!(values(net.export(id).unwrap().forward(images(3))), stitched);
        assert!(distance(&stitched, &whole) > 0.0);
    }
}

#[test]
fn gradients_of_stitching_layers_are_the_slopes_of_the_loss() {
    let net = net(&[vit(4), vit(6)], SpaceConfig::default());
    let id = net.space().len() - 1;
    let layer = net.space().configurations()[id].cuts[0].layer;
    let loss = |net: &SnNet<AnchorNet>| {
        let classes = Tensor::<1, Int>::from_data(TensorData::new(vec![0i64, 1, 2], [3]), &Device::flex());
        cross_entropy(net.forward_with(id, images(3)).unwrap(), classes, &Default::default()).mean()
    };
    let training = net.clone().train();
    let gradients = loss(&training).backward();
    let gradient = training.stitches[layer].map.weight.val().grad(&gradients).unwrap();
    // Along the gradient itself, the slope is its squared norm.
    let slope = f64::from(gradient.clone().square().sum().into_scalar::<f32>());
    let step = 1e-2 / slope.sqrt();
    let moved = |by: f64| {
        let mut net = net.clone();
        net.stitches[layer].map.weight =
            net.stitches[layer].map.weight.clone().map(|weight| weight + gradient.clone() * by);
        f64::from(loss(&net).into_scalar::<f32>())
    };
    let difference = (moved(step) - moved(-step)) / (2.0 * step);
    assert!((difference / slope - 1.0).abs() < 1e-2, "{difference} against {slope}");
}

#[test]
fn threads_run_different_networks_of_one_at_the_same_time() {
    let (_, net) = nets().swap_remove(1);
    let alone: Vec<Vec<f32>> =
        (0..net.space().len()).map(|id| values(net.forward_with(id, images(2)).unwrap())).collect();
    let x = images(2);
    std::thread::scope(|scope| {
        for start in 0..4 {
            let (net, alone, x) = (&net, &alone, x.clone());
            scope.spawn(move || {
                for id in (start..net.space().len()).step_by(4) {
                    assert_eq!(values(net.forward_with(id, x.clone()).unwrap()), alone[id]);
                }
            });
        }
    });
}

#[test]
fn switching_is_by_id_and_refuses_what_is_not_there() {
    let (_, mut net) = nets().swap_remove(0);
    let last = net.space().len() - 1;
    net.set_config(last).unwrap();
    let name = net.space().configurations()[last].name();
    assert_eq!((net.config(), net.space().find(&name).unwrap()), (last, last));
    assert_eq!(values(net.forward(images(2))), values(net.forward_with(last, images(2)).unwrap()));
    let error = net.set_config(last + 1).unwrap_err();
    assert!(error.hint_text().unwrap().contains(&format!("from 0 to {last}")));
    assert_eq!(net.config(), last);
    assert!(net.space().find("s1>s0@1>2").is_err());
}

#[test]
fn pruning_keeps_the_best_of_each_class_of_cost_and_the_layers_that_they_need() {
    let mut net = net(&[vit(4), vit(6), vit(8)], SpaceConfig::default());
    net.fit(images(40), &cx()).unwrap();
    let merits = net.alignments(images(40), &cx()).unwrap();
    assert!(merits.iter().all(|(_, merit)| (0.0..=1.0).contains(merit)), "{merits:?}");
    let whole = net.clone();
    let pruned = net.prune(3, &merits);
    assert_eq!(pruned.space().len(), 3 + 3);
    assert_eq!(pruned.stitches.len(), pruned.space().layers().len());
    for (id, configuration) in pruned.space().configurations().iter().enumerate() {
        let old = whole.space().find(&configuration.name()).unwrap();
        let expected = values(whole.forward_with(old, images(2)).unwrap());
        assert_eq!(values(pruned.forward_with(id, images(2)).unwrap()), expected);
    }
    // More than there are: all stay.
    assert_eq!(whole.clone().prune(1000, &merits).space(), whole.space());
    assert_eq!(whole.clone().prune(0, &merits).space().len(), 3);
    // The stitch whose cut has all the merit is the one that stays.
    for (wanted, _) in &merits {
        let merits: Vec<_> =
            merits.iter().map(|&(cut, _)| (cut, f64::from(u8::from(cut == *wanted)))).collect();
        let pruned = whole.clone().prune(1, &merits);
        let names: Vec<String> = whole.space().cuts_of(wanted.layer).map(|(c, _)| c.name()).collect();
        assert!(names.contains(&pruned.space().configurations()[3].name()), "{names:?}");
    }
}

#[test]
fn activations_that_are_not_finite_are_traced_to_their_block() {
    let anchor = draw(&vit(4), 0);
    let mut file = TensorFile::from_module(&anchor);
    file.insert("blocks.1.mlp.fc2.bias", HostTensor::float([4], vec![f32::MAX, 0.0, 0.0, 0.0]));
    file.insert("blocks.2.mlp.fc2.bias", HostTensor::float([4], vec![f32::MAX, 0.0, 0.0, 0.0]));
    let broken = file.into_module(anchor.clone()).unwrap();
    let mut net = SnNetConfig::new(vec![anchor, broken]).init(&Device::flex()).unwrap();
    let error = net.fit(images(8), &cx()).unwrap_err().to_string();
    assert!(error.contains("of anchor 1 gives numbers that are not finite"), "{error}");
}

/// Images whose brightness varies, with what scales them.
fn labelled_images(count: usize) -> (Images, Scaling) {
    let pixels = values(images(count)).iter().map(|x| 0.5 + 0.1 * x).collect();
    let classes = ["a", "b", "c"].map(String::from).to_vec();
    let labels = (0..count).map(|image| image % 3).collect();
    let images = Images { shape: IMAGE, pixels, labels, classes, white: 1.0 };
    (images.clone(), Scaling::of(&images))
}

#[test]
fn calibrated_norms_hold_the_means_over_the_images_and_change_nothing_else() {
    let mut net = net(&[resnet(2), resnet(4)], SpaceConfig::default());
    let before: Vec<_> =
        (0..net.space().len()).map(|id| values(net.forward_with(id, images(5)).unwrap())).collect();
    // Two batches of 128 images.
    let (all, scaling) = labelled_images(256);
    let everything = 0..net.space().len();
    net.calibrate(everything, &all, &scaling, &cx()).unwrap();
    assert_eq!(net.calibrated(), net.space().len());

    // The first norm of every network comes after the first convolution, of which the means are known.
    let x = scaling.tensor(&all, &(0..256).collect::<Vec<_>>(), &Device::flex());
    let AnchorNet::Resnet(first) = &net.anchors[0] else { unreachable!("a resnet was made") };
    let seen = first.conv1.as_ref().unwrap().forward(x);
    let means = values(seen.swap_dims(0, 1).flatten::<2>(1, 3).mean_dim(1));
    let file = net.save_statistics();
    let stitch = net.space().find("s0>s1@1>2").unwrap();
    for id in [0, stitch] {
        let found = file.get(&format!("{id}.0.running_mean")).unwrap().as_floats().unwrap();
        assert!(distance(found, &means) < 1e-5, "{found:?} {means:?}");
    }
    // Two of the norms of the small anchor's last block are the stitch's no more.
    assert_eq!(file.get(&format!("{stitch}.8.running_var")).unwrap().shape, [8 * 2]);

    let after = |id| values(net.forward_with(id, images(5)).unwrap());
    for (id, before) in before.iter().enumerate() {
        assert!(distance(&after(id), before) > 1e-3, "{id} runs with statistics of its own");
        assert_eq!(after(id), values(net.export(id).unwrap().forward(images(5))), "{id}");
    }
    let shared = net.clone().share_norms();
    let unchanged = |(id, before): (usize, &Vec<f32>)| {
        assert_eq!(*before, values(shared.forward_with(id, images(5)).unwrap()));
    };
    before.iter().enumerate().for_each(unchanged);

    // A snapshot for validation, as training returns it, has the same.
    let mut snapshot = shared.valid();
    snapshot.calibrate(0..net.space().len(), &all, &scaling, &cx()).unwrap();
    let again = snapshot.save_statistics();
    assert!(file.names().all(|name| file.get(name) == again.get(name)));

    let mut loaded = net.clone().share_norms();
    loaded.load_statistics(file, &cx()).unwrap();
    for id in 0..loaded.space().len() {
        assert_eq!(after(id), values(loaded.forward_with(id, images(5)).unwrap()), "{id}");
    }
}

#[test]
fn networks_without_batch_norms_have_nothing_to_calibrate() {
    let (images, scaling) = labelled_images(1);
    let mut transformers = net(&[vit(4), vit(6)], SpaceConfig::default());
    transformers.calibrate(0..2, &images, &scaling, &cx()).unwrap();
    assert_eq!(transformers.calibrated(), 0);
    let mut convolutions = net(&[resnet(2), resnet(4)], SpaceConfig::default());
    let error = convolutions.calibrate(0..2, &images, &scaling, &cx()).unwrap_err();
    assert!(error.to_string().contains("1 image has no variance"));
}
