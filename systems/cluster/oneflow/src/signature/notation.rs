//! Index notation: what a word like `"*mk *kn > *mn"` allows.

use std::collections::BTreeMap;

use burn::backend::ir::{ModuleOperationIr as Module, OperationIr, TensorIr};

use super::Signature;
use crate::sbp::Sbp;

/// An axis in the notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Letter {
    Named(char),
    /// Counted from the right.
    Other(usize),
    /// Never split.
    Whole,
}

/// The letters of a tensor's axes; `None` where the rank does not fit the notation.
fn letters(word: &str, rank: usize) -> Option<Vec<Letter>> {
    let named = word.chars().filter(|letter| *letter != '*').count();
    let others = rank.checked_sub(named)?;
    if others > 0 && !word.contains('*') {
        return None;
    }
    let mut letters = Vec::with_capacity(rank);
    for letter in word.chars() {
        match letter {
            '*' => letters.extend((0..others).rev().map(Letter::Other)),
            '_' => letters.push(Letter::Whole),
            letter => letters.push(Letter::Named(letter)),
        }
    }
    Some(letters)
}

pub fn by_notation(operation: &OperationIr, notation: &str) -> Vec<Signature> {
    let Some((operands, results)) = notation.split_once('>') else { return Vec::new() };
    let added: Vec<bool> = operands.split_whitespace().map(|word| word.starts_with('+')).collect();
    let read = |words: &str, tensors: &[&TensorIr]| -> Option<Vec<Vec<Letter>>> {
        let words = words.split_whitespace().map(|word| word.trim_start_matches('+'));
        words.zip(tensors).map(|(word, tensor)| letters(word, tensor.shape.rank())).collect()
    };
    let (inputs, outputs): (Vec<&TensorIr>, Vec<&TensorIr>) =
        (operation.inputs().collect(), operation.outputs().collect());
    let (Some(operand_letters), Some(result_letters)) = (read(operands, &inputs), read(results, &outputs))
    else {
        return Vec::new();
    };
    let mut extents: BTreeMap<Letter, usize> = BTreeMap::new();
    let all = operand_letters.iter().zip(&inputs).chain(result_letters.iter().zip(&outputs));
    for (letters, tensor) in all {
        for (letter, &size) in letters.iter().zip(tensor.shape.iter()) {
            let extent = extents.entry(*letter).or_insert(1);
            *extent = (*extent).max(size);
        }
    }
    extents.remove(&Letter::Whole);
    // Channels in groups: their order is not that of the axis.
    if groups(operation) > 1 {
        extents.remove(&Letter::Named('c'));
        extents.remove(&Letter::Named('o'));
    }
    let place = |letters: &[Letter], tensor: &TensorIr, letter: Letter, extent: usize| {
        letters.iter().position(|other| *other == letter).filter(|&axis| tensor.shape[axis] == extent)
    };
    let split = |(&letter, &extent): (&Letter, &usize)| {
        if extent < 2 {
            return None;
        }
        let outputs = result_letters.iter().zip(&outputs);
        let outputs: Vec<Sbp> = outputs
            .map(|(letters, tensor)| place(letters, tensor, letter, extent).map_or(Sbp::SUM, Sbp::S))
            .collect();
        let sums = outputs.contains(&Sbp::SUM);
        let inputs = operand_letters.iter().zip(&inputs).zip(&added).map(|((letters, tensor), &added)| {
            let absent = if added && sums { Sbp::SUM } else { Sbp::B };
            place(letters, tensor, letter, extent).map_or(absent, Sbp::S)
        });
        Some(Signature::plain(inputs.collect(), outputs))
    };
    extents.iter().filter_map(split).collect()
}

/// In how many groups a convolution's channels are.
fn groups(operation: &OperationIr) -> usize {
    let OperationIr::Module(module) = operation else { return 1 };
    match module {
        Module::Conv1d(op) => op.options.groups,
        Module::Conv1dXBackward(op) => op.options.groups,
        Module::Conv1dWeightBackward(op) => op.options.groups,
        Module::Conv2d(op) => op.options.groups,
        Module::Conv2dXBackward(op) => op.options.groups,
        Module::Conv2dWeightBackward(op) => op.options.groups,
        Module::ConvTranspose1d(op) => op.options.groups,
        Module::ConvTranspose2d(op) => op.options.groups,
        _ => 1,
    }
}
