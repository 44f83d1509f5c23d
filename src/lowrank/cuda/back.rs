//! From a subspace back into weights on CUDA devices.

use super::{BACK, BACK_ADD, BACK_REQUANTIZE, Basis, SPAN, of_element};
use crate::cuda::{Arena, Args, Module, Pointer, Shape, Stream};
use crate::error::Result;
use crate::lowrank::back::{Additions, Requantizations};
use crate::quant::blocks::Cut;
use crate::quant::cuda::{Weight, requantize_dense};
use crate::quant::grid::Format;
use crate::quant::update::Change;
use crate::rng::{Key, Stream as Random};
use crate::tensor::{TensorView, TensorViewMut};

/// Elements of a block's tile of a weight.
const TILE: (usize, usize) = (32, 256);
/// Elements of an update that exist at once, where a weight takes two passes.
const SPAN_ELEMENTS: usize = 4 << 20;

/// The low-rank update of one weight as the kernels take it.
#[derive(Clone, Copy)]
struct Factors {
    update: Pointer,
    basis: Basis,
    rows: usize,
    columns: usize,
    rank: usize,
}

impl Factors {
    fn put(self, args: Args) -> Args {
        let Self { update, basis, rows, columns, rank } = self;
        args.pointer(update)
            .pointer(basis.values)
            .pointer(basis.scale)
            .pointer(basis.zero_point)
            .value(rows as i64)
            .value(columns as i64)
            .value(rank as i64)
            .value(basis.group_size)
    }

    fn launch(
        self,
        stream: &Stream,
        module: Module,
        kernel: &'static str,
        rows: usize,
        args: Args,
    ) -> Result<()> {
        let tiles = rows.div_ceil(TILE.0) as u64 * self.columns.div_ceil(TILE.1) as u64;
        // SAFETY: as kernels/lowrank/README.md lists them; the op has checked all views.
        unsafe { stream.launch(module, kernel, Shape::line(tiles, 128), args) }
    }
}

/// A key that is not read.
fn no_key() -> Key {
    Key::new(0, Random::Bfloat16, 0, 0)
}

/// `params = params * keep + alpha * back(update)`.
pub fn add(args: &mut Additions, stream: &Stream) -> Result<()> {
    let Additions { params, updates, bases, found_inf, shapes, ranks, keys, change } = args;
    for (i, param) in params.iter_mut().enumerate() {
        let ((rows, columns), rank) = (shapes[i], ranks[i]);
        let basis = Basis::of(bases, i, rows.min(columns) * rank);
        let module = of_element(stream.op(), basis.choose(BACK_ADD), param)?;
        let factors = Factors { update: (&updates[i]).into(), basis, rows, columns, rank };
        let key = keys.as_ref().map(|keys| keys[i]);
        let args = factors
            .put(Args::new().write(param))
            .read_some(found_inf.as_ref())
            .value(change.keep)
            .value(change.alpha)
            .flag(key.is_some())
            .value(key.unwrap_or_else(no_key));
        factors.launch(stream, module, "project_back_add", rows, args)?;
    }
    Ok(())
}

/// Whether groups are parts of a tile's rows, so that one pass is enough.
fn is_one_pass(columns: usize, group_size: usize) -> bool {
    matches!(group_size, 32 | 64 | 128 | 256) && columns.is_multiple_of(group_size)
}

/// How a weight of `numel` elements is cut where it takes two passes: runs of elements that share
/// no byte, and spans of whole runs.
#[derive(Clone, Copy)]
struct Spans {
    cut: Cut,
    length: usize,
}

impl Spans {
    fn new(numel: usize, group_size: usize, format: Format) -> Self {
        let cut = Cut::any(group_size, numel, format.bits == 4);
        let unit = cut.run();
        Self { cut, length: SPAN_ELEMENTS.div_ceil(unit).saturating_mul(unit) }
    }

    /// Floats of workspace: the rows that a span may touch.
    fn floats(self, numel: usize, columns: usize) -> usize {
        self.length.min(numel) + 2 * columns
    }
}

fn values_of(
    arena: &mut Arena,
    shapes: &[(usize, usize)],
    format: Format,
    group_size: usize,
) -> Pointer {
    let floats = shapes.iter().filter(|shape| !is_one_pass(shape.1, group_size)).map(|shape| {
        let numel = shape.0 * shape.1;
        Spans::new(numel, group_size, format).floats(numel, shape.1)
    });
    arena.take::<f32>(floats.max().unwrap_or(0))
}

/// Bytes of workspace that updating weights of these rows and columns from a subspace takes.
pub fn requantize_workspace(shapes: &[(usize, usize)], format: Format, group_size: usize) -> usize {
    let mut arena = Arena::counting();
    values_of(&mut arena, shapes, format, group_size);
    arena.size()
}

