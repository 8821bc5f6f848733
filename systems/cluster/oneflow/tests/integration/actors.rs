//! Random networks of actors: no deadlock, pieces in order, each exactly once, and no more registers in use than there are.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Mutex;

use kiln_core::random_stream;
use kiln_oneflow::actor::{Actor, Channel, Network, Queue, run, simulate};
use rand::RngExt;

const QUEUES: usize = 3;

/// Up to twelve actors on three queues, each reading some of those before it.
fn random_network(number: u64) -> Network {
    let mut rng = random_stream(9, "network", number);
    let count = rng.random_range(2..12);
    let mut network = Network::default();
    for at in 0..count {
        let (queue, duration) = (rng.random_range(0..QUEUES), f64::from(rng.random_range(0..4u8)));
        network.actors.push(Actor { name: format!("a{at}"), queue, duration, lag: 0 });
    }
    for from in 0..count {
        let readers = (from + 1..count).filter(|_| rng.random_bool(0.4)).collect();
        network.channels.push(Channel { from, to: readers, registers: rng.random_range(1..4), filled: 0 });
    }
    network
}

/// Runs a network on threads; what every actor was given must be of the piece that it makes.
fn check(network: &Network, pieces: usize) {
    let seen = Mutex::new(vec![Vec::new(); network.actors.len()]);
    let queues = (0..QUEUES).map(|number| {
        let seen = &seen;
        Queue {
            name: number.to_string(),
            act: Box::new(move |actor: usize, piece: usize, inputs: &[(usize, usize)]| {
                let readable = network.channels.iter().filter(|channel| channel.to.contains(&actor));
                let expected: Vec<(usize, usize)> = readable.map(|channel| (channel.from, piece)).collect();
                assert_eq!(inputs, expected, "what actor {actor} reads");
                seen.lock().unwrap()[actor].push(piece);
                Ok(network
                    .channels
                    .iter()
                    .filter(|channel| channel.from == actor)
                    .map(|_| (actor, piece))
                    .collect())
            }),
            ordered: number == 1,
        }
    });
    let course = run(network, pieces, queues.collect(), |_| (0, 0), 0, true).unwrap();
    for (actor, pieces_seen) in seen.into_inner().unwrap().into_iter().enumerate() {
        assert_eq!(pieces_seen, (0..pieces).collect::<Vec<_>>(), "actor {actor}");
    }
    assert_eq!(course.trace.acts.len(), network.actors.len() * pieces);
    for (channel, peak) in network.channels.iter().zip(&course.peak_registers) {
        assert!((1..=channel.registers).contains(peak), "{peak} of {} registers", channel.registers);
    }
}

#[test]
fn random_networks_run_to_the_end_in_order() {
    for number in 0..60 {
        let network = random_network(number);
        check(&network, 20);
        let table = simulate(&network, 20).unwrap();
        assert!(table.starts.iter().all(|starts| starts.len() == 20 && starts.is_sorted()));
        let bounded = network
            .channels
            .iter()
            .zip(&table.peak_registers)
            .all(|(channel, peak)| *peak <= channel.registers);
        assert!(bounded);
    }
}

/// Two actors that wait for each other's first piece.
fn loop_of(filled: usize) -> Network {
    let actor = |name: &str, queue| Actor { name: name.into(), queue, duration: 1.0, lag: 0 };
    let channel = |from, to, filled| Channel { from, to: vec![to], registers: 1, filled };
    Network {
        actors: vec![actor("left", 0), actor("right", 1)],
        channels: vec![channel(0, 1, 0), channel(1, 0, filled)],
    }
}

#[test]
fn actors_that_wait_for_each_other_are_told() {
    let queue = |number: usize| Queue {
        name: number.to_string(),
        act: Box::new(|_: usize, _: usize, _: &[()]| Ok(vec![()])),
        ordered: false,
    };
    let start = || vec![queue(0), queue(1)];
    for told in
        [run(&loop_of(0), 3, start(), |_| (), 0, false).unwrap_err(), simulate(&loop_of(0), 3).unwrap_err()]
    {
        let told = told.to_string();
        assert!(told.contains("left has done 0 of 3 pieces and waits for a piece of right"), "{told}");
        assert!(told.contains("right has done 0 of 3 pieces and waits for a piece of left"), "{told}");
    }
    run(&loop_of(1), 3, start(), |_| (), 0, false).unwrap();
    simulate(&loop_of(1), 3).unwrap();
}

#[test]
fn the_error_of_an_act_ends_the_run() {
    let queue = |number: usize| Queue {
        name: number.to_string(),
        act: Box::new(move |_: usize, piece: usize, _: &[()]| match piece {
            2 => Err(kiln_core::Error::work(format!("piece 2 broke on {number}"))),
            _ => Ok(vec![()]),
        }),
        ordered: false,
    };
    let told = run(&loop_of(1), 5, vec![queue(0), queue(1)], |_| (), 0, false).unwrap_err();
    assert!(told.to_string().contains("piece 2 broke"), "{told}");
}
