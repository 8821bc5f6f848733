//! `kiln oneflow predict`

use std::path::PathBuf;

use burn::tensor::TensorData;
use clap::Args;
use kiln_core::{Context, Error, HostTensor, ModelFolder, Result, TensorFile};
use kiln_data::write_tensors;
use serde_json::json;

use super::Source;
use super::run::named;
use crate::case::{Examples, KIND};
use crate::model::Model;
use crate::network::{Loss, Rows};

#[derive(Debug, Args)]
pub struct PredictArgs {
    #[command(flatten)]
    source: Source,
    /// Examples as for training; what is to be predicted scores the result
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// --model and --graph of other systems: the output that is scored [default: the first]
    #[arg(long, value_name = "NAME")]
    output: Option<String>,
    /// --model and --graph of other systems: the loss for which it was trained [default: by the type of y]
    #[arg(long, value_enum)]
    loss: Option<Loss>,
    /// File for the scores, .npz or .safetensors
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl PredictArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        match &self.source.model {
            Some(model) if ModelFolder::new(model).kind()? == KIND => self.of_case(model, cx),
            _ => self.of_network(cx),
        }
    }

    /// A network of any system, so many examples at once as its graph takes.
    fn of_network(&self, cx: &Context) -> Result<()> {
        let trainee = self.source.trainee(None, None, cx)?;
        let rows = Rows::read(&self.data, &trainee.graph)?;
        let output = trainee.output(self.output.as_deref())?;
        let port = &trainee.graph.outputs[output].port;
        let batch = trainee.batch()?;
        let mut found: Vec<Vec<f32>> = vec![Vec::new(); trainee.graph.outputs.len()];
        let progress = cx.progress(rows.count as u64, "examples");
        for start in (0..rows.count).step_by(batch) {
            let count = batch.min(rows.count - start);
            // The last row fills what the last batch lacks.
            let places: Vec<usize> = (start..start + batch).map(|row| row.min(rows.count - 1)).collect();
            let outputs = trainee.graph.run(&rows.at(&places))?;
            for ((found, data), output) in found.iter_mut().zip(&outputs).zip(&trainee.graph.outputs) {
                if output.port.shape.first().is_none_or(|rows| !rows.is_multiple_of(batch)) {
                    return Err(Error::usage(format!(
                        "the output \"{}\" {:?} has no row for each of {batch} examples",
                        output.port.name, output.port.shape
                    ))
                    .hint("run it by `kiln oneflow run` or `kiln graph run`"));
                }
                let width = data.num_elements() / batch;
                found.extend(data.iter::<f32>().take(count * width));
            }
            progress.inc(count as u64);
            if cx.interrupted() {
                return Err(Error::interrupted("stopped"));
            }
        }
        let loss = self.loss.or_else(|| rows.usual_loss(port).ok());
        let score = loss.filter(|&loss| rows.check(port, loss).is_ok());
        let score = score.and_then(|loss| rows.score(&found[output], port, loss));
        if let Some(path) = &self.out {
            let mut file = TensorFile::new();
            for (output, values) in trainee.graph.outputs.iter().zip(&found) {
                let each = output.port.shape[0] / batch;
                let shape = [&[rows.count * each], &output.port.shape[1..]].concat();
                file.insert(&output.port.name, HostTensor::float(shape, values.clone()));
            }
            write_tensors(path, &file)?;
        }
        let mut shown = json!({"network": trainee.graph.kind, "rows": rows.count, "out": self.out});
        if let Some((measure, value)) = score {
            shown[measure.replace(' ', "_")] = json!(value);
        }
        cx.emit(&shown, |_| match score {
            Some((measure, value)) => format!("{} examples: {measure} {value:.4}\n", rows.count),
            None => format!("{} examples\n", rows.count),
        })
    }

    fn of_case(&self, model: &std::path::Path, cx: &Context) -> Result<()> {
        let Model { case, columns, weights, .. } = Model::open(model)?;
        let examples = Examples::read(&self.data, &case, &columns)?;
        let rows = examples.samples(&case);
        let mut data = examples.at(&case, &(0..rows).collect::<Vec<_>>());
        let target: TensorData = data.pop().ok_or_else(|| Error::work("there are no examples"))?;
        let graph = case.predictor(rows, weights)?.graph()?;
        let outputs = graph.run(&data)?;
        let scores = &outputs[0];
        let width = scores.shape()[1];
        let values: Vec<f32> = scores.iter::<f32>().collect();
        let targets: Vec<f64> = target.iter::<f64>().collect();
        let right = values.chunks(width).zip(&targets).filter(|(row, target)| {
            let found = match row {
                [odds] => f64::from(u8::from(*odds > 0.0)),
                row => row
                    .iter()
                    .enumerate()
                    .max_by(|a, b| a.1.total_cmp(b.1))
                    .map_or(-1.0, |(class, _)| class as f64),
            };
            found == **target
        });
        let accuracy = right.count() as f64 / targets.len().max(1) as f64;
        if let Some(path) = &self.out {
            write_tensors(path, &named(&graph, &outputs))?;
        }
        let shown =
            json!({"case": case.name(), "rows": targets.len(), "accuracy": accuracy, "out": self.out});
        cx.emit(&shown, |_| {
            format!(
                "{} of {} right ({:.1} %)\n",
                (accuracy * targets.len() as f64).round(),
                targets.len(),
                100.0 * accuracy
            )
        })
    }
}
