//! The stitchable network: anchors, the stitching layers between them, and one network of the space at a time.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleDisplay};
use burn::tensor::{Device, Tensor};
use kiln_core::{Context, Error, Result};
use kiln_data::Matrix;
use kiln_nn::initialise;
use rand::Rng;

use crate::anchor::{Anchor, Extent, Feature, Segment};
use crate::least_squares::{LeastSquares, Solution};
use crate::norms::Statistics;
use crate::similarity::Centred;
use crate::space::{Configuration, Cut, SpaceConfig, StitchSpace};
use crate::stitch::StitchLayer;

/// Configuration of an [`SnNet`].
#[derive(Debug, Clone)]
pub struct SnNetConfig<A> {
    anchors: Vec<A>,
    space: SpaceConfig,
    rank: Option<usize>,
}

impl<A: Anchor + ModuleDisplay> SnNetConfig<A> {
    /// The paper's space over these anchors, which are put into the order of their cost.
    pub fn new(mut anchors: Vec<A>) -> Self {
        anchors.sort_by_key(|anchor| anchor.outline().total().flops);
        Self { anchors, space: SpaceConfig::default(), rank: None }
    }

    /// Another size of the sliding window.
    pub fn with_kernel(mut self, kernel: usize) -> Self {
        self.space.kernel = kernel;
        self
    }

    /// Another step of the sliding window.
    pub fn with_stride(mut self, stride: usize) -> Self {
        self.space.stride = stride;
        self
    }

    /// Another space.
    pub fn with_space(mut self, space: SpaceConfig) -> Self {
        self.space = space;
        self
    }

    /// Of the stitching layers, only a product of this rank is trained.
    pub fn with_rank(mut self, rank: Option<usize>) -> Self {
        self.rank = rank;
        self
    }

    /// The network with random stitching layers.
    ///
    /// # Errors
    /// As [`StitchSpace::new`], and when the rank is 0.
    pub fn init(self, device: &Device) -> Result<SnNet<A>> {
        let outlines = self.anchors.iter().map(Anchor::outline).collect();
        let space = StitchSpace::new(outlines, &self.space)?;
        SnNet::over(self.anchors, space, self.rank, device)
    }

    /// The network with stitching layers drawn from a random stream, the same every time.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    pub fn draw(self, rng: &mut impl Rng, device: &Device) -> Result<SnNet<A>> {
        let outlines = self.anchors.iter().map(Anchor::outline).collect();
        let space = StitchSpace::new(outlines, &self.space)?;
        SnNet::draw(self.anchors, space, self.rank, rng, device)
    }
}

/// Anchors and stitching layers that share their weights among all networks of the space.
#[derive(Module, Debug)]
pub struct SnNet<A: Module> {
    /// The anchors, in the order of their cost.
    pub anchors: Vec<A>,
    /// The stitching layers, as [`StitchSpace::layers`] lists them.
    pub stitches: Vec<StitchLayer>,
    #[module(skip)]
    space: StitchSpace,
    #[module(skip)]
    current: usize,
    /// By id, batch norms' running statistics that networks have for themselves.
    #[module(skip)]
    statistics: Vec<Option<Statistics>>,
}

/// What least squares found for one cut.
#[derive(Debug, Clone)]
pub struct CutFit {
    /// The cut.
    pub cut: Cut,
    /// Rows of activations that it was fitted to.
    pub rows: usize,
    /// Directions in which the rows of inputs and the constant differ from 0.
    pub rank: usize,
    /// The share of the variance of the target that no linear map explains.
    pub residual: f64,
}

impl<A: Anchor + ModuleDisplay> SnNet<A> {
    /// The network of anchors over a space that is theirs, with random stitching layers.
    ///
    /// # Errors
    /// When the rank is 0.
    pub fn over(anchors: Vec<A>, space: StitchSpace, rank: Option<usize>, device: &Device) -> Result<Self> {
        if rank == Some(0) {
            return Err(Error::usage("a stitching layer of rank 0 cannot be trained")
                .hint("choose --rank 1 or more, or leave it out to train whole layers"));
        }
        let layer = |index| {
            let [inputs, outputs] = space.layer_widths(index);
            StitchLayer::init(inputs, outputs, rank, device)
        };
        let stitches = (0..space.layers().len()).map(layer).collect();
        Ok(Self { anchors, stitches, space, current: 0, statistics: Vec::new() })
    }

