//! The stitch space: which networks can be made of the anchors.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use clap::{Args, ValueEnum};
use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::anchor::{Cost, Extent, Outline, linear_cost};

/// More networks than this are taken for a mistake.
const MOST_CONFIGURATIONS: usize = 100_000;

/// Widest window.
const LARGEST_KERNEL: usize = 64;

/// Which anchor may come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The cheaper one: its front is joined to the rear of the dearer one
    Fast,
    /// Either
    Both,
}

/// Which anchors are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pairs {
    /// Those next to each other in cost
    Nearest,
    /// All
    All,
}

/// How the space is laid out; the paper's choices by default, except that `include_m0` is off.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct SpaceConfig {
    /// Blocks of the sliding window within which anchors of equal depth are joined
    #[arg(long, default_value_t = 2)]
    pub kernel: usize,
    /// How far the window moves
    #[arg(long, default_value_t = 1)]
    pub stride: usize,
    /// Also join fronts to the whole of the other network, at more than its cost
    #[arg(long)]
    pub include_m0: bool,
    /// Which anchor may come first
    #[arg(long, value_enum, default_value = "fast")]
    pub direction: Direction,
    /// Which anchors are joined
    #[arg(long, value_enum, default_value = "nearest")]
    pub pairs: Pairs,
    /// Anchors of a network, two or three
    #[arg(long, default_value_t = 2)]
    pub max_anchors: usize,
}

impl Default for SpaceConfig {
    fn default() -> Self {
        Self {
            kernel: 2,
            stride: 1,
            include_m0: false,
            direction: Direction::Fast,
            pairs: Pairs::Nearest,
            max_anchors: 2,
        }
    }
}

/// From a block of one anchor to a block of another: the front ends with block `after`, the rear begins with `before`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cut {
    /// Last block of the front, `l`.
    pub after: usize,
    /// First block of the rear, `m`.
    pub before: usize,
    /// The stitching layer between, by its place in [`StitchSpace::layers`].
    pub layer: usize,
}

/// One network of the space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The anchors that it runs through.
    pub anchors: Vec<usize>,
    /// The cuts between them, one fewer.
    pub cuts: Vec<Cut>,
}

impl Configuration {
    /// A whole anchor.
    pub fn anchor(index: usize) -> Self {
        Self { anchors: vec![index], cuts: Vec::new() }
    }

    /// Whether it is a whole anchor.
    pub fn is_anchor(&self) -> bool {
        self.cuts.is_empty()
    }

    /// `s0>s1@3>4`: block 3 of anchor 0 is followed by block 4 of anchor 1.
    pub fn name(&self) -> String {
        let join = |parts: Vec<String>, mark| parts.join(mark);
        let anchors = join(self.anchors.iter().map(|anchor| format!("s{anchor}")).collect(), ">");
        if self.is_anchor() {
            return anchors;
        }
        let cuts = self.cuts.iter().map(|cut| format!("{}>{}", cut.after, cut.before)).collect();
        format!("{anchors}@{}", join(cuts, ","))
    }

    /// The blocks of each anchor that run, in order; `depths` are those of all anchors.
    pub fn legs<'a>(
        &'a self,
        depths: impl Fn(usize) -> usize + 'a,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
        self.anchors.iter().enumerate().map(move |(place, &anchor)| {
            let start = if place == 0 { 0 } else { self.cuts[place - 1].before };
            let end = self.cuts.get(place).map_or_else(|| depths(anchor), |cut| cut.after + 1);
            (anchor, start..end)
        })
    }
}

/// The anchors that a stitching layer joins; all its cuts do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Joint {
    /// The anchor whose front comes before.
    pub front: usize,
    /// The anchor whose rear comes after.
    pub rear: usize,
    /// The layer's number among those of the pair.
    pub number: usize,
}

/// All networks that can be made of anchors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StitchSpace {
    outlines: Vec<Outline>,
    configurations: Vec<Configuration>,
    layers: Vec<Joint>,
}

