//! The linear classifier of the paper's example (§3.3, fig. 9) as a problem of selection, with its known optimum.

use burn::tensor::DType;
use kiln_core::{Error, Result, random_stream};
use serde::Serialize;

use crate::boxing::Router;
use crate::sbp::{NdSbp, Sbp};
use crate::select::{Choice, Edge, Node, Problem, Solver};

/// One step of training `y = x W` with `x: [batch, features]` and `W: [features, classes]` in 32-bit floats. `x` arrives
/// as S0 and its gradient leaves so; the gradient of `W` must reach the form of `W`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Linear {
    /// Rows of x.
    pub batch: usize,
    /// Columns of x.
    pub features: usize,
    /// Columns of W.
    pub classes: usize,
}

/// What was chosen, and what it moves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Selected {
    /// The form of the stored weight.
    pub weight: Sbp,
    /// Bytes a step.
    pub bytes: f64,
    /// Operands and result of y = x W.
    pub forward: (Vec<Sbp>, Sbp),
    /// The form in which the loss reads y.
    pub loss: Sbp,
    /// Operands and result of dx = dy Wᵀ.
    pub dx: (Vec<Sbp>, Sbp),
    /// Operands and result of dW = xᵀ dy.
    pub dw: (Vec<Sbp>, Sbp),
}

/// The best over all forms of the weight, and the best for each.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Selection {
    /// Over all forms.
    pub best: Selected,
    /// One a form.
    pub by_weight_sbp: Vec<Selected>,
}

const ELEMENT: DType = DType::F32;
/// The signatures that divide a product.
const PRODUCT: [([Sbp; 2], Sbp); 3] =
    [([Sbp::S(0), Sbp::B], Sbp::S(0)), ([Sbp::B, Sbp::S(1)], Sbp::S(1)), ([Sbp::S(1), Sbp::S(0)], Sbp::SUM)];

// The tensors, by their number.
const X: usize = 0;
const W: usize = 1;
const Y: usize = 2;
const DY: usize = 3;
const DX: usize = 4;
const DW: usize = 5;
// The nodes.
const WEIGHT: usize = 1;
const FORWARD: usize = 2;
const LOSS: usize = 3;
const BACK_X: usize = 4;
const BACK_W: usize = 5;

impl Linear {
    /// The cheapest signatures on `devices` devices.
    ///
    /// # Errors
    /// When a size is zero.
    pub fn select(&self, devices: usize) -> Result<Selection> {
        if self.batch == 0 || self.features == 0 || self.classes == 0 || devices == 0 {
            return Err(Error::usage("batch, features, classes and devices must be at least 1"));
        }
        let forms = [Sbp::B, Sbp::S(0), Sbp::S(1)];
        let by_weight_sbp =
            forms.into_iter().map(|weight| self.best_for(weight, devices)).collect::<Result<Vec<_>>>()?;
        let best = by_weight_sbp.iter().min_by(|a, b| a.bytes.total_cmp(&b.bytes)).cloned();
        let best = best.ok_or_else(|| Error::work("there is no form of the weight"))?;
        Ok(Selection { best, by_weight_sbp })
    }

    fn best_for(&self, weight: Sbp, devices: usize) -> Result<Selected> {
        let problem = self.problem(weight, devices);
        let solver = Solver::new(&problem, &mut Router::new(&[devices]));
        let found = solver.solve(&[], &mut random_stream(0, "linear", 0))?;
        let choice = |node: usize| &problem.nodes[node].choices[found[node]];
        let forms = |node: usize| {
            let choice = choice(node);
            (choice.inputs.iter().map(|nd| nd.0[0]).collect::<Vec<_>>(), choice.outputs[0].0[0])
        };
        // The operand that is read transposed, as the product sees it.
        let turned = |(mut inputs, output): (Vec<Sbp>, Sbp), operand: usize| {
            inputs[operand] = transposed(inputs[operand]);
            (inputs, output)
        };
        Ok(Selected {
            weight,
            bytes: solver.cost(&found),
            forward: forms(FORWARD),
            loss: forms(LOSS).1,
            dx: turned(forms(BACK_X), 1),
            dw: turned(forms(BACK_W), 0),
        })
    }

    fn problem(&self, weight: Sbp, devices: usize) -> Problem {
        let edge =
            |name: &str, shape: [usize; 2]| Edge { name: name.into(), shape: shape.to_vec(), dtype: ELEMENT };
        let (b, f, c) = (self.batch, self.features, self.classes);
        let edges = vec![
            edge("x", [b, f]),
            edge("W", [f, c]),
            edge("y", [b, c]),
            edge("dy", [b, c]),
            edge("dx", [b, f]),
            edge("dW", [f, c]),
        ];
        let product = |turned: Option<usize>| {
            let with = |&(inputs, output): &([Sbp; 2], Sbp)| {
                let read = inputs.iter().enumerate();
                let read = read.map(|(at, &sbp)| if turned == Some(at) { transposed(sbp) } else { sbp });
                choice(&read.collect::<Vec<_>>(), &[output])
            };
            PRODUCT.iter().map(with).collect::<Vec<_>>()
        };
        // Over split classes the loss reduces maximum, sum and the target's logit over all devices.
        let rows = 3.0 * 2.0 * ((devices - 1) * b * ELEMENT.size()) as f64;
        let loss = [(Sbp::S(0), 0.0), (Sbp::B, 0.0), (Sbp::S(1), rows)];
        let loss = loss.map(|(sbp, cost)| Choice { cost, ..choice(&[sbp], &[sbp]) });
        let node = |name: &str, inputs: &[usize], outputs: &[usize], choices: Vec<Choice>| Node {
            name: name.into(),
            inputs: inputs.to_vec(),
            outputs: outputs.to_vec(),
            choices,
        };
        Problem {
            edges,
            nodes: vec![
                node("x", &[], &[X], vec![choice(&[], &[Sbp::S(0)])]),
                node("W", &[DW], &[W], vec![choice(&[weight], &[weight])]),
                node("y = x W", &[X, W], &[Y], product(None)),
                node("loss", &[Y], &[DY], loss.to_vec()),
                node("dx = dy Wt", &[DY, W], &[DX], product(Some(1))),
                node("dW = xt dy", &[X, DY], &[DW], product(Some(0))),
                node("dx leaves", &[DX], &[], vec![choice(&[Sbp::S(0)], &[])]),
            ],
        }
    }

    /// Every assignment tried, for tests: the bytes of the best.
    ///
    /// # Errors
    /// As [`Solver::enumerate`].
    pub fn enumerate(&self, weight: Sbp, devices: usize) -> Result<f64> {
        let problem = self.problem(weight, devices);
        let solver = Solver::new(&problem, &mut Router::new(&[devices]));
        debug_assert_eq!(problem.nodes[WEIGHT].name, "W");
        Ok(solver.cost(&solver.enumerate()?))
    }
}

fn choice(inputs: &[Sbp], outputs: &[Sbp]) -> Choice {
    let nd = |forms: &[Sbp]| forms.iter().map(|&sbp| NdSbp(vec![sbp])).collect();
    Choice { inputs: nd(inputs), outputs: nd(outputs), cost: 0.0 }
}

fn transposed(sbp: Sbp) -> Sbp {
    match sbp {
        Sbp::S(axis) => Sbp::S(1 - axis),
        other => other,
    }
}
