//! What must not depend on the layout, and what it costs.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_cluster::{Communicator, Op, Operation, run_threads};
use kiln_core::{Context, ModelFolder, TensorFile};
use kiln_megatron::checkpoint::{self, Whole, read_gpt2, write_gpt2};
use kiln_megatron::data::{Tokens, random_samples};
use kiln_megatron::layout::ParallelLayout;
use kiln_megatron::model::GptConfig;
use kiln_megatron::perf::{Cluster, GptShape, PerfModel, plan};
use kiln_megatron::ranks::Ranks;
use kiln_megatron::real::Real;
use kiln_megatron::schedule::{Kind, Schedule};
use kiln_megatron::trainer::{TrainOptions, Trainer};

fn config() -> GptConfig {
    GptConfig { vocab_multiple: 4, ..GptConfig::new(6, 12, 6, 29) }.with_max_seq(8)
}

fn options() -> TrainOptions {
    TrainOptions::new(8, 2, 7)
}

fn samples(steps: usize) -> Tokens {
    random_samples([steps, 8, 8], 29, 3)
}

fn trainer<T: Real>(
    config: &GptConfig,
    layout: &ParallelLayout,
    options: &TrainOptions,
    comm: Communicator,
) -> Trainer<T> {
    let cx = Context::for_tests("unused");
    let ranks = Ranks::new(layout, comm).unwrap();
    Trainer::new(config, options, ranks, |_| None, &cx).unwrap()
}

#[test]
fn gradients_of_every_kind_of_parallelism_are_finite_differences() {
    let rows = samples(1).batch(0, (8, 7), 0);
    for layout in [ParallelLayout::new(2, 1, 1), ParallelLayout::new(3, 2, 1), ParallelLayout::new(1, 1, 2)] {
        for smoothing in [0.0, 0.1] {
            let options = TrainOptions { label_smoothing: smoothing, ..options() };
            let slopes = run_threads(layout.ranks(), |comm| {
                let mut trainer = trainer::<f64>(&config(), &layout, &options, comm);
                trainer.gradients(&rows)?;
                // One direction for all parameters: the same on ranks that have the same parameter.
                let direction: Vec<f64> = trainer.parameters.gradients.clone();
                let values = trainer.parameters.values.clone();
                let counted: f64 = trainer
                    .parameters
                    .specs
                    .iter()
                    .filter(|spec| spec.counted)
                    .flat_map(|spec| &direction[spec.range.clone()])
                    .map(|g| g * g)
                    .sum();
                let mut squares = [counted];
                trainer.ranks.model.all_reduce(&mut squares, Op::Sum)?;
                let mut loss = |step: f64| {
                    for (value, (&start, &d)) in
                        trainer.parameters.values.iter_mut().zip(values.iter().zip(&direction))
                    {
                        *value = start + step * d;
                    }
                    trainer.parameters.refresh();
                    Ok::<f64, kiln_core::Error>(trainer.gradients(&rows)?.loss)
                };
                Ok(((loss(1e-5)? - loss(-1e-5)?) / 2e-5, squares[0]))
            })
            .unwrap();
            for (slope, squared) in slopes {
                assert!(
                    squared > 1e-3 && (slope - squared).abs() <= 1e-6 * squared,
                    "{layout:?}: {slope}, should be {squared}"
                );
            }
        }
    }
}

#[test]
fn parameters_that_tensor_ranks_share_have_equal_gradients_without_communication() {
    let rows = samples(1).batch(0, (8, 7), 0);
    let layout = ParallelLayout::new(3, 1, 1);
    let shared = run_threads(3, |comm| {
        let mut trainer = trainer::<f32>(&config(), &layout, &options(), comm);
        trainer.gradients(&rows)?;
        let parameters = &trainer.parameters;
        let whole = parameters.specs.iter().filter(|spec| spec.shape == spec.whole && spec.whole.len() == 1);
        let own = whole.filter(|spec| !spec.name.contains("qkv") && !spec.name.contains("fc1"));
        Ok(own.map(|spec| parameters.gradients[spec.range.clone()].to_vec()).collect::<Vec<_>>())
    })
    .unwrap();
    assert_eq!(shared[0].len(), 6 * 6 + 2);
    assert!(shared.iter().all(|rank| *rank == shared[0]), "bit for bit");
}

