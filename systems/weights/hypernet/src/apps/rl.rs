//! Policies for worlds that differ: a hypernetwork makes the policy from a description of the world.
//!
//! Both are trained by evolution strategies (Salimans et al., arXiv 1703.03864), which need returns and no gradients.
//! Baseline: one policy that sees the description beside the state.

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Context, Error, Plot, Result, Table as Sheet};
use kiln_data::{Table, TableOptions};
use kiln_nn::WeightSpec;
use rand::{Rng, RngExt};
use rayon::prelude::*;

use crate::apps::{Findings, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::data::numbers;
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, OutputScheme};
use crate::target::{Layer, Target};
use crate::training::{Plain, normal};

/// Units of the hidden layer of a policy that is made, and of the one that sees the description and must hold all worlds.
const HIDDEN: [usize; 2] = [16, 64];
/// Numbers of a state, and of an action.
const STATE: usize = 4;
/// Numbers that describe a world.
pub const DESCRIPTION: usize = 2;
const ACTION: usize = 2;
/// Pairs of opposite disturbances a step, and worlds that each is tried in.
const PAIRS: usize = 16;
const WORLDS: usize = 4;
/// Standard deviations of a disturbance; each policy has the one that it learns more with.
const SIGMAS: [f32; 2] = [0.05, 0.2];
/// Steps at the end of a run that tell how much was learned.
const LAST: usize = 20;
/// Learning rate of Adam.
const RATE: f32 = 0.03;

/// A family of worlds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum World {
    /// A pole on a cart (Barto et al. 1983), with its half-length and gravity as description
    Cartpole,
    /// A point that is to reach a place, with controls turned by an angle that the description tells
    Reacher,
}

impl World {
    /// Its name in sentences.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cartpole => "cart and pole",
            Self::Reacher => "reacher",
        }
    }

    /// Steps of an episode.
    fn steps(self) -> usize {
        match self {
            Self::Cartpole => 500,
            Self::Reacher => 60,
        }
    }

    /// A world of the family, described by numbers near 0; those held out for tests lie between and beyond.
    fn draw(self, rng: &mut impl Rng) -> [f32; DESCRIPTION] {
        match self {
            // Half-lengths 0.3 to 1.5 and gravity 4.8 to 14.8, see `episode`.
            Self::Cartpole => [rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0)],
            Self::Reacher => {
                let angle: f32 = rng.random_range(-3.0..3.0);
                [angle.cos(), angle.sin()]
            }
        }
    }

    /// Worlds of one's own: a table with the columns `half_length` (m) and `gravity` (m/s²) of poles, or `angle` (degrees)
    /// of turned controls.
    ///
    /// # Errors
    /// Names the column that is missing, or the row that describes no world.
    pub fn read(self, path: &Path) -> Result<Vec<[f32; DESCRIPTION]>> {
        let table = Table::read(path, TableOptions::default())?;
        let column = |name: &str| match table.column(name) {
            Some(column) => numbers(path, column),
            None => Err(table.no_column(name)),
        };
        match self {
            Self::Cartpole => {
                let (lengths, gravities) = (column("half_length")?, column("gravity")?);
                if let Some(row) = lengths.iter().zip(&gravities).position(|(l, g)| *l <= 0.0 || *g <= 0.0) {
                    let place = format!("{}, row {}", path.display(), row + 1);
                    return Err(Error::input(place, "half_length and gravity must be above 0"));
                }
                let world = |(l, g): (&f64, &f64)| [((l - 0.9) / 0.6) as f32, ((g - 9.8) / 5.0) as f32];
                Ok(lengths.iter().zip(&gravities).map(world).collect())
            }
            Self::Reacher => {
                let turned = |angle: &f64| [angle.to_radians().cos() as f32, angle.to_radians().sin() as f32];
                Ok(column("angle")?.iter().map(turned).collect())
            }
        }
    }

    /// Runs a policy to the end of an episode; the return.
    fn episode(self, policy: &Policy, world: [f32; DESCRIPTION], rng: &mut impl Rng) -> f32 {
        match self {
            Self::Cartpole => cartpole(policy, world, rng),
            Self::Reacher => reacher(policy, world, rng),
        }
    }
}

