//! Random programs: groups within groups, collectives of disjoint groups at once, messages in between.

use kiln_cluster::{Communicator, Op};
use kiln_core::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Engine;

/// Every rank draws the same program from the same seed.
fn program(comm: &Communicator, rng: &mut ChaCha8Rng, depth: usize) -> Result<()> {
    for _ in 0..6 {
        let (rank, ranks) = (comm.rank(), comm.size());
        let len: usize = rng.random_range(0..40);
        match rng.random_range(0..6) {
            0 => {
                let mut sum = vec![rank as i64 + 1; len];
                comm.all_reduce(&mut sum, Op::Sum)?;
                assert_eq!(sum, vec![(ranks * (ranks + 1) / 2) as i64; len]);
            }
            1 => {
                let root = rng.random_range(0..ranks);
                let mut buffer = vec![rank as i64; len];
                comm.broadcast(&mut buffer, root)?;
                assert_eq!(buffer, vec![root as i64; len]);
            }
            2 => {
                let mut all = vec![0; ranks * len];
                comm.all_gather(&vec![rank as u8; len], &mut all)?;
                assert!(all.chunks(len.max(1)).enumerate().all(|(of, part)| part == vec![of as u8; len]));
            }
            // Around a ring of any stride, asked for before it is sent.
            3 => {
                let stride = rng.random_range(0..ranks);
                let tag = rng.random_range(0..3);
                let from = (rank + ranks - stride) % ranks;
                let coming = comm.irecv::<i64>(from, tag, len)?;
                comm.isend((rank + stride) % ranks, tag, vec![rank as i64; len])?.wait()?;
                assert_eq!(coming.wait()?, vec![from as i64; len]);
            }
            4 => comm.barrier()?,
            // Each part of a random division goes its own way for a while.
            _ if depth > 0 => {
                let colors: Vec<usize> = (0..ranks).map(|_| rng.random_range(0..3)).collect();
                let keys: Vec<i64> = (0..ranks).map(|_| rng.random_range(-2..3)).collect();
                let seed: u64 = rng.random();
                let part = comm.split(Some(colors[rank]), keys[rank])?.expect("a colour was given");
                let mut members: Vec<usize> = (0..ranks).filter(|&r| colors[r] == colors[rank]).collect();
                members.sort_by_key(|&member| (keys[member], member));
                assert_eq!(members.iter().position(|&member| member == rank), Some(part.rank()));
                let mut own = ChaCha8Rng::seed_from_u64(seed ^ colors[rank] as u64);
                program(&part, &mut own, depth - 1)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Random programs on every number of ranks.
pub fn random_programs_agree(engine: &dyn Engine) {
    for &ranks in engine.sizes() {
        for seed in 0..8 {
            let body = |comm: Communicator| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                program(&comm, &mut rng, 2)
            };
            engine.run(ranks, &body).unwrap();
        }
    }
}