    /// As [`over`](Self::over), with layers drawn from a random stream.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn draw(
        anchors: Vec<A>,
        space: StitchSpace,
        rank: Option<usize>,
        rng: &mut impl Rng,
        device: &Device,
    ) -> Result<Self> {
        let mut net = Self::over(anchors, space, rank, device)?;
        net.stitches = initialise(device, rng, |_| net.stitches);
        Ok(net)
    }

    /// The networks that this one can be.
    pub fn space(&self) -> &StitchSpace {
        &self.space
    }

    /// The id of the network that [`forward`](Self::forward) runs; the smallest anchor at first.
    pub fn config(&self) -> usize {
        self.current
    }

    /// Chooses the network that [`forward`](Self::forward) runs. Nothing is copied or allocated.
    ///
    /// # Errors
    /// When there is none with this id.
    pub fn set_config(&mut self, id: usize) -> Result<()> {
        self.space.configuration(id)?;
        self.current = id;
        Ok(())
    }

    /// Logits `[batch, classes]` of images `[batch, channels, height, width]` by the chosen network.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        self.run(self.current, &self.space.configurations()[self.current], images)
    }

    /// The same by another network, for threads that share this one.
    ///
    /// # Errors
    /// When there is none with this id.
    pub fn forward_with(&self, id: usize, images: Tensor<4>) -> Result<Tensor<2>> {
        Ok(self.run(id, self.space.configuration(id)?, images))
    }

    fn run(&self, id: usize, configuration: &Configuration, images: Tensor<4>) -> Tensor<2> {
        if let Some(statistics) = self.statistics_of(id) {
            return statistics.put_into(self.take_out(configuration)).forward(images);
        }
        let mut x: Option<Feature> = None;
        for (place, (anchor, blocks)) in self.legs(configuration).enumerate() {
            let net = &self.anchors[anchor];
            let input = match x.take() {
                None => net.embed(images.clone()),
                Some(x) => {
                    let cut = &configuration.cuts[place - 1];
                    self.stitches[cut.layer].forward(x, self.space.rear_extent(cut))
                }
            };
            x = Some(net.run(blocks, input));
        }
        let last = configuration.anchors.last().map(|&anchor| &self.anchors[anchor]);
        last.expect(NOT_EMPTY).head(x.expect(NOT_EMPTY))
    }

    fn legs<'a>(
        &'a self,
        configuration: &'a Configuration,
    ) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + 'a {
        configuration.legs(|anchor| self.space.outlines()[anchor].depth())
    }

    /// Fits every stitching layer to the activations of the anchors for these images: the mean of the least-squares
    /// solutions of its cuts. The target of a cut is what the rear block takes in its own network, that is, what the
    /// block before it gives, or the embedding for block 0.
    ///
    /// # Errors
    /// When an activation is not finite.
    pub fn fit(&mut self, images: Tensor<4>, cx: &Context) -> Result<Vec<CutFit>> {
        let activations = self.activations(images)?;
        let by_input = self.cuts_by_input();
        let bar = cx.progress(by_input.len() as u64, "least squares");
        let mut solutions: Vec<Vec<Solution>> = vec![Vec::new(); self.stitches.len()];
        let mut fits = Vec::new();
        for ((front, after), cuts) in by_input {
            if cx.interrupted() {
                return Err(Error::interrupted("stopped while stitching layers were fitted"));
            }
            let x = rows(&activations[front][after + 1]);
            let least = LeastSquares::new(&x)?;
            for cut in cuts {
                let rear = self.space.layers()[cut.layer].rear;
                let solution = least.solve(&rows(&activations[rear][cut.before]))?;
                fits.push(CutFit { cut, rows: x.rows, rank: least.rank(), residual: solution.residual });
                solutions[cut.layer].push(solution);
            }
            bar.inc(1);
        }
        let stitches = std::mem::take(&mut self.stitches).into_iter().zip(&solutions);
        self.stitches = stitches.map(|(layer, solutions)| layer.with_solution(&mean(solutions))).collect();
        self.statistics.clear();
        Ok(fits)
    }

    /// How alike what each cut's front gives and what its rear takes are: their linear centred kernel alignment.
    ///
    /// # Errors
    /// When an activation is not finite, or the user stopped it.
    pub fn alignments(&self, images: Tensor<4>, cx: &Context) -> Result<Vec<(Cut, f64)>> {
        let activations = self.activations(images)?;
        let by_input = self.cuts_by_input();
        let bar = cx.progress(by_input.len() as u64, "alignment");
        let mut alignments = Vec::new();
        for ((front, after), cuts) in by_input {
            let x = Centred::new(&rows(&activations[front][after + 1]));
            for cut in cuts {
                if cx.interrupted() {
                    return Err(Error::interrupted("stopped while activations were compared"));
                }
                let rear = self.space.layers()[cut.layer].rear;
                alignments.push((cut, x.alignment(&Centred::new(&rows(&activations[rear][cut.before])))));
            }
            bar.inc(1);
        }
        Ok(alignments)
    }

    /// By anchor, what each block takes, and last what the head takes.
    fn activations(&self, images: Tensor<4>) -> Result<Vec<Vec<Tensor<2>>>> {
        let anchors = self.anchors.iter().enumerate();
        anchors.map(|(index, anchor)| activations(index, anchor, images.clone())).collect()
    }

    /// The cuts of all networks, each once, by anchor and block that they come after: these have the same inputs.
    fn cuts_by_input(&self) -> BTreeMap<(usize, usize), Vec<Cut>> {
        let cuts: BTreeSet<Cut> = self.space.configurations().iter().flat_map(|c| c.cuts.clone()).collect();
        let mut by_input: BTreeMap<(usize, usize), Vec<Cut>> = BTreeMap::new();
        for cut in cuts {
            by_input.entry((self.space.layers()[cut.layer].front, cut.after)).or_default().push(cut);
        }
        by_input
    }

    /// Keeps the anchors and at most `count` stitches, those whose cuts have the highest `merits`. So that all costs stay
    /// within reach, the stitches are dealt into `count` classes of neighbouring cost, and the best of each stays.
    pub fn prune(mut self, count: usize, merits: &[(Cut, f64)]) -> Self {
        // The worst of a network's cuts decides.
        let merit = |configuration: &Configuration| {
            let of = |cut: &Cut| {
                merits.iter().find(|(other, _)| other == cut).map_or(f64::NEG_INFINITY, |(_, merit)| *merit)
            };
            configuration.cuts.iter().map(of).fold(f64::INFINITY, f64::min)
        };
        let stitches = self.space.configurations().iter().enumerate().filter(|(_, c)| !c.is_anchor());
        let mut ranked: Vec<(u64, usize, f64)> =
            stitches.map(|(id, c)| (self.space.cost(c).flops, id, merit(c))).collect();
        ranked.sort_by_key(|(flops, id, _)| (*flops, *id));
        let total = ranked.len();
        let kept: Vec<usize> = (0..count.min(total))
            .filter_map(|class| {
                let members =
                    &ranked[class * total / count.min(total)..(class + 1) * total / count.min(total)];
                members.iter().max_by(|a, b| a.2.total_cmp(&b.2).then(b.1.cmp(&a.1))).map(|(_, id, _)| *id)
            })
            .collect();
        let layers = self.space.layers().to_vec();
        self.space.retain(|id, _| kept.contains(&id));
        let stays = |index: &usize| self.space.layers().contains(&layers[*index]);
        let stitches = std::mem::take(&mut self.stitches).into_iter().enumerate();
        self.stitches = stitches.filter(|(index, _)| stays(index)).map(|(_, layer)| layer).collect();
        self.current = 0;
        self.statistics.clear();
        self
    }

    /// All networks run with the anchors' running statistics, as they must while they are trained.
    pub fn share_norms(mut self) -> Self {
        self.statistics.clear();
        self
    }

    /// The statistics that a network has for itself.
    pub(crate) fn statistics_of(&self, id: usize) -> Option<&Statistics> {
        self.statistics.get(id)?.as_ref()
    }

    pub(crate) fn set_statistics(&mut self, id: usize, statistics: Statistics) {
        self.statistics.resize(self.space.len(), None);
        self.statistics[id] = Some(statistics);
    }

    /// Leaves the anchors as they are in training, running means of batch norms included.
    pub fn freeze_anchors(mut self) -> Self {
        self.anchors = self.anchors.freeze();
        self
    }

    /// One of the networks on its own: the parts that it runs and nothing else. Its logits are the same, bit for bit.
    ///
    /// # Errors
    /// When there is none with this id.
    pub fn export(&self, id: usize) -> Result<Stitched<A>> {
        let net = self.take_out(self.space.configuration(id)?);
        Ok(match self.statistics_of(id) {
            Some(statistics) => statistics.put_into(net),
            None => net,
        })
    }

    /// One of the networks with the anchors' running statistics.
    pub(crate) fn take_out(&self, configuration: &Configuration) -> Stitched<A> {
        let segments = segments(configuration, &self.space);
        let parts = configuration.anchors.iter().zip(&segments);
        Stitched {
            parts: parts.map(|(&anchor, segment)| self.anchors[anchor].clone().keep(segment)).collect(),
            stitches: configuration
                .cuts
                .iter()
                .map(|cut| self.stitches[cut.layer].clone().merged())
                .collect(),
            plan: Plan::of(configuration, &self.space),
        }
    }
}

