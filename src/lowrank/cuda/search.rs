//! The leading directions of a matrix, found without waiting for the device: what goes on is decided
//! there, while the launches are always the same.

use super::dense::Columns;
use super::product::{Gate, Product, Size};
use super::space::{Extent, Space, partials};
use super::{Basis, PROJECT, REFRESH, of_element};
use crate::cuda::{Arena, Args, Module, Pointer, Shape, Stream};
use crate::error::Result;
use crate::lowrank::refresh::{OVERSAMPLE, PROBES};
use crate::lowrank::{Refresh, Side, Svd};
use crate::rng::Key;
use crate::tensor::TensorView;

/// What a launch waits for: the stages of `kernels/include/state.cuh`.
mod stage {
    pub const FRESH: i32 = 1;
    pub const MAIN: i32 = 2;
    pub const PASS: i32 = 4;
}
use stage::{FRESH, MAIN, PASS};

/// How a search begins.
#[derive(Clone, Copy)]
enum Mode {
    Cold = 0,
    Warm = 1,
    Svd = 2,
}

/// What is decided on the device, in the order of `refresh.cu`.
#[derive(Clone, Copy)]
enum Decision {
    AnotherPass,
    LookAtWarm,
    RoughDone,
    ExactDone,
    Last,
}

/// Passes of CholeskyQR at most: of a basis that is multiplied further, of the basis itself, and of
/// a matrix of any condition.
const ROUGH_PASSES: usize = 2;
const EXACT_PASSES: usize = 3;
const SVD_PASSES: usize = 4;

/// One search in a matrix.
struct Search<'a> {
    stream: &'a Stream,
    space: Space,
    extent: Extent,
    /// The matrix, whose strides along its longer and its shorter side are these.
    x: Pointer,
    strides: (usize, usize),
    product: Module,
    module: Module,
    key: Key,
    /// Whether it begins with an earlier basis.
    warm: bool,
}

impl<'a> Search<'a> {
    fn new(
        stream: &'a Stream,
        space: Space,
        extent: Extent,
        x: &TensorView,
        side: Side,
        key: Key,
        warm: bool,
    ) -> Result<Self> {
        let Extent { long, short, .. } = extent;
        let strides = if side == Side::Right { (short, 1) } else { (1, long) };
        let product = of_element(stream.op(), PROJECT[0], x)?;
        let module = of_element(stream.op(), REFRESH, x)?;
        Ok(Self { stream, space, extent, x: x.into(), strides, product, module, key, warm })
    }

    /// Launches a small kernel with 256 threads a block.
    fn call(&self, kernel: &'static str, blocks: usize, args: Args) -> Result<()> {
        let shape = Shape::line(blocks as u64, 256);
        // SAFETY: as kernels/lowrank/README.md lists them; the workspaces have the search's sizes.
        unsafe { self.stream.launch(self.module, kernel, shape, args) }
    }

    /// Arguments that end with what decides whether a kernel runs.
    fn gated(&self, args: Args, stages: i32) -> Args {
        args.pointer(self.space.dense.flags).value(stages)
    }

    fn begin(&self, mode: Mode) -> Result<()> {
        let Space { partial, dense, .. } = &self.space;
        let count = self.extent.long * self.extent.short;
        let parts = partials(count);
        let args = Args::new().pointer(self.x).pointer(*partial).value(count as i64);
        self.call("square_norm", parts, args)?;
        let args = Args::new()
            .pointer(*partial)
            .value(parts as i32)
            .value(mode as i32)
            .pointer(dense.flags)
            .pointer(dense.numbers);
        self.call("refresh_begin", 1, args)
    }

    /// `out = a b` for the upright matrix `a` and `b` `[short, n]`.
    fn times(&self, b: Pointer, out: Pointer, n: usize, stages: i32) -> Result<()> {
        let size = Size { m: self.extent.long, n, k: self.extent.short };
        self.multiply(self.product, self.x, self.strides, b, out, size, stages)
    }

