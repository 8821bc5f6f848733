//! The collectives against sums worked out in one place.

use burn::tensor::Tensor;
use kiln_cluster::{Algorithm, Communicator, Element, Mesh, Op, chunk};
use kiln_core::Result;

use super::Engine;

const LENGTHS: [usize; 7] = [0, 1, 2, 3, 17, 1024, 1025];

const OPS: [Op; 5] = [Op::Sum, Op::Max, Op::Min, Op::Prod, Op::Avg];

/// An element as the tests see it.
pub trait Sample: Element {
    /// Twice the unit of rounding; zero for whole numbers.
    const EPS: f64;
    fn of(value: f64) -> Self;
    fn value(self) -> f64;
}

macro_rules! sample {
    ($($type:ty, $eps:expr, $of:expr, $value:expr;)*) => {$(
        impl Sample for $type {
            const EPS: f64 = $eps;
            fn of(value: f64) -> Self {
                $of(value)
            }
            fn value(self) -> f64 {
                $value(self)
            }
        }
    )*};
}

sample! {
    f32, f32::EPSILON as f64, |x| x as f32, f64::from;
    f64, f64::EPSILON, |x| x, |x| x;
    half::f16, half::f16::EPSILON.to_f64_const(), half::f16::from_f64, half::f16::to_f64;
    half::bf16, half::bf16::EPSILON.to_f64_const(), half::bf16::from_f64, half::bf16::to_f64;
    i32, 0.0, |x: f64| x.trunc() as i32, f64::from;
    i64, 0.0, |x: f64| x.trunc() as i64, |x| x as f64;
    u8, 0.0, |x: f64| x.abs().trunc() as u8, f64::from;
    u32, 0.0, |x: f64| x.abs().trunc() as u32, f64::from;
    u64, 0.0, |x: f64| x.abs().trunc() as u64, |x| x as f64;
}

/// What a rank has at an index: small, of both signs, with digits behind the point, and exact in every float type.
fn sample<T: Sample>(rank: usize, index: usize) -> T {
    T::of(((rank * 37 + index * 11) % 23) as f64 / 4.0 - 2.5)
}

fn samples<T: Sample>(rank: usize, len: usize) -> Vec<T> {
    (0..len).map(|index| sample(rank, index)).collect()
}

/// The reduction of all ranks in f64, and how far rounding may lead away from it.
fn serial<T: Sample>(ranks: usize, index: usize, op: Op) -> (f64, f64) {
    let values: Vec<f64> = (0..ranks).map(|rank| sample::<T>(rank, index).value()).collect();
    let size: f64 = values.iter().map(|value| value.abs()).sum();
    let (result, size) = match op {
        Op::Sum => (values.iter().sum(), size),
        Op::Avg => (values.iter().sum::<f64>() / ranks as f64, size / ranks as f64),
        Op::Max => (values.iter().copied().fold(f64::MIN, f64::max), 0.0),
        Op::Min => (values.iter().copied().fold(f64::MAX, f64::min), 0.0),
        Op::Prod => (values.iter().product(), values.iter().product::<f64>().abs()),
    };
    (if T::EPS == 0.0 { result.trunc() } else { result }, ranks as f64 * T::EPS * size)
}

fn require<T: Sample>(found: &[T], first: usize, ranks: usize, op: Op, what: &str) {
    for (offset, &found) in found.iter().enumerate() {
        let (expected, tolerance) = serial::<T>(ranks, first + offset, op);
        let kept = T::EPS > 0.0 || T::of(expected).value() == expected; // no overflow of whole numbers
        let error = (found.value() - expected).abs();
        assert!(!kept || error <= tolerance, "{what}: element {offset} is {found:?}, not {expected}");
    }
}

fn algorithms(ranks: usize) -> Vec<Algorithm> {
    use Algorithm::{Auto, Canonical, Direct, HalvingDoubling, Ring, Star, Tree};
    let halving = ranks.is_power_of_two().then_some(HalvingDoubling);
    [Auto, Ring, Tree, Star, Direct, Canonical].into_iter().chain(halving).collect()
}

fn reduce_all<T: Sample>(comm: &Communicator, ops: &[Op]) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.size());
    for len in LENGTHS {
        let own: Vec<T> = samples(rank, len);
        for &op in ops {
            for algorithm in algorithms(ranks) {
                let mut buffer = own.clone();
                comm.all_reduce_by(&mut buffer, op, algorithm)?;
                require(&buffer, 0, ranks, op, &format!("{algorithm} {op} on {ranks} ranks"));
            }
            let part = chunk(len, ranks, rank);
            let mut into = vec![T::of(0.0); part.len()];
            comm.reduce_scatter(&own, &mut into, op)?;
            require(&into, part.start, ranks, op, &format!("reduce_scatter {op} on {ranks} ranks"));
            for root in 0..ranks {
                let mut buffer = own.clone();
                comm.reduce(&mut buffer, op, root)?;
                if rank == root {
                    require(&buffer, 0, ranks, op, &format!("reduce {op} on {ranks} ranks"));
                }
            }
        }
    }
    Ok(())
}

