//! The collectives on small cases, over threads.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_cluster::{Algorithm, ClusterError, Mesh, Op, chunk, run_threads};

const ALGORITHMS: [Algorithm; 6] = [
    Algorithm::Auto,
    Algorithm::Ring,
    Algorithm::Tree,
    Algorithm::Star,
    Algorithm::Direct,
    Algorithm::Canonical,
];

fn value(rank: usize, index: usize) -> i64 {
    (rank * 1000 + index * 7) as i64 - 500
}

#[test]
fn whole_numbers_are_reduced_exactly_by_every_algorithm() {
    for ranks in [1, 2, 3, 4, 5, 7, 8] {
        for len in [0, 1, 2, 3, 17, 1025] {
            let expected: Vec<i64> = (0..len).map(|i| (0..ranks).map(|rank| value(rank, i)).sum()).collect();
            run_threads(ranks, |comm| {
                for algorithm in ALGORITHMS {
                    let mut buffer: Vec<i64> = (0..len).map(|i| value(comm.rank(), i)).collect();
                    comm.all_reduce_by(&mut buffer, Op::Sum, algorithm)?;
                    assert_eq!(buffer, expected, "{algorithm} {ranks} {len}");
                }
                let mut buffer: Vec<i64> = (0..len).map(|i| value(comm.rank(), i)).collect();
                if ranks.is_power_of_two() {
                    comm.all_reduce_by(&mut buffer, Op::Sum, Algorithm::HalvingDoubling)?;
                    assert_eq!(buffer, expected, "halving {ranks} {len}");
                }
                Ok(())
            })
            .unwrap();
        }
    }
}

#[test]
fn the_other_collectives_bring_everything_to_its_place() {
    for ranks in [1, 2, 3, 4, 5, 7, 8] {
        for len in [0, 1, 3, 17] {
            run_threads(ranks, |comm| {
                let rank = comm.rank();
                let own: Vec<i64> = (0..len).map(|i| value(rank, i)).collect();

                let mut side_by_side = vec![0; len * ranks];
                comm.all_gather(&own, &mut side_by_side)?;
                let all: Vec<i64> =
                    (0..ranks).flat_map(|rank| (0..len).map(move |i| value(rank, i))).collect();
                assert_eq!(side_by_side, all);

                let sums: Vec<i64> = (0..len).map(|i| (0..ranks).map(|rank| value(rank, i)).sum()).collect();
                let mut scattered = vec![0; chunk(len, ranks, rank).len()];
                comm.reduce_scatter(&own, &mut scattered, Op::Sum)?;
                assert_eq!(scattered, sums[chunk(len, ranks, rank)]);

                let counts: Vec<usize> = (0..ranks).map(|rank| rank % 3).collect();
                let mut varied = vec![0; counts.iter().sum()];
                comm.all_gather_v(&vec![rank as i64; counts[rank]], &counts, &mut varied)?;
                let expected: Vec<i64> =
                    (0..ranks).flat_map(|rank| vec![rank as i64; counts[rank]]).collect();
                assert_eq!(varied, expected);

                let parts: Vec<i64> = (0..len * ranks).map(|i| value(rank, i)).collect();
                let mut turned = vec![0; len * ranks];
                comm.all_to_all(&parts, &mut turned)?;
                let expected: Vec<i64> = (0..ranks)
                    .flat_map(|from| (rank * len..(rank + 1) * len).map(move |i| value(from, i)))
                    .collect();
                assert_eq!(turned, expected);

                for root in 0..ranks {
                    let mut buffer = if rank == root { own.clone() } else { vec![0; len] };
                    comm.broadcast(&mut buffer, root)?;
                    assert_eq!(buffer, (0..len).map(|i| value(root, i)).collect::<Vec<_>>());

                    let mut buffer = own.clone();
                    comm.reduce(&mut buffer, Op::Sum, root)?;
                    assert!(rank != root || buffer == sums);

                    let mut into = vec![0; if rank == root { len * ranks } else { 0 }];
                    comm.gather(&own, &mut into, root)?;
                    assert!(rank != root || into == all);

                    let mut part = vec![0; len];
                    comm.scatter(if rank == root { &all } else { &[] }, &mut part, root)?;
                    assert_eq!(part, own);
                }
                comm.barrier()
            })
            .unwrap();
        }
    }
}

#[test]
fn requests_are_answered_in_the_order_they_were_made() {
    run_threads(2, |comm| {
        let other = 1 - comm.rank();
        let first = comm.irecv::<f32>(other, 5, 2)?;
        let second = comm.irecv::<f32>(other, 5, 1)?;
        comm.isend(other, 9, vec![7u8])?.wait()?;
        comm.isend(other, 5, vec![1.0f32, 2.0])?.wait()?;
        comm.isend(other, 5, vec![3.0f32])?.wait()?;
        assert_eq!(second.wait()?, [3.0]);
        assert!(first.test());
        assert_eq!(first.wait()?, [1.0, 2.0]);
        let mut byte = [0u8];
        comm.recv(other, 9, &mut byte)?;
        assert_eq!(byte, [7]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn groups_along_the_axes_of_a_mesh_add_up_lines() {
    run_threads(8, |comm| {
        let mesh = Mesh::new(&[("pipe", 2), ("data", 2), ("tensor", 2)])?;
        for axis in ["tensor", "pipe", "data"] {
            let line = mesh.along(&comm, axis)?;
            assert_eq!(line.size(), 2);
            assert_eq!(line.rank(), mesh.coordinate(comm.rank(), axis));
            let mut sum = [comm.rank() as i64];
            line.all_reduce(&mut sum, Op::Sum)?;
            assert_eq!(sum[0], mesh.line(comm.rank(), axis).iter().sum::<usize>() as i64);
        }
        let odd = comm.group(&[7, 5, 3])?;
        assert_eq!(odd.as_ref().map(|group| group.rank()), [7, 5, 3].iter().position(|&r| r == comm.rank()));
        assert!(comm.split(None, 0)?.is_none());
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_panic_of_one_rank_is_told_and_ends_the_others() {
    let error = run_threads(4, |comm| {
        assert!(comm.rank() != 2, "the third rank trips");
        let mut buffer = [1.0f32];
        let lost = comm.all_reduce(&mut buffer, Op::Sum).unwrap_err();
        assert!(matches!(ClusterError::of(&lost), Some(ClusterError::PeerLost { rank: 2, .. })), "{lost}");
        Err::<(), _>(lost)
    })
    .unwrap_err();
    assert!(error.to_string().contains("rank 2 panicked: the third rank trips"), "{error}");
}

#[test]
fn different_calls_are_told_rank_by_rank() {
    for algorithm in [Algorithm::Direct, Algorithm::Ring] {
        let error = run_threads(2, |comm| {
            let mut buffer = [1.0f32; 4];
            match comm.rank() {
                0 => comm.all_reduce_by(&mut buffer, Op::Sum, algorithm),
                _ => comm.all_reduce_by(&mut buffer[..3], Op::Sum, algorithm),
            }
        })
        .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("rank 0: all_reduce(4 × f32, sum"), "{text}");
        assert!(text.contains("rank 1: all_reduce(3 × f32, sum"), "{text}");
    }
}

#[test]
fn a_rank_that_leaves_early_is_noticed_at_once() {
    let error = run_threads(3, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier() }).unwrap_err();
    assert!(matches!(ClusterError::of(&error), Some(ClusterError::PeerLost { rank: 1, .. })), "{error}");
}