/// `weights = round(weights * keep + alpha * update)`, for updates of low rank or dense ones.
pub fn requantize(args: &mut Requantizations, stream: &Stream) -> Result<()> {
    if args.bases.is_empty() {
        return requantize_from_dense(args, stream);
    }
    let Requantizations { format, group_size, stochastic, change, .. } = *args;
    let mut arena = Arena::over(args.workspace.as_mut());
    let values = values_of(&mut arena, &args.shapes, format, group_size);
    arena.check(stream.op())?;
    let mut zero_points = args.zero_points.iter_mut();
    for (i, (codes, scale)) in args.codes.iter_mut().zip(&mut args.scales).enumerate() {
        let ((rows, columns), rank) = (args.shapes[i], args.ranks[i]);
        let basis = Basis::of(&args.bases, i, rows.min(columns) * rank);
        let update = (&args.updates[i]).into();
        let factors = Factors { update, basis, rows, columns, rank };
        let target = Target {
            codes,
            scale,
            zero_point: zero_points.next(),
            found_inf: args.found_inf.as_ref(),
            format,
            stochastic,
            change,
            key: args.keys[i],
        };
        if is_one_pass(columns, group_size) {
            target.in_one_pass(stream, factors, group_size)?;
        } else {
            target.in_spans(stream, factors, group_size, values)?;
        }
    }
    Ok(())
}

/// One quantized weight and how it is rounded.
struct Target<'a> {
    codes: &'a mut TensorViewMut,
    scale: &'a mut TensorViewMut,
    zero_point: Option<&'a mut TensorViewMut>,
    found_inf: Option<&'a TensorView>,
    format: Format,
    stochastic: bool,
    change: Change,
    key: Key,
}

impl Target<'_> {
    fn begin(&mut self) -> Args {
        let args = Args::new().write(self.codes).write(self.scale);
        args.write_some(self.zero_point.as_deref_mut())
    }

    fn end(&self, args: Args, group_size: usize) -> Args {
        args.read_some(self.found_inf)
            .value(group_size as i64)
            .value(i32::from(self.format.bits))
            .value(self.change.keep)
            .value(self.change.alpha)
            .flag(self.stochastic)
            .value(self.key)
    }

    fn in_one_pass(mut self, stream: &Stream, factors: Factors, group_size: usize) -> Result<()> {
        let args = factors.put(self.begin());
        let args = self.end(args, group_size);
        let module = factors.basis.choose(BACK_REQUANTIZE);
        factors.launch(stream, module, "project_back_requantize", factors.rows, args)
    }

    fn in_spans(
        mut self,
        stream: &Stream,
        factors: Factors,
        group_size: usize,
        values: Pointer,
    ) -> Result<()> {
        let Factors { rows, columns, basis, .. } = factors;
        let numel = rows * columns;
        let Spans { cut, length } = Spans::new(numel, group_size, self.format);
        for first in (0..numel).step_by(length) {
            let count = length.min(numel - first);
            let (top, bottom) = (first / columns, (first + count).div_ceil(columns));
            let args = factors.put(Args::new().pointer(values));
            let args = args.value(top as i64).value((bottom - top) as i64);
            let module = basis.choose(BACK);
            factors.launch(stream, module, "project_back", bottom - top, args)?;
            let args = self
                .begin()
                .pointer(values.after(first - top * columns))
                .value(first as i64)
                .value(count as i64);
            let args = self.end(args, cut.size() as usize).value_some(cut.team());
            // SAFETY: as kernels/lowrank/README.md lists them; the op has checked all views.
            unsafe { stream.launch(SPAN, "requantize_span", cut.shape(count), args) }?;
        }
        Ok(())
    }
}

fn requantize_from_dense(args: &mut Requantizations, stream: &Stream) -> Result<()> {
    let mut zero_points = args.zero_points.iter_mut();
    let weights = args.codes.iter_mut().zip(&mut args.scales).zip(&args.updates);
    let weights = weights.zip(&args.shapes).zip(&args.keys).map(
        |((((codes, scale), update), &(rows, columns)), &key)| {
            let zero_point = zero_points.next();
            Weight { codes, scale, zero_point, update, numel: rows * columns, key }
        },
    );
    let Requantizations { format, group_size, stochastic, change, .. } = *args;
    let found_inf = args.found_inf.as_ref();
    requantize_dense(stream, weights.collect(), found_inf, format, group_size, stochastic, change)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_whole_runs() {
        let format = Format { bits: 4, symmetric: false };
        for (numel, group_size, run) in [(100, 7, 14), (1 << 24, 1001, 2002), (50, 1 << 40, 50)] {
            let spans = Spans::new(numel, group_size, format);
            assert_eq!(spans.cut.run(), run);
            assert!(spans.length.is_multiple_of(run) && spans.length >= SPAN_ELEMENTS);
            assert!(spans.floats(numel, 10) <= numel + 20);
        }
        assert!(is_one_pass(512, 128) && !is_one_pass(512, 512) && !is_one_pass(100, 32));
    }
}