/// Every reduction by every algorithm, on every type.
pub fn reductions_match_a_serial_sum(engine: &dyn Engine) {
    for &ranks in engine.sizes() {
        let body = |comm: Communicator| {
            reduce_all::<f32>(&comm, &OPS)?;
            reduce_all::<i64>(&comm, &OPS)?;
            reduce_all::<f64>(&comm, &[Op::Sum])?;
            reduce_all::<half::f16>(&comm, &[Op::Sum, Op::Avg])?;
            reduce_all::<half::bf16>(&comm, &[Op::Sum, Op::Max])?;
            reduce_all::<i32>(&comm, &[Op::Sum, Op::Min])?;
            reduce_all::<u8>(&comm, &[Op::Max])?;
            reduce_all::<u32>(&comm, &[Op::Sum])?;
            reduce_all::<u64>(&comm, &[Op::Max])
        };
        engine.run(ranks, &body).unwrap();
    }
}

fn bring<T: Sample>(comm: &Communicator, len: usize) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let own: Vec<T> = samples(rank, len);
    let everyone = |len: usize| -> Vec<T> { (0..ranks).flat_map(|rank| samples(rank, len)).collect() };
    let zeros = |len: usize| vec![T::of(0.0); len];

    let mut gathered = zeros(len * ranks);
    comm.all_gather(&own, &mut gathered)?;
    assert_eq!(gathered, everyone(len));

    let counts: Vec<usize> = (0..ranks).map(|rank| (len + rank) % 5).collect();
    let mut gathered = zeros(counts.iter().sum());
    comm.all_gather_v(&samples::<T>(rank, counts[rank]), &counts, &mut gathered)?;
    let expected: Vec<T> = (0..ranks).flat_map(|rank| samples(rank, counts[rank])).collect();
    assert_eq!(gathered, expected);

    let parts: Vec<T> = samples(rank, len * ranks);
    let mut turned = zeros(len * ranks);
    comm.all_to_all(&parts, &mut turned)?;
    let of = |from: usize, part: std::ops::Range<usize>| part.map(move |index| sample::<T>(from, index));
    let expected: Vec<T> = (0..ranks).flat_map(|from| of(from, rank * len..(rank + 1) * len)).collect();
    assert_eq!(turned, expected);

    // From k to l go (k + 2l) mod 3 elements.
    let count = |from: usize, to: usize| (from + 2 * to) % 3;
    let send_counts: Vec<usize> = (0..ranks).map(|to| count(rank, to)).collect();
    let receive_counts: Vec<usize> = (0..ranks).map(|from| count(from, rank)).collect();
    let send: Vec<T> = (0..ranks).flat_map(|to| vec![sample(rank, to); count(rank, to)]).collect();
    let mut into = zeros(receive_counts.iter().sum());
    comm.all_to_all_v(&send, &send_counts, &mut into, &receive_counts)?;
    let expected: Vec<T> = (0..ranks).flat_map(|from| vec![sample(from, rank); count(from, rank)]).collect();
    assert_eq!(into, expected);

    for root in 0..ranks {
        let mut buffer = if rank == root { own.clone() } else { zeros(len) };
        comm.broadcast(&mut buffer, root)?;
        assert_eq!(buffer, samples(root, len));

        let mut into = zeros(if rank == root { len * ranks } else { 0 });
        comm.gather(&own, &mut into, root)?;
        assert!(rank != root || into == everyone(len));

        let mut part = zeros(len);
        let all = if rank == root { everyone(len) } else { Vec::new() };
        comm.scatter(&all, &mut part, root)?;
        assert_eq!(part, own);
    }
    comm.barrier()
}

/// Every collective that only moves elements.
pub fn everything_comes_to_its_place(engine: &dyn Engine) {
    for &ranks in engine.sizes() {
        let body = |comm: Communicator| {
            for len in LENGTHS {
                bring::<f32>(&comm, len)?;
                bring::<i64>(&comm, len)?;
            }
            bring::<half::bf16>(&comm, 17)?;
            bring::<u8>(&comm, 17)
        };
        engine.run(ranks, &body).unwrap();
    }
}

/// Requests are answered in the order they were made, and tags are kept apart.
pub fn requests_keep_their_order(engine: &dyn Engine) {
    let body = |comm: Communicator| {
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
        let mut theirs = vec![0i64; 1 << 17];
        comm.send_recv(other, &vec![comm.rank() as i64; 1 << 17], other, &mut theirs)?;
        assert!(theirs.iter().all(|&value| value == other as i64));
        Ok(())
    };
    engine.run(2, &body).unwrap();
}