/// Steps until the pole has fallen by 12° or the cart left ±2.4: masses 1.0 and 0.1, force 10, steps of 0.02 s.
fn cartpole(policy: &Policy, [length, gravity]: [f32; DESCRIPTION], rng: &mut impl Rng) -> f32 {
    const CART: f32 = 1.0;
    const POLE: f32 = 0.1;
    const TAU: f32 = 0.02;
    let (half, g) = (0.9 + 0.6 * length, 9.8 + 5.0 * gravity);
    let mut state: [f32; STATE] = std::array::from_fn(|_| rng.random_range(-0.05..0.05));
    for step in 0..World::Cartpole.steps() {
        let [x, v, angle, turning] = state;
        if x.abs() > 2.4 || angle.abs() > 12f32.to_radians() {
            return step as f32;
        }
        let [left, right] = policy.act(state, [length, gravity]);
        let force = if right > left { 10.0 } else { -10.0 };
        let (sin, cos) = angle.sin_cos();
        let push = (force + POLE * half * turning * turning * sin) / (CART + POLE);
        let angular = (g * sin - cos * push) / (half * (4.0 / 3.0 - POLE * cos * cos / (CART + POLE)));
        let linear = push - POLE * half * angular * cos / (CART + POLE);
        state = [x + TAU * v, v + TAU * linear, angle + TAU * turning, turning + TAU * angular];
    }
    World::Cartpole.steps() as f32
}

/// The sum over steps of `1 - distance`, at least 0, to a place at distance 1 from the start.
fn reacher(policy: &Policy, world: [f32; DESCRIPTION], rng: &mut impl Rng) -> f32 {
    let [cos, sin] = world;
    let at: f32 = rng.random_range(0.0..std::f32::consts::TAU);
    let (mut offset, mut speed) = ([at.cos(), at.sin()], [0.0f32; 2]);
    let mut total = 0.0;
    for _ in 0..World::Reacher.steps() {
        let [a, b] = policy.act([offset[0], offset[1], speed[0], speed[1]], world).map(f32::tanh);
        for (axis, push) in [cos * a - sin * b, sin * a + cos * b].into_iter().enumerate() {
            speed[axis] = 0.8 * speed[axis] + 0.1 * push;
            offset[axis] -= speed[axis];
        }
        total += (1.0 - offset[0].hypot(offset[1])).max(0.0);
    }
    total
}

/// A policy with one hidden layer; weights as [`Target`] has them.
struct Policy<'a> {
    theta: &'a [f32],
    /// Whether it sees the description beside the state.
    sees_world: bool,
}

impl Policy<'_> {
    fn act(&self, state: [f32; STATE], world: [f32; DESCRIPTION]) -> [f32; ACTION] {
        let mut input = [0.0; STATE + DESCRIPTION];
        input[..STATE].copy_from_slice(&state);
        input[STATE..].copy_from_slice(&world);
        let input = if self.sees_world { &input[..] } else { &input[..STATE] };
        // H (inputs + 1) + actions (H + 1) numbers.
        let units = (self.theta.len() - ACTION) / (input.len() + 1 + ACTION);
        let (weight, rest) = self.theta.split_at(units * input.len());
        let (bias, rest) = rest.split_at(units);
        let dot = |row: &[f32], x: &[f32]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
        let mut hidden = [0.0; HIDDEN[1]];
        let hidden = &mut hidden[..units];
        for (unit, h) in hidden.iter_mut().enumerate() {
            *h = (dot(&weight[unit * input.len()..(unit + 1) * input.len()], input) + bias[unit]).tanh();
        }
        let (weight, bias) = rest.split_at(ACTION * units);
        std::array::from_fn(|a| dot(&weight[a * units..(a + 1) * units], hidden) + bias[a])
    }
}

