//! The leading directions of a matrix, found without waiting for the device: what goes on is decided
//! there, while the launches are always the same.

use super::dense::Columns;
use super::factors::Factors;
use super::product::{Gate, Product, Size};
use super::space::{Extent, Space, partials};
use super::{Basis, PROJECT, REFRESH, of_element};
use crate::cuda::{Arena, Args, Module, Pointer, Shape, Stream};
use crate::error::Result;
use crate::lowrank::refresh::{OVERSAMPLE, PROBES};
use crate::lowrank::search::Gradient;
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

/// The matrix as one that has at least as many rows as columns, `[long, short]`.
#[derive(Clone, Copy)]
enum Upright {
    /// With strides along its longer and its shorter side.
    Dense { x: Pointer, strides: (usize, usize), product: Module },
    /// `long^T short` of factors `[tokens, long]` and `[tokens, short]`.
    Factors { long: Pointer, short: Pointer, product: Module },
}

/// One search in a matrix.
struct Search<'a> {
    stream: &'a Stream,
    space: Space,
    extent: Extent,
    matrix: Upright,
    /// Of the small kernels, by the dtype of what `square_norm` reads.
    module: Module,
    key: Key,
    /// Whether it begins with an earlier basis.
    warm: bool,
}

impl<'a> Search<'a> {
    fn in_dense(
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
        let matrix = Upright::Dense { x: x.into(), strides, product };
        Ok(Self { stream, space, extent, matrix, module, key, warm })
    }

    fn in_factors(
        stream: &'a Stream,
        space: Space,
        extent: Extent,
        factors: Factors,
        key: Key,
        warm: bool,
    ) -> Self {
        let Factors { long, short, product } = factors;
        let matrix = Upright::Factors { long, short, product };
        // The norm is taken of float32 images.
        Self { stream, space, extent, matrix, module: REFRESH[0], key, warm }
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
        let Space { partial, dense, y, .. } = &self.space;
        let (x, count, share) = match self.matrix {
            Upright::Dense { x, .. } => (x, self.extent.long * self.extent.short, 1f32),
            Upright::Factors { .. } => {
                self.images_of_signs()?;
                (*y, self.extent.long * PROBES, 1.0 / PROBES as f32)
            }
        };
        let parts = partials(count);
        let args = Args::new().pointer(x).pointer(*partial).value(count as i64);
        self.call("square_norm", parts, args)?;
        let args = Args::new()
            .pointer(*partial)
            .value(parts as i32)
            .value(mode as i32)
            .value(share)
            .pointer(dense.flags)
            .pointer(dense.numbers);
        self.call("refresh_begin", 1, args)
    }

    /// Random combinations of the columns of a matrix that has no elements to take the norm of.
    fn images_of_signs(&self) -> Result<()> {
        let Extent { short, .. } = self.extent;
        let Space { norm_signs, y, .. } = self.space;
        let args = Args::new().pointer(norm_signs).value(short as i32).value(self.key);
        let args = args.pointer(Pointer::NULL).value(0i32);
        self.call("probe_signs", (short * PROBES).div_ceil(256), args)?;
        self.apply(norm_signs, y, PROBES, false, Gate::OPEN)
    }

    /// `out = a b` for the upright matrix `a` and `b` `[short, n]`.
    fn times(&self, b: Pointer, out: Pointer, n: usize, stages: i32) -> Result<()> {
        self.apply(b, out, n, false, self.gate(stages))
    }

    /// `out = a^T b` for the upright matrix `a` and `b` `[long, n]`.
    fn times_transposed(&self, b: Pointer, out: Pointer, n: usize, stages: i32) -> Result<()> {
        self.apply(b, out, n, true, self.gate(stages))
    }

    fn gate(&self, stages: i32) -> Gate {
        // A search from nothing after one from a basis would overwrite what that one found.
        let strict = self.warm && stages & FRESH != 0;
        Gate { strict, ..self.space.dense.gate(stages) }
    }

