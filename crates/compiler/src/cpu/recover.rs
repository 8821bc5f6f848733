//! Attention found again in the operations that it was written with: `softmax(scale q kᵀ + bias) v`.

use super::expression::{Binary, Expression};
use super::lower::{Attention, Draft, Origin, RowWork, Step, Work};
use super::memory::Kind;
use super::view::View;

/// What was done to the scores before their softmax.
#[derive(Default)]
struct Scores {
    scale: Option<f32>,
    bias: Option<View>,
    mask: Option<View>,
}

/// The attention whose probabilities are `probabilities`, `[batch, heads, time, source]`, and whose values are `v`;
/// `None` where they come from anything else.
///
/// Queries that see no key get 0, where the softmax that is replaced would give NaN.
pub(super) fn attention(
    drafts: &[Draft],
    steps: &[Step],
    probabilities: &View,
    v: &View,
) -> Option<Attention> {
    let step_of = |view: &View| match drafts[view.buffer].origin {
        Origin::Step(step) => Some(&steps[step]),
        _ => None,
    };
    let Step { work: Work::Rows { x, work: RowWork::Softmax, .. }, epilogue: None, .. } =
        step_of(probabilities)?
    else {
        return None;
    };
    if probabilities.shape.len() != 4 || !probabilities.is_contiguous() {
        return None;
    }
    let mut scores = Scores::default();
    let mut product = scores.read(x, drafts)?;
    if product.shape != probabilities.shape || !product.is_contiguous() {
        return None;
    }
    let Step { work: Work::Product { operands: Some([q, k]), .. }, epilogue, .. } = step_of(&product)? else {
        return None;
    };
    if let Some(epilogue) = epilogue {
        let own = product.buffer;
        product = scores.read(epilogue, drafts)?;
        if product.buffer != own {
            return None;
        }
    }
    Some(Attention {
        q: q.clone(),
        k: k.permute(&[0, 1, 3, 2]),
        v: v.clone(),
        bias: scores.bias,
        mask: scores.mask,
        causal: false,
        scale: scores.scale.unwrap_or(1.0),
    })
}

impl Scores {
    /// Takes off what was done to the scores, outermost first; the product beneath.
    fn read(&mut self, x: &Expression, drafts: &[Draft]) -> Option<View> {
        match x {
            Expression::Load(view) => Some(view.clone()),
            Expression::Binary(Binary::Multiply, x, factor)
            | Expression::Binary(Binary::Multiply, factor, x)
                if let Expression::Constant(factor) = **factor =>
            {
                self.scale = Some(self.scale.unwrap_or(1.0) * factor);
                self.read(x, drafts)
            }
            Expression::Binary(Binary::Divide, x, divisor)
                if let Expression::Constant(divisor) = **divisor =>
            {
                self.scale = Some(self.scale.unwrap_or(1.0) / divisor);
                self.read(x, drafts)
            }
            Expression::Binary(Binary::Add, x, bias) if self.is_first(bias, Kind::Float, drafts) => {
                self.bias = bias.as_load().cloned();
                self.read(x, drafts)
            }
            Expression::Select(mask, hidden, x)
                if **hidden == Expression::Constant(f32::NEG_INFINITY)
                    && self.mask.is_none()
                    && self.is_first(mask, Kind::Bool, drafts) =>
            {
                self.mask = mask.as_load().cloned();
                self.read(x, drafts)
            }
            _ => None,
        }
    }

    /// Whether an operand is a tensor that can be added to finished scores: nothing has been found yet that was done
    /// to them later and does not commute with it.
    fn is_first(&self, operand: &Expression, kind: Kind, drafts: &[Draft]) -> bool {
        self.bias.is_none()
            && self.scale.is_none()
            && operand.as_load().is_some_and(|view| drafts[view.buffer].kind == kind)
    }
}
