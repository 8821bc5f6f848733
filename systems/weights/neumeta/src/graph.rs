//! A network as a graph of operations in which every channel is accounted for.
//!
//! Which axes of which tensors must be permuted together follows from the graph: each node says which *groups* of
//! channels its output consists of, an addition makes the groups of its two inputs one, and the groups of the image and
//! of the result are fixed. A group that is not fixed is a *clique*: its channels may change places, or be left out, as
//! long as every axis that carries them does the same.

use burn::tensor::Tensor;
use burn::tensor::ops::{AvgPoolOptions, ConvOptions, ConvTransposeOptions};
use kiln_core::{Error, Result};
use kiln_nn::BatchNorm;
use kiln_ops::{Activation, adaptive_avg_pool2d, avg_pool2d, conv_transpose2d, conv2d, linear};

/// A node of a [`ChannelGraph`], by its place.
pub type NodeId = usize;

/// Channels of an axis that belong to one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The group.
    pub group: usize,
    /// How many channels it has.
    pub channels: usize,
}

/// What a layer does with its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// A convolution with a kernel `[height, width]`, padded to keep the size at stride 1.
    Conv {
        /// Extent of the kernel.
        kernel: [usize; 2],
        /// Distance of neighbouring windows.
        stride: usize,
        /// Zeros on each side.
        padding: [usize; 2],
    },
    /// A transposed convolution that turns one pixel into an image of the kernel's size.
    Spread {
        /// Extent of the kernel.
        kernel: [usize; 2],
    },
    /// A linear layer on one pixel.
    Linear,
}

/// A layer with a weight `[outputs, inputs, ...kernel]` and a bias `[outputs]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its name; its tensors are `<name>.weight` and `<name>.bias`.
    pub name: String,
    /// What it does.
    pub kind: LayerKind,
    /// Groups on its inputs, one after another.
    pub inputs: Vec<Segment>,
    /// Group of its outputs.
    pub outputs: Segment,
    /// Whether a batch norm follows as long as it is trained directly.
    pub norm: bool,
}

impl Layer {
    /// Input channels.
    pub fn fan_in(&self) -> usize {
        self.inputs.iter().map(|segment| segment.channels).sum()
    }

    /// Shape of the weight: outputs first.
    pub fn weight_shape(&self) -> Vec<usize> {
        let (outputs, inputs) = (self.outputs.channels, self.fan_in());
        match self.kind {
            LayerKind::Conv { kernel: [height, width], .. }
            | LayerKind::Spread { kernel: [height, width] } => {
                vec![outputs, inputs, height, width]
            }
            LayerKind::Linear => vec![outputs, inputs],
        }
    }

    /// Numbers of a kernel.
    pub fn taps(&self) -> usize {
        self.weight_shape()[2..].iter().product()
    }
}

