//! The memory of a program: inputs, constants, and one arena for each kind of element with a fixed place for every intermediate
//! result.

use std::sync::Arc;

use burn::tensor::{BoolStore, DType, TensorData};

use super::view::{BufferId, View};

/// What a buffer's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Float,
    Int,
    Bool,
}

impl Kind {
    /// The kind of an element type; `None` for floats of another width than 32 bits.
    pub fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::Float),
            DType::Bool(_) => Some(Self::Bool),
            other => other.is_int().then_some(Self::Int),
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Float => 4,
            Self::Int => 8,
            Self::Bool => 1,
        }
    }
}

/// Where a buffer is.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// Number of an input.
    Input(usize),
    /// A value from compilation.
    Constant(Arc<Values>),
    /// From this element of the kind's arena on.
    Arena(usize),
}

/// A stretch of elements.
#[derive(Debug, Clone)]
pub(super) struct Buffer {
    pub kind: Kind,
    pub len: usize,
    pub place: Place,
}

/// Elements that are owned.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Values {
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Bools(Vec<u8>),
}

impl Values {
    /// `None` for element types that have no [`Kind`].
    pub fn of(data: &TensorData) -> Option<Self> {
        Some(match Kind::of(data.dtype())? {
            Kind::Float => Self::Floats(data.iter::<f32>().collect()),
            Kind::Int => Self::Ints(data.iter::<i64>().collect()),
            Kind::Bool => Self::Bools(data.iter::<bool>().map(u8::from).collect()),
        })
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Floats(_) => Kind::Float,
            Self::Ints(_) => Kind::Int,
            Self::Bools(_) => Kind::Bool,
        }
    }

    pub fn elements(&self) -> Elements<'_> {
        match self {
            Self::Floats(values) => Elements::Floats(values),
            Self::Ints(values) => Elements::Ints(values),
            Self::Bools(values) => Elements::Bools(values),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::Floats(values) => values.len() * Kind::Float.size(),
            Self::Ints(values) => values.len() * Kind::Int.size(),
            Self::Bools(values) => values.len() * Kind::Bool.size(),
        }
    }
}

/// Elements that are read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Elements<'a> {
    Floats(&'a [f32]),
    Ints(&'a [i64]),
    Bools(&'a [u8]),
}

/// Elements that are written.
#[derive(Debug)]
pub(super) enum ElementsMut<'a> {
    Floats(&'a mut [f32]),
    Ints(&'a mut [i64]),
    Bools(&'a mut [u8]),
}

/// The buffers that a step reads.
pub(super) struct Memory<'a>(Vec<(BufferId, Elements<'a>)>);

impl<'a> Memory<'a> {
    pub fn elements(&self, buffer: BufferId) -> Elements<'a> {
        let found = self.0.iter().find(|(id, _)| *id == buffer);
        found.expect("a step lists the buffers that it reads").1
    }

    pub fn floats(&self, buffer: BufferId) -> &'a [f32] {
        match self.elements(buffer) {
            Elements::Floats(values) => values,
            other => panic!("a kernel of floats was given {other:?}"),
        }
    }

    pub fn ints(&self, buffer: BufferId) -> &'a [i64] {
        match self.elements(buffer) {
            Elements::Ints(values) => values,
            other => panic!("a kernel of integers was given {other:?}"),
        }
    }

    pub fn bools(&self, buffer: BufferId) -> &'a [u8] {
        match self.elements(buffer) {
            Elements::Bools(values) => values,
            other => panic!("a kernel of truth values was given {other:?}"),
        }
    }

    /// A tensor's elements in row-major order.
    pub fn to_data(&self, view: &View, dtype: DType) -> TensorData {
        let mut places = vec![view.offset as isize];
        if view.is_contiguous() {
            places = (view.offset as isize..(view.offset + view.len()) as isize).collect();
        } else {
            for (&extent, &stride) in view.shape.iter().zip(&view.strides) {
                let along = |place: &isize| {
                    let place = *place;
                    (0..extent as isize).map(move |i| place + i * stride)
                };
                places = places.iter().flat_map(along).collect();
            }
        }
        let places = places.into_iter().map(|place| place as usize);
        let shape = view.shape.clone();
        let data = match self.elements(view.buffer) {
            Elements::Floats(values) => {
                TensorData::new(places.map(|place| values[place]).collect::<Vec<_>>(), shape)
            }
            Elements::Ints(values) => {
                TensorData::new(places.map(|place| values[place]).collect::<Vec<_>>(), shape)
            }
            Elements::Bools(values) => {
                TensorData::new(places.map(|place| values[place] != 0).collect::<Vec<_>>(), shape)
            }
        };
        match (data.dtype(), dtype) {
            (DType::Bool(BoolStore::Native), DType::Bool(_)) => data,
            _ => data.convert_dtype(dtype),
        }
    }
}