impl StitchSpace {
    /// Lays out the space of anchors, which stand in the order of their cost.
    ///
    /// # Errors
    /// When the settings make no sense, the anchors do not fit one another, or nothing can be joined.
    pub fn new(outlines: Vec<Outline>, config: &SpaceConfig) -> Result<Self> {
        check_config(config)?;
        check_outlines(&outlines)?;
        let mut space = Self { configurations: Vec::new(), layers: Vec::new(), outlines };
        let count = space.outlines.len();
        space.configurations.extend((0..count).map(Configuration::anchor));
        let mut by_pair = BTreeMap::new();
        for (front, rear) in pairs(count, config) {
            let cuts = space.join(front, rear, config)?;
            for cut in &cuts {
                space.add(vec![front, rear], vec![*cut])?;
            }
            by_pair.insert((front, rear), cuts);
        }
        if config.max_anchors == 3 {
            space.add_triples(&by_pair)?;
        }
        if space.layers.is_empty() {
            return Err(Error::usage("no block of one anchor can be joined to a block of another").hint(
                "anchors need two blocks or more; of networks with stages only the middle ones are joined, where they \
                 have two blocks or more",
            ));
        }
        Ok(space)
    }

    /// The space with these networks and layers, as a file has them.
    ///
    /// # Errors
    /// When one of them is not possible.
    pub fn from_parts(
        outlines: Vec<Outline>,
        configurations: Vec<Configuration>,
        layers: Vec<Joint>,
    ) -> Result<Self> {
        check_outlines(&outlines)?;
        let space = Self { outlines, configurations, layers };
        let anchors = |joint: &Joint| joint.front.max(joint.rear);
        if space.layers.iter().any(|joint| anchors(joint) >= space.outlines.len()) {
            return Err(Error::usage("a stitching layer joins an anchor that is not there"));
        }
        let whole = |anchor| space.configurations.get(anchor) == Some(&Configuration::anchor(anchor));
        if !(0..space.outlines.len()).all(whole) {
            return Err(Error::usage("the first configurations are not the anchors"));
        }
        for (id, configuration) in space.configurations.iter().enumerate() {
            if !space.is_possible(configuration) {
                return Err(Error::usage(format!("configuration {id} cannot be made of the anchors")));
            }
        }
        // A layer serves cuts between features of the same widths.
        let mut widths = vec![None; space.layers.len()];
        for cut in space.configurations.iter().flat_map(|configuration| &configuration.cuts) {
            let found = space.widths(space.layers[cut.layer], cut);
            if *widths[cut.layer].get_or_insert(found) != found {
                return Err(Error::usage(format!("stitching layer {} joins several widths", cut.layer)));
            }
        }
        if let Some(layer) = widths.iter().position(Option::is_none) {
            return Err(Error::usage(format!("no configuration uses stitching layer {layer}")));
        }
        Ok(space)
    }

    fn is_possible(&self, configuration: &Configuration) -> bool {
        let Configuration { anchors, cuts } = configuration;
        if anchors.len() != cuts.len() + 1 || anchors.iter().any(|&anchor| anchor >= self.outlines.len()) {
            return false;
        }
        let cuts_fit = cuts.iter().zip(anchors.windows(2)).all(|(cut, pair)| {
            let (front, rear) = (&self.outlines[pair[0]], &self.outlines[pair[1]]);
            let joint = self.layers.get(cut.layer).map(|joint| (joint.front, joint.rear));
            joint == Some((pair[0], pair[1]))
                && cut.after < front.depth()
                && cut.before < rear.depth()
                && front.extents[cut.after + 1].can_become(&rear.extents[cut.before])
        });
        cuts_fit && cuts.windows(2).all(|pair| pair[0].before <= pair[1].after)
    }