/// Lines of a mesh, groups in any order, ranks without a group.
pub fn groups_number_their_members(engine: &dyn Engine) {
    let ranks = if engine.sizes().contains(&8) { 8 } else { 4 };
    let body = |comm: Communicator| {
        let mesh = Mesh::new(&[("pipe", ranks / 4), ("data", 2), ("tensor", 2)])?;
        for axis in ["tensor", "pipe", "data"] {
            let line = mesh.along(&comm, axis)?;
            assert_eq!(line.rank(), mesh.coordinate(comm.rank(), axis));
            let mut sum = [comm.rank() as i64];
            line.all_reduce(&mut sum, Op::Sum)?;
            assert_eq!(sum[0], mesh.line(comm.rank(), axis).iter().sum::<usize>() as i64);
        }
        let odd = comm.group(&[3, 0, 1])?;
        assert_eq!(odd.as_ref().map(Communicator::rank), [3, 0, 1].iter().position(|&r| r == comm.rank()));
        if let Some(odd) = odd {
            let mut first = [comm.rank() as i32];
            odd.broadcast(&mut first, 0)?;
            assert_eq!(first, [3]);
        }
        assert!(comm.split(None, 0)?.is_none());
        Ok(())
    };
    engine.run(ranks, &body).unwrap();
}

/// Buffers of several pieces, the last of which are not full and not on all ranks.
pub fn long_buffers_are_reduced_and_gathered(engine: &dyn Engine) {
    for &ranks in engine.sizes().iter().filter(|&&ranks| ranks <= 4) {
        let len = ranks * (5 << 16) + 1;
        let body = |comm: Communicator| {
            let own: Vec<f32> = samples(comm.rank(), len);
            for algorithm in algorithms(ranks) {
                let mut buffer = own.clone();
                comm.all_reduce_by(&mut buffer, Op::Sum, algorithm)?;
                require(&buffer, 0, ranks, Op::Sum, &format!("long {algorithm} on {ranks} ranks"));
            }
            // The last rank has nothing.
            let counts: Vec<usize> = (0..ranks).map(|rank| (ranks - 1 - rank) * (3 << 16)).collect();
            let mut all = vec![0.0; counts.iter().sum()];
            comm.all_gather_v(&own[..counts[comm.rank()]], &counts, &mut all)?;
            let expected = counts.iter().enumerate().flat_map(|(rank, &count)| samples::<f32>(rank, count));
            assert!(all.into_iter().eq(expected), "long all-gather on {ranks} ranks");
            Ok(())
        };
        engine.run(ranks, &body).unwrap();
    }
}

/// Bytes and messages that a rank sends in an all-reduce of `len` f32 by an algorithm; see [`Algorithm`].
fn sent(algorithm: Algorithm, rank: usize, ranks: usize, len: usize) -> (u64, u64) {
    let (n, bytes) = (ranks as u64, 4 * len as u64);
    let chunks = |sizes: &mut dyn Iterator<Item = usize>| 4 * sizes.sum::<usize>() as u64;
    let part = |index: usize| chunk(len, ranks, index % ranks).len();
    match algorithm {
        // All chunks but this rank's on the first round, all but its right neighbour's on the second.
        Algorithm::Ring => {
            let reducing = chunks(&mut (1..ranks).map(|round| part(rank + round)));
            let knowing = chunks(&mut (0..ranks - 1).map(|round| part(rank + ranks - round)));
            (reducing + knowing, 2 * (n - 1))
        }
        Algorithm::Star if rank == 0 => ((n - 1) * bytes, n - 1),
        Algorithm::Star => (bytes, 1),
        Algorithm::Canonical => {
            let others = chunks(&mut (1..ranks).map(|distance| part(rank + distance)));
            (others + (n - 1) * 4 * part(rank) as u64, 2 * (n - 1))
        }
        Algorithm::HalvingDoubling => (2 * (n - 1) * bytes / n, 2 * u64::from(ranks.ilog2())),
        other => panic!("{other} has another count on every rank"),
    }
}