    /// `out = a^T b` for the upright matrix `a` and `b` `[long, n]`.
    fn times_transposed(&self, b: Pointer, out: Pointer, n: usize, stages: i32) -> Result<()> {
        let size = Size { m: self.extent.short, n, k: self.extent.long };
        let strides = (self.strides.1, self.strides.0);
        self.multiply(self.product, self.x, strides, b, out, size, stages)
    }

    #[allow(clippy::too_many_arguments)]
    fn multiply(
        &self,
        module: Module,
        a: Pointer,
        strides: (usize, usize),
        b: Pointer,
        out: Pointer,
        size: Size,
        stages: i32,
    ) -> Result<()> {
        let (b, room) = (Basis::dense(b), self.space.room);
        let product = Product { module, a, strides, b, out, size, by_columns: false, room };
        // A search from nothing after one from a basis would overwrite what that one found.
        let strict = self.warm && stages & FRESH != 0;
        product.launch(self.stream, Gate { strict, ..self.space.dense.gate(stages) })
    }

    /// Scales a matrix by a power of two, so that it, or what it is multiplied with next, is about
    /// one; `rows` of the search's width.
    fn to_unit(&self, x: Pointer, rows: usize, twice: bool, stages: i32) -> Result<()> {
        let count = rows * self.extent.width;
        let parts = partials(count);
        let magnitudes = self.space.magnitudes;
        let args = Args::new().pointer(x).pointer(magnitudes).value(count as i64);
        self.call("largest_magnitude", parts, self.gated(args, stages))?;
        let args = Args::new()
            .pointer(x)
            .pointer(magnitudes)
            .value(parts as i32)
            .value(count as i64)
            .flag(twice);
        let blocks = count.div_ceil(1024).min(1024);
        self.call("scale_to_unit", blocks, self.gated(args, stages))
    }

    /// Random combinations of the matrix's rows.
    fn sketch(&self, out: Pointer) -> Result<()> {
        let Extent { long, short, width, .. } = self.extent;
        let count = long * width;
        let args = Args::new().pointer(self.space.y).value(count as i64).value(self.key);
        self.call("random_matrix", count.div_ceil(2048), self.gated(args, FRESH))?;
        self.times_transposed(self.space.y, out, width, FRESH)?;
        self.to_unit(out, short, false, FRESH)
    }

    /// `z = a^T a b`, up to a power of two.
    fn two_sided(&self, b: Pointer, stages: i32) -> Result<()> {
        let Extent { long, width, .. } = self.extent;
        let Space { y, z, .. } = self.space;
        self.times(b, y, width, stages)?;
        self.to_unit(y, long, true, stages)?;
        self.times_transposed(y, z, width, stages)
    }

    fn short(&self, at: Pointer) -> Columns {
        Columns { at, other: self.space.other, rows: self.extent.short }
    }

    /// `first` counts the steps with random numbers before.
    fn passes(
        &self,
        z: Columns,
        stages: i32,
        count: usize,
        first: usize,
        done: Decision,
    ) -> Result<()> {
        let Space { dense, room, .. } = &self.space;
        self.decide(Decision::AnotherPass, self.extent.width)?;
        for number in first..first + count {
            dense.pass(self.stream, z, *room, stages | PASS, self.key, number)?;
            self.decide(done, self.extent.width)?;
        }
        Ok(())
    }

    /// Of the columns marked as dependent the first `columns` count.
    fn decide(&self, decision: Decision, columns: usize) -> Result<()> {
        let dense = &self.space.dense;
        let args = Args::new()
            .value(decision as i32)
            .pointer(dense.dependent)
            .value(columns as i32)
            .pointer(dense.flags)
            .pointer(dense.numbers);
        // SAFETY: as kernels/lowrank/README.md lists them.
        unsafe { self.stream.launch(self.module, "refresh_decide", Shape::line(1, 32), args) }
    }