    /// The cuts between two anchors, whose layers are added.
    fn join(&mut self, front: usize, rear: usize, config: &SpaceConfig) -> Result<Vec<Cut>> {
        let found = self.cuts_between(front, rear, config)?;
        // Windows without a cut need no layer, and different widths need layers of their own.
        let mut numbers = BTreeMap::new();
        let mut cuts = Vec::with_capacity(found.len());
        for (after, before, window) in found {
            let widths = self.widths(Joint { front, rear, number: 0 }, &Cut { after, before, layer: 0 });
            let number = numbers.len();
            let layer = match numbers.entry((window, widths)) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    self.layers.push(Joint { front, rear, number });
                    *new.insert(self.layers.len() - 1)
                }
            };
            cuts.push(Cut { after, before, layer });
        }
        Ok(cuts)
    }

    /// The cuts from one anchor to another, stage by stage.
    fn cuts_between(&self, from: usize, to: usize, config: &SpaceConfig) -> Result<Vec<WindowCut>> {
        let (front, rear) = (&self.outlines[from], &self.outlines[to]);
        let stages = front.stage_count();
        if rear.stage_count() != stages {
            return Err(Error::usage(format!(
                "one anchor has {stages} stages, another {}",
                rear.stage_count()
            ))
            .hint("networks are stitched stage by stage: both need the same number"));
        }
        // Of networks with stages, only the middle ones: the first and the last are the cheapest to leave whole.
        let middle = if stages == 1 { 0..1 } else { 1..stages - 1 };
        let mut cuts = Vec::new();
        let mut mismatch = None;
        for stage in middle {
            let (front_blocks, rear_blocks) = (front.stage(stage), rear.stage(stage));
            for (after, before, window) in stage_cuts(front_blocks.len(), rear_blocks.len(), config) {
                let (after, before) = (front_blocks.start + after, rear_blocks.start + before);
                if before == 0 && !config.include_m0 {
                    continue;
                }
                let (given, taken) = (&front.extents[after + 1], &rear.extents[before]);
                if given.can_become(taken) {
                    cuts.push((after, before, (stage, window)));
                } else if before > rear_blocks.start || stages == 1 {
                    // The first block of a later stage still takes the larger map of the stage before.
                    mismatch = Some((given.positions(), taken.positions()));
                }
            }
        }
        match mismatch {
            Some((given, taken)) if cuts.is_empty() => Err(Error::usage(format!(
                "anchor {from} has {given} positions where anchor {to} has {taken}"
            ))
            .hint("anchors must have the same patch size, and the same steps from stage to stage")),
            _ => Ok(cuts),
        }
    }

    /// Networks through three anchors, each dearer than the one before.
    fn add_triples(&mut self, by_pair: &BTreeMap<(usize, usize), Vec<Cut>>) -> Result<()> {
        let rising = || by_pair.iter().filter(|((front, rear), _)| front < rear);
        for (&(first, middle), cuts) in rising() {
            for (&(_, last), further) in rising().filter(|((front, _), _)| *front == middle) {
                for cut in cuts {
                    // The middle anchor runs at least one block.
                    for next in further.iter().filter(|next| cut.before <= next.after) {
                        self.add(vec![first, middle, last], vec![*cut, *next])?;
                    }
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, anchors: Vec<usize>, cuts: Vec<Cut>) -> Result<()> {
        if self.configurations.len() == MOST_CONFIGURATIONS {
            return Err(Error::usage(format!("the space has more than {MOST_CONFIGURATIONS} networks"))
                .hint("choose a smaller --kernel, fewer anchors, or --max-anchors 2"));
        }
        self.configurations.push(Configuration { anchors, cuts });
        Ok(())
    }

    /// The layouts of the anchors.
    pub fn outlines(&self) -> &[Outline] {
        &self.outlines
    }

    /// All networks; the first are the anchors. The place of each is its id.
    pub fn configurations(&self) -> &[Configuration] {
        &self.configurations
    }

    /// All stitching layers.
    pub fn layers(&self) -> &[Joint] {
        &self.layers
    }

    /// Number of networks.
    pub fn len(&self) -> usize {
        self.configurations.len()
    }

    /// Whether there is no network.
    pub fn is_empty(&self) -> bool {
        self.configurations.is_empty()
    }

    /// One of the networks.
    ///
    /// # Errors
    /// When there is none with this id.
    pub fn configuration(&self, id: usize) -> Result<&Configuration> {
        self.configurations.get(id).ok_or_else(|| {
            Error::usage(format!("there is no configuration {id}")).hint(format!(
                "ids go from 0 to {}: `kiln stitch space --model DIR` lists them",
                self.len() - 1
            ))
        })
    }

    /// The id of a network given by its number or its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, text: &str) -> Result<usize> {
        if let Ok(id) = text.parse() {
            return self.configuration(id).map(|_| id);
        }
        self.configurations.iter().position(|configuration| configuration.name() == text).ok_or_else(|| {
            Error::usage(format!("there is no configuration \"{text}\"")).hint(format!(
                "give an id from 0 to {} or a name such as {}: `kiln stitch space --model DIR` lists them",
                self.len() - 1,
                self.configurations[self.len() - 1].name()
            ))
        })
    }

    /// The networks that pass a stitching layer, with their cuts there.
    pub fn cuts_of(&self, layer: usize) -> impl Iterator<Item = (&Configuration, &Cut)> {
        let cuts = self.configurations.iter().flat_map(|c| c.cuts.iter().map(move |cut| (c, cut)));
        cuts.filter(move |(_, cut)| cut.layer == layer)
    }

    /// What the rear of a cut takes.
    pub fn rear_extent(&self, cut: &Cut) -> &Extent {
        &self.outlines[self.layers[cut.layer].rear].extents[cut.before]
    }

    /// Channels before and after a stitching layer.
    pub fn layer_widths(&self, layer: usize) -> [usize; 2] {
        let cut = self.cuts_of(layer).next().map(|(_, cut)| *cut);
        cut.map_or([0, 0], |cut| self.widths(self.layers[layer], &cut))
    }

    fn widths(&self, joint: Joint, cut: &Cut) -> [usize; 2] {
        let (front, rear) = (&self.outlines[joint.front], &self.outlines[joint.rear]);
        [front.extents[cut.after + 1].channels, rear.extents[cut.before].channels]
    }

    /// What a network costs for one image: the parts that it runs, the embedding of its first anchor, the head of its last
    /// and the stitching layers.
    pub fn cost(&self, configuration: &Configuration) -> Cost {
        let outline = |anchor: usize| &self.outlines[anchor];
        let blocks: Cost = configuration
            .legs(|anchor| outline(anchor).depth())
            .map(|(anchor, blocks)| outline(anchor).blocks_cost(blocks))
            .sum();
        let stitches: Cost = configuration
            .cuts
            .iter()
            .map(|cut| {
                let [inputs, outputs] = self.widths(self.layers[cut.layer], cut);
                linear_cost(self.rear_extent(cut).positions(), inputs, outputs)
            })
            .sum();
        let (first, last) = (configuration.anchors[0], *configuration.anchors.last().unwrap_or(&0));
        outline(first).embed + blocks + stitches + outline(last).head
    }

    /// Keeps the anchors and these other networks, and only the layers that they need.
    pub fn retain(&mut self, keep: impl Fn(usize, &Configuration) -> bool) {
        let mut id = 0;
        self.configurations.retain(|configuration| {
            id += 1;
            configuration.is_anchor() || keep(id - 1, configuration)
        });
        let mut places = BTreeMap::new();
        for cut in self.configurations.iter_mut().flat_map(|c| &mut c.cuts) {
            places.entry(cut.layer).or_insert(0);
        }
        for (new, place) in places.values_mut().enumerate() {
            *place = new;
        }
        self.layers = places.keys().map(|&old| self.layers[old]).collect();
        for cut in self.configurations.iter_mut().flat_map(|c| &mut c.cuts) {
            cut.layer = places[&cut.layer];
        }
    }
}

fn check_config(config: &SpaceConfig) -> Result<()> {
    if !(1..=LARGEST_KERNEL).contains(&config.kernel) || config.stride == 0 {
        return Err(Error::usage(format!(
            "a window of {} blocks that moves by {} is impossible",
            config.kernel, config.stride
        ))
        .hint(format!("--kernel lies between 1 and {LARGEST_KERNEL}, and --stride is at least 1")));
    }
    if !(2..=3).contains(&config.max_anchors) {
        return Err(Error::usage(format!("networks of {} anchors are not made", config.max_anchors))
            .hint("--max-anchors is 2 or 3"));
    }
    Ok(())
}

/// Checks that the anchors solve the same task.
fn check_outlines(outlines: &[Outline]) -> Result<()> {
    if outlines.len() < 2 {
        return Err(Error::usage(format!("{} anchor cannot be stitched", outlines.len()))
            .hint("give at least two, of different size"));
    }
    outlines.iter().try_for_each(Outline::check)?;
    for (index, outline) in outlines.iter().enumerate().skip(1) {
        let first = &outlines[0];
        let differ = |what: &str, a: String, b: String| {
            Err(Error::usage(format!("anchor 0 has {what} {a}, anchor {index} {b}"))
                .hint("anchors must be trained for the same task: same images, same classes"))
        };
        if outline.classes != first.classes {
            return differ("classes:", first.classes.to_string(), outline.classes.to_string());
        }
        if outline.image != first.image {
            return differ("images", format!("{:?}", first.image), format!("{:?}", outline.image));
        }
    }
    Ok(())
}

/// The pairs that are joined, by front and rear.
fn pairs(count: usize, config: &SpaceConfig) -> Vec<(usize, usize)> {
    let all = (0..count).flat_map(|front| (0..count).map(move |rear| (front, rear)));
    all.filter(|&(front, rear)| match config.direction {
        Direction::Fast => front < rear,
        Direction::Both => front != rear,
    })
    .filter(|&(front, rear)| config.pairs == Pairs::All || front.abs_diff(rear) == 1)
    .collect()
}

/// A cut and the number of the window whose layer it uses.
type WindowCut = (usize, usize, (usize, usize));

/// The cuts between `front` and `rear` blocks, each with the number of its layer.
fn stage_cuts(front: usize, rear: usize, config: &SpaceConfig) -> Vec<(usize, usize, usize)> {
    use std::cmp::Ordering;
    match front.cmp(&rear) {
        Ordering::Equal => paired(front, config),
        // Rear block m stands where floor(m L_front / L_rear) stands in the front.
        Ordering::Less => (1..rear)
            .map(|before| (before * front / rear, before))
            .filter(|(after, before)| after < before)
            .map(|(after, before)| (after, before, after))
            .collect(),
        // The same with the roles changed: after front block l, ceil((l + 1) L_rear / L_front) is next.
        Ordering::Greater => (0..front)
            .map(|after| (after, ((after + 1) * rear).div_ceil(front)))
            .filter(|&(_, before)| before < rear)
            .map(|(after, before)| (after, before, before))
            .collect(),
    }
}

/// Equal depth: every pair of blocks within a sliding window; the window where it is first seen gives the layer.
fn paired(depth: usize, config: &SpaceConfig) -> Vec<(usize, usize, usize)> {
    let mut cuts = Vec::new();
    for (window, start) in (0..depth).step_by(config.stride).enumerate() {
        let blocks = start..depth.min(start.saturating_add(config.kernel));
        // Pairs of two blocks that both belong to the window before have been seen.
        let seen = match window {
            0 => 0..0,
            _ => start..depth.min((start - config.stride).saturating_add(config.kernel)),
        };
        for after in blocks.clone() {
            let fresh = blocks.clone().filter(|before| !(seen.contains(&after) && seen.contains(before)));
            cuts.extend(fresh.map(|before| (after, before, window)));
        }
    }
    cuts
}
