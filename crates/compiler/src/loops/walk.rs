//! Going through programs: every expression, every statement, names.

use std::collections::HashSet;

use super::program::{Expr, For, Program, Stmt};

impl Expr {
    /// The expressions that it is made of.
    fn parts(&self) -> Vec<&Self> {
        match self {
            Self::I32(_) | Self::I64(_) | Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::Var(_) => {
                Vec::new()
            }
            Self::Load { idx: parts, .. } | Self::Call(_, parts) => parts.iter().collect(),
            Self::Bin(_, a, b) => vec![a, b],
            Self::Un(_, a) | Self::Cast(_, a) => vec![a],
            Self::Select(a, b, c) => vec![a, b, c],
        }
    }

    /// The expressions that it is made of.
    fn parts_mut(&mut self) -> Vec<&mut Self> {
        match self {
            Self::I32(_) | Self::I64(_) | Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::Var(_) => {
                Vec::new()
            }
            Self::Load { idx: parts, .. } | Self::Call(_, parts) => parts.iter_mut().collect(),
            Self::Bin(_, a, b) => vec![a, b],
            Self::Un(_, a) | Self::Cast(_, a) => vec![a],
            Self::Select(a, b, c) => vec![a, b, c],
        }
    }

    /// Shows every part to `look`, the whole first.
    pub fn visit(&self, look: &mut impl FnMut(&Self)) {
        look(self);
        self.parts().into_iter().for_each(|part| part.visit(look));
    }

    /// Changes every part, innermost first.
    pub fn rewrite(&mut self, change: &mut impl FnMut(&mut Self)) {
        self.parts_mut().into_iter().for_each(|part| part.rewrite(change));
        change(self);
    }

    /// Puts what `replacement` gives in the place of the largest parts for which it gives anything.
    pub(super) fn replace_largest(&mut self, replacement: &mut impl FnMut(&Self) -> Option<Self>) {
        match replacement(self) {
            Some(other) => *self = other,
            None => self.parts_mut().into_iter().for_each(|part| part.replace_largest(replacement)),
        }
    }

    /// Whether computing it can neither trap nor depend on what a buffer holds.
    pub fn is_pure(&self) -> bool {
        let mut pure = true;
        self.visit(&mut |part| pure &= !matches!(part, Self::Load { .. }) && !part.may_divide_by_zero());
        pure
    }

    pub(super) fn may_divide_by_zero(&self) -> bool {
        use super::program::BinOp::{Div, FloorDiv, FloorMod, Rem};
        match self {
            Self::Bin(Div | Rem | FloorDiv | FloorMod, _, divisor) => !matches!(
                &**divisor,
                Self::I32(1..)
                    | Self::I64(1..)
                    | Self::I32(..=-1)
                    | Self::I64(..=-1)
                    | Self::F32(_)
                    | Self::F64(_)
            ),
            _ => false,
        }
    }
}

impl Stmt {
    /// The bodies inside of it.
    pub fn bodies(&self) -> Vec<&Vec<Self>> {
        match self {
            Self::For(For { body, .. }) | Self::Alloc { body, .. } | Self::Let { body, .. } => vec![body],
            Self::If { then, otherwise, .. } => vec![then, otherwise],
            Self::Store { .. } | Self::Assert { .. } => Vec::new(),
        }
    }

    /// The bodies inside of it.
    pub fn bodies_mut(&mut self) -> Vec<&mut Vec<Self>> {
        match self {
            Self::For(For { body, .. }) | Self::Alloc { body, .. } | Self::Let { body, .. } => vec![body],
            Self::If { then, otherwise, .. } => vec![then, otherwise],
            Self::Store { .. } | Self::Assert { .. } => Vec::new(),
        }
    }

    /// The expressions that it computes itself, not in its bodies.
    pub fn exprs(&self) -> Vec<&Expr> {
        match self {
            Self::For(For { min, extent, .. }) => vec![min, extent],
            Self::Store { idx, value, .. } => idx.iter().chain([value]).collect(),
            Self::If { cond, .. } | Self::Assert { cond, .. } => vec![cond],
            Self::Let { value, .. } => vec![value],
            Self::Alloc { .. } => Vec::new(),
        }
    }

