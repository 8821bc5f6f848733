//! The suite over MPI: `mpirun -n 4` of this program. It has no harness, since all ranks must run the same cases in
//! the same order; the last line of rank 0 tells how many passed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod suite;

use kiln_cluster::{Backend, ClusterArgs, Communicator};
use kiln_core::{Context, Result};
use suite::{Engine, case, program};

/// Groups of the ranks that `mpirun` has started.
struct Mpi<'a> {
    world: &'a Communicator,
    sizes: Vec<usize>,
}

impl Engine for Mpi<'_> {
    fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    fn run(&self, ranks: usize, body: &(dyn Fn(Communicator) -> Result<()> + Sync)) -> Result<()> {
        let members: Vec<usize> = (0..ranks).collect();
        if let Some(group) = self.world.group(&members)? {
            body(group)?;
        }
        self.world.barrier()
    }
}

fn main() {
    let cases: [(&str, fn(&dyn Engine)); 9] = [
        ("reductions_match_a_serial_sum", case::reductions_match_a_serial_sum),
        ("long_buffers_are_reduced_and_gathered", case::long_buffers_are_reduced_and_gathered),
        ("everything_comes_to_its_place", case::everything_comes_to_its_place),
        ("requests_keep_their_order", case::requests_keep_their_order),
        ("groups_number_their_members", case::groups_number_their_members),
        ("traffic_is_what_the_formulas_say", case::traffic_is_what_the_formulas_say),
        ("sums_are_the_same_to_the_bit", |engine| case::sums_are_the_same_to_the_bit(engine, false)),
        ("tensors_are_reduced_as_their_elements", case::tensors_are_reduced_as_their_elements),
        ("random_programs_agree", program::random_programs_agree),
    ];
    let ranks: usize = std::env::var("OMPI_COMM_WORLD_SIZE").map_or(1, |size| size.parse().unwrap());
    let options = ClusterArgs { backend: Backend::Mpi, ..ClusterArgs::default() };
    let outcome = options.run(ranks, &Context::new(), |world| {
        let engine = Mpi { world: &world, sizes: (1..=ranks).collect() };
        for (name, case) in cases {
            // Needs ranks that this run may not have.
            if name.starts_with("groups") && ranks < 4 || name.starts_with("requests") && ranks < 2 {
                continue;
            }
            case(&engine);
            if world.rank() == 0 {
                println!("test {name} ... ok");
            }
        }
        Ok(())
    });
    if let Err(error) = outcome {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
