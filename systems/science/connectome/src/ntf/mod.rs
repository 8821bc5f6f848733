//! Non-negative tensor factorisation: `x[t,w,p] ≈ Σ_r λ_r a[t,r] b[w,r] c[p,r]`, all factors ≥ 0, by masked least squares or
//! another loss.

mod direct;
mod divergence;
mod loss;
pub mod missing;
pub mod mttkrp;
pub mod rank;
mod starts;
mod sweep;

use clap::ValueEnum;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::Matrix;
use rand::RngExt;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use loss::Loss;
pub use starts::Starts;

use crate::tensor::{AffinityTensor, Element, neuron_count};

/// How the factors are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Solver {
    /// Hierarchical alternating least squares: one column after another
    #[default]
    Hals,
    /// Multiplicative updates; of the squared error or, as the Poisson loss, the Kullback–Leibler divergence
    Mu,
    /// All factors at once, by projected L-BFGS, for every loss
    Direct,
}

/// A factorisation in progress.
trait Descent {
    /// One more sweep. The relative error afterwards where that is what is minimised, otherwise the mean loss of an entry.
    ///
    /// # Errors
    /// When the tensor lies in a file that cannot be read.
    fn sweep(&mut self) -> Result<f64>;

    /// The factors so far.
    fn factors(&self) -> Factors;
}

/// Factors with columns of norm 1 and their weights, or before that factors as the sweeps left them.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// `[T, R]`
    pub time: Matrix,
    /// `[W, R]`
    pub animals: Matrix,
    /// `[P, R]`
    pub pairs: Matrix,
    /// λ, `[R]`
    pub weights: Vec<f64>,
}

/// What a fit found.
#[derive(Debug, Clone)]
pub struct Fit {
    /// Normalised, sorted by weight.
    pub factors: Factors,
    /// ‖x − x̂‖ / ‖x‖ over observed entries.
    pub relative_error: f64,
    /// After every sweep the relative error, or for losses other than the squared one the mean loss of an observed entry.
    pub errors: Vec<f64>,
    /// Whether the error changed by less than the tolerance at last.
    pub converged: bool,
}

/// How a tensor is factorised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NtfConfig {
    /// R, the number of motifs.
    pub rank: usize,
    /// How.
    pub solver: Solver,
    /// What is minimised.
    #[serde(default)]
    pub loss: Loss,
    /// Whether a pair's factor is the product of those of its neurons, `c[(i,j),r] = d[i,r] d[j,r]`.
    #[serde(default)]
    pub tied: bool,
    /// Most sweeps.
    pub sweeps: usize,
    /// Stop when the error changes by less than this part of itself.
    pub tolerance: f64,
    /// Random starts, of which the best is kept.
    pub inits: usize,
}

impl NtfConfig {
    /// HALS with at most 500 sweeps, a tolerance of 1e-6 and ten starts.
    pub fn new(rank: usize) -> Self {
        Self {
            rank,
            solver: Solver::Hals,
            loss: Loss::Squared,
            tied: false,
            sweeps: 500,
            tolerance: 1e-6,
            inits: 10,
        }
    }

    /// With another number of random starts.
    pub fn with_inits(mut self, inits: usize) -> Self {
        self.inits = inits;
        self
    }

    /// With another bound on the sweeps.
    pub fn with_sweeps(mut self, sweeps: usize) -> Self {
        self.sweeps = sweeps;
        self
    }

    /// With another solver.
    pub fn with_solver(mut self, solver: Solver) -> Self {
        self.solver = solver;
        self
    }

    /// With another loss.
    pub fn with_loss(mut self, loss: Loss) -> Self {
        self.loss = loss;
        self
    }

    /// The best of the random starts.
    ///
    /// # Errors
    /// When the rank does not fit the tensor, the tensor is zero everywhere, or the user stops.
    pub fn fit<E: Element>(&self, tensor: &AffinityTensor<E>, cx: &Context) -> Result<Fit> {
        self.check(tensor)?;
        let starts = self.fit_all(tensor, &Starts::default(), cx)?;
        best(starts)
            .ok_or_else(|| Error::usage("--inits 0 starts nothing").hint("ten starts are the default"))
    }

