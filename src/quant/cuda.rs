//! Quantization on CUDA devices: which kernel, which grid, which arguments.

use super::blocks::{self, Cut, EACH};
use super::dynamic::codec::Codec;
use super::grid::Format;
use super::update::Change;
use super::{Dequantization, DynamicDequantization, DynamicQuantization, Quantization};
use crate::cuda::list::{Entry, Part, parts};
use crate::cuda::{Args, Module, Parameter, Shape, Stream};
use crate::error::{Error, Result};
use crate::rng::Key;
use crate::tensor::{DType, TensorView, TensorViewMut};

// SAFETY: four words, as the kernels' `Key`.
unsafe impl Parameter for Key {
    const KIND: u8 = b's';
}

const fn module(file: &'static str, defines: &'static [&'static str]) -> Module {
    Module { file, defines, lists: false }
}

const QUANT: [Module; 3] = [
    module("quant.cu", &["ELEM=f32"]),
    module("quant.cu", &["ELEM=f16"]),
    module("quant.cu", &["ELEM=bf16"]),
];
const UPDATE: Module = Module { file: "update.cu", defines: &[], lists: true };
const DYNAMIC: [Module; 3] = [
    module("dynamic.cu", &["ELEM=f32"]),
    module("dynamic.cu", &["ELEM=f16"]),
    module("dynamic.cu", &["ELEM=bf16"]),
];

/// Every module of the family with its kernels, those that do not depend on `ELEM` once.
pub fn kernels() -> Vec<(Module, &'static [&'static str])> {
    let by_element: [&[_]; 2] = [
        &[
            "quantize_blockwise",
            "quantize_blockwise_any",
            "dequantize_blockwise",
            "dequantize_blockwise_any",
        ],
        &["quantize_dynamic", "quantize_dynamic_any"],
    ];
    let once: [&[_]; 2] = [
        &["pack_int4", "unpack_int4", "round_bf16_stochastic"],
        &["dequantize_dynamic", "dequantize_dynamic_any"],
    ];
    let mut list = Vec::new();
    for ((modules, names), once) in [QUANT, DYNAMIC].into_iter().zip(by_element).zip(once) {
        list.extend(modules.map(|module| (module, names)));
        list.push((modules[0], once));
    }
    list.push((UPDATE, &["requantize_dense", "requantize_dense_any"]));
    list
}

/// The module of a float dtype.
fn of_element(modules: [Module; 3], stream: &Stream, tensor: &TensorView) -> Result<Module> {
    match tensor.dtype() {
        DType::F32 => Ok(modules[0]),
        DType::F16 => Ok(modules[1]),
        DType::BF16 => Ok(modules[2]),
        dtype => Err(Error::Unsupported { op: stream.op(), device: tensor.device(), dtype }),
    }
}

/// A key that is not read.
fn no_key() -> Key {
    Key::new(0, crate::rng::Stream::Quantize, 0, 0)
}

pub fn quantize_blockwise(args: &mut Quantization, stream: &Stream) -> Result<()> {
    let Quantization { x, codes, scale, zero_point, nonfinite, rounding } = args;
    let module = of_element(QUANT, stream, x)?;
    let format = rounding.format;
    let cut = Cut::new(rounding.group_size, x.numel(), format.bits == 4);
    let args = Args::new()
        .read(x)
        .write(codes)
        .write(scale)
        .write_some(zero_point.as_mut())
        .write(nonfinite)
        .value(x.numel() as i64)
        .value(cut.size())
        .value(i32::from(format.bits))
        .flag(rounding.key.is_some())
        .value(rounding.key.unwrap_or_else(no_key));
    let args = args.value_some(cut.team());
    let kernel = cut.pick("quantize_blockwise", "quantize_blockwise_any");
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, kernel, cut.shape(x.numel()), args) }
}

pub fn dequantize_blockwise(args: &mut Dequantization, stream: &Stream) -> Result<()> {
    let Dequantization { codes, scale, zero_point, out, format, group_size } = args;
    let module = of_element(QUANT, stream, out)?;
    let numel = out.numel();
    let (size, shape, any) = blocks::look_up(*group_size, numel);
    let args = Args::new()
        .read(codes)
        .read(scale)
        .read_some(zero_point.as_ref())
        .write(out)
        .value(numel as i64)
        .value(size)
        .value(i32::from(format.bits));
    let kernel = if any { "dequantize_blockwise_any" } else { "dequantize_blockwise" };
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, kernel, shape, args) }
}

/// The kernel `kernel` on `count` codes of 4 bits, from `x` to `y`.
fn nibbles(
    kernel: &'static str,
    x: &TensorView,
    y: &mut TensorViewMut,
    count: usize,
    stream: &Stream,
) -> Result<()> {
    let args = Args::new().read(x).write(y).value(count as i64);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(QUANT[0], kernel, blocks::each(count, 4096), args) }
}

pub fn pack_int4((codes, packed): &mut (TensorView, TensorViewMut), stream: &Stream) -> Result<()> {
    nibbles("pack_int4", codes, packed, codes.numel(), stream)
}

