//! The sizes of a search for leading directions, and the workspace that it takes.

use super::dense::Dense;
use super::product::{Room, Size};
use crate::cuda::{Arena, Pointer};
use crate::lowrank::refresh::PROBES;

/// The workspace of a search.
pub struct Space {
    pub dense: Dense,
    /// `[long, width]`: the images of columns, and of the probes.
    pub y: Pointer,
    /// Another one, where left vectors are wanted.
    pub left: Pointer,
    /// `[short, width]` each; `other` takes turns with the two before.
    pub start: Pointer,
    pub z: Pointer,
    pub other: Pointer,
    pub partial: Pointer,
    pub magnitudes: Pointer,
    pub signs: Pointer,
    pub sums: Pointer,
    /// Of a product of two factors: `[tokens, width]`, and the signs `[short, PROBES]` that its
    /// norm is measured with.
    pub inner: Pointer,
    pub norm_signs: Pointer,
    pub room: Room,
}

/// The sizes of a search in an upright matrix `[long, short]`.
#[derive(Clone, Copy)]
pub struct Extent {
    pub long: usize,
    pub short: usize,
    pub width: usize,
    pub rank: usize,
    /// Whether left vectors are wanted too.
    pub both: bool,
    /// Of the two factors whose product the matrix is; 0 for a matrix that exists.
    pub tokens: usize,
}

impl Extent {
    pub fn new(rows: usize, columns: usize, rank: usize, oversample: usize, both: bool) -> Self {
        let (long, short) = (rows.max(columns), rows.min(columns));
        let width = rank.saturating_add(oversample).min(short);
        Self { long, short, width, rank, both, tokens: 0 }
    }

    fn parts(self) -> usize {
        let Self { long, short, width, rank, tokens, .. } = self;
        let size = |m, n, k| Size { m, n, k }.parts();
        let factors = [width, PROBES].into_iter().flat_map(|n| {
            [(tokens, short), (long, tokens), (tokens, long), (short, tokens)]
                .map(|(m, k)| if tokens == 0 { 0 } else { size(m, n, k) })
        });
        let others = [
            size(long, width, short),
            size(short, width, long),
            size(long, PROBES, short),
            size(short, PROBES, rank),
            size(short, width, width),
            size(long, width, width),
            size(rank, PROBES, short),
        ];
        factors.chain(others).fold(0, usize::max)
    }
}

impl Space {
    pub fn new(arena: &mut Arena, extent: Extent) -> Self {
        let Extent { long, short, width, rank, both, tokens } = extent;
        let probed = if tokens == 0 { 0 } else { short };
        Self {
            dense: Dense::new(arena, width, if both { long } else { short }),
            y: arena.take::<f32>(long * width.max(PROBES)),
            left: arena.take::<f32>(if both { long * width } else { 0 }),
            start: arena.take::<f32>(short * width),
            z: arena.take::<f32>(short * width),
            other: arena.take::<f32>(short * width),
            partial: arena.take::<f64>(partials(long * short)),
            magnitudes: arena.take::<u32>(partials(long * width)),
            signs: arena.take::<f32>(rank * PROBES),
            sums: arena.take::<f32>(short * PROBES),
            inner: arena.take::<f32>(tokens * width.max(PROBES)),
            norm_signs: arena.take::<f32>(probed * PROBES),
            room: Room::new(arena, extent.parts(), true),
        }
    }
}

/// Parts of a sum or of a maximum over `count` elements.
pub fn partials(count: usize) -> usize {
    count.div_ceil(1 << 16).clamp(1, 1024)
}