/// Bytes that all ranks of a group sent and received.
fn bytes(comm: &Communicator, operation: Operation) -> u64 {
    let exchange = comm.traffic().of(operation);
    exchange.bytes_sent + exchange.bytes_received
}

#[test]
fn gradients_reduced_beside_the_backward_pass_are_those_reduced_after_it_bit_for_bit() {
    let rows = samples(1).batch(0, (8, 7), 0);
    let interleaved = ParallelLayout::new(1, 2, 2).with_chunks(3);
    for (layout, schedule) in [
        (ParallelLayout::new(1, 1, 2), Kind::OneForwardOneBackward),
        (ParallelLayout::new(2, 1, 2), Kind::OneForwardOneBackward),
        (ParallelLayout::new(1, 2, 2), Kind::Gpipe),
        (interleaved, Kind::Interleaved),
    ] {
        // A divided optimiser reduces everything at the end.
        let gradients = |distributed_optimiser, bucket_bytes| {
            let options =
                TrainOptions { distributed_optimiser, bucket_bytes, schedule, micro_batch: 1, ..options() };
            run_threads(layout.ranks(), |comm| {
                let mut trainer = trainer::<f32>(&config(), &layout, &options, comm);
                trainer.gradients(&rows)?;
                assert!(trainer.parameters.finished.is_none());
                Ok((trainer.moments.range.clone(), trainer.parameters.gradients.clone()))
            })
            .unwrap()
        };
        let after = gradients(true, 1 << 20);
        for bucket_bytes in [16, 1 << 20] {
            for ((range, after), (_, beside)) in after.iter().zip(gradients(false, bucket_bytes)) {
                assert_eq!(after[range.clone()], beside[range.clone()], "{layout:?}");
            }
        }
    }
}

#[test]
fn traffic_is_what_the_formulas_say() {
    let (b, s, h, t) = (2, 7, 12, 2);
    let layout = ParallelLayout::new(t, 1, 1);
    let rows = samples(1).batch(0, (8, 7), 0);
    // What one all-reduce of b s h elements costs a rank here.
    let one = run_threads(t, |comm| {
        comm.all_reduce(&mut vec![1.0f32; b * s * h], Op::Sum)?;
        Ok(bytes(&comm, Operation::AllReduce))
    })
    .unwrap();
    let of_layers = |layers: usize, recompute| {
        let config = GptConfig { layers, ..config() };
        let options = TrainOptions { recompute, ..options() };
        let sent = run_threads(t, |comm| {
            let mut trainer = trainer::<f32>(&config, &layout, &options, comm);
            trainer.gradients(&rows)?;
            assert_eq!(bytes(&trainer.ranks.tensor, Operation::AllGather), 0, "logits are never gathered");
            Ok(bytes(&trainer.ranks.tensor, Operation::AllReduce))
        });
        sent.unwrap()[0]
    };
    use kiln_megatron::stage::Recompute;
    let micro_batches = 4;
    for (recompute, reductions) in [(Recompute::None, 4), (Recompute::Selective, 4), (Recompute::Full, 6)] {
        let layer = of_layers(3, recompute) - of_layers(2, recompute);
        assert_eq!(layer, micro_batches * reductions * one[0], "{recompute:?}");
    }
    // Besides the layers: embedding forward, logits backward, and three numbers a token for the loss.
    let rest = of_layers(2, Recompute::None) - 2 * micro_batches * 4 * one[0];
    assert!(rest < micro_batches * 3 * one[0], "{rest} {}", one[0]);
}

