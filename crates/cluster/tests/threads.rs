//! The suite on ranks that are threads.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod failure;
mod suite;

use std::time::Duration;

use kiln_cluster::{ClusterArgs, Communicator};
use kiln_core::{Context, Result};
use suite::{Engine, case, program};

struct Threads {
    options: ClusterArgs,
}

impl Engine for Threads {
    fn sizes(&self) -> &[usize] {
        &[1, 2, 3, 4, 5, 7, 8]
    }

    fn run(&self, ranks: usize, body: &(dyn Fn(Communicator) -> Result<()> + Sync)) -> Result<()> {
        self.options.run(ranks, &Context::new(), body).map(drop)
    }
}

fn threads() -> Threads {
    Threads { options: ClusterArgs { timeout: Duration::from_secs(60), ..ClusterArgs::default() } }
}

fn impatient() -> Threads {
    Threads { options: ClusterArgs { timeout: Duration::from_secs(1), ..ClusterArgs::default() } }
}

#[test]
fn reductions_match_a_serial_sum() {
    case::reductions_match_a_serial_sum(&threads());
}

#[test]
fn long_buffers_are_reduced_and_gathered() {
    case::long_buffers_are_reduced_and_gathered(&threads());
}

#[test]
fn everything_comes_to_its_place() {
    case::everything_comes_to_its_place(&threads());
}

#[test]
fn requests_keep_their_order() {
    case::requests_keep_their_order(&threads());
}

#[test]
fn groups_number_their_members() {
    case::groups_number_their_members(&threads());
}

#[test]
fn traffic_is_what_the_formulas_say() {
    case::traffic_is_what_the_formulas_say(&threads());
}

#[test]
fn sums_are_the_same_to_the_bit() {
    case::sums_are_the_same_to_the_bit(&threads(), true);
}

#[test]
fn tensors_are_reduced_as_their_elements() {
    case::tensors_are_reduced_as_their_elements(&threads());
}

#[test]
fn random_programs_agree() {
    program::random_programs_agree(&threads());
}

#[test]
fn a_panic_ends_everyone() {
    failure::a_panic_ends_everyone(&threads());
}

#[test]
fn an_error_ends_everyone() {
    failure::an_error_ends_everyone(&threads());
}

#[test]
fn different_calls_are_listed() {
    failure::different_calls_are_listed(&threads());
}

#[test]
fn another_length_is_told() {
    failure::another_length_is_told(&threads());
}

#[test]
fn leaving_early_is_noticed() {
    failure::leaving_early_is_noticed(&threads());
}

#[test]
fn a_stall_is_given_up() {
    failure::a_stall_is_given_up(&impatient());
}

#[test]
fn impossible_calls_are_refused() {
    failure::impossible_calls_are_refused(&threads());
}