    /// Tells the caller, on the device: status, cosine, energy.
    fn end(&self, outcome: Pointer) -> Result<()> {
        let dense = &self.space.dense;
        let args = Args::new().pointer(dense.flags).pointer(dense.numbers).pointer(outcome);
        // SAFETY: as kernels/lowrank/README.md lists them; three float64 at `outcome`.
        unsafe { self.stream.launch(self.module, "refresh_outcome", Shape::line(1, 32), args) }
    }

    fn start_from(&self, basis: Pointer) -> Result<()> {
        let Extent { short, width, rank, .. } = self.extent;
        let Space { start, room, ref dense, .. } = self.space;
        let args = Args::new()
            .pointer(basis)
            .pointer(start)
            .value(short as i64)
            .value(rank as i32)
            .value(width as i32)
            .value(self.key);
        let blocks = (short * width).div_ceil(256);
        self.call("start_basis", blocks, self.gated(args, MAIN))?;
        dense.pass(self.stream, self.short(start), room, MAIN, self.key, 0)?;
        self.two_sided(start, MAIN)?;
        dense.gram(self.stream, self.space.z, short, MAIN)?;
        dense.cholesky(self.stream, MAIN)?;
        self.decide(Decision::LookAtWarm, rank)
    }

    fn refresh(&self, basis: Pointer, vector: Pointer) -> Result<()> {
        let Extent { short, width, rank, .. } = self.extent;
        let Space { start, z, room, ref dense, .. } = self.space;
        let warm = self.warm;
        self.begin(if warm { Mode::Warm } else { Mode::Cold })?;
        if warm {
            self.start_from(basis)?;
        }
        // Where an earlier basis served, none of this runs.
        self.sketch(start)?;
        self.passes(self.short(start), FRESH, ROUGH_PASSES, 0, Decision::RoughDone)?;
        self.two_sided(start, FRESH)?;
        // The directions, and then only rounding.
        dense.gram(self.stream, z, short, MAIN)?;
        dense.eigen(self.stream, MAIN, true)?;
        dense.apply(self.stream, self.short(z), room, MAIN, self.key, ROUGH_PASSES)?;
        let first = ROUGH_PASSES + 1;
        self.passes(self.short(z), MAIN, EXACT_PASSES, first, Decision::ExactDone)?;
        self.decide(Decision::Last, width)?;
        let args = Args::new()
            .pointer(z)
            .pointer(basis)
            .pointer(vector)
            .value(short as i64)
            .value(rank as i32)
            .value(width as i32)
            .flag(warm)
            .pointer(dense.flags)
            .pointer(dense.numbers);
        self.call("refresh_commit", rank.div_ceil(32), args)?;
        self.measure(basis)
    }

    /// What the basis captures of the matrix's squared norm.
    fn measure(&self, basis: Pointer) -> Result<()> {
        let Extent { long, short, rank, .. } = self.extent;
        let Space { y, signs, sums, partial, ref dense, .. } = self.space;
        let args = Args::new().pointer(signs).value(rank as i32).value(self.key);
        let blocks = (rank * PROBES).div_ceil(256);
        self.call("probe_signs", blocks, self.gated(args, MAIN))?;
        let size = Size { m: short, n: PROBES, k: rank };
        self.multiply(PROJECT[0][0], basis, (rank, 1), signs, sums, size, MAIN)?;
        self.times(sums, y, PROBES, MAIN)?;
        let count = long * PROBES;
        let parts = partials(count);
        let args = Args::new().pointer(y).pointer(partial).value(count as i64);
        self.call("captured_norm", parts, self.gated(args, MAIN))?;
        let args = Args::new()
            .pointer(partial)
            .value(parts as i32)
            .pointer(dense.flags)
            .pointer(dense.numbers);
        self.call("refresh_end", 1, args)
    }

