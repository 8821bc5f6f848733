//! The reference experiment.
use kiln_core::{Card, Context, Report, Result, Scale};
pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    Ok(Report::new(card, scale, cx.seed))
}