#[test]
fn shares_of_activations_are_a_tth_of_the_bytes() {
    let rows = samples(1).batch(0, (8, 7), 0);
    let layout = ParallelLayout::new(2, 3, 1);
    let sent = |scatter_gather| {
        let options = TrainOptions { scatter_gather, ..options() };
        let ranks = run_threads(6, |comm| {
            let mut trainer = trainer::<f32>(&config(), &layout, &options, comm);
            trainer.gradients(&rows)?;
            Ok(trainer.ranks.pipe.traffic().of(Operation::Send).bytes_sent)
        });
        ranks.unwrap().iter().sum::<u64>()
    };
    // Two borders between stages, both ways, four micro-batches, b s h numbers of four bytes on each of t ranks.
    let whole = 2 * 2 * 4 * (2 * 7 * 12) * 4 * 2;
    assert_eq!((sent(false), sent(true)), (whole, whole / 2));
}

#[test]
fn uneven_stages_and_short_batches_train_as_one_rank() {
    let train = |layout: &ParallelLayout, micro_batch, schedule| {
        let options = TrainOptions { micro_batch, schedule, ..options() };
        let losses = run_threads(layout.ranks(), |comm| {
            let mut trainer = trainer::<f64>(&config(), layout, &options, comm);
            let losses =
                (0..3).map(|step| Ok(trainer.train_step(&samples(3).batch(step, (8, 7), 0), 1e-2)?.loss));
            losses.collect::<kiln_core::Result<Vec<f64>>>()
        });
        losses.unwrap().swap_remove(0)
    };
    let single = train(&ParallelLayout::new(1, 1, 1), 8, Kind::OneForwardOneBackward);
    let f_b = Kind::OneForwardOneBackward;
    for (layout, micro_batch, kind) in [
        (ParallelLayout::new(1, 3, 1).with_stage_layers(vec![1, 3, 2]), 2, f_b),
        // More stages than layers: some pass activations on as they are.
        (
            ParallelLayout::new(2, 2, 1).with_chunks(4).with_stage_layers(vec![0, 1, 1, 1, 0, 1, 2, 0]),
            1,
            Kind::Interleaved,
        ),
        // Fewer micro-batches than ranks, and one alone.
        (ParallelLayout::new(1, 6, 1), 4, f_b),
        (ParallelLayout::new(1, 3, 1), 8, Kind::Gpipe),
        (ParallelLayout::new(1, 2, 1).with_chunks(3), 4, Kind::Interleaved),
    ] {
        for (a, b) in train(&layout, micro_batch, kind).iter().zip(&single) {
            assert!((a - b).abs() < 1e-11, "{layout:?} {micro_batch}: {a} {b}");
        }
    }
}