/// From parameters to the policy of a world.
enum Maker<'a> {
    /// The parameters are the policy.
    Plain,
    /// The parameters are those of a hypernetwork.
    Hyper { hyper: &'a HyperNet, spec: &'a WeightSpec, cx: &'a Context },
}

impl Maker<'_> {
    /// The policies' weights, one for every world.
    fn make(&self, phi: &[f32], worlds: &[[f32; DESCRIPTION]]) -> Result<Vec<Vec<f32>>> {
        match self {
            Self::Plain => Ok(vec![phi.to_vec(); worlds.len()]),
            Self::Hyper { hyper, spec, cx } => {
                let phi = Tensor::from_data(TensorData::new(phi.to_vec(), [phi.len()]), &cx.device);
                let given: Vec<f32> = worlds.iter().flatten().copied().collect();
                let given =
                    Tensor::from_data(TensorData::new(given, [worlds.len(), DESCRIPTION]), &cx.device);
                let theta = spec.split(phi)?.fill(*hyper)?.generate(&Condition::given(given))?.flat;
                let count = theta.dims()[1];
                let theta: Vec<f32> = theta.into_data().iter::<f32>().collect();
                Ok(theta.chunks(count).map(<[f32]>::to_vec).collect())
            }
        }
    }

    fn sees_world(&self) -> bool {
        matches!(self, Self::Plain)
    }
}

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// The family of worlds.
    pub world: World,
    /// Steps of the evolution strategy.
    pub steps: usize,
    /// Worlds that policies are judged in.
    pub test_worlds: usize,
    /// Those worlds, where they are not drawn like the ones trained in.
    pub worlds: Option<Vec<[f32; DESCRIPTION]>>,
    /// Repetitions.
    pub seeds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { world: World::Cartpole, steps: 150, test_worlds: 100, worlds: None, seeds: 1 }
    }
}

/// Mean returns in worlds that are not trained in: of the hypernetwork's policies, and of the one that sees the
/// description.
///
/// # Errors
/// When the configuration makes no sense, or the user stops it.
pub fn run(config: &Config, cx: &Context) -> Result<(Findings, [f64; 2])> {
    if config.test_worlds == 0 {
        return Err(Error::usage("policies must be judged in at least one world"));
    }
    let (mut returns, mut curves) = ([Vec::new(), Vec::new()], Vec::new());
    let mut parameters = [0, 0];
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("policies for the {}, seed {}", config.world.name(), cx.seed));
        let hyper = HyperNetConfig::new(policy(STATE, HIDDEN[0]).spec()?)
            .with_conditioning([Conditioning::Given { dim: DESCRIPTION }])
            .with_scheme(OutputScheme::Once)
            .with_arch(Arch::Mlp(vec![16]))
            .draw(cx, "hypernet")?;
        let spec = WeightSpec::of(&hyper);
        let phi: Vec<f32> = spec.read(&hyper)?.into_data().iter::<f32>().collect();
        let plain = Plain::new(&policy(STATE + DESCRIPTION, HIDDEN[1]), 1, cx, "plain")?;
        let theta: Vec<f32> = plain.theta.val().into_data().iter::<f32>().collect();
        parameters = [phi.len(), theta.len()];
        for (number, (maker, start)) in
            [(Maker::Hyper { hyper: &hyper, spec: &spec, cx }, phi), (Maker::Plain, theta)]
                .into_iter()
                .enumerate()
        {
            let evolved = evolve_best(config, &maker, &start, cx)?;
            returns[number].push(judge(config, &maker, &evolved.phi, cx)?);
            if seed == 0 {
                curves.push(evolved.curve);
            }
        }
    }
    let spreads = returns.map(|values| Spread::of(&values));
    let mut table = Sheet::new(
        format!(
            "Policies for the {}: mean return in {} unseen worlds, at most {}",
            config.world.name(),
            config.worlds.as_ref().map_or(config.test_worlds, Vec::len),
            config.world.steps()
        ),
        &["policy", "parameters", "mean return"],
    );
    let names = ["made from the description", "sees the description"];
    for (number, name) in names.into_iter().enumerate() {
        table.row([name.to_string(), parameters[number].to_string(), spreads[number].text()]);
    }
    let mut plot = Plot::lines(
        format!("Learning policies for the {}", config.world.name()),
        "step",
        "mean return of the disturbed policies",
    );
    for (name, curve) in names.into_iter().zip(curves) {
        plot = plot.series(name, curve);
    }
    let notes = vec![format!(
        "Policies: {} steps of an evolution strategy, {PAIRS} pairs of disturbances in {WORLDS} worlds each, of the better of the \
         deviations {SIGMAS:?}; both see the same worlds.",
        config.steps
    )];
    Ok((Findings { table, plots: vec![plot], notes }, spreads.map(|spread| spread.mean)))
}