    /// The fits from all random starts, of which those that are `kept` are not made again.
    ///
    /// # Errors
    /// As [`fit`](Self::fit), and when a start cannot be kept.
    pub fn fit_all<E: Element>(
        &self,
        tensor: &AffinityTensor<E>,
        kept: &Starts,
        cx: &Context,
    ) -> Result<Vec<Fit>> {
        self.check(tensor)?;
        let bar = cx.progress((self.inits * self.sweeps) as u64, &format!("rank {}", self.rank));
        (0..self.inits)
            .map(|start| {
                let fit = match kept.get(self.rank, start)? {
                    Some(fit) => fit,
                    None => {
                        let drawn = self.draw(tensor, start as u64, cx);
                        let fit = self.fit_from(tensor, drawn, cx, &|_| bar.inc(1))?;
                        kept.put(self.rank, start, &fit)?;
                        fit
                    }
                };
                bar.set(((start + 1) * self.sweeps) as u64);
                Ok(fit)
            })
            .collect()
    }

    /// A fit from given factors, whose weights count as 1; `swept` hears the error of every sweep.
    ///
    /// # Errors
    /// When the factors do not fit the tensor, or the user stops.
    pub fn fit_from<E: Element>(
        &self,
        tensor: &AffinityTensor<E>,
        start: Factors,
        cx: &Context,
        swept: &dyn Fn(f64),
    ) -> Result<Fit> {
        self.check(tensor)?;
        start.check(tensor, self.rank)?;
        let mut descent = self.descent(tensor, start)?;
        let mut errors: Vec<f64> = Vec::new();
        let mut converged = false;
        while errors.len() < self.sweeps && !converged {
            if cx.interrupted() {
                return Err(Error::interrupted("the factorisation was stopped"));
            }
            let error = descent.sweep()?;
            swept(error);
            converged = errors.last().is_some_and(|last| (last - error).abs() <= self.tolerance * last.abs());
            errors.push(error);
        }
        let factors = descent.factors().normalised();
        let relative_error = match (self.loss, errors.last()) {
            (Loss::Squared, Some(&error)) => error,
            _ => factors.relative_error(tensor)?,
        };
        Ok(Fit { relative_error, factors, errors, converged })
    }