#[test]
fn checkpoints_go_through_any_layouts_and_come_back_bit_by_bit() {
    let folder = tempfile::tempdir().unwrap();
    let layout = ParallelLayout::new(1, 1, 1);
    run_threads(1, |comm| {
        let mut trainer = trainer::<f32>(&config(), &layout, &options(), comm);
        trainer.train_step(&samples(1).batch(0, (8, 7), 0), 1e-2)?;
        checkpoint::save(&trainer, folder.path())
    })
    .unwrap();
    let mut at = checkpoint::finished(folder.path()).unwrap().remove(0);
    let first = Whole::read(&at).unwrap();
    for (number, layout) in [
        ParallelLayout::new(2, 1, 1).with_chunks(3),
        ParallelLayout::new(2, 3, 1).with_chunks(2),
        ParallelLayout::new(3, 2, 1).with_stage_layers(vec![5, 1]),
        ParallelLayout::new(6, 6, 1),
        ParallelLayout::new(1, 1, 1),
    ]
    .into_iter()
    .enumerate()
    {
        let next = folder.path().join(format!("parts{number}"));
        Whole::read(&at).unwrap().write_parts(&ModelFolder::new(&next), &layout).unwrap();
        at = next;
    }
    let last = Whole::read(&at).unwrap();
    assert_eq!((last.progress, &last.config), (first.progress, &first.config));
    let same = |a: &TensorFile, b: &TensorFile| {
        let names: Vec<&str> = a.names().collect();
        assert_eq!(names, b.names().collect::<Vec<_>>());
        assert!(names.iter().all(|name| a.get(name) == b.get(name)));
    };
    same(&first.weights, &last.weights);
    for (a, b) in first.moments.unwrap().iter().zip(last.moments.as_ref().unwrap()) {
        same(a, b);
    }
    let gpt2 = ModelFolder::new(folder.path().join("gpt2"));
    write_gpt2(&last, &gpt2).unwrap();
    same(&read_gpt2(gpt2.path()).unwrap().weights, &last.weights);
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    // From the layout it began with bit by bit, from another but for rounding.
    let began = ParallelLayout::new(2, 2, 2);
    for distributed_optimiser in [false, true] {
        let options = TrainOptions { distributed_optimiser, ..options() };
        let config = config().with_dropout(0.1);
        let run = |layout: &ParallelLayout, from: Option<&Whole>, save: Option<&std::path::Path>| {
            let losses = run_threads(layout.ranks(), |comm| {
                let ranks = Ranks::new(layout, comm)?;
                let cx = Context::for_tests("unused");
                let whole = |name: &str| from.and_then(|from| from.weight(name));
                let mut trainer = Trainer::<f32>::new(&config, &options, ranks, whole, &cx)?;
                if let Some(from) = from {
                    from.restore(&mut trainer)?;
                }
                let mut losses = Vec::new();
                while trainer.step < 6 {
                    losses.push(trainer.train_step(&samples(6).batch(trainer.step, (8, 7), 0), 1e-2)?.loss);
                    if let Some(path) = save.filter(|_| trainer.step == 3) {
                        checkpoint::save(&trainer, path)?;
                    }
                }
                Ok(losses)
            });
            losses.unwrap().swap_remove(0)
        };
        let folder = tempfile::tempdir().unwrap();
        let whole = run(&began, None, Some(folder.path()));
        let saved = Whole::read(&checkpoint::finished(folder.path()).unwrap()[0]).unwrap();
        assert_eq!(run(&began, Some(&saved), None), whole[3..]);
        for (a, b) in run(&ParallelLayout::new(3, 1, 1), Some(&saved), None).iter().zip(&whole[3..]) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }
}

#[test]
fn only_the_two_newest_finished_checkpoints_stay() {
    let folder = tempfile::tempdir().unwrap();
    let layout = ParallelLayout::new(1, 2, 1);
    run_threads(2, |comm| {
        let mut trainer = trainer::<f32>(&config(), &layout, &options(), comm);
        for step in 0..4 {
            trainer.train_step(&samples(4).batch(step, (8, 7), 0), 1e-2)?;
            checkpoint::save(&trainer, folder.path())?;
        }
        Ok(())
    })
    .unwrap();
    let names: Vec<_> = checkpoint::finished(folder.path())
        .unwrap()
        .iter()
        .map(|path| path.file_name().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["step-00000003", "step-00000004"]);
}

#[test]
fn a_loss_that_is_no_number_stops_all_ranks_and_names_step_and_layer() {
    let layout = ParallelLayout::new(2, 2, 1);
    let error = run_threads(4, |comm| {
        let mut trainer = trainer::<f32>(&config(), &layout, &options(), comm);
        trainer.train_step(&samples(1).batch(0, (8, 7), 0), 1e-2)?;
        if let Some(at) =
            trainer.parameters.specs.iter().position(|spec| spec.name == "layers.4.mlp.fc1.bias")
        {
            let range = trainer.parameters.specs[at].range.clone();
            trainer.parameters.values[range].fill(f32::NAN);
            trainer.parameters.refresh();
        }
        trainer.train_step(&samples(1).batch(0, (8, 7), 0), 1e-2)
    })
    .unwrap_err()
    .to_string();
    assert!(error.contains("loss of step 2 is NaN: layer 4 is the first"), "{error}");
}