/// The network of a policy.
fn policy(inputs: usize, hidden: usize) -> Target {
    Target {
        input: vec![inputs],
        layers: vec![Layer::Linear { outputs: hidden }, Layer::Tanh, Layer::Linear { outputs: ACTION }],
    }
}

/// Parameters after a run.
#[derive(Default)]
struct Evolved {
    phi: Vec<f32>,
    /// The mean return of the disturbed policies after each step.
    curve: Vec<(f64, f64)>,
}

/// Evolves with each of [`SIGMAS`], and keeps what has the highest returns at the end.
fn evolve_best(config: &Config, maker: &Maker, start: &[f32], cx: &Context) -> Result<Evolved> {
    let learned = |run: &Evolved| run.curve.iter().rev().take(LAST).map(|point| point.1).sum::<f64>();
    let runs = SIGMAS.iter().map(|&sigma| evolve(config, maker, start.to_vec(), sigma, cx));
    let runs = runs.collect::<Result<Vec<_>>>()?;
    Ok(runs.into_iter().max_by(|a, b| learned(a).total_cmp(&learned(b))).unwrap_or_default())
}

/// Climbs the mean return by disturbed copies of the parameters.
fn evolve(config: &Config, maker: &Maker, mut phi: Vec<f32>, sigma: f32, cx: &Context) -> Result<Evolved> {
    let bar = cx.progress(config.steps as u64, "evolving");
    let count = phi.len();
    let mut moments = vec![[0.0f32; 2]; count];
    let mut curve = Vec::with_capacity(config.steps);
    for step in 0..config.steps {
        if cx.interrupted() {
            return Err(Error::interrupted("the training was stopped"));
        }
        let mut rng = cx.rng("worlds", step as u64);
        let worlds: Vec<[f32; DESCRIPTION]> = (0..WORLDS).map(|_| config.world.draw(&mut rng)).collect();
        let mut rng = cx.rng("disturbances", step as u64);
        let noises: Vec<Vec<f32>> =
            (0..PAIRS).map(|_| (0..count).map(|_| normal(&mut rng) as f32).collect()).collect();
        let makes = noises
            .iter()
            .flat_map(|noise| [sigma, -sigma].map(|by| (noise, by)))
            .map(|(noise, by)| {
                let disturbed: Vec<f32> = phi.iter().zip(noise).map(|(p, n)| p + by * n).collect();
                maker.make(&disturbed, &worlds)
            })
            .collect::<Result<Vec<_>>>()?;
        let returns: Vec<f32> = makes
            .par_iter()
            .map(|policies| {
                // Both of a pair, and all pairs, begin in the same states.
                let of = |(number, theta): (usize, &Vec<f32>)| {
                    let mut rng = cx.rng("starts", (step * WORLDS + number) as u64);
                    let policy = Policy { theta, sees_world: maker.sees_world() };
                    config.world.episode(&policy, worlds[number], &mut rng)
                };
                policies.iter().enumerate().map(of).sum::<f32>() / WORLDS as f32
            })
            .collect();
        curve.push((step as f64 + 1.0, f64::from(returns.iter().sum::<f32>()) / returns.len() as f64));
        let ranks = centred_ranks(&returns);
        for (i, (phi, [first, second])) in phi.iter_mut().zip(&mut moments).enumerate() {
            let slope: f32 =
                (0..PAIRS).map(|pair| (ranks[2 * pair] - ranks[2 * pair + 1]) * noises[pair][i]).sum();
            // Adam, upwards.
            *first = 0.9 * *first + 0.1 * slope;
            *second = 0.99 * *second + 0.01 * slope * slope;
            let (a, b) = (1.0 - 0.9f32.powi(step as i32 + 1), 1.0 - 0.99f32.powi(step as i32 + 1));
            *phi += RATE * (*first / a) / ((*second / b).sqrt() + 1e-8);
        }
        bar.inc(1);
    }
    Ok(Evolved { phi, curve })
}