/// One of a network's tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in model files.
    pub name: String,
    /// Its shape, outputs first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Output channels, input channels (1 where there is no such axis) and numbers of a kernel.
    pub fn extents(&self) -> [usize; 3] {
        [self.shape[0], self.shape.get(1).copied().unwrap_or(1), self.shape.iter().skip(2).product()]
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Op {
    /// Fed from outside.
    Input,
    Layer(usize),
    Relu,
    /// The mean over 2 x 2 pixels.
    Halve,
    /// The mean over all pixels.
    Mean,
    Add,
    Concat,
    /// The first input with every pixel twice in both directions, as large as the second.
    Enlarge,
    /// The same with the size given.
    EnlargeTo([usize; 2]),
    /// Means and log-variances in halves, and standard normal noise: a draw from that distribution.
    Draw,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    op: Op,
    inputs: Vec<NodeId>,
    segments: Vec<Segment>,
}

/// A network: its layers, and how they are joined.
#[derive(Debug, Clone, Default)]
pub struct ChannelGraph {
    layers: Vec<Layer>,
    nodes: Vec<Node>,
    /// Each group's representative, itself unless an addition made it one with an earlier group.
    merged: Vec<usize>,
    fixed: Vec<bool>,
}

impl ChannelGraph {
    /// A graph without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Something fed from outside, whose channels stay where they are.
    pub fn input(&mut self, channels: usize) -> NodeId {
        let group = self.group();
        self.fixed[group] = true;
        self.node(Op::Input, vec![], vec![Segment { group, channels }])
    }

    /// A convolution that keeps the size of the image but for its stride.
    pub fn conv(&mut self, name: &str, x: NodeId, outputs: usize, kernel: usize, stride: usize) -> NodeId {
        let padding = [kernel / 2; 2];
        self.layer(name, x, outputs, LayerKind::Conv { kernel: [kernel; 2], stride, padding })
    }

    /// A convolution over the whole of an image of this size, which leaves one pixel.
    pub fn gather(&mut self, name: &str, x: NodeId, outputs: usize, kernel: [usize; 2]) -> NodeId {
        self.layer(name, x, outputs, LayerKind::Conv { kernel, stride: 1, padding: [0; 2] })
    }

    /// An image of this size from one pixel.
    pub fn spread(&mut self, name: &str, x: NodeId, outputs: usize, kernel: [usize; 2]) -> NodeId {
        self.layer(name, x, outputs, LayerKind::Spread { kernel })
    }

    /// A linear layer on one pixel.
    pub fn linear(&mut self, name: &str, x: NodeId, outputs: usize) -> NodeId {
        self.layer(name, x, outputs, LayerKind::Linear)
    }

    /// Puts a batch norm after the last layer for as long as the network is trained directly.
    pub fn normed(&mut self, node: NodeId) -> NodeId {
        if let Op::Layer(index) = self.nodes[node].op {
            self.layers[index].norm = true;
        }
        node
    }

    /// `max(x, 0)`
    pub fn relu(&mut self, x: NodeId) -> NodeId {
        self.same(Op::Relu, x)
    }

    /// The mean over 2 x 2 pixels.
    pub fn halve(&mut self, x: NodeId) -> NodeId {
        self.same(Op::Halve, x)
    }

    /// The mean over all pixels.
    pub fn mean(&mut self, x: NodeId) -> NodeId {
        self.same(Op::Mean, x)
    }

    /// The sum of two nodes, which ties their channels together.
    ///
    /// # Panics
    /// When they do not have the same channels.
    pub fn add(&mut self, a: NodeId, b: NodeId) -> NodeId {
        let (left, right) = (self.nodes[a].segments.clone(), self.nodes[b].segments.clone());
        assert_eq!(left.len(), right.len(), "added nodes must consist of the same groups");
        for (x, y) in left.iter().zip(&right) {
            assert_eq!(x.channels, y.channels, "added nodes must have the same channels");
            let (x, y) = (self.representative(x.group), self.representative(y.group));
            self.merged[x.max(y)] = x.min(y);
            self.fixed[x.min(y)] |= self.fixed[x.max(y)];
        }
        self.node(Op::Add, vec![a, b], left)
    }

    /// The channels of two nodes, one after another.
    pub fn concat(&mut self, a: NodeId, b: NodeId) -> NodeId {
        let segments = [&self.nodes[a].segments[..], &self.nodes[b].segments[..]].concat();
        self.node(Op::Concat, vec![a, b], segments)
    }

    /// A node with every pixel twice in both directions, as large as `like`.
    pub fn enlarge(&mut self, x: NodeId, like: NodeId) -> NodeId {
        let segments = self.nodes[x].segments.clone();
        self.node(Op::Enlarge, vec![x, like], segments)
    }

    /// A node with every pixel twice in both directions, so many rows and columns large: as many again, or one more.
    pub fn enlarge_to(&mut self, x: NodeId, extent: [usize; 2]) -> NodeId {
        self.same(Op::EnlargeTo(extent), x)
    }

    /// A draw from the normal distribution with the means and log-variances that `x` has in its halves.
    pub fn draw(&mut self, x: NodeId, noise: NodeId) -> NodeId {
        self.fix(x);
        let segments = self.nodes[noise].segments.clone();
        self.node(Op::Draw, vec![x, noise], segments)
    }

    /// Says that the channels of a node mean something and must stay where they are.
    pub fn fix(&mut self, x: NodeId) -> NodeId {
        for segment in self.nodes[x].segments.clone() {
            let group = self.representative(segment.group);
            self.fixed[group] = true;
        }
        x
    }

    fn layer(&mut self, name: &str, x: NodeId, outputs: usize, kind: LayerKind) -> NodeId {
        let outputs = Segment { group: self.group(), channels: outputs };
        let inputs = self.nodes[x].segments.clone();
        self.layers.push(Layer { name: name.into(), kind, inputs, outputs, norm: false });
        self.node(Op::Layer(self.layers.len() - 1), vec![x], vec![outputs])
    }

    fn same(&mut self, op: Op, x: NodeId) -> NodeId {
        let segments = self.nodes[x].segments.clone();
        self.node(op, vec![x], segments)
    }

    fn node(&mut self, op: Op, inputs: Vec<NodeId>, segments: Vec<Segment>) -> NodeId {
        self.nodes.push(Node { op, inputs, segments });
        self.nodes.len() - 1
    }

    fn group(&mut self) -> usize {
        self.merged.push(self.merged.len());
        self.fixed.push(false);
        self.merged.len() - 1
    }

    fn representative(&self, mut group: usize) -> usize {
        while self.merged[group] != group {
            group = self.merged[group];
        }
        group
    }

    /// The layers in the order in which they were added.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The tensors: weight and bias of each layer in turn.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let of = |layer: &Layer| {
            let spec = |part: &str, shape| TensorSpec { name: format!("{}.{part}", layer.name), shape };
            [spec("weight", layer.weight_shape()), spec("bias", vec![layer.outputs.channels])]
        };
        self.layers.iter().flat_map(of).collect()
    }

    /// Number of weights and biases.
    pub fn numel(&self) -> usize {
        self.tensors().iter().map(TensorSpec::numel).sum()
    }

    /// Number of groups, merged ones included.
    pub fn groups(&self) -> usize {
        self.merged.len()
    }

    /// Groups on the first two axes of each tensor, representatives instead of merged ones.
    pub fn axes(&self) -> Vec<[Vec<Segment>; 2]> {
        let own = |segment: &Segment| Segment { group: self.representative(segment.group), ..*segment };
        let of = |layer: &Layer| {
            let outputs = vec![own(&layer.outputs)];
            [[outputs.clone(), layer.inputs.iter().map(own).collect()], [outputs, Vec::new()]]
        };
        self.layers.iter().flat_map(of).collect()
    }

    /// The cliques: groups whose channels may change places, with more than one channel, and how many those are.
    pub fn cliques(&self) -> Vec<Segment> {
        let mut cliques: Vec<Segment> = Vec::new();
        for segment in self.axes().into_iter().flatten().flatten() {
            let known = cliques.iter().any(|clique| clique.group == segment.group);
            if !known && !self.fixed[segment.group] && segment.channels > 1 {
                cliques.push(segment);
            }
        }
        cliques
    }

    /// Computes nodes from others.
    ///
    /// # Shapes
    /// - parameters: one flat vector for each of [`tensors`](Self::tensors)
    /// - norms: a batch norm for every layer that has one, in their order, or none at all
    /// - feeds, output: `[images, channels, height, width]`
    ///
    /// # Errors
    /// When an input that a target depends on is not fed.
    pub fn run(
        &self,
        parameters: &[Tensor<1>],
        norms: &[BatchNorm],
        feeds: &[(NodeId, Tensor<4>)],
        targets: &[NodeId],
    ) -> Result<Vec<Tensor<4>>> {
        let mut values: Vec<Option<Tensor<4>>> = vec![None; self.nodes.len()];
        for (node, value) in feeds {
            values[*node] = Some(value.clone());
        }
        let needed = self.needed(targets, &values);
        for id in (0..self.nodes.len()).filter(|&id| needed[id]) {
            let inputs = self.nodes[id].inputs.iter().map(|&input| values[input].clone());
            let inputs: Option<Vec<Tensor<4>>> = inputs.collect();
            let inputs = inputs.filter(|_| self.nodes[id].op != Op::Input).ok_or_else(|| {
                Error::work(format!("node {id} of the network needs an input that was not given"))
            })?;
            values[id] = Some(self.compute(id, inputs, parameters, norms));
        }
        let missing = || Error::work("a result of the network is not a node of it");
        targets.iter().map(|&target| values[target].clone().ok_or_else(missing)).collect()
    }

    /// Which nodes must be computed for the targets, given those that have values.
    fn needed(&self, targets: &[NodeId], values: &[Option<Tensor<4>>]) -> Vec<bool> {
        let mut needed = vec![false; self.nodes.len()];
        let mut pending = targets.to_vec();
        while let Some(id) = pending.pop() {
            if values[id].is_none() && !needed[id] {
                needed[id] = true;
                pending.extend(&self.nodes[id].inputs);
            }
        }
        needed
    }

    fn compute(
        &self,
        id: NodeId,
        mut inputs: Vec<Tensor<4>>,
        parameters: &[Tensor<1>],
        norms: &[BatchNorm],
    ) -> Tensor<4> {
        let second = (inputs.len() > 1).then(|| inputs.remove(1));
        let x = inputs.remove(0);
        match (&self.nodes[id].op, second) {
            (Op::Layer(index), _) => {
                let y = self.apply_layer(*index, x, parameters);
                let before = self.layers[..*index].iter().filter(|layer| layer.norm).count();
                match norms.get(before).filter(|_| self.layers[*index].norm) {
                    Some(norm) => norm.forward(y),
                    None => y,
                }
            }
            (Op::Relu, _) => kiln_ops::activate(x, Activation::Relu),
            (Op::Halve, _) => avg_pool2d(x, AvgPoolOptions::new([2, 2])),
            (Op::Mean, _) => adaptive_avg_pool2d(x, [1, 1]),
            (Op::Add, Some(y)) => x + y,
            (Op::Concat, Some(y)) => Tensor::cat(vec![x, y], 1),
            (Op::Enlarge, Some(like)) => enlarged(x, [like.dims()[2], like.dims()[3]]),
            (Op::EnlargeTo(extent), _) => enlarged(x, *extent),
            (Op::Draw, Some(noise)) => {
                let [means, log_variances]: [Tensor<4>; 2] =
                    x.chunk(2, 1).try_into().expect("means and variances");
                means + noise * (log_variances * 0.5).exp()
            }
            (op, _) => unreachable!("{op:?} has as many inputs as it was made with"),
        }
    }

    fn apply_layer(&self, index: usize, x: Tensor<4>, parameters: &[Tensor<1>]) -> Tensor<4> {
        let layer = &self.layers[index];
        let (outputs, inputs) = (layer.outputs.channels, layer.fan_in());
        let (weight, bias) = (parameters[2 * index].clone(), parameters[2 * index + 1].clone());
        match layer.kind {
            LayerKind::Conv { kernel: [height, width], stride, padding } => {
                let weight = weight.reshape([outputs, inputs, height, width]);
                conv2d(x, weight, Some(bias), ConvOptions::new([stride; 2], padding, [1, 1], 1))
            }
            LayerKind::Spread { kernel: [height, width] } => {
                let weight = weight.reshape([outputs, inputs, height, width]).swap_dims(0, 1);
                let options = ConvTransposeOptions::new([1, 1], [0, 0], [0, 0], [1, 1], 1);
                conv_transpose2d(x, weight, Some(bias), options)
            }
            LayerKind::Linear => {
                let images = x.dims()[0];
                let weight = weight.reshape([outputs, inputs]).transpose();
                let y = linear(x.reshape([images, inputs]), weight, Some(bias), Activation::Identity);
                y.reshape([images, outputs, 1, 1])
            }
        }
    }
}

/// `x` with every pixel twice in both directions; an odd extent gets a copy of its last row.
fn enlarged(x: Tensor<4>, [tall, wide]: [usize; 2]) -> Tensor<4> {
    let [images, channels, height, width] = x.dims();
    let twice = x
        .reshape([images, channels, height, 1, width, 1])
        .expand([images, channels, height, 2, width, 2])
        .reshape([images, channels, 2 * height, 2 * width]);
    let grown = |x: Tensor<4>, axis: usize, extent: usize| match x.dims()[axis] {
        short if short < extent => {
            Tensor::cat(vec![x.clone(), x.narrow(axis, short - 1, extent - short)], axis)
        }
        _ => x,
    };
    grown(grown(twice, 2, tall), 3, wide)
}
