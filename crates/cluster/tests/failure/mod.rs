//! What happens when a rank does not do its part. For back ends whose ranks can fail without taking the test along.

use std::time::Duration;

use kiln_cluster::{Algorithm, ClusterError, Communicator, Op};
use kiln_core::Error;

use crate::suite::Engine;

fn lost(error: &Error, who: usize) {
    assert!(
        matches!(ClusterError::of(error), Some(ClusterError::PeerLost { rank, .. }) if *rank == who),
        "{error}"
    );
}

/// A panic is told, and the others learn whose it was.
pub fn a_panic_ends_everyone(engine: &dyn Engine) {
    for algorithm in [Algorithm::Auto, Algorithm::Ring, Algorithm::Tree] {
        let body = |comm: Communicator| {
            assert!(comm.rank() != 2, "the third rank trips");
            let error = comm.all_reduce_by(&mut [1.0f32], Op::Sum, algorithm).unwrap_err();
            lost(&error, 2);
            Err(error)
        };
        let error = engine.run(4, &body).unwrap_err();
        assert!(error.to_string().contains("rank 2 panicked: the third rank trips"), "{error}");
    }
}

/// An error of one rank's own work reaches the others as its loss, with the reason.
pub fn an_error_ends_everyone(engine: &dyn Engine) {
    let body = |comm: Communicator| {
        if comm.rank() == 1 {
            return Err(Error::work("the disk is full"));
        }
        let error = comm.barrier().unwrap_err();
        assert!(error.to_string().contains("the disk is full"), "{error}");
        Err(error)
    };
    assert_eq!(engine.run(3, &body).unwrap_err().to_string(), "the disk is full");
}

/// Different lengths, types and operations are listed rank by rank.
pub fn different_calls_are_listed(engine: &dyn Engine) {
    for algorithm in [Algorithm::Auto, Algorithm::Ring, Algorithm::Star] {
        let body = |comm: Communicator| {
            let mut buffer = [1.0f32; 4];
            let len = 4 - comm.rank();
            comm.all_reduce_by(&mut buffer[..len], Op::Sum, algorithm)
        };
        let text = engine.run(2, &body).unwrap_err().to_string();
        assert!(text.contains("rank 0: all_reduce(4 × f32, sum"), "{text}");
        assert!(text.contains("rank 1: all_reduce(3 × f32, sum"), "{text}");
    }
    let body = |comm: Communicator| match comm.rank() {
        0 => comm.broadcast(&mut [0u8; 2], 0),
        _ => comm.all_reduce(&mut [0u8; 2], Op::Max),
    };
    let text = engine.run(2, &body).unwrap_err().to_string();
    assert!(text.contains("broadcast(2 × u8") && text.contains("all_reduce(2 × u8"), "{text}");
}

/// A message of another length than asked for is no message.
pub fn another_length_is_told(engine: &dyn Engine) {
    let body = |comm: Communicator| match comm.rank() {
        0 => comm.send(1, 4, &[1.0f32; 3]),
        _ => comm.recv(0, 4, &mut [0.0f32; 2]),
    };
    let error = engine.run(2, &body).unwrap_err();
    assert!(matches!(ClusterError::of(&error), Some(ClusterError::Mismatch { .. })), "{error}");
}

/// A rank that has ended is noticed without waiting for the time-out.
pub fn leaving_early_is_noticed(engine: &dyn Engine) {
    let body = |comm: Communicator| if comm.rank() == 1 { Ok(()) } else { comm.barrier() };
    lost(&engine.run(3, &body).unwrap_err(), 1);
}

/// A rank that stalls: the others give up after the time-out, of about a second.
pub fn a_stall_is_given_up(engine: &dyn Engine) {
    let body = |comm: Communicator| {
        if comm.rank() == 2 {
            while comm.check().is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
            return comm.check();
        }
        comm.all_reduce(&mut [1.0f32; 8], Op::Sum)
    };
    let error = engine.run(3, &body).unwrap_err();
    assert!(matches!(ClusterError::of(&error), Some(ClusterError::Timeout { .. })), "{error}");
    assert!(error.to_string().contains("rank 2") || error.to_string().contains("rank 0"), "{error}");
}

/// Calls that cannot be.
pub fn impossible_calls_are_refused(engine: &dyn Engine) {
    let refused = |body: &(dyn Fn(Communicator) -> kiln_core::Result<()> + Sync), ranks: usize, why: &str| {
        let text = engine.run(ranks, body).unwrap_err().to_string();
        assert!(text.contains(why), "{text}");
    };
    refused(&|comm| comm.broadcast(&mut [1u8], 9), 2, "no rank 9");
    refused(&|comm| comm.send(7, 0, &[1u8]), 2, "no rank 7");
    refused(&|comm| comm.group(&[0, 0]).map(drop), 2, "listed twice");
    refused(
        &|comm| comm.all_reduce_by(&mut [1.0f32; 3], Op::Sum, Algorithm::HalvingDoubling),
        3,
        "power of two",
    );
    refused(&|comm| comm.all_to_all(&[1u8; 3], &mut [0u8; 3]), 2, "no 2 equal parts");
}
