//! The suite over TCP, each rank with its own sockets in this process.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod failure;
mod suite;

use std::time::Duration;

use kiln_cluster::{ClusterArgs, Communicator, run_over_loopback};
use kiln_core::Result;
use suite::{Engine, case, program};

struct Loopback {
    options: ClusterArgs,
}

impl Engine for Loopback {
    fn sizes(&self) -> &[usize] {
        &[1, 2, 3, 4, 5, 7, 8]
    }

    fn run(&self, ranks: usize, body: &(dyn Fn(Communicator) -> Result<()> + Sync)) -> Result<()> {
        run_over_loopback(ranks, &self.options, body).map(drop)
    }
}

fn loopback() -> Loopback {
    Loopback { options: ClusterArgs { timeout: Duration::from_secs(60), ..ClusterArgs::default() } }
}

fn impatient() -> Loopback {
    Loopback { options: ClusterArgs { timeout: Duration::from_secs(1), ..ClusterArgs::default() } }
}

#[test]
fn reductions_match_a_serial_sum() {
    case::reductions_match_a_serial_sum(&loopback());
}

#[test]
fn long_buffers_are_reduced_and_gathered() {
    case::long_buffers_are_reduced_and_gathered(&loopback());
}

#[test]
fn everything_comes_to_its_place() {
    case::everything_comes_to_its_place(&loopback());
}

#[test]
fn requests_keep_their_order() {
    case::requests_keep_their_order(&loopback());
}

#[test]
fn groups_number_their_members() {
    case::groups_number_their_members(&loopback());
}

#[test]
fn traffic_is_what_the_formulas_say() {
    case::traffic_is_what_the_formulas_say(&loopback());
}

#[test]
fn sums_are_the_same_to_the_bit() {
    case::sums_are_the_same_to_the_bit(&loopback(), true);
}

#[test]
fn tensors_are_reduced_as_their_elements() {
    case::tensors_are_reduced_as_their_elements(&loopback());
}

#[test]
fn random_programs_agree() {
    program::random_programs_agree(&loopback());
}

#[test]
fn a_panic_ends_everyone() {
    failure::a_panic_ends_everyone(&loopback());
}

#[test]
fn an_error_ends_everyone() {
    failure::an_error_ends_everyone(&loopback());
}

#[test]
fn different_calls_are_listed() {
    failure::different_calls_are_listed(&loopback());
}

#[test]
fn another_length_is_told() {
    failure::another_length_is_told(&loopback());
}

#[test]
fn leaving_early_is_noticed() {
    failure::leaving_early_is_noticed(&loopback());
}

#[test]
fn a_stall_is_given_up() {
    failure::a_stall_is_given_up(&impatient());
}

#[test]
fn impossible_calls_are_refused() {
    failure::impossible_calls_are_refused(&loopback());
}