const NOT_EMPTY: &str = "a network runs through at least one anchor";

/// The parts of anchors that a network runs.
pub fn segments(configuration: &Configuration, space: &StitchSpace) -> Vec<Segment> {
    let last = configuration.anchors.len() - 1;
    configuration
        .legs(|anchor| space.outlines()[anchor].depth())
        .enumerate()
        .map(|(place, (_, blocks))| Segment { embed: place == 0, blocks, head: place == last })
        .collect()
}

/// A network of the space on its own.
#[derive(Module, Debug)]
pub struct Stitched<A: Module> {
    /// Parts of anchors.
    pub parts: Vec<A>,
    /// The stitching layers between.
    pub stitches: Vec<StitchLayer>,
    #[module(skip)]
    plan: Plan,
}

/// How the parts of a [`Stitched`] network follow one another.
#[derive(Debug, Clone)]
struct Plan {
    /// Blocks of each part.
    lengths: Vec<usize>,
    /// What each part but the first takes.
    extents: Vec<Extent>,
}

impl Plan {
    fn of(configuration: &Configuration, space: &StitchSpace) -> Self {
        let segments = segments(configuration, space);
        Self {
            lengths: segments.iter().map(|segment| segment.blocks.len()).collect(),
            extents: configuration.cuts.iter().map(|cut| *space.rear_extent(cut)).collect(),
        }
    }
}

