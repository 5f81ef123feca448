//! Numbers in memory of their own, or in a mapped file.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::sync::Arc;

use bytemuck::Pod;
use memmap2::Mmap;

/// A slice that is owned or mapped; the same to all who read it.
#[derive(Clone)]
pub struct Held<T>(Kind<T>);

#[derive(Clone)]
enum Kind<T> {
    Owned(Vec<T>),
    Mapped(Arc<Mmap>, Range<usize>, PhantomData<T>),
}

impl<T: Pod> Held<T> {
    /// The numbers in these bytes of a file, native as they lie there; `None` where they are not whole or not
    /// aligned.
    pub fn mapped(map: Arc<Mmap>, range: Range<usize>) -> Option<Self> {
        bytemuck::try_cast_slice::<u8, T>(map.get(range.clone())?).ok()?;
        Some(Self(Kind::Mapped(map, range, PhantomData)))
    }
}

impl<T: Pod> Deref for Held<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Kind::Owned(values) => values,
            Kind::Mapped(map, range, _) => bytemuck::cast_slice(&map[range.clone()]),
        }
    }
}

impl<T> From<Vec<T>> for Held<T> {
    fn from(values: Vec<T>) -> Self {
        Self(Kind::Owned(values))
    }
}

impl<T: Pod + PartialEq> PartialEq for Held<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Held<T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        (**self).fmt(f)
    }
}
