//! What must hold whatever the weights.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use kiln_core::{Context, HostTensor, TensorFile};
use kiln_data::Images;
use kiln_neumeta::data::{Samples, scenes};
use kiln_neumeta::family::Source;
use kiln_neumeta::inr::crop;
use kiln_neumeta::objective::Run;
use kiln_neumeta::prune::{Importance, cut, prune};
use kiln_neumeta::smooth::{Order, mean_variation};
use kiln_neumeta::{
    Arch, BaseTerm, CliquePermuter, Family, FamilyConfig, Goal, Inr, InrConfig, KernelCrop, NetConfig,
    NoiseOn, Plain, ShpSolver, Size, Trainable, WeightCoords,
};
use rand::RngExt;

fn net(arch: &str, image: [usize; 3]) -> NetConfig {
    let arch: Arch = arch.parse().unwrap();
    let goal = match arch {
        Arch::Unet => Goal::Segment,
        Arch::Vae => Goal::Generate,
        _ => Goal::Classify,
    };
    NetConfig { goal, arch, image, classes: 3 }
}

fn cx() -> Context {
    Context::for_tests("unused")
}

/// A network whose biases are random too.
fn random(net: &NetConfig, size: Size) -> Plain {
    let graph = net.build(size).unwrap().graph;
    let mut rng = cx().rng("weights", 0);
    let mut draw = |count: usize| (0..count).map(|_| rng.random::<f32>() - 0.5).collect();
    let tensors = graph.tensors().iter().map(|spec| draw(spec.numel())).collect();
    Plain { config: net.clone(), size, tensors }
}

fn family(net: NetConfig, full: usize, base: BaseTerm, noise: f64) -> (Family, Inr) {
    let inr = InrConfig { hidden: 6, frequencies: 3, ..Family::inr_config(&net, full).unwrap() };
    let plain = random(&net, Size::new(full));
    let config = FamilyConfig {
        net,
        full,
        widths: vec![2, full],
        depths: vec![],
        kernels: vec![],
        kernel_crop: KernelCrop::Flat,
        inr,
        base,
        output_scale: true,
        noise,
        noise_on: NoiseOn::All,
    };
    let family = Family::new(config, plain).unwrap();
    let inr = family.draw(&cx().device, &mut cx().rng("inr", 0));
    (family, inr)
}

#[test]
fn ordering_channels_leaves_every_network_as_it_is() {
    for (arch, image) in [
        ("small", [1, 9, 8]),
        ("lenet", [3, 8, 8]),
        ("resnet14", [1, 12, 12]),
        ("unet", [1, 10, 7]),
        ("vae", [1, 9, 8]),
        ("a(cin->2w,1x1)+relu; b(2w->w,3x3)+relu+global mean; fc(w->classes)", [2, 5, 5]),
    ] {
        for order in [Order::Shortest, Order::Random] {
            let plain = random(&net(arch, image), Size::new(6));
            let permuter = CliquePermuter { solver: ShpSolver::default(), order };
            let (ordered, report) = permuter.permute(&plain, &cx()).unwrap();
            assert_ne!(ordered.tensors, plain.tensors, "{arch}");
            assert!(report.output_change < 1e-5, "{arch}: {}", report.output_change);
            if order == Order::Shortest {
                assert!(report.cliques.iter().all(|clique| clique.after <= clique.before + 1e-3), "{arch}");
                assert!(report.variation_after < report.variation_before, "{arch}");
            }
        }
    }
}

