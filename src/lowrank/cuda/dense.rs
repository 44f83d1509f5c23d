//! Orthonormal columns and eigenvectors on the device: Gram matrices, Cholesky, Jacobi.

use super::product::{Gate, Product, Room, Size};
use super::{Basis, EIGEN, ORTHONORMAL, PROJECT};
use crate::cuda::{Arena, Args, Module, Pointer, Shape, Stream};
use crate::error::Result;
use crate::rng::Key;

/// Small matrices are cut into squares of this side.
const SIDE: usize = 32;
/// Blocks of the reduction of a Gram matrix that keep a large device busy.
const BLOCKS: usize = 264;
/// Sweeps of Jacobi's method, more than any matrix was seen to take (nine at 544 columns); those
/// after convergence return at once.
const SWEEPS: i32 = 12;
/// As many as there is room for, for widths beyond this.
const WIDE: (usize, i32) = (1088, 16);

/// What a subspace's search knows, and the small matrices of its width, all on the device.
pub struct Dense {
    pub width: usize,
    /// The leading dimension of small matrices.
    ld: usize,
    pub flags: Pointer,
    pub numbers: Pointer,
    gram: Pointer,
    other: Pointer,
    /// Runs of rows of a Gram matrix, before they are added up.
    gram_parts: Pointer,
    /// What columns are multiplied with: from Cholesky or Jacobi.
    pub inverse: Pointer,
    diagonal: Pointer,
    pub values: Pointer,
    rotations: Pointer,
    rotated: Pointer,
    pub dependent: Pointer,
}

/// A matrix of `width` columns by rows, and another of its size that takes its place and back.
#[derive(Clone, Copy)]
pub struct Columns {
    pub at: Pointer,
    pub other: Pointer,
    pub rows: usize,
}

impl Dense {
    /// For matrices of `width` columns and at most `rows` rows.
    pub fn new(arena: &mut Arena, width: usize, rows: usize) -> Self {
        let ld = width.next_multiple_of(SIDE);
        let squares = ld / SIDE;
        let runs = rows_per_run(rows, squares).1;
        Self {
            width,
            ld,
            flags: arena.take::<i32>(8),
            numbers: arena.take::<f64>(32),
            gram: arena.take::<f64>(ld * ld),
            other: arena.take::<f64>(ld * ld),
            gram_parts: arena.take::<f64>(runs * ld * ld),
            inverse: arena.take::<f32>(width * width),
            diagonal: arena.take::<f64>(ld),
            values: arena.take::<f64>(width),
            rotations: arena.take::<f64>(SIDE * ld),
            rotated: arena.take::<i32>(squares),
            dependent: arena.take::<i32>(width),
        }
    }

    pub fn gate(&self, stages: i32) -> Gate {
        Gate { flags: self.flags, stages, strict: false }
    }

    /// Arguments that end with the state and with what decides whether a kernel runs.
    fn gated(&self, args: Args, stages: i32) -> Args {
        args.pointer(self.flags).pointer(self.numbers).value(stages)
    }

    fn squares(&self) -> usize {
        self.ld / SIDE
    }

    /// The Gram matrix of a `[rows, width]` matrix.
    pub fn gram(&self, stream: &Stream, z: Pointer, rows: usize, stages: i32) -> Result<()> {
        let squares = self.squares();
        let (per_run, runs) = rows_per_run(rows, squares);
        let args = self.gated(
            Args::new()
                .pointer(z)
                .pointer(self.gram_parts)
                .value(rows as i64)
                .value(self.width as i32)
                .value(self.ld as i32)
                .value(per_run as i64),
            stages,
        );
        let grid = [triangle(squares) as u64, runs as u64, 1];
        let shape = Shape { grid, block: [256, 1, 1], shared: 0 };
        launch(stream, ORTHONORMAL, "gram", shape, args)?;
        let args = self.gated(
            Args::new()
                .pointer(self.gram_parts)
                .pointer(self.gram)
                .pointer(self.other)
                .pointer(self.inverse)
                .pointer(self.diagonal)
                .value(self.width as i32)
                .value(self.ld as i32)
                .value(runs as i32),
            stages,
        );
        let shape = Shape::line((self.ld * self.ld / 256) as u64, 256);
        launch(stream, ORTHONORMAL, "gram_reduce", shape, args)
    }

    /// The inverse of the Gram matrix's Cholesky factor, transposed.
    pub fn cholesky(&self, stream: &Stream, stages: i32) -> Result<()> {
        let squares = self.squares();
        for k in 0..squares {
            let args = self.gated(
                Args::new()
                    .pointer(self.gram)
                    .pointer(self.other)
                    .pointer(self.diagonal)
                    .pointer(self.inverse)
                    .pointer(self.dependent)
                    .value(self.width as i32)
                    .value(self.ld as i32)
                    .value(k as i32),
                stages,
            );
            let shape = Shape::line(squares as u64, 256);
            launch(stream, ORTHONORMAL, "cholesky_panel", shape, args)?;
            let below = squares - 1 - k;
            let args = Args::new()
                .pointer(self.gram)
                .pointer(self.other)
                .value(self.ld as i32)
                .value(k as i32)
                .pointer(self.flags)
                .value(stages);
            let shape = Shape::line((triangle(below) + below * (k + 1)) as u64, 256);
            launch(stream, ORTHONORMAL, "cholesky_update", shape, args)?;
        }
        Ok(())
    }