    fn descent<'a, E: Element>(
        &self,
        tensor: &'a AffinityTensor<E>,
        start: Factors,
    ) -> Result<Box<dyn Descent + 'a>> {
        Ok(match (self.solver, self.loss) {
            (Solver::Hals, _) => Box::new(sweep::Sweeper::new(tensor, start, sweep::hals)?),
            (Solver::Mu, Loss::Squared) => {
                Box::new(sweep::Sweeper::new(tensor, start, sweep::multiplicative)?)
            }
            (Solver::Mu, _) => Box::new(divergence::Divergence::new(tensor, start)),
            (Solver::Direct, loss) => {
                let tied = self.tied.then(|| neuron_count(tensor.pairs)).flatten();
                Box::new(direct::Direct::new(tensor, start, loss, tied)?)
            }
        })
    }

    /// Factors drawn evenly from 0 to 1.
    pub fn draw<E: Element>(&self, tensor: &AffinityTensor<E>, start: u64, cx: &Context) -> Factors {
        let mut rng = cx.rng(&format!("ntf {}", self.rank), start);
        let mut matrix = |rows: usize| {
            Matrix::new(rows, self.rank, (0..rows * self.rank).map(|_| rng.random::<f64>()).collect())
        };
        let (time, animals, pairs) = (matrix(tensor.frames), matrix(tensor.animals), matrix(tensor.pairs));
        Factors { time, animals, pairs, weights: vec![1.0; self.rank] }
    }

    /// Makes sure that a tensor can be factorised so.
    ///
    /// # Errors
    /// When the rank or the loss does not fit the tensor, or it is zero everywhere.
    pub fn check<E: Element>(&self, tensor: &AffinityTensor<E>) -> Result<()> {
        let most = tensor.frames.min(tensor.pairs);
        if self.rank == 0 || self.rank > most {
            return Err(Error::usage(format!(
                "rank {} does not fit a tensor of {} time steps and {} pairs",
                self.rank, tensor.frames, tensor.pairs
            ))
            .hint(format!("choose a rank from 1 to {most}")));
        }
        if self.inits == 0 || self.sweeps == 0 {
            return Err(Error::usage(format!("{} starts of {} sweeps fit nothing", self.inits, self.sweeps))
                .hint("give --inits and --sweeps of at least 1"));
        }
        let is_known = match self.solver {
            Solver::Hals => self.loss == Loss::Squared,
            Solver::Mu => self.loss != Loss::Gamma,
            Solver::Direct => true,
        };
        if !is_known {
            return Err(Error::usage(format!(
                "--solver {} does not minimise this loss",
                if self.solver == Solver::Hals { "hals" } else { "mu" }
            ))
            .hint("hals knows --loss squared, mu squared and poisson, direct all"));
        }
        if self.tied && self.solver != Solver::Direct {
            return Err(Error::usage("--tied needs --solver direct"));
        }
        if self.tied && neuron_count(tensor.pairs).is_none() {
            return Err(Error::work(format!(
                "{} pairs are not those of any number of neurons",
                tensor.pairs
            ))
            .hint("tied factors need all pairs"));
        }
        self.loss.check(tensor)?;
        if tensor.squared_norm()? == 0.0 {
            return Err(Error::work("the tensor is zero everywhere: there is nothing to factorise")
                .hint("no two neurons change together; check the traces and --sigma"));
        }
        Ok(())
    }
}

/// The fit with the least error.
pub fn best(fits: Vec<Fit>) -> Option<Fit> {
    fits.into_iter().min_by(|a, b| a.last().total_cmp(&b.last()))
}

impl Fit {
    /// The error or loss after the last sweep, by which starts are compared.
    pub fn last(&self) -> f64 {
        self.errors.last().copied().unwrap_or(f64::INFINITY)
    }
}

impl Factors {
    /// Number of components.
    pub fn rank(&self) -> usize {
        self.weights.len()
    }

    /// Time, animals, pairs.
    pub fn modes(&self) -> [&Matrix; 3] {
        [&self.time, &self.animals, &self.pairs]
    }

    fn modes_mut(&mut self) -> [&mut Matrix; 3] {
        [&mut self.time, &mut self.animals, &mut self.pairs]
    }

    fn check<E: Element>(&self, tensor: &AffinityTensor<E>, rank: usize) -> Result<()> {
        let extents = [("time", tensor.frames), ("animals", tensor.animals), ("pairs", tensor.pairs)];
        for (matrix, (name, rows)) in self.modes().into_iter().zip(extents) {
            if (matrix.rows, matrix.columns) != (rows, rank) {
                return Err(Error::input(
                    "initial factors",
                    format!("\"{name}\" is [{}, {}], must be [{rows}, {rank}]", matrix.rows, matrix.columns),
                ));
            }
            if let Some(value) = matrix.values.iter().find(|v| !(v.is_finite() && **v >= 0.0)) {
                return Err(Error::input("initial factors", format!("\"{name}\" holds {value}"))
                    .hint("factors are finite and not negative"));
            }
        }
        Ok(())
    }

    /// Columns of norm 1, their norms gathered in the weights, the largest weight first.
    pub fn normalised(mut self) -> Self {
        for r in 0..self.rank() {
            let mut weight = self.weights[r];
            for matrix in self.modes_mut() {
                let norm =
                    matrix.values.chunks(matrix.columns).map(|row| row[r] * row[r]).sum::<f64>().sqrt();
                if norm > 0.0 {
                    matrix.values.chunks_mut(matrix.columns).for_each(|row| row[r] /= norm);
                }
                weight *= norm;
            }
            self.weights[r] = weight;
        }
        let mut order: Vec<usize> = (0..self.rank()).collect();
        order.sort_by(|&a, &b| self.weights[b].total_cmp(&self.weights[a]));
        self.weights = order.iter().map(|&r| self.weights[r]).collect();
        for matrix in self.modes_mut() {
            let sorted = matrix.values.chunks(matrix.columns).flat_map(|row| order.iter().map(|&r| row[r]));
            matrix.values = sorted.collect();
        }
        self
    }