impl<A: Anchor + ModuleDisplay> Stitched<A> {
    /// The network of a configuration, with random stitching layers; `anchors` gives an anchor by its number.
    pub fn init(
        configuration: &Configuration,
        space: &StitchSpace,
        anchors: impl Fn(usize) -> A,
        device: &Device,
    ) -> Self {
        let segments = segments(configuration, space);
        let parts = configuration.anchors.iter().zip(&segments);
        let layer = |cut: &Cut| {
            let [inputs, outputs] = space.layer_widths(cut.layer);
            StitchLayer::init(inputs, outputs, None, device)
        };
        Self {
            parts: parts.map(|(&anchor, segment)| anchors(anchor).keep(segment)).collect(),
            stitches: configuration.cuts.iter().map(layer).collect(),
            plan: Plan::of(configuration, space),
        }
    }

    /// A whole anchor.
    pub fn whole(anchor: A) -> Self {
        let depth = anchor.outline().depth();
        let plan = Plan { lengths: vec![depth], extents: Vec::new() };
        Self { parts: vec![anchor], stitches: Vec::new(), plan }
    }

    /// Logits `[batch, classes]` of images `[batch, channels, height, width]`.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let first = &self.parts[0];
        let mut x = first.run(0..self.plan.lengths[0], first.embed(images));
        let joined = self.parts.iter().zip(&self.plan.lengths).skip(1);
        for ((part, &length), (stitch, extent)) in joined.zip(self.stitches.iter().zip(&self.plan.extents)) {
            x = part.run(0..length, stitch.forward(x, extent));
        }
        self.parts[self.parts.len() - 1].head(x)
    }
}

/// What each block of an anchor takes, and last what the head takes, as `[rows, channels]`.
fn activations<A: Anchor>(index: usize, anchor: &A, images: Tensor<4>) -> Result<Vec<Tensor<2>>> {
    let mut x = anchor.embed(images);
    let mut all = Vec::new();
    for block in 0..=anchor.outline().depth() {
        let tokens: Tensor<2> = x.clone().into_tokens().flatten(0, 1);
        // 0 unless one of the numbers is infinite or none.
        if !tokens.clone().mul_scalar(0.0).sum().into_scalar::<f32>().is_finite() {
            let giver = if block == 0 { "the embedding".into() } else { format!("block {}", block - 1) };
            return Err(Error::work(format!("{giver} of anchor {index} gives numbers that are not finite"))
                .hint("the training of this anchor went wrong: train it again with a lower learning rate"));
        }
        all.push(tokens);
        if block < anchor.outline().depth() {
            x = anchor.block(block, x);
        }
    }
    Ok(all)
}

/// Activations in double precision on the host.
fn rows(x: &Tensor<2>) -> Matrix {
    let [rows, columns] = x.dims();
    Matrix::new(rows, columns, x.clone().into_data().iter::<f64>().collect())
}

/// The mean of the solutions of the cuts that share a layer.
fn mean(solutions: &[Solution]) -> Solution {
    let mut sum = solutions[0].clone();
    let share = 1.0 / solutions.len() as f64;
    let add = |sum: &mut [f64], other: &[f64]| sum.iter_mut().zip(other).for_each(|(a, b)| *a += b);
    for solution in &solutions[1..] {
        add(&mut sum.weight.values, &solution.weight.values);
        add(&mut sum.bias, &solution.bias);
        sum.residual += solution.residual;
    }
    sum.weight.values.iter_mut().chain(&mut sum.bias).for_each(|value| *value *= share);
    sum.residual *= share;
    sum
}