    /// The Gram matrix's eigenvectors, the leading ones first; `scaled` to make columns orthonormal.
    pub fn eigen(&self, stream: &Stream, stages: i32, scaled: bool) -> Result<()> {
        let squares = self.squares();
        let sweeps = if self.width > WIDE.0 { WIDE.1 } else { SWEEPS };
        for sweep in 0..sweeps {
            for round in 0..(2 * squares - 1) as i32 {
                self.jacobi(stream, stages, sweep, round)?;
            }
        }
        let args = Args::new()
            .pointer(self.gram)
            .pointer(self.other)
            .pointer(self.diagonal)
            .pointer(self.values)
            .pointer(self.inverse)
            .pointer(self.dependent)
            .value(self.width as i32)
            .value(self.ld as i32)
            .flag(scaled)
            .pointer(self.flags)
            .value(stages);
        let shape = Shape::line(self.width as u64, 256);
        launch(stream, EIGEN, "eigen_order", shape, args)
    }

    fn jacobi(&self, stream: &Stream, stages: i32, sweep: i32, round: i32) -> Result<()> {
        let squares = self.squares();
        let args = self.gated(
            Args::new()
                .pointer(self.gram)
                .pointer(self.rotations)
                .pointer(self.rotated)
                .value(self.ld as i32)
                .value(round)
                .value(sweep),
            stages,
        );
        let shape = Shape::line(squares as u64, 256);
        launch(stream, EIGEN, "jacobi_solve", shape, args)?;
        let args = self.gated(
            Args::new()
                .pointer(self.gram)
                .pointer(self.other)
                .pointer(self.rotations)
                .pointer(self.rotated)
                .value(self.ld as i32)
                .value(squares as i32)
                .value(round)
                .value(sweep),
            stages,
        );
        let shape = Shape::line((triangle(squares) + squares * squares) as u64, 256);
        launch(stream, EIGEN, "jacobi_update", shape, args)
    }

    /// `to = from inverse`: by what Cholesky or Jacobi found.
    pub fn multiply(
        &self,
        stream: &Stream,
        from: Pointer,
        to: Pointer,
        rows: usize,
        room: Room,
        stages: i32,
    ) -> Result<()> {
        let product = Product {
            // Orthonormal columns need all of float32.
            module: PROJECT[0][0],
            a: from,
            strides: (self.width, 1),
            b: Basis::dense(self.inverse),
            out: to,
            size: Size { m: rows, n: self.width, k: self.width },
            by_columns: false,
            room,
        };
        product.launch(stream, self.gate(stages))
    }

    /// Multiplies columns by what was found; dependent ones become random. `number` tells the random
    /// numbers of several such steps apart.
    pub fn apply(
        &self,
        stream: &Stream,
        z: Columns,
        room: Room,
        stages: i32,
        key: Key,
        number: usize,
    ) -> Result<()> {
        let Columns { at, other, rows } = z;
        self.multiply(stream, at, other, rows, room, stages)?;
        let count = rows * self.width;
        let args = Args::new()
            .pointer(other)
            .pointer(at)
            .pointer(self.dependent)
            .value(rows as i64)
            .value(self.width as i32)
            .value(key)
            .value((number * count) as i64)
            .pointer(self.flags)
            .value(stages);
        let shape = Shape::line(count.div_ceil(256) as u64, 256);
        launch(stream, ORTHONORMAL, "replace_dependent", shape, args)
    }

    /// One pass of CholeskyQR.
    pub fn pass(
        &self,
        stream: &Stream,
        z: Columns,
        room: Room,
        stages: i32,
        key: Key,
        number: usize,
    ) -> Result<()> {
        self.gram(stream, z.at, z.rows, stages)?;
        self.cholesky(stream, stages)?;
        self.apply(stream, z, room, stages, key, number)
    }
}

/// Launches a kernel on workspaces of a search.
fn launch(
    stream: &Stream,
    module: Module,
    kernel: &'static str,
    shape: Shape,
    args: Args,
) -> Result<()> {
    // SAFETY: as kernels/lowrank/README.md lists them; the workspaces were made for these sizes.
    unsafe { stream.launch(module, kernel, shape, args) }
}

/// Squares of a triangle with `side` of them on the diagonal.
fn triangle(side: usize) -> usize {
    side * (side + 1) / 2
}

/// How the rows of a Gram matrix are cut: rows of a run, and their number.
fn rows_per_run(rows: usize, squares: usize) -> (usize, usize) {
    let most = rows.div_ceil(256).clamp(1, 16);
    let runs = (BLOCKS / triangle(squares)).clamp(1, most);
    let per_run = rows.div_ceil(runs).next_multiple_of(SIDE);
    (per_run, rows.div_ceil(per_run).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_rows_cover_them() {
        for (rows, squares) in [(1, 1), (4096, 1), (4096, 9), (100_000, 33)] {
            let (per_run, runs) = rows_per_run(rows, squares);
            assert!(per_run.is_multiple_of(32) && runs <= 16);
            assert!(per_run * runs >= rows && per_run * (runs - 1) < rows);
        }
    }
}