    /// `x̂[t,w,p]`
    pub fn at(&self, t: usize, w: usize, p: usize) -> f64 {
        (0..self.rank())
            .map(|r| self.weights[r] * self.time.at(t, r) * self.animals.at(w, r) * self.pairs.at(p, r))
            .sum()
    }

    /// ‖x − x̂‖ / ‖x‖ over observed entries, computed entry by entry.
    ///
    /// # Errors
    /// When the tensor lies in a file that cannot be read.
    pub fn relative_error<E: Element>(&self, tensor: &AffinityTensor<E>) -> Result<f64> {
        let mut sum = 0.0;
        tensor.pass(|first, rows| {
            let squares = rows.par_chunks(tensor.pairs).enumerate().map(|(row, x)| {
                let (t, w) = ((first + row) / tensor.animals, (first + row) % tensor.animals);
                let seen = x.iter().enumerate().filter(|&(p, _)| tensor.has(w, p));
                seen.map(|(p, x)| (x.widen() - self.at(t, w, p)).powi(2)).sum::<f64>()
            });
            sum += squares.collect::<Vec<f64>>().iter().sum::<f64>();
            Ok(())
        })?;
        Ok((sum / tensor.squared_norm()?).sqrt())
    }

    /// As a file: `time`, `animals`, `pairs`, `weights`.
    pub fn to_file(&self) -> TensorFile {
        let mut file = TensorFile::new();
        for (name, matrix) in ["time", "animals", "pairs"].into_iter().zip(self.modes()) {
            let values = matrix.values.iter().map(|&v| v as f32).collect();
            file.insert(name, HostTensor::float([matrix.rows, matrix.columns], values));
        }
        let weights: Vec<f32> = self.weights.iter().map(|&v| v as f32).collect();
        file.insert("weights", HostTensor::float([weights.len()], weights));
        file
    }

    /// From such a file; without `weights` they count as 1.
    ///
    /// # Errors
    /// When a factor is missing or no matrix of floats, or they differ in rank.
    pub fn from_file(mut file: TensorFile) -> Result<Self> {
        let place = file.source().display().to_string();
        let mut matrix = |name: &str| -> Result<Matrix> {
            let tensor = file.take(name)?;
            match (&tensor.shape[..], tensor.as_floats()) {
                (&[rows, columns], Some(values)) if columns > 0 => {
                    Ok(Matrix::new(rows, columns, values.iter().map(|&v| v.into()).collect()))
                }
                _ => Err(Error::input(&place, format!("\"{name}\" has the shape {:?}", tensor.shape))
                    .hint("a factor is a matrix of floats with one column a component")),
            }
        };
        let (time, animals, pairs) = (matrix("time")?, matrix("animals")?, matrix("pairs")?);
        let weights: Vec<f64> = match file.take("weights").ok().as_ref().and_then(HostTensor::as_floats) {
            Some(weights) => weights.iter().map(|&v| v.into()).collect(),
            None => vec![1.0; time.columns],
        };
        let ranks = [time.columns, animals.columns, pairs.columns, weights.len()];
        if ranks.iter().any(|&rank| rank != ranks[0]) {
            return Err(Error::input(
                &place,
                format!("time, animals, pairs and weights have {ranks:?} components"),
            ));
        }
        Ok(Self { time, animals, pairs, weights })
    }

    /// The factors with the weights multiplied into the time factor, all weights 1.
    pub fn absorbed(mut self) -> Self {
        for row in self.time.values.chunks_mut(self.weights.len()) {
            row.iter_mut().zip(&self.weights).for_each(|(value, weight)| *value *= weight);
        }
        self.weights.fill(1.0);
        self
    }
}
