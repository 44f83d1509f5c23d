//! Products of a gradient, or another matrix, with a basis.

use super::{Basis, PROJECT, of_element};
use crate::cuda::{Arena, Args, BLAS_WORKSPACE, Gemm, Module, Pointer, Shape, Stream};
use crate::error::Result;
use crate::lowrank::{Project, Side};
use crate::tensor::DType;

/// Elements of one block's tile.
const TILE: (usize, usize) = (128, 64);
/// Blocks that keep a large device busy, where the tiles are fewer: two for each multiprocessor.
const BLOCKS: usize = 264;
/// Slices of a sum are whole ones.
const SLICE: usize = 32;

/// Which launches do anything: those whose stages all run, as the device knows. Without flags all.
#[derive(Clone, Copy)]
pub struct Gate {
    pub flags: Pointer,
    pub stages: i32,
    /// Whether a product that should not run must not: where it only overwrites what nobody reads,
    /// the vendor's library may take it, which knows no stages.
    pub strict: bool,
}

impl Gate {
    pub const OPEN: Self = Self { flags: Pointer::NULL, stages: 0, strict: false };
}

/// Workspaces that products share.
#[derive(Clone, Copy)]
pub struct Room {
    /// [`Size::parts`] elements, of the largest product.
    pub parts: Pointer,
    /// Of the vendor's library.
    pub blas: Pointer,
}

impl Room {
    /// For products of up to so many elements of parts.
    pub fn new(arena: &mut Arena, parts: usize, plain: bool) -> Self {
        let blas = if plain { BLAS_WORKSPACE } else { 0 };
        Self { parts: arena.take::<f32>(parts), blas: arena.take::<u8>(blas) }
    }
}

/// The shape of `out [m, n] = a [m, k] b [k, n]`.
#[derive(Clone, Copy)]
pub struct Size {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

impl Size {
    /// How a sum over `k` is cut where the tiles alone do not fill a device: elements of a run, and
    /// their number. It depends on the shape alone, and so do the bits of the result.
    fn runs(self) -> (usize, usize) {
        let blocks = self.m.div_ceil(TILE.0) * self.n.div_ceil(TILE.1);
        let most = self.k.div_ceil(512).clamp(1, 16);
        let runs = (BLOCKS / blocks.max(1)).clamp(1, most);
        let per_run = self.k.div_ceil(runs).next_multiple_of(SLICE);
        (per_run, self.k.div_ceil(per_run).max(1))
    }

    /// Elements of the workspace in which the runs' results lie.
    pub fn parts(self) -> usize {
        match self.runs().1 {
            1 => 0,
            runs => runs * self.m * self.n,
        }
    }
}

/// One product.
pub struct Product {
    pub module: Module,
    pub a: Pointer,
    /// Strides of `a` along m and along k, one of which is 1.
    pub strides: (usize, usize),
    pub b: Basis,
    pub out: Pointer,
    pub size: Size,
    /// Stores the result transposed.
    pub by_columns: bool,
    pub room: Room,
}

/// The module of products of two float32 matrices.
const PLAIN: Module = PROJECT[0][0];

impl Product {
    pub fn launch(self, stream: &Stream, gate: Gate) -> Result<()> {
        let Self { module, a, strides, b, out, size, by_columns, room } = self;
        let Size { m, n, k } = size;
        if module == PLAIN && !gate.strict {
            let (b, workspace) = (b.values, room.blas);
            let gemm = Gemm { a, strides, b, out, m, n, k, by_columns, workspace };
            // SAFETY: matrices of these sizes; `room` was made for them.
            if unsafe { stream.multiply(gemm) }? {
                return Ok(());
            }
        }
        let parts = room.parts;
        let (per_run, runs) = size.runs();
        let to = if runs > 1 { parts } else { out };
        let args = Args::new()
            .pointer(a)
            .pointer(b.values)
            .pointer(b.scale)
            .pointer(b.zero_point)
            .pointer(to)
            .value(m as i64)
            .value(n as i64)
            .value(k as i64)
            .value(strides.0 as i64)
            .value(strides.1 as i64)
            .value(n as i64)
            .value(b.group_size)
            .flag(by_columns)
            .value(per_run as i64)
            .pointer(gate.flags)
            .value(gate.stages);
        let tiles = (m.div_ceil(TILE.0) * n.div_ceil(TILE.1)) as u64;
        let shape = Shape { grid: [tiles, runs as u64, 1], block: [128, 1, 1], shared: 0 };
        // SAFETY: as kernels/lowrank/README.md lists them, over matrices of these sizes.
        unsafe { stream.launch(module, "project", shape, args) }?;
        if runs == 1 {
            return Ok(());
        }
        let count = m * n;
        let args = Args::new()
            .pointer(parts)
            .pointer(out)
            .value(count as i64)
            .value(runs as i32)
            .pointer(gate.flags)
            .value(gate.stages);
        let shape = Shape::line(count.div_ceil(1024) as u64, 256);
        // SAFETY: as above; `parts` holds the runs.
        unsafe { stream.launch(module, "project_reduce", shape, args) }
    }
}

/// The product that projects a gradient.
fn projection_size(rows: usize, columns: usize, rank: usize) -> Size {
    Size { m: rows.max(columns), n: rank, k: rows.min(columns) }
}

/// Bytes of workspace that projecting gradients of these rows, columns and ranks takes; `plain`
/// where some gradient is float32, and so are the bases.
pub fn project_workspace(shapes: &[(usize, usize, usize)], plain: bool) -> usize {
    let mut arena = Arena::counting();
    room(&mut arena, shapes, plain);
    arena.size()
}

/// One workspace for all gradients, which come one after the other.
fn room(arena: &mut Arena, shapes: &[(usize, usize, usize)], plain: bool) -> Room {
    let sizes = shapes.iter().map(|&(rows, columns, rank)| projection_size(rows, columns, rank));
    Room::new(arena, sizes.map(Size::parts).max().unwrap_or(0), plain)
}

/// Projects every gradient of the call.
pub fn project(args: &mut Project, stream: &Stream) -> Result<()> {
    let Project { grads, bases, outs, workspace, shapes } = args;
    let mut arena = Arena::over(workspace.as_mut());
    let plain = bases.packing.is_none() && grads.iter().any(|grad| grad.dtype() == DType::F32);
    let room = room(&mut arena, shapes, plain);
    arena.check(stream.op())?;
    for (i, (grad, out)) in grads.iter().zip(outs).enumerate() {
        let (rows, columns, rank) = shapes[i];
        let size = projection_size(rows, columns, rank);
        let b = Basis::of(bases, i, size.k * size.n);
        let left = Side::of(rows, columns) == Side::Left;
        let product = Product {
            module: of_element(stream.op(), b.choose(PROJECT), grad)?,
            a: grad.into(),
            strides: if left { (1, columns) } else { (columns, 1) },
            b,
            out: out.into(),
            size,
            by_columns: left,
            room,
        };
        product.launch(stream, Gate::OPEN)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_the_sum_and_depend_on_the_shape() {
        for (m, n, k) in [(1, 1, 1), (2048, 256, 2048), (100, 4, 5000), (50_000, 128, 512)] {
            let (per_run, runs) = Size { m, n, k }.runs();
            assert!(per_run.is_multiple_of(32) && runs <= 16);
            assert!(per_run * runs >= k && per_run * (runs - 1) < k);
        }
        assert_eq!(Size { m: 50_000, n: 128, k: 512 }.parts(), 0);
        assert_eq!(Size { m: 100, n: 4, k: 5000 }.parts(), 10 * 400);
    }
}