#[test]
fn tensors_tied_by_an_addition_are_one_clique_and_ends_are_none() {
    let graph = net("resnet8", [1, 8, 8]).build(Size::new(8)).unwrap().graph;
    // The stem with the first stage; the second and third stage; and the inside of each block.
    assert_eq!(graph.cliques().iter().map(|clique| clique.channels).sum::<usize>(), 2 * (2 + 4 + 8));
    assert_eq!(graph.cliques().len(), 6);
    let narrow = net("small", [1, 8, 8]).build(Size::new(1)).unwrap().graph;
    assert_eq!(narrow.cliques().iter().map(|clique| clique.channels).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn a_network_sampled_alone_is_the_one_written_together_with_others() {
    let (family, inr) = family(net("lenet", [1, 8, 8]), 5, BaseTerm::None, 1.0);
    let device = cx().device;
    for kernel in [None, Some(3), Some(1)] {
        let size = Size { kernel, ..Size::new(3) };
        let together = family.write(&inr, size, None, |_| Source::Learned, &device).unwrap();
        let graph = family.config.net.build(size).unwrap().graph;
        let specs = graph.tensors();
        for (index, (spec, tensor)) in specs.iter().zip(together).enumerate() {
            let coords = WeightCoords::of(index, specs.len(), spec);
            let rows: Vec<Tensor<2>> = coords
                .rows
                .iter()
                .map(|&row| inr.raw(index, &WeightCoords { rows: vec![row] }, &family.config.inr, &device))
                .collect();
            let alone = crop(Tensor::cat(rows, 0), spec).reshape([spec.numel()]);
            // The family multiplies by the spread of the full tensor: compare the directions.
            let largest = |x: &Tensor<1>| x.clone().abs().max().into_scalar::<f32>();
            let scale = largest(&tensor) / largest(&alone);
            let difference = (tensor - alone * scale).abs().max().into_scalar::<f32>();
            assert!(difference < 1e-5 * scale.max(1.0), "{} {size}: {difference}", spec.name);
        }
    }
}

#[test]
fn a_small_kernel_is_the_middle_of_the_row_as_published_or_of_the_square() {
    for (crop, taps) in [
        (KernelCrop::Flat, [8, 9, 10, 11, 12, 13, 14, 15, 16]),
        (KernelCrop::Middle, [6, 7, 8, 11, 12, 13, 16, 17, 18]),
    ] {
        for base in [BaseTerm::None, BaseTerm::Interp] {
            let (family, _) = family(net("lenet", [1, 8, 8]), 4, base, 0.0);
            let config = FamilyConfig { kernel_crop: crop, ..family.config };
            let family = Family::new(config, family.base).unwrap();
            // A function that writes something on a base as well.
            let inr = family.config.inr.init(false, &cx().device, &mut cx().rng("inr", 0));
            let sample = |kernel| {
                let size = Size { kernel: Some(kernel), ..Size::new(3) };
                family.sample(&inr, size, 1, &cx()).unwrap()
            };
            let (whole, small, one) = (sample(5), sample(3), sample(1));
            assert_eq!(whole.size, Size::new(3));
            // The first layer's kernels are 3 x 3 at most, the second's 5 x 5.
            assert_eq!(whole.tensors[0], small.tensors[0]);
            let kernels = whole.tensors[2].chunks(25).zip(small.tensors[2].chunks(9)).zip(&one.tensors[2]);
            for ((whole, small), one) in kernels {
                if base == BaseTerm::None {
                    assert_eq!(taps.map(|tap| whole[tap]).as_slice(), small);
                } else if crop == KernelCrop::Middle {
                    let apart = |(tap, w): (usize, &f32)| (whole[tap] - w).abs() < 1e-6;
                    assert!(taps.into_iter().zip(small).all(apart));
                }
                assert!((whole[12] - one).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn a_folded_kernel_sums_to_the_whole_one_and_is_it_on_an_even_picture() {
    for base in [BaseTerm::None, BaseTerm::Interp] {
        let (family, _) = family(net("lenet", [1, 8, 8]), 4, base, 0.0);
        let config = FamilyConfig { kernel_crop: KernelCrop::Fold, ..family.config };
        let family = Family::new(config, family.base).unwrap();
        let inr = family.config.inr.init(false, &cx().device, &mut cx().rng("inr", 0));
        let sample = |kernel| {
            let size = Size { kernel: Some(kernel), ..Size::new(3) };
            family.sample(&inr, size, 1, &cx()).unwrap().tensors
        };
        let (whole, small, one) = (sample(5), sample(3), sample(1));
        let kernels = whole[2].chunks(25).zip(small[2].chunks(9)).zip(&one[2]);
        for ((whole, small), one) in kernels {
            let sum: f32 = whole.iter().sum();
            assert!((sum - small.iter().sum::<f32>()).abs() < 1e-4 && (sum - one).abs() < 1e-4);
            // The corner takes the four numbers around the corner of the whole kernel, the middle stays.
            let corner = whole[0] + whole[1] + whole[5] + whole[6];
            assert!((small[0] - corner).abs() < 1e-5 && (small[4] - whole[12]).abs() < 1e-6);
        }
        // Biases and linear layers have no kernels.
        assert_eq!((&whole[3], &whole[6]), (&small[3], &one[6]));
    }
}

#[test]
fn a_network_with_kernels_cut_is_the_base_of_the_family_there() {
    let (family, inr) = family(net("lenet", [1, 8, 8]), 4, BaseTerm::Interp, 0.0);
    for kernel in [1, 3] {
        let size = Size { kernel: Some(kernel), ..family.full() };
        let cut = cut(&family.base, kernel).unwrap();
        assert_eq!((cut.size, &cut.tensors), (size, &family.sample(&inr, size, 1, &cx()).unwrap().tensors));
    }
    assert_eq!(cut(&family.base, 5).unwrap(), family.base);
    assert!(cut(&family.base, 7).is_err());
}

#[test]
fn on_a_base_the_untrained_family_begins_with_the_full_network() {
    let (family, inr) = family(net("lenet", [1, 8, 8]), 4, BaseTerm::Interp, 1.0);
    assert_eq!(family.sample(&inr, family.full(), 3, &cx()).unwrap().tensors, family.base.tensors);
    // Half as many inputs count twice as much each; a channel is the mean of the two whose place it has.
    let half = family.sample(&inr, Size::new(2), 1, &cx()).unwrap();
    let (small, full) = (&half.tensors[2], &family.base.tensors[2]);
    assert_eq!((small.len(), full.len()), (4 * 2 * 25, 8 * 4 * 25));
    let at = |o: usize, c: usize| full[(o * 4 + c) * 25 + 7];
    let expected = 2.0 * (at(2, 0) + at(2, 1) + at(3, 0) + at(3, 1)) / 4.0;
    assert!((small[2 * 25 + 7] - expected).abs() < 1e-6);
}

#[test]
fn a_network_whose_channels_come_in_equal_pairs_is_merged_without_loss() {
    let config = net("small", [1, 8, 8]);
    let half = random(&config, Size::new(3));
    // Each channel twice, each of the two giving half to what follows.
    let graph = config.build(half.size).unwrap().graph;
    let twice =
        |spec: &kiln_neumeta::graph::TensorSpec, values: &[f32], last: bool, first: bool| -> Vec<f32> {
            let [outputs, inputs, taps] = spec.extents();
            let (o_times, c_times) =
                (if last { 1 } else { 2 }, if first || spec.shape.len() == 1 { 1 } else { 2 });
            let kernel = |o: usize, c: usize| values[(o * inputs + c) * taps..][..taps].to_vec();
            (0..outputs * o_times)
                .flat_map(|o| {
                    (0..inputs * c_times)
                        .flat_map(move |c| kernel(o / o_times, c / c_times))
                        .collect::<Vec<_>>()
                })
                .map(|w| w / c_times as f32)
                .collect()
        };
    let specs = graph.tensors();
    let tensors = specs.iter().zip(&half.tensors).enumerate();
    let tensors =
        tensors.map(|(i, (spec, values))| twice(spec, values, i >= specs.len() - 2, i < 2)).collect();
    let full = Plain { config: config.clone(), size: Size::new(6), tensors };
    let (mut family, inr) = family(config, 6, BaseTerm::Interp, 0.0);
    family = Family::new(family.config, full).unwrap();
    let merged = family.sample(&inr, Size::new(3), 1, &cx()).unwrap();
    for (found, expected) in merged.tensors.iter().flatten().zip(half.tensors.iter().flatten()) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
}

#[test]
fn without_noise_draws_are_equal_and_with_noise_their_mean_settles() {
    let (quiet, inr) = family(net("small", [1, 8, 8]), 4, BaseTerm::None, 0.0);
    let sample = |family: &Family, draws, seed| {
        let cx = Context { seed, ..cx() };
        family.sample(&inr, Size::new(3), draws, &cx).unwrap().tensors
    };
    // A mean of equal numbers differs from them by roundings at most.
    let apart = |a: &[Vec<f32>], b: &[Vec<f32>]| -> f32 {
        a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).sum()
    };
    assert_eq!(sample(&quiet, 1, 0), sample(&quiet, 1, 1));
    assert!(apart(&sample(&quiet, 1, 0), &sample(&quiet, 5, 1)) < 1e-4);
    let (noisy, _) = family(net("small", [1, 8, 8]), 4, BaseTerm::None, 1.0);
    let between = |draws| apart(&sample(&noisy, draws, 1), &sample(&noisy, draws, 2));
    let (few, many) = (between(4), between(100));
    assert!(many < 0.5 * few, "{few} {many}");
    assert_eq!(sample(&noisy, 4, 1), sample(&noisy, 4, 1));
}

#[test]
fn narrow_networks_and_small_kernels_and_depths_are_written() {
    let (family, inr) = family(net("resnet20", [1, 8, 8]), 8, BaseTerm::Interp, 1.0);
    for size in [Size::new(1), Size { width: 5, depth: Some(1), kernel: Some(1) }, Size::new(12)] {
        let plain = family.sample(&inr, size, 2, &cx()).unwrap();
        let graph = family.config.net.build(size).unwrap().graph;
        assert_eq!(plain.tensors.iter().map(Vec::len).sum::<usize>(), graph.numel());
        let built = family.config.net.build(size).unwrap();
        let parameters = plain.parameters(&cx().device);
        let run = Run { goal: Goal::Classify, built: &built, parameters: &parameters, norms: &[] };
        let logits = run.output(Tensor::ones([2, 1, 8, 8], &cx().device)).unwrap();
        assert_eq!(logits.dims(), [2, 3, 1, 1]);
        assert!(logits.sum().into_scalar::<f32>().is_finite());
    }
    assert_eq!(family.width_within(family.base.tensors.iter().map(Vec::len).sum(), None, None).unwrap(), 8);
    assert!(family.width_within(10, None, None).is_err());
}

/// Adds to one element of the module's parameters, counted over all of them.
struct Nudge {
    left: usize,
    by: f32,
}

impl ModuleMapper for Nudge {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let value = param.val();
        let (count, shape) = (value.dims().iter().product::<usize>(), value.dims());
        if self.left >= count {
            self.left -= count;
            return param;
        }
        let mut values = value.clone().into_data().try_to_vec::<f32>().unwrap();
        values[self.left] += self.by;
        self.left = usize::MAX;
        let nudged = burn::tensor::TensorData::new(values, shape);
        Param::initialized(param.id, Tensor::from_data(nudged, &value.device()))
    }
}

#[test]
fn gradients_through_written_weights_are_those_of_finite_differences() {
    let cx = cx();
    let (family, inr) = family(net("small", [1, 8, 8]), 3, BaseTerm::None, 0.0);
    let mut rng = cx.rng("pictures", 0);
    let images = Images {
        shape: [1, 8, 8],
        pixels: (0..6 * 64).map(|_| rng.random()).collect(),
        labels: vec![0, 1, 2, 0, 1, 2],
        classes: ["a", "b", "c"].map(String::from).to_vec(),
        white: 1.0,
    };
    let samples = Samples { images, masks: vec![] };
    let built = family.config.net.build(Size::new(2)).unwrap();
    let loss = |inr: &Inr| {
        let written = family.write(inr, Size::new(2), None, |_| Source::Learned, &cx.device).unwrap();
        let run = Run { goal: Goal::Classify, built: &built, parameters: &written, norms: &[] };
        run.loss(&samples, &cx.device, &mut cx.rng("unused", 0)).unwrap().task
    };
    let training = inr.clone().train();
    let gradients = loss(&training).backward();
    let slope = |tensor: Tensor<2>| -> Vec<f32> {
        tensor.grad(&gradients).unwrap().into_data().try_to_vec().unwrap()
    };
    // The weights into the first layer of the first tensor come first in the module, [inputs, hidden].
    let found = slope(training.mlps[0].input.weight.val());
    let largest = found.iter().fold(0.0f32, |a, g| a.max(g.abs()));
    for element in [0, 7, 20, found.len() - 1] {
        let step = 1e-2;
        let at = |by| {
            let nudged = inr.clone().map(&mut Nudge { left: element, by });
            f64::from(loss(&nudged).into_scalar::<f32>())
        };
        let expected = (at(step) - at(-step)) / (2.0 * f64::from(step));
        let difference = (f64::from(found[element]) - expected).abs();
        assert!(difference < 0.02 * f64::from(largest) + 1e-5, "{element}: {} {expected}", found[element]);
    }
    assert!(largest > 1e-5);
}

#[test]
fn pruning_to_the_full_width_changes_nothing_and_keeps_the_largest_channels() {
    let mut plain = random(&net("resnet8", [1, 8, 8]), Size::new(8));
    let samples = Samples {
        images: Images {
            shape: [1, 8, 8],
            pixels: vec![0.5; 64],
            labels: vec![1],
            classes: vec![],
            white: 1.0,
        },
        masks: vec![],
    };
    for importance in Importance::ALL {
        let same = prune(&plain, 8, importance, &samples, &cx()).unwrap();
        assert_eq!(same.tensors, plain.tensors);
        let half = prune(&plain, 4, importance, &samples, &cx()).unwrap();
        let graph = plain.config.build(Size::new(4)).unwrap().graph;
        assert_eq!(
            half.tensors.iter().map(Vec::len).collect::<Vec<_>>(),
            graph.tensors().iter().map(|spec| spec.numel()).collect::<Vec<_>>()
        );
    }
    // A channel of the first block's inside with huge weights stays.
    let names: Vec<String> =
        plain.config.build(plain.size).unwrap().graph.tensors().into_iter().map(|t| t.name).collect();
    let inside = names.iter().position(|name| name == "stage1.0.conv1.bias").unwrap();
    plain.tensors[inside] = vec![0.0, 50.0];
    let kept = prune(&plain, 4, Importance::L1, &samples, &cx()).unwrap();
    assert_eq!(kept.tensors[inside], [50.0]);
}

#[test]
fn a_network_with_batch_norms_is_folded_from_a_file_and_from_training_alike() {
    let net = net("resnet8", [1, 8, 8]);
    let size = Size::new(4);
    let graph = net.build(size).unwrap().graph;
    let device = Device::flex();
    let model = Trainable::draw(&graph, &device, &mut cx().rng("draw", 0));
    let mut rng = cx().rng("statistics", 0);
    let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| 0.5 + rng.random::<f32>()).collect() };
    let vector = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
    let mut file = TensorFile::new();
    for (spec, tensor) in graph.tensors().iter().zip(model.parameters()) {
        let values = tensor.into_data().try_to_vec().unwrap();
        file.insert(spec.name.clone(), HostTensor::float(spec.shape.clone(), values));
    }
    let mut model = model;
    for (layer, norm) in graph.layers().iter().filter(|layer| layer.norm).zip(&mut model.norms) {
        let count = layer.outputs.channels;
        let [scale, shift, mean, variance] = [0; 4].map(|_| draw(count));
        norm.gamma = Param::from_tensor(vector(&scale));
        norm.beta = Param::from_tensor(vector(&shift));
        norm.running_mean.update(vector(&mean));
        norm.running_var.update(vector(&variance));
        for (part, values) in
            [("weight", scale), ("bias", shift), ("running_mean", mean), ("running_var", variance)]
        {
            file.insert(format!("{}.norm.{part}", layer.name), HostTensor::float([count], values));
        }
    }
    let folded = model.to_plain(&net, size).unwrap();
    assert_eq!(Plain::from_file(net.clone(), size, file).unwrap(), folded);

    let model = model.valid();
    let built = net.build(size).unwrap();
    let x = Tensor::<4>::ones([2, 1, 8, 8], &device);
    let (with, without) = (model.parameters(), folded.parameters(&device));
    let with = model.run(&net, &built, &with).output(x.clone()).unwrap();
    let without =
        Run { goal: Goal::Classify, built: &built, parameters: &without, norms: &[] }.output(x).unwrap();
    let difference = (with.clone() - without).abs().max().into_scalar::<f32>();
    assert!(difference < 1e-4 * with.abs().max().into_scalar::<f32>(), "{difference}");
}

#[test]
fn scenes_have_a_class_wherever_there_is_ink() {
    let images = Images {
        shape: [1, 2, 2],
        pixels: vec![1.0, 0.0, 0.5, 1.0, 0.2, 0.2, 0.2, 0.2],
        labels: vec![0, 4],
        classes: vec![],
        white: 1.0,
    };
    let samples = scenes(&images, 6, 5, &mut cx().rng("scenes", 0));
    assert_eq!((samples.len(), samples.masks.len()), (5, 5 * 36));
    for (pixel, class) in samples.images.pixels.iter().zip(&samples.masks) {
        assert_eq!(*pixel > 0.0, *class > 0);
        assert!([0, 1, 5].contains(class));
    }
}

#[test]
fn variation_of_an_ordered_network_is_lower_than_of_a_shuffled_one() {
    let plain = random(&net("small", [1, 8, 8]), Size::new(8));
    let graph = plain.config.build(plain.size).unwrap().graph;
    let variation = |order| {
        let permuter = CliquePermuter { solver: ShpSolver::default(), order };
        mean_variation(&graph, &permuter.permute(&plain, &cx()).unwrap().0.tensors)
    };
    assert!(variation(Order::Shortest) < variation(Order::Random));
}
