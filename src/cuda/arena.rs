//! Memory for intermediate results, cut from a workspace that the caller brings.

use std::mem::size_of;

use super::launch::Pointer;
use crate::error::{Error, Result};
use crate::tensor::TensorViewMut;

/// Every piece begins at a multiple of this, which is what coalesced accesses like.
const ALIGNMENT: usize = 256;

/// Hands out pieces of a workspace one after the other.
///
/// The same code that takes the pieces tells how large the workspace has to be: without one, it
/// only counts.
pub struct Arena {
    base: usize,
    available: usize,
    used: usize,
}

impl Arena {
    /// Counts what would be taken.
    pub fn counting() -> Self {
        Self { base: 0, available: usize::MAX, used: 0 }
    }

    /// Pieces of `workspace`, of which there may be none where nothing is taken.
    pub fn over(workspace: Option<&mut TensorViewMut>) -> Self {
        let (base, available) =
            workspace.map_or((0, 0), |w| (w.ptr_mut() as usize, w.numel() * w.dtype().size()));
        Self { base, available, used: 0 }
    }

    /// Room for `count` values of type `T`, of any content. [`Self::check`] comes before its use.
    pub fn take<T>(&mut self, count: usize) -> Pointer {
        // The alignment is that of the address, of which the caller's memory decides the rest.
        let start = (self.base + self.used).next_multiple_of(ALIGNMENT) - self.base;
        self.used = start + count * size_of::<T>();
        Pointer::new((self.base + start) as u64, size_of::<T>())
    }

    /// Bytes that a workspace needs, wherever it begins.
    pub fn size(&self) -> usize {
        if self.used == 0 { 0 } else { self.used + ALIGNMENT }
    }

    /// That all pieces taken so far lie in the workspace.
    pub fn check(&self, op: &'static str) -> Result<()> {
        if self.used <= self.available {
            return Ok(());
        }
        let expected = format!("at least {} bytes", self.size());
        let got = format!("{} bytes", self.available);
        Err(Error::Value { op, name: "workspace", expected, got })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_apart() {
        let mut arena = Arena { base: 1000, available: 600, used: 0 };
        let (first, second) = (arena.take::<f64>(3), arena.take::<u8>(1));
        assert_eq!((first.address(), second.address()), (1024, 1280));
        assert!(arena.check("op").is_ok());
        let third = arena.take::<f32>(23);
        assert_eq!(third.address(), 1536);
        let message = arena.check("op").unwrap_err().to_string();
        assert_eq!(message, "op: workspace must be at least 884 bytes, got 600 bytes");
    }

    #[test]
    fn counting_covers_every_beginning() {
        let take = |arena: &mut Arena| {
            arena.take::<f32>(5);
            arena.take::<f64>(100);
        };
        let mut counted = Arena::counting();
        assert_eq!(counted.size(), 0);
        take(&mut counted);
        for base in 0..300 {
            let mut arena = Arena { base, available: counted.size(), used: 0 };
            take(&mut arena);
            assert!(arena.check("op").is_ok());
        }
    }
}
