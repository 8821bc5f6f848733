//! Louvain's method: groups that maximise weighted modularity (Blondel et al. 2008).

use rand::Rng;
use rand::seq::SliceRandom;

use crate::graph::Graph;

/// The group of every node.
pub fn louvain(graph: &Graph, rng: &mut impl Rng) -> Vec<usize> {
    let mut neighbours: Vec<Vec<(usize, f64)>> =
        (0..graph.len()).map(|i| graph.neighbours(i).to_vec()).collect();
    let mut loops = vec![0.0; graph.len()]; // twice the weight within a node that was a group
    let mut groups: Vec<usize> = (0..graph.len()).collect();
    loop {
        let (moved, found) = local_moves(&neighbours, &loops, rng);
        groups.iter_mut().for_each(|group| *group = found[*group]);
        if !moved {
            return groups;
        }
        (neighbours, loops) = joined(&neighbours, &loops, &found);
    }
}

/// Moves nodes one by one while modularity rises: whether any moved, and the groups numbered without gaps.
fn local_moves(neighbours: &[Vec<(usize, f64)>], loops: &[f64], rng: &mut impl Rng) -> (bool, Vec<usize>) {
    let n = neighbours.len();
    let strength: Vec<f64> =
        (0..n).map(|i| loops[i] + neighbours[i].iter().map(|(_, weight)| weight).sum::<f64>()).collect();
    let total: f64 = strength.iter().sum(); // 2 m
    let mut groups: Vec<usize> = (0..n).collect();
    let mut of_group = strength.clone();
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(rng);
    let (mut moved, mut again) = (false, true);
    let mut to_group = vec![0.0; n];
    while again {
        again = false;
        for &i in &order {
            let mut near = vec![groups[i]];
            for &(j, weight) in &neighbours[i] {
                let group = groups[j];
                if to_group[group] == 0.0 && group != groups[i] {
                    near.push(group);
                }
                to_group[group] += weight;
            }
            of_group[groups[i]] -= strength[i];
            let gain = |group: usize| to_group[group] - of_group[group] * strength[i] / total;
            let mut best = groups[i];
            for &group in &near {
                if gain(group) > gain(best) + 1e-12 {
                    best = group;
                }
            }
            of_group[best] += strength[i];
            if best != groups[i] {
                (groups[i], moved, again) = (best, true, true);
            }
            for &(j, _) in &neighbours[i] {
                to_group[groups[j]] = 0.0;
            }
            near.into_iter().for_each(|group| to_group[group] = 0.0);
        }
    }
    (moved, crate::blockmodel::by_size(&groups).0)
}

/// The graph whose nodes are the groups.
fn joined(
    neighbours: &[Vec<(usize, f64)>],
    loops: &[f64],
    groups: &[usize],
) -> (Vec<Vec<(usize, f64)>>, Vec<f64>) {
    let count = groups.iter().max().map_or(0, |m| m + 1);
    let mut between = vec![std::collections::BTreeMap::new(); count];
    let mut within = vec![0.0; count];
    for (i, edges) in neighbours.iter().enumerate() {
        within[groups[i]] += loops[i];
        for &(j, weight) in edges {
            match groups[i] == groups[j] {
                true => within[groups[i]] += weight,
                false => *between[groups[i]].entry(groups[j]).or_insert(0.0) += weight,
            }
        }
    }
    (between.into_iter().map(|edges| edges.into_iter().collect()).collect(), within)
}