    fn svd(&self, [u, s, vh]: [Pointer; 3], n_iter: usize) -> Result<()> {
        let Extent { long, short, width, rank, .. } = self.extent;
        let Space { y, left, z, other, room, ref dense, .. } = self.space;
        let stream = self.stream;
        let basis = |z: Columns| self.passes(z, MAIN, SVD_PASSES, 0, Decision::ExactDone);
        self.begin(Mode::Svd)?;
        self.sketch(z)?;
        basis(self.short(z))?;
        for _ in 0..n_iter {
            self.two_sided(z, MAIN)?;
            basis(self.short(z))?;
        }
        self.times(z, y, width, MAIN)?;
        dense.gram(stream, y, long, MAIN)?;
        dense.eigen(stream, MAIN, false)?;
        dense.multiply(stream, z, other, short, room, MAIN)?;
        dense.multiply(stream, y, left, long, room, MAIN)?;
        basis(Columns { at: left, other: y, rows: long })?;
        self.decide(Decision::Last, width)?;
        let (rows, columns) = if self.strides.1 == 1 { (long, short) } else { (short, long) };
        let args = Args::new()
            .pointer(other)
            .pointer(left)
            .pointer(dense.values)
            .pointer(u)
            .pointer(s)
            .pointer(vh)
            .value(rows as i64)
            .value(columns as i64)
            .value(rank as i32)
            .value(width as i32)
            .pointer(dense.flags);
        self.call("svd_commit", rank.div_ceil(32), args)
    }
}

fn of_refresh((rows, columns, rank): (usize, usize, usize)) -> Extent {
    Extent::new(rows, columns, rank, OVERSAMPLE, false)
}

/// Bytes of workspace that refreshing the bases of gradients of these rows, columns and ranks takes:
/// that of the largest, since they come one after the other.
pub fn refresh_workspace(shapes: &[(usize, usize, usize)]) -> usize {
    let size = |&shape| {
        let mut arena = Arena::counting();
        Space::new(&mut arena, of_refresh(shape));
        arena.size()
    };
    shapes.iter().map(size).max().unwrap_or(0)
}

/// Finds every basis of the call anew.
pub fn refresh(args: &mut Refresh, stream: &Stream) -> Result<()> {
    let Refresh { grads, bases, vectors, outcomes, workspace, warm, keys, shapes } = args;
    let outcomes = Pointer::from(outcomes);
    let mut prepared = Vec::with_capacity(shapes.len());
    for &shape in &*shapes {
        let mut arena = Arena::over(workspace.as_mut());
        let space = Space::new(&mut arena, of_refresh(shape));
        arena.check(stream.op())?;
        prepared.push(space);
    }
    for (i, (space, basis)) in prepared.into_iter().zip(bases).enumerate() {
        let (rows, columns, _) = shapes[i];
        let (extent, side) = (of_refresh(shapes[i]), Side::of(rows, columns));
        let search = Search::new(stream, space, extent, &grads[i], side, keys[i], warm[i])?;
        search.refresh(basis.into(), Pointer::from(&mut vectors[i]))?;
        search.end(outcomes.after(3 * i))?;
    }
    Ok(())
}

/// Bytes of workspace that an SVD takes.
pub fn svd_workspace(rows: usize, columns: usize, rank: usize, oversample: usize) -> usize {
    let mut arena = Arena::counting();
    Space::new(&mut arena, Extent::new(rows, columns, rank, oversample, true));
    arena.size()
}

/// The randomized SVD of the call.
pub fn svd(args: &mut Svd, stream: &Stream) -> Result<()> {
    let Svd { x, u, s, vh, outcome, workspace, n_iter, oversample, key, .. } = args;
    let (rows, columns) = (x.shape()[0], x.shape()[1]);
    let extent = Extent::new(rows, columns, s.numel(), *oversample, true);
    let mut arena = Arena::over(workspace.as_mut());
    let space = Space::new(&mut arena, extent);
    arena.check(stream.op())?;
    let side = Side::of(rows, columns);
    let search = Search::new(stream, space, extent, x, side, *key, false)?;
    search.svd([u.into(), s.into(), vh.into()], *n_iter)?;
    search.end(outcome.into())
}