/// The arenas.
#[derive(Debug, Default)]
pub(super) struct Arenas {
    pub floats: Vec<f32>,
    pub ints: Vec<i64>,
    pub bools: Vec<u8>,
}

impl Arenas {
    /// The buffers that a step reads, and the one that it writes.
    ///
    /// # Panics
    /// When what is read lies where is written.
    pub fn borrow<'a>(
        &'a mut self,
        buffers: &'a [Buffer],
        inputs: &'a [Values],
        reads: &[BufferId],
        write: Option<BufferId>,
    ) -> (Memory<'a>, ElementsMut<'a>) {
        let written = write.map(|id| (buffers[id].kind, range(&buffers[id])));
        let own = |kind: Kind| match &written {
            Some((written, range)) if *written == kind => range.clone(),
            _ => 0..0,
        };
        let floats = Parts::new(&mut self.floats, own(Kind::Float));
        let ints = Parts::new(&mut self.ints, own(Kind::Int));
        let bools = Parts::new(&mut self.bools, own(Kind::Bool));
        let read = |&id: &BufferId| {
            let buffer = &buffers[id];
            let elements = match &buffer.place {
                Place::Input(number) => inputs[*number].elements(),
                Place::Constant(values) => values.elements(),
                Place::Arena(_) => match buffer.kind {
                    Kind::Float => Elements::Floats(floats.read(range(buffer))),
                    Kind::Int => Elements::Ints(ints.read(range(buffer))),
                    Kind::Bool => Elements::Bools(bools.read(range(buffer))),
                },
            };
            (id, elements)
        };
        let memory = Memory(reads.iter().map(read).collect());
        let write = match written {
            Some((Kind::Int, _)) => ElementsMut::Ints(ints.own),
            Some((Kind::Bool, _)) => ElementsMut::Bools(bools.own),
            _ => ElementsMut::Floats(floats.own),
        };
        (memory, write)
    }
}

/// The elements of a buffer in its arena.
fn range(buffer: &Buffer) -> std::ops::Range<usize> {
    match buffer.place {
        Place::Arena(start) => start..start + buffer.len,
        _ => panic!("only arenas are written"),
    }
}

/// An arena around the part that is written.
struct Parts<'a, T> {
    before: &'a [T],
    own: &'a mut [T],
    after: &'a [T],
    after_start: usize,
}

impl<'a, T> Parts<'a, T> {
    fn new(arena: &'a mut [T], own: std::ops::Range<usize>) -> Self {
        let after_start = own.end;
        let (before, rest) = arena.split_at_mut(own.start);
        let (own, after) = rest.split_at_mut(own.len());
        Self { before, own, after, after_start }
    }

    fn read(&self, range: std::ops::Range<usize>) -> &'a [T] {
        match range.start.checked_sub(self.after_start) {
            Some(start) => &self.after[start..start + range.len()],
            None => &self.before[range],
        }
    }
}