/// Ranks from -0.5 for the lowest to 0.5 for the highest; equal values have equal ranks.
fn centred_ranks(values: &[f32]) -> Vec<f32> {
    let below = |v: &f32| values.iter().filter(|w| *w < v).count() as f32;
    let equal = |v: &f32| values.iter().filter(|w| *w == v).count() as f32;
    let last = values.len() as f32 - 1.0;
    values.iter().map(|v| (below(v) + 0.5 * (equal(v) - 1.0)) / last - 0.5).collect()
}

fn judge(config: &Config, maker: &Maker, phi: &[f32], cx: &Context) -> Result<f64> {
    let mut rng = cx.rng("test worlds", 0);
    let worlds: Vec<[f32; DESCRIPTION]> = match &config.worlds {
        Some(worlds) => worlds.clone(),
        None => (0..config.test_worlds).map(|_| config.world.draw(&mut rng)).collect(),
    };
    let returns = maker.make(phi, &worlds)?;
    let of = |(theta, &world): (&Vec<f32>, &[f32; DESCRIPTION])| {
        let policy = Policy { theta, sees_world: maker.sees_world() };
        f64::from(config.world.episode(&policy, world, &mut rng))
    };
    Ok(returns.iter().zip(&worlds).map(of).sum::<f64>() / worlds.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn policies_compute_what_their_target_does() {
        let cx = Context::for_tests("unused");
        let target = policy(STATE, HIDDEN[0]);
        let plain = Plain::new(&target, 1, &cx, "plain").unwrap();
        let state = [0.3, -0.2, 0.1, 0.7];
        let x = Tensor::<1>::from_floats(state, &cx.device).reshape([1, 1, STATE]);
        let expected: Vec<f32> = target.forward(plain.theta.val(), x).into_data().try_to_vec().unwrap();
        let theta: Vec<f32> = plain.theta.val().into_data().try_to_vec().unwrap();
        let found = Policy { theta: &theta, sees_world: false }.act(state, [0.0; 2]);
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn a_pole_that_is_always_pushed_falls_soon_and_a_straight_hand_reaches() {
        let units = HIDDEN[0];
        let count = units * (STATE + 1) + ACTION * (units + 1);
        let policy = Policy { theta: &vec![0.0; count], sees_world: false };
        let length = cartpole(&policy, [-0.66, 0.0], &mut random_stream(0, "test", 0));
        assert!((7.0..15.0).contains(&length), "{length}");
        // Hidden units 0 and 1 are the offset, and the action follows them.
        let mut theta = vec![0.0; count];
        for axis in 0..2 {
            theta[axis * STATE + axis] = 1.0;
            theta[units * (STATE + 1) + axis * units + axis] = 3.0;
        }
        let policy = Policy { theta: &theta, sees_world: false };
        let straight = reacher(&policy, [1.0, 0.0], &mut random_stream(0, "test", 0));
        let backwards = reacher(&policy, [-1.0, 0.0], &mut random_stream(0, "test", 0));
        assert!(straight > 40.0 && backwards == 0.0, "{straight} {backwards}");
    }

    #[test]
    fn ranks_are_centred_and_ties_share_theirs() {
        assert_eq!(centred_ranks(&[3.0, 1.0, 2.0]), [0.5, -0.5, 0.0]);
        assert_eq!(centred_ranks(&[1.0, 1.0]), [0.0, 0.0]);
    }
}
