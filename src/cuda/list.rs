//! Many tensors in one launch: their descriptions go by value in the kernel's parameters.

use super::launch::{Parameter, Shape};

/// The description of one tensor; each block of a launch finds the one that it belongs to.
pub trait Entry: Parameter {
    /// Sets how many blocks the tensors before have.
    fn set_first_block(&mut self, blocks: u32);
}

/// What one launch takes.
#[derive(Debug, PartialEq)]
pub struct Part<T> {
    pub entries: Vec<T>,
    pub blocks: u64,
}

/// Cuts tensors, each with its number of blocks, into launches of at most `capacity` entries and as
/// many blocks as a grid may have. Tensors without elements have no blocks and are left out.
pub fn parts<T: Entry>(tensors: impl Iterator<Item = (T, u64)>, capacity: usize) -> Vec<Part<T>> {
    let mut parts: Vec<Part<T>> = Vec::new();
    for (mut entry, blocks) in tensors.filter(|&(_, blocks)| blocks > 0) {
        let fits = |part: &Part<T>| {
            part.entries.len() < capacity && part.blocks + blocks <= Shape::MOST_BLOCKS
        };
        if !parts.last().is_some_and(fits) {
            parts.push(Part { entries: Vec::new(), blocks: 0 });
        }
        if let Some(part) = parts.last_mut() {
            entry.set_first_block(part.blocks as u32);
            part.entries.push(entry);
            part.blocks += blocks;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct First(u32);
    // SAFETY: one word.
    unsafe impl Parameter for First {
        const KIND: u8 = b's';
    }
    impl Entry for First {
        fn set_first_block(&mut self, blocks: u32) {
            self.0 = blocks;
        }
    }

    #[test]
    fn launches_are_full_but_never_beyond_a_limit() {
        let cut = |blocks: &[u64], capacity| -> Vec<(Vec<u32>, u64)> {
            parts(blocks.iter().map(|&n| (First(99), n)), capacity)
                .into_iter()
                .map(|part| (part.entries.iter().map(|first| first.0).collect(), part.blocks))
                .collect()
        };
        assert_eq!(cut(&[], 4), []);
        assert_eq!(cut(&[0, 0], 4), []);
        assert_eq!(cut(&[3, 0, 2, 1, 4], 2), [(vec![0, 3], 5), (vec![0, 1], 5)]);
        let most = Shape::MOST_BLOCKS;
        assert_eq!(
            cut(&[most, 1, most - 1, 1], 9),
            [(vec![0], most), (vec![0, 1], most), (vec![0], 1)]
        );
        assert_eq!(cut(&[1 << 40], 9), [(vec![0], 1 << 40)]);
    }
}
