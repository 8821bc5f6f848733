//! The reference experiment: what the review claims of hypernetworks, each time beside the networks one would use without.

use std::time::Instant;

use kiln_core::{Card, Claim, Context, Report, Result, Scale, Threshold};

use crate::apps::hyperlstm::{self, Characters};
use crate::apps::uncertainty::Known;
use crate::apps::{
    Findings, Parts, causal, compare, continual, nlp, prune, rl, text, transfer, uncertainty, zeroshot,
};
use crate::table::{Sizes, table};
use crate::target::Target;

/// Everything that differs between scales.
struct Plan {
    /// Steps of a task of continual learning.
    continual: usize,
    causal: usize,
    replications: usize,
    compare: usize,
    rows: Vec<usize>,
    transfer: [usize; 2],
    uncertainty: usize,
    zeroshot: usize,
    /// Shares of units that are removed, and steps of training and of fine-tuning.
    prune: (&'static [f64], [usize; 2]),
    /// Families of worlds, and steps of the evolution strategy.
    rl: (&'static [rl::World], usize),
    /// Steps of the encoder of texts and of what each task has of its own.
    nlp: [usize; 2],
    /// Steps of the networks over characters, and their learning rates.
    characters: (usize, &'static [f64]),
    seeds: u64,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                continual: 2,
                causal: 2,
                replications: 1,
                compare: 2,
                rows: vec![5],
                transfer: [2, 2],
                uncertainty: 2,
                zeroshot: 2,
                prune: (&[0.5], [2, 2]),
                rl: (&[rl::World::Reacher], 1),
                nlp: [2, 2],
                characters: (1, &[6e-3]),
                seeds: 1,
            },
            Scale::Quick => Self {
                continual: 400,
                causal: 300,
                replications: 1,
                compare: 600,
                rows: vec![5],
                transfer: [400, 100],
                uncertainty: 400,
                zeroshot: 400,
                prune: (&[0.5], [500, 100]),
                rl: (&[rl::World::Reacher], 60),
                nlp: [100, 50],
                characters: (40, &[6e-3]),
                seeds: 1,
            },
            Scale::Full => Self {
                continual: 400,
                causal: 1000,
                replications: 3,
                compare: 1500,
                rows: vec![5, 20, 100],
                transfer: [1500, 200],
                uncertainty: 1500,
                zeroshot: 1000,
                prune: (&[0.5, 0.75], [1500, 300]),
                rl: (&[rl::World::Cartpole, rl::World::Reacher], 150),
                nlp: [600, 400],
                characters: (600, &[2e-3, 6e-3]),
                seeds: 3,
            },
        }
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    report_continual(&mut report, &plan, cx)?;
    report_compare(&mut report, &plan, cx)?;
    report_causal(&mut report, &plan, cx)?;
    report_transfer(&mut report, &plan, cx)?;
    report_uncertainty(&mut report, &plan, cx)?;
    report_zeroshot(&mut report, &plan, cx)?;
    report_prune(&mut report, &plan, cx)?;
    report_rl(&mut report, &plan, cx)?;
    report_texts(&mut report, &plan, cx)?;
    report_characters(&mut report, &plan, cx)?;
    let sizes = Sizes { hidden: 32, chunk: 256, emb_dim: 8, tasks: 5 };
    report.tables.push(table(&Target::mlp(&[64, 32, 2]), sizes, cx)?);
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

fn add(report: &mut Report, findings: Findings) {
    report.tables.push(findings.table);
    report.plots.extend(findings.plots);
    report.notes.extend(findings.notes);
}

fn report_continual(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let config = continual::Config {
        steps: plan.continual,
        look_ahead: true,
        seeds: plan.seeds,
        ..continual::Config::new()
    };
    let tasks = continual::digit_tasks("0/1,2/3,4/5,6/7,8/9")?;
    let (findings, summary) = continual::run(&config, &tasks, cx)?;
    add(report, findings);
    let paper = "task-conditioned hypernetworks learn tasks one after another with little forgetting";
    let claim = |name: &str, measured, threshold| Claim::new(name, paper, measured, "", threshold);
    report.claims.extend([
        claim(
            "Five tasks one after another: mean final accuracy",
            summary.accuracy,
            Threshold::AtLeast(0.95),
        ),
        claim("Ahead of fine-tuning", summary.accuracy - summary.fine_tuning, Threshold::AtLeast(0.08)),
        claim("Accuracy that is forgotten", summary.forgetting, Threshold::AtMost(0.02)),
    ]);
    Ok(())
}

fn report_compare(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let config = compare::Config {
        steps: plan.compare,
        rows: plan.rows.clone(),
        seeds: plan.seeds,
        ..compare::Config::default()
    };
    let (findings, found) = compare::compression(&config, cx)?;
    add(report, findings);
    report.claims.extend([
        Claim::new(
            "A hypernetwork of fewer parameters than its target: parameters",
            "a hypernetwork compresses its target",
            found.parameters as f64 / found.target as f64,
            "of the target's weights",
            Threshold::AtMost(10_000.0 / found.target as f64),
        ),
        Claim::new(
            "And its accuracy, of that of the target trained directly",
            "a hypernetwork compresses its target",
            found.ratio,
            "",
            Threshold::AtLeast(0.95),
        ),
    ]);
    let (findings, ahead) = compare::sharing(&config, cx)?;
    add(report, findings);
    report.claims.push(Claim::new(
        "With 5 rows a class and task, one hypernetwork is ahead of a network for each task",
        "tasks share information softly through the hypernetwork",
        ahead,
        "accuracy",
        Threshold::AtLeast(0.03),
    ));
    Ok(())
}

fn report_causal(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let (sets, what) = causal::bundled(plan.replications, cx)?;
    let config = causal::Config { steps: plan.causal, ..causal::Config::default() };
    let (findings, all) = causal::run(&config, &sets, &what, cx)?;
    add(report, findings);
    let [hyper, tarnet, single] =
        ["hypernetwork", "TARNet", "S-learner"].map(|name| causal::mean_test_pehe(&all, name));
    let paper = "heads that share softly are no worse than heads that share nothing";
    report.claims.extend([
        Claim::new(
            "Effects of a treatment: error, of TARNet's",
            paper,
            hyper / tarnet,
            "",
            Threshold::AtMost(1.1),
        ),
        Claim::new("And of the S-learner's", paper, hyper / single, "", Threshold::AtMost(1.0)),
    ]);
    Ok(())
}

fn report_transfer(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let config = transfer::Config { steps: plan.transfer, seeds: plan.seeds, ..transfer::Config::default() };
    let (findings, [adapted, pooled, _]) =
        transfer::run(&config, &transfer::turned_digits(&[0.0, 30.0, 60.0, 90.0]), cx)?;
    add(report, findings);
    report.claims.push(Claim::new(
        "A new domain by its embedding alone, ahead of one network for all domains",
        "a new domain needs only a new embedding",
        adapted - pooled,
        "accuracy",
        Threshold::AtLeast(0.05),
    ));
    Ok(())
}

fn report_uncertainty(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let config =
        uncertainty::Config { steps: plan.uncertainty, seeds: plan.seeds, ..uncertainty::Config::default() };
    let (findings, [hyper, single]) = uncertainty::run(&config, &Known::bundled()?, cx)?;
    add(report, findings);
    report.claims.push(Claim::new(
        "Noise-conditioned weights: negative log-likelihood, of that of one network",
        "a distribution of weights knows how sure it is",
        hyper / single,
        "",
        Threshold::AtMost(1.0),
    ));
    Ok(())
}

fn report_zeroshot(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let config = zeroshot::Config { steps: plan.zeroshot, ..zeroshot::Config::default() };
    let (findings, accuracy) = zeroshot::run(&config, &Parts::digits(&prune::DIGITS), cx)?;
    add(report, findings);
    report.claims.push(Claim::new(
        "Three classes that were never seen: accuracy (chance 0.33)",
        "weights made from a description need no examples",
        accuracy,
        "",
        Threshold::AtLeast(0.5),
    ));
    Ok(())
}

fn report_prune(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let (removed, steps) = plan.prune;
    let config = prune::Config { removed: removed.to_vec(), steps, seeds: plan.seeds };
    let (findings, [hyper, magnitude]) = prune::run(&config, &Parts::digits(&prune::DIGITS), cx)?;
    add(report, findings);
    report.claims.push(Claim::new(
        "Half of the hidden units removed by masks that are made with the weights, ahead of magnitude pruning",
        "hypernetworks find small networks that are as good",
        hyper - magnitude,
        "accuracy",
        Threshold::AtLeast(-0.01),
    ));
    Ok(())
}

fn report_rl(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let (worlds, steps) = plan.rl;
    for &world in worlds {
        let config = rl::Config { world, steps, seeds: plan.seeds, ..rl::Config::default() };
        let (findings, [made, sees]) = rl::run(&config, cx)?;
        add(report, findings);
        report.claims.push(Claim::new(
            format!(
                "Policies made from the description of the world ({}): return, of that of one that sees it",
                world.name()
            ),
            "a hypernetwork adapts the policy to the world",
            made / sees,
            "",
            Threshold::AtLeast(0.95),
        ));
    }
    Ok(())
}

fn report_texts(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let config = nlp::Config { steps: plan.nlp, seeds: plan.seeds, ..nlp::Config::default() };
    let (findings, found) = nlp::run(&config, &text::bundled(cx)?, cx)?;
    add(report, findings);
    let [made, each, head] = found.accuracies;
    let paper = "adapters that one hypernetwork makes share what tasks have in common, with fewer parameters";
    report.claims.extend([
        Claim::new(
            "Adapters for texts made by a hypernetwork: parameters, of adapters of each task",
            paper,
            found.parameters[0] as f64 / found.parameters[1] as f64,
            "",
            Threshold::AtMost(0.6),
        ),
        Claim::new(
            "Their accuracy ahead of those",
            paper,
            made - each,
            "accuracy",
            Threshold::AtLeast(-0.01),
        ),
        Claim::new("And ahead of a shared head", paper, made - head, "accuracy", Threshold::AtLeast(0.0)),
    ]);
    Ok(())
}

fn report_characters(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let (steps, rates) = plan.characters;
    let config = hyperlstm::Config { steps, rates: rates.to_vec(), ..hyperlstm::Config::default() };
    let (findings, [hyper, plain]) = hyperlstm::run(&config, &Characters::bundled(), cx)?;
    add(report, findings);
    report.claims.push(Claim::new(
        "HyperLSTM: bits a character, of an LSTM with as many parameters",
        "weights that change at every step predict characters better",
        hyper / plain,
        "",
        Threshold::AtMost(1.0),
    ));
    Ok(())
}
