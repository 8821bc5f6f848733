//! The time of the two mixers beside each other.

use std::time::Instant;

use burn::tensor::{Distribution, Tensor};
use kiln_core::{Context, Plot, Table};
use kiln_nn::initialise;
use serde::Serialize;

use crate::ema::MultiHeadEmaConfig;
use crate::tcn::TcnConfig;

/// Seconds of both mixers at one length, medians.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timing {
    /// Steps of a sequence.
    pub length: usize,
    /// TCN, forward.
    pub tcn_forward: f64,
    /// EMA by FFT, forward.
    pub ema_forward: f64,
    /// EMA as a recurrence, forward: no gradients.
    pub scan_forward: f64,
    /// TCN, forward and backward.
    pub tcn_both: f64,
    /// EMA by FFT, forward and backward.
    pub ema_both: f64,
}

/// Times both mixers on random input, one length after another.
pub fn measure(tcn: TcnConfig, states: usize, batch: usize, lengths: &[usize], cx: &Context) -> Vec<Timing> {
    let bar = cx.progress(lengths.len() as u64, "timing");
    let ema = MultiHeadEmaConfig { states, ..MultiHeadEmaConfig::new(tcn.channels) };
    let (tcn, ema) =
        initialise(&cx.device, &mut cx.rng("speed", 0), |device| (tcn.init(device), ema.init(device)));
    let device = cx.device.clone();
    let time = |&length: &usize| {
        let x = Tensor::<3>::random(
            [batch, length, tcn.config().channels],
            Distribution::Normal(0.0, 1.0),
            &device,
        );
        let state = ema.initial_state(batch, &device);
        // As many runs as fit into a moment, at least three.
        let runs = (1 << 19) / (batch * length).max(1);
        let runs = runs.clamp(3, 15);
        let [tcn_forward, ema_forward, scan_forward] = in_turn(
            runs,
            [&|| drop(tcn.forward(x.clone(), None)), &|| drop(ema.forward(x.clone(), None)), &|| {
                drop(ema.forward_with_state(x.clone(), state.clone()))
            }],
        );
        let (tcn, ema) = (burn::module::Module::train(tcn.clone()), burn::module::Module::train(ema.clone()));
        let leaf = Tensor::from_inner(x.clone()).require_grad();
        let [tcn_both, ema_both] = in_turn(
            runs,
            [&|| drop(tcn.forward(leaf.clone(), None).sum().backward()), &|| {
                drop(ema.forward(leaf.clone(), None).sum().backward())
            }],
        );
        bar.inc(1);
        Timing { length, tcn_forward, ema_forward, scan_forward, tcn_both, ema_both }
    };
    lengths.iter().map(time).collect()
}

/// The median seconds of several pieces of work that are run in turn, so that all see the same machine.
fn in_turn<const N: usize>(runs: usize, work: [&dyn Fn(); N]) -> [f64; N] {
    work.iter().for_each(|work| work());
    let mut seconds: [Vec<f64>; N] = std::array::from_fn(|_| Vec::with_capacity(runs));
    for _ in 0..runs {
        for (work, seconds) in work.iter().zip(&mut seconds) {
            let begun = Instant::now();
            work();
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[runs / 2]
    })
}

/// The timings as a table, in milliseconds.
pub fn table(title: impl Into<String>, timings: &[Timing]) -> Table {
    let mut table = Table::new(
        title,
        &[
            "length",
            "TCN forward",
            "EMA (FFT) forward",
            "EMA / TCN",
            "TCN both ways",
            "EMA (FFT) both ways",
            "EMA / TCN",
            "EMA (recurrence) forward",
        ],
    );
    let ms = |seconds: f64| format!("{:.2}", 1e3 * seconds);
    for t in timings {
        table.row([
            t.length.to_string(),
            ms(t.tcn_forward),
            ms(t.ema_forward),
            format!("{:.2}", t.ema_forward / t.tcn_forward),
            ms(t.tcn_both),
            ms(t.ema_both),
            format!("{:.2}", t.ema_both / t.tcn_both),
            ms(t.scan_forward),
        ]);
    }
    table
}

/// The timings as curves.
pub fn plot(timings: &[Timing]) -> Plot {
    let curve = |of: fn(&Timing) -> f64| timings.iter().map(|t| (t.length as f64, 1e3 * of(t))).collect();
    Plot::lines("Time of the mixers", "length", "milliseconds")
        .log_x()
        .log_y()
        .series("TCN, forward", curve(|t| t.tcn_forward))
        .series("EMA by FFT, forward", curve(|t| t.ema_forward))
        .series("TCN, forward and backward", curve(|t| t.tcn_both))
        .series("EMA by FFT, forward and backward", curve(|t| t.ema_both))
        .series("EMA as recurrence, forward", curve(|t| t.scan_forward))
}
