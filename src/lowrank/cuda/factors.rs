//! Products with gradients that are products themselves.

use super::product::{Gate, Product, Room, Size};
use super::{Basis, PROJECT, of_element};
use crate::cuda::{Arena, Module, Pointer, Stream};
use crate::error::Result;
use crate::lowrank::Side;
use crate::lowrank::factors::{Factored, ProjectFactors};
use crate::tensor::DType;

/// On float16 tensor cores the right factor would have to stay below 255, which activations need
/// not.
const HALF: Module = Module {
    file: "lowrank/project.cu",
    defines: &["ELEM=f16", "BASIS_BITS=32", "TENSOR=0"],
    lists: false,
};

/// The modules of products with float32 matrices of any magnitude.
pub const WIDE: [Module; 3] = [PROJECT[0][0], HALF, PROJECT[0][2]];

/// The two factors of a gradient by the sides of the upright matrix.
pub struct Factors {
    /// `[tokens, long]` and `[tokens, short]`.
    pub long: Pointer,
    pub short: Pointer,
    pub product: Module,
}

impl Factors {
    pub fn new(op: &'static str, factors: &Factored) -> Result<Self> {
        let (rows, columns) = factors.shape();
        let (grad_output, input) = (&factors.grad_output, &factors.input);
        let (long, short) = match Side::of(rows, columns) {
            Side::Right => (grad_output, input),
            Side::Left => (input, grad_output),
        };
        let product = of_element(op, WIDE, input)?;
        Ok(Self { long: long.into(), short: short.into(), product })
    }
}

/// Tokens, rows, columns, rank.
type Shape = (usize, usize, usize, usize);

/// The two products that project a gradient.
fn sizes((tokens, rows, columns, rank): Shape) -> [Size; 2] {
    let (long, short) = (rows.max(columns), rows.min(columns));
    [Size { m: tokens, n: rank, k: short }, Size { m: long, n: rank, k: tokens }]
}

/// Bytes of workspace that projecting gradients of these tokens, rows, columns and ranks takes;
/// `plain` where some factors are float32.
pub fn project_factors_workspace(shapes: &[Shape], plain: bool) -> usize {
    let mut arena = Arena::counting();
    take(&mut arena, shapes, plain);
    arena.size()
}

/// One workspace for all gradients, which come one after the other.
fn take(arena: &mut Arena, shapes: &[Shape], plain: bool) -> (Room, Pointer) {
    let parts = shapes.iter().flat_map(|&shape| sizes(shape)).map(Size::parts).max();
    let inner = shapes.iter().map(|&(tokens, _, _, rank)| tokens * rank).max();
    (Room::new(arena, parts.unwrap_or(0), plain), arena.take::<f32>(inner.unwrap_or(0)))
}

/// Projects every gradient of the call.
pub fn project_factors(args: &mut ProjectFactors, stream: &Stream) -> Result<()> {
    let ProjectFactors { factors, bases, outs, workspace, shapes } = args;
    let mut arena = Arena::over(workspace.as_mut());
    let shapes: Vec<Shape> = factors
        .iter()
        .zip(&*shapes)
        .map(|(factors, &(rows, columns, rank))| (factors.tokens(), rows, columns, rank))
        .collect();
    let plain = factors.iter().any(|factors| factors.input.dtype() == DType::F32);
    let (room, inner) = take(&mut arena, &shapes, plain);
    arena.check(stream.op())?;
    for (i, (factors, out)) in factors.iter().zip(outs).enumerate() {
        let (_, rows, columns, rank) = shapes[i];
        let (long, short) = (rows.max(columns), rows.min(columns));
        let given = Factors::new(stream.op(), factors)?;
        let basis = Basis::of(bases, i, short * rank);
        let [first, second] = sizes(shapes[i]);
        Product {
            module: of_element(stream.op(), basis.choose(PROJECT), &factors.input)?,
            a: given.short,
            strides: (short, 1),
            b: basis,
            out: inner,
            size: first,
            by_columns: false,
            room,
        }
        .launch(stream, Gate::OPEN)?;
        Product {
            module: given.product,
            a: given.long,
            strides: (1, long),
            b: Basis::dense(inner),
            out: out.into(),
            size: second,
            by_columns: Side::of(rows, columns) == Side::Left,
            room,
        }
        .launch(stream, Gate::OPEN)?;
    }
    Ok(())
}