    /// The product of the upright matrix, or of the transposed one, with `b`.
    fn apply(
        &self,
        b: Pointer,
        out: Pointer,
        n: usize,
        transposed: bool,
        gate: Gate,
    ) -> Result<()> {
        let Extent { long, short, tokens, .. } = self.extent;
        let (rows, columns) = if transposed { (short, long) } else { (long, short) };
        match self.matrix {
            Upright::Dense { x, strides, product } => {
                let strides = if transposed { (strides.1, strides.0) } else { strides };
                let size = Size { m: rows, n, k: columns };
                self.multiply(product, x, strides, b, out, size, gate)
            }
            Upright::Factors { long: of_long, short: of_short, product } => {
                let inner = self.space.inner;
                let (first, second) =
                    if transposed { (of_long, of_short) } else { (of_short, of_long) };
                let size = Size { m: tokens, n, k: columns };
                self.multiply(product, first, (columns, 1), b, inner, size, gate)?;
                let size = Size { m: rows, n, k: tokens };
                self.multiply(product, second, (1, rows), inner, out, size, gate)
            }
        }
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
        gate: Gate,
    ) -> Result<()> {
        let (b, room) = (Basis::dense(b), self.space.room);
        let product = Product { module, a, strides, b, out, size, by_columns: false, room };
        product.launch(self.stream, gate)
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
        let Space { y, signs, sums, partial, norm_signs, ref dense, .. } = self.space;
        let plain = PROJECT[0][0];
        if let Upright::Dense { .. } = self.matrix {
            let args = Args::new().pointer(signs).value(rank as i32).value(self.key);
            let blocks = (rank * PROBES).div_ceil(256);
            self.call("probe_signs", blocks, self.gated(args, MAIN))?;
        } else {
            let size = Size { m: rank, n: PROBES, k: short };
            self.multiply(plain, basis, (1, rank), norm_signs, signs, size, self.gate(MAIN))?;
        }
        let size = Size { m: short, n: PROBES, k: rank };
        self.multiply(plain, basis, (rank, 1), signs, sums, size, self.gate(MAIN))?;
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

    fn svd(
        &self,
        [u, s, vh]: [Pointer; 3],
        (rows, columns): (usize, usize),
        n_iter: usize,
    ) -> Result<()> {
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

/// Of the largest search, since they come one after the other.
fn workspace_of(extents: impl Iterator<Item = Extent>) -> usize {
    let size = |extent| {
        let mut arena = Arena::counting();
        Space::new(&mut arena, extent);
        arena.size()
    };
    extents.map(size).max().unwrap_or(0)
}

/// Bytes of workspace that refreshing the bases of gradients of these rows, columns and ranks takes.
pub fn refresh_workspace(shapes: &[(usize, usize, usize)]) -> usize {
    workspace_of(shapes.iter().copied().map(of_refresh))
}

/// The same where gradients are products over these tokens, rows, columns and ranks.
pub fn refresh_factors_workspace(shapes: &[(usize, usize, usize, usize)]) -> usize {
    workspace_of(shapes.iter().map(|&(tokens, rows, columns, rank)| Extent {
        tokens,
        ..of_refresh((rows, columns, rank))
    }))
}

/// Finds every basis of the call anew.
pub fn refresh(args: &mut Refresh, stream: &Stream) -> Result<()> {
    let Refresh { gradients, bases, vectors, outcomes, workspace, warm, keys, shapes } = args;
    let outcomes = Pointer::from(outcomes);
    let mut prepared = Vec::with_capacity(shapes.len());
    for (&shape, gradient) in shapes.iter().zip(&*gradients) {
        let tokens = match gradient {
            Gradient::Dense(_) => 0,
            Gradient::Factors(factors) => factors.tokens(),
        };
        let extent = Extent { tokens, ..of_refresh(shape) };
        let mut arena = Arena::over(workspace.as_mut());
        let space = Space::new(&mut arena, extent);
        arena.check(stream.op())?;
        prepared.push((extent, space));
    }
    for (i, ((extent, space), basis)) in prepared.into_iter().zip(bases).enumerate() {
        let (rows, columns, _) = shapes[i];
        let (side, key, warm) = (Side::of(rows, columns), keys[i], warm[i]);
        let search = match &gradients[i] {
            Gradient::Dense(grad) => {
                Search::in_dense(stream, space, extent, grad, side, key, warm)?
            }
            Gradient::Factors(factors) => {
                let factors = Factors::new(stream.op(), factors)?;
                Search::in_factors(stream, space, extent, factors, key, warm)
            }
        };
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
    let search = Search::in_dense(stream, space, extent, x, side, *key, false)?;
    search.svd([u.into(), s.into(), vh.into()], (rows, columns), *n_iter)?;
    search.end(outcome.into())
}
