//! The verbs of `kiln megatron`.

mod model;
mod planning;
mod train;

use clap::{Parser, Subcommand};
use kiln_core::{Context, Result};

/// `kiln megatron …`
#[derive(Debug, Parser)]
#[command(
    name = "megatron",
    about = "Language models trained on many ranks: tensor, pipeline and data parallel"
)]
#[command(after_help = "Examples:
  kiln megatron train --data corpus.txt --tensor 2 --out model/
  kiln megatron generate --model model/ --prompt \"Once\"
  kiln megatron plan --model gpt3-175b --cluster a100-selene --gpus 1024 --global-batch 1536")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a language model on your own text
    #[command(after_help = "Examples:
  kiln megatron train --data corpus.txt --out model/                          on one rank
  kiln megatron train --data corpus.txt --tensor 2 --out model/               every layer on two ranks
  kiln megatron train --data texts/ --pipeline 2 --chunks 2 --schedule interleaved --out model/
  kiln megatron train --data lines.jsonl --text-field body --data-parallel 2 --out model/
  kiln megatron train --data corpus.txt --tensor 2 --out model/ --resume      after Ctrl-C or the loss of a rank
Repeat the whole line with --resume; the layout may be another. Writes model.safetensors, log.csv and schedule.svg.")]
    Train(Box<train::TrainArgs>),
    /// Score a trained model on a text
    #[command(after_help = "Examples:
  kiln megatron eval --model model/ --data valid.txt
  kiln megatron eval --model model/ --tokens tokens.npy --logits out.safetensors")]
    Eval(model::EvalArgs),
    /// Continue a text with a trained model
    #[command(after_help = "Example:
  kiln megatron generate --model model/ --prompt \"To be\" --max-tokens 100 --temperature 1 --top-k 40")]
    Generate(model::GenerateArgs),
    /// Bring a model or a checkpoint into the parts of another layout, into one file, or into GPT-2's names and back
    #[command(after_help = "Examples:
  kiln megatron reshard --model model/ --tensor 2 --pipeline 2 --chunks 2 --out parts/
  kiln megatron reshard --model parts/ --out whole/
  kiln megatron reshard --model whole/ --to gpt2-hf --out gpt2/
  kiln megatron reshard --model gpt2/ --from gpt2-hf --out model/")]
    Reshard(model::ReshardArgs),
    /// Show in which order pipeline ranks compute, and how long they idle
    #[command(after_help = "Examples:
  kiln megatron schedule --pipeline 4 --microbatches 8 --chunks 2 --kind interleaved --svg schedule.svg
  kiln megatron schedule --pipeline 4 --microbatches 8 --kind gpipe --json")]
    Schedule(planning::ScheduleArgs),
    /// Find the best division of a cluster for a model
    #[command(after_help = "Examples:
  kiln megatron plan --model gpt3-175b --cluster a100-selene --gpus 1024 --global-batch 1536 --tokens 300e9
  kiln megatron plan --layers 24 --hidden 2048 --heads 16 --vocab 50304 --seq 2048 --cluster cluster.toml --global-batch 512
cluster.toml has gpus, gpus_per_node, peak_tflops, memory_gb, hbm_gbps, intra_gbps, inter_gbps and latency_us.")]
    Plan(planning::PlanArgs),
    /// Compare the analytic model with the paper's measurements
    #[command(after_help = "Examples:
  kiln megatron perf --table 1
  kiln megatron perf --figure interleaving --out figures/")]
    Perf(planning::PerfArgs),
}

impl Command {
    /// Does what was asked for.
    pub fn run(&self, cx: &Context) -> Result<()> {
        match &self.verb {
            Verb::Train(args) => args.run(cx),
            Verb::Eval(args) => args.run(cx),
            Verb::Generate(args) => args.run(cx),
            Verb::Reshard(args) => args.run(cx),
            Verb::Schedule(args) => args.run(cx),
            Verb::Plan(args) => args.run(cx),
            Verb::Perf(args) => args.run(cx),
        }
    }
}