    /// The expressions that it computes itself, not in its bodies.
    pub fn exprs_mut(&mut self) -> Vec<&mut Expr> {
        match self {
            Self::For(For { min, extent, .. }) => vec![min, extent],
            Self::Store { idx, value, .. } => idx.iter_mut().chain([value]).collect(),
            Self::If { cond, .. } | Self::Assert { cond, .. } => vec![cond],
            Self::Let { value, .. } => vec![value],
            Self::Alloc { .. } => Vec::new(),
        }
    }

    /// The name that it binds, and where.
    fn binding_mut(&mut self) -> Option<(&mut String, &mut Vec<Self>)> {
        match self {
            Self::For(For { var: name, body, .. })
            | Self::Alloc { buf: name, body, .. }
            | Self::Let { var: name, body, .. } => Some((name, body)),
            Self::If { .. } | Self::Store { .. } | Self::Assert { .. } => None,
        }
    }

    /// The name that it binds.
    pub(super) fn binding(&self) -> Option<&str> {
        match self {
            Self::For(For { var: name, .. })
            | Self::Alloc { buf: name, .. }
            | Self::Let { var: name, .. } => Some(name),
            Self::If { .. } | Self::Store { .. } | Self::Assert { .. } => None,
        }
    }

    /// Shows this statement and all inside of it to `look`, outer ones first.
    pub fn visit(&self, look: &mut impl FnMut(&Self)) {
        look(self);
        self.bodies().into_iter().flatten().for_each(|inner| inner.visit(look));
    }

    /// Changes every expression in this statement and all inside of it, innermost first.
    pub fn rewrite_exprs(&mut self, change: &mut impl FnMut(&mut Expr)) {
        self.exprs_mut().into_iter().for_each(|expr| expr.rewrite(change));
        self.bodies_mut().into_iter().flatten().for_each(|inner| inner.rewrite_exprs(change));
    }
}

/// Puts `value` where `name` stands; names in the program must be unique.
pub(super) fn substitute(body: &mut [Stmt], name: &str, value: &Expr) {
    let mut change = |expr: &mut Expr| {
        if matches!(expr, Expr::Var(found) if found == name) {
            *expr = value.clone();
        }
    };
    body.iter_mut().for_each(|statement| statement.rewrite_exprs(&mut change));
}

impl Program {
    /// Renames what is bound twice, so that no name stands for two things anywhere in the program.
    pub fn make_names_unique(&mut self) {
        self.make_names_differ_from(self.params.iter().map(|param| param.name.clone()).collect());
    }

    /// The same, with names that are taken elsewhere.
    pub(super) fn make_names_differ_from(&mut self, mut taken: HashSet<String>) {
        make_unique(&mut self.body, &mut taken);
    }
}

fn make_unique(body: &mut [Stmt], taken: &mut HashSet<String>) {
    for statement in body {
        if let Some((name, body)) = statement.binding_mut() {
            let free = free_name(name, taken);
            if free != *name {
                rename(body, name, &free);
                name.clone_from(&free);
            }
            taken.insert(free);
        }
        statement.bodies_mut().into_iter().for_each(|body| make_unique(body, taken));
    }
}

/// The name itself, or with the first number behind it that makes it a new one.
pub(super) fn free_name(name: &str, taken: &HashSet<String>) -> String {
    let numbered = (1..).map(|number| format!("{name}_{number}"));
    [name.to_string()].into_iter().chain(numbered).find(|free| !taken.contains(free)).unwrap_or_default()
}

/// Renames a variable or buffer where it is not bound anew.
fn rename(body: &mut [Stmt], from: &str, to: &str) {
    for statement in body {
        let mut change = |expr: &mut Expr| match expr {
            Expr::Var(name) | Expr::Load { buf: name, .. } if name == from => *name = to.into(),
            _ => {}
        };
        statement.exprs_mut().into_iter().for_each(|expr| expr.rewrite(&mut change));
        if let Stmt::Store { buf, .. } = statement
            && buf == from
        {
            *buf = to.into();
        }
        if statement.binding_mut().is_none_or(|(name, _)| name != from) {
            statement.bodies_mut().into_iter().for_each(|body| rename(body, from, to));
        }
    }
}