#[test]
fn what_does_not_divide_is_refused_with_the_nearest_that_would() {
    let refusal = |layout: ParallelLayout, options: TrainOptions| {
        let error = options.check(&config(), &layout).unwrap_err();
        format!("{error}; {}", error.hint_text().unwrap_or_default())
    };
    let plain = |t, p, d| ParallelLayout::new(t, p, d);
    let cases = [
        (plain(4, 1, 1), options(), "--tensor 4 does not divide heads 6; use --tensor 3 or 6"),
        (plain(1, 4, 1), options(), "6 layers are not divisible by the 4 stages"),
        (plain(1, 4, 1), options(), "of 3 or 6"),
        (plain(1, 1, 3), options(), "the batch of 8 is not divisible by 6"),
        (plain(1, 1, 3), options(), "use --batch 6 or 12"),
        (plain(1, 1, 1).with_chunks(2), options(), "interleaved"),
        (
            plain(1, 3, 1),
            TrainOptions { schedule: Kind::Interleaved, ..options() },
            "do not divide 4 micro-batches; use 3 or 6",
        ),
        (
            plain(1, 2, 1).with_stage_layers(vec![5, 2]),
            options(),
            "adds up to 7 layers, but the network has 6",
        ),
        (plain(1, 2, 1).with_stage_layers(vec![6]), options(), "names 1 stages"),
        (plain(0, 1, 1), options(), "--tensor is 0"),
        (
            plain(1, 1, 1),
            TrainOptions { seq: 9, ..options() },
            "--seq 9 is not between 1 and the 8 positions",
        ),
    ];
    for (layout, options, words) in cases {
        let found = refusal(layout, options);
        assert!(found.contains(words), "{found}");
    }
    let error = run_threads(3, |comm| Ranks::new(&plain(2, 1, 1), comm).map(|_| ())).unwrap_err().to_string();
    assert!(error.contains("there are 3 ranks, but"), "{error}");
}

#[test]
fn plans_keep_tensor_parallelism_in_the_node_and_fit_the_memory() {
    let shape = GptShape::preset("gpt3-175b").unwrap();
    let model = PerfModel::new(Cluster::a100_selene(512), shape);
    let plans = plan(&model, 1536, 300e9).unwrap();
    let best = &plans[0];
    assert!(best.division.tensor <= 8 && best.division.pipeline > 1, "{best:?}");
    assert!(plans.iter().all(|plan| plan.memory_gb <= 80.0));
    assert!(plans.is_sorted_by(|a, b| a.iteration.seconds <= b.iteration.seconds));
    let small = PerfModel::new(Cluster::a100_selene(8), shape);
    let error = plan(&small, 64, 1e9).unwrap_err().to_string();
    assert!(error.contains("the smallest needs") && error.contains("of 80 GB"), "{error}");
    // Of a model that fits into one device, no part is given away.
    let small = PerfModel::new(Cluster::a100_selene(64), GptShape::preset("gpt2-small").unwrap());
    let best = &plan(&small, 8192, 1e9).unwrap()[0];
    assert_eq!((best.division.tensor, best.division.pipeline, best.division.data), (1, 1, 64));
}

#[test]
fn schedules_say_what_they_cannot_order() {
    let refused = |kind, p, m, v| Schedule::new(kind, p, m, v).unwrap_err().to_string();
    assert!(refused(Kind::Gpipe, 2, 2, 2).contains("2 chunks a rank need the interleaved schedule"));
    assert!(refused(Kind::Interleaved, 4, 6, 2).contains("do not divide 6 micro-batches"));
    assert!(refused(Kind::Gpipe, 0, 1, 1).contains("pipeline ranks is 0"));
}