pub fn unpack_int4(
    (packed, codes): &mut (TensorView, TensorViewMut),
    stream: &Stream,
) -> Result<()> {
    let count = codes.numel();
    nibbles("unpack_int4", packed, codes, count, stream)
}

pub fn round_bf16_stochastic(
    (x, out, key): &mut (TensorView, TensorViewMut, Key),
    stream: &Stream,
) -> Result<()> {
    let args = Args::new().read(x).write(out).value(x.numel() as i64).value(*key);
    let shape = blocks::each(x.numel(), EACH);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(QUANT[0], "round_bf16_stochastic", shape, args) }
}

pub fn quantize_dynamic(args: &mut DynamicQuantization, stream: &Stream) -> Result<()> {
    let DynamicQuantization { x, codes, scale, nonfinite, codec, block_size } = args;
    let Codec { bits, signed } = *codec;
    let module = of_element(DYNAMIC, stream, x)?;
    // Blocks of packed codes begin at whole bytes, so that runs of one block are enough.
    let cut = Cut::new(*block_size, x.numel(), false);
    let args = Args::new()
        .read(x)
        .write(codes)
        .write(scale)
        .write(nonfinite)
        .value(x.numel() as i64)
        .value(cut.size())
        .value(i32::from(bits))
        .flag(signed)
        .value_some(cut.team());
    let kernel = cut.pick("quantize_dynamic", "quantize_dynamic_any");
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, kernel, cut.shape(x.numel()), args) }
}

pub fn dequantize_dynamic(args: &mut DynamicDequantization, stream: &Stream) -> Result<()> {
    let DynamicDequantization { codes, scale, out, codec, block_size } = args;
    let Codec { bits, signed } = *codec;
    let numel = out.numel();
    let (size, shape, any) = blocks::look_up(*block_size, numel);
    let args = Args::new()
        .read(codes)
        .read(scale)
        .write(out)
        .value(numel as i64)
        .value(size)
        .value(i32::from(bits))
        .flag(signed);
    let kernel = if any { "dequantize_dynamic_any" } else { "dequantize_dynamic" };
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(DYNAMIC[0], kernel, shape, args) }
}

/// One quantized weight and its update.
pub struct Weight<'a> {
    pub codes: &'a mut TensorViewMut,
    pub scale: &'a mut TensorViewMut,
    pub zero_point: Option<&'a mut TensorViewMut>,
    pub update: &'a TensorView,
    pub numel: usize,
    pub key: Key,
}

/// A weight as the kernels take it.
#[derive(Clone, Copy)]
#[repr(C)]
struct WeightTensor {
    codes: *mut u8,
    scale: *mut u8,
    zero_point: *mut u8,
    update: *const u8,
    numel: i64,
    first_block: u32,
    tensor_id: u32,
    step: u32,
    keep: f32,
    alpha: f32,
    unused: u32,
}

// SAFETY: 64 bytes without padding, as the kernels' `WeightTensor`.
unsafe impl Parameter for WeightTensor {
    const KIND: u8 = b's';
}

impl Entry for WeightTensor {
    fn set_first_block(&mut self, blocks: u32) {
        self.first_block = blocks;
    }
}

/// `weights = round(weights * keep + alpha * update)`, one launch for all of them.
pub fn requantize_dense(
    stream: &Stream,
    weights: Vec<Weight<'_>>,
    found_inf: Option<&TensorView>,
    format: Format,
    group_size: usize,
    stochastic: bool,
    change: Change,
) -> Result<()> {
    let largest = weights.iter().map(|weight| weight.numel).max().unwrap_or(0);
    let cut = Cut::new(group_size, largest, format.bits == 4);
    let Change { keep, alpha } = change;
    // The same for all weights of a call.
    let words = weights.first().map_or([0; 2], |weight| weight.key.seed_words());
    let capacity = stream.list_capacity();
    let entries = weights.into_iter().map(|weight| {
        let Weight { codes, scale, zero_point, update, numel, key } = weight;
        let (tensor_id, step) = key.counter_words();
        let entry = WeightTensor {
            codes: codes.ptr_mut(),
            scale: scale.ptr_mut(),
            zero_point: zero_point.map_or(std::ptr::null_mut(), |t| t.ptr_mut()),
            update: update.ptr(),
            numel: numel as i64,
            first_block: 0,
            tensor_id,
            step,
            keep,
            alpha,
            unused: 0,
        };
        (entry, cut.blocks(numel))
    });
    for Part { entries, blocks } in parts(entries, capacity) {
        let args = Args::new()
            .list(&entries, capacity)
            .value(entries.len() as i32)
            .read_some(found_inf)
            .value(cut.size())
            .value(i32::from(format.bits))
            .flag(stochastic)
            .value(words[0])
            .value(words[1])
            .value_some(cut.team());
        let kernel = cut.pick("requantize_dense", "requantize_dense_any");
        let shape = Shape::line(blocks, cut.threads());
        // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and device.
        unsafe { stream.launch(UPDATE, kernel, shape, args)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<Key>(), 16);
        assert_eq!(size_of::<WeightTensor>(), 64);
        assert_eq!(std::mem::offset_of!(WeightTensor, alpha), 56);
    }
}