/// The counters show what the table of [`Algorithm`] says.
pub fn traffic_is_what_the_formulas_say(engine: &dyn Engine) {
    for &ranks in engine.sizes().iter().filter(|&&ranks| ranks > 1) {
        for len in [16 * ranks, 1025] {
            let body = |comm: Communicator| {
                for algorithm in algorithms(ranks) {
                    let halving = algorithm == Algorithm::HalvingDoubling;
                    if matches!(algorithm, Algorithm::Auto | Algorithm::Direct) || halving && len == 1025 {
                        continue;
                    }
                    let before = comm.traffic().total();
                    comm.all_reduce_by(&mut vec![1f32; len], Op::Sum, algorithm)?;
                    let after = comm.traffic().total();
                    let bytes = after.bytes_sent - before.bytes_sent;
                    let messages = after.messages_sent - before.messages_sent;
                    if algorithm == Algorithm::Tree {
                        // Of all ranks together: up and down every edge of the tree.
                        let mut all = [bytes, messages];
                        comm.all_reduce(&mut all, Op::Sum)?;
                        let edges = 2 * (ranks as u64 - 1);
                        assert_eq!(all, [edges * 4 * len as u64, edges], "tree on {ranks} ranks");
                    } else {
                        let expected = sent(algorithm, comm.rank(), ranks, len);
                        assert_eq!((bytes, messages), expected, "{algorithm} on {ranks} ranks, {len}");
                    }
                }
                Ok(())
            };
            engine.run(ranks, &body).unwrap();
        }
    }
}

/// Numbers whose sum depends on the order of adding.
fn delicate(rank: usize, index: usize) -> f32 {
    let x = ((rank * 7919 + index * 104_729) % 10_007) as f32;
    (x * 0.7).sin() * 10f32.powi((rank + index) as i32 % 9 - 4)
}

/// The bits of a sum by every algorithm, rank 0's.
pub fn bits(engine: &dyn Engine, ranks: usize) -> Vec<(Algorithm, Vec<u32>)> {
    let collected = std::sync::Mutex::default();
    let body = |comm: Communicator| {
        let mut of_rank = Vec::new();
        for algorithm in algorithms(ranks) {
            let mut buffer: Vec<f32> = (0..1025).map(|index| delicate(comm.rank(), index)).collect();
            comm.all_reduce_by(&mut buffer, Op::Sum, algorithm)?;
            let bits: Vec<u32> = buffer.iter().map(|x| x.to_bits()).collect();
            let mut first = bits.clone();
            comm.broadcast(&mut first, 0)?;
            assert_eq!(bits, first, "{algorithm}: all ranks have the same bits");
            of_rank.push((algorithm, bits));
        }
        if comm.rank() == 0 {
            *collected.lock().unwrap() = of_rank;
        }
        Ok(())
    };
    engine.run(ranks, &body).unwrap();
    collected.into_inner().unwrap()
}

/// A seeded sum in rank order, worked out in one place.
pub fn canonical_bits(ranks: usize) -> Vec<u32> {
    let sum = |index| (1..ranks).fold(delicate(0, index), |sum, rank| sum + delicate(rank, index));
    (0..1025).map(|index| sum(index).to_bits()).collect()
}

/// Every run gives the same bits, and those algorithms that add in rank order give those of rank order.
pub fn sums_are_the_same_to_the_bit(engine: &dyn Engine, auto_is_canonical: bool) {
    for &ranks in engine.sizes() {
        let once = bits(engine, ranks);
        assert_eq!(once, bits(engine, ranks), "from run to run");
        let expected = canonical_bits(ranks);
        for (algorithm, bits) in once {
            let ordered = match algorithm {
                Algorithm::Star | Algorithm::Canonical | Algorithm::Direct => true,
                Algorithm::Auto => auto_is_canonical,
                _ => false,
            };
            assert!(!ordered || bits == expected, "{algorithm} on {ranks} ranks");
        }
    }
}

/// Tensors, with the bits that their elements alone would have.
pub fn tensors_are_reduced_as_their_elements(engine: &dyn Engine) {
    let body = |comm: Communicator| {
        let device = burn::tensor::Device::flex();
        let own: Vec<f32> = (0..24).map(|index| delicate(comm.rank(), index)).collect();
        let tensor = Tensor::<1>::from_data(own.as_slice(), &device).reshape([2, 3, 4]);
        let reduced = comm.all_reduce_tensor::<3>(tensor.clone(), Op::Sum)?;
        let mut values = own.clone();
        comm.all_reduce(&mut values, Op::Sum)?;
        assert_eq!(reduced.into_data().try_to_vec::<f32>().unwrap(), values);
        // What else holds the tensor sees the old values, and a view is as good as what it looks at.
        assert_eq!(tensor.clone().into_data().try_to_vec::<f32>().unwrap(), own);
        let turned = comm.all_reduce_tensor(tensor.swap_dims(0, 2), Op::Sum)?.swap_dims(0, 2);
        assert_eq!(turned.into_data().try_to_vec::<f32>().unwrap(), values);
        let whole = Tensor::<1, burn::tensor::Int>::from_data([1i64, 2], &device).float();
        let doubled = comm.all_reduce_tensor(whole, Op::Prod)?;
        assert_eq!(doubled.into_data().try_to_vec::<f32>().unwrap(), [1.0, 2f32.powi(comm.size() as i32)]);
        Ok(())
    };
    for &ranks in engine.sizes() {
        engine.run(ranks, &body).unwrap();
    }
}
