//! What is launched: a kernel of a module, over a grid, with typed arguments.

use std::ffi::c_void;
use std::mem::size_of;

use super::fault::{Fault, Result};
use crate::tensor::{TensorView, TensorViewMut};

/// One way to compile a file of `kernels/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    pub file: &'static str,
    pub defines: &'static [&'static str],
    /// Its kernels take lists of tensors, of as many entries as the macro `LIST_CAPACITY` says.
    pub lists: bool,
}

impl Module {
    /// All defines, those that the device decides included.
    pub fn defines(&self, list_capacity: usize) -> Vec<String> {
        let own = self.defines.iter().map(ToString::to_string);
        own.chain(self.lists.then(|| format!("LIST_CAPACITY={list_capacity}"))).collect()
    }
}

/// Blocks and threads of a launch, in 64 bits until they are checked.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub grid: [u64; 3],
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// What a driver takes.
#[derive(Clone, Copy, Debug)]
pub struct Checked {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared: u32,
}

impl Shape {
    /// The most blocks in x, which every device allows.
    pub const MOST_BLOCKS: u64 = i32::MAX as u64;

    /// A row of blocks, each a row of threads.
    pub fn line(blocks: u64, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }

    pub fn check(self) -> Result<Checked> {
        let Self { grid, block, shared } = self;
        let most = [Self::MOST_BLOCKS, 65_535, 65_535];
        let threads = block.iter().map(|&n| u64::from(n)).product::<u64>();
        if grid.iter().zip(most).any(|(&n, most)| n > most) || !(1..=1024).contains(&threads) {
            let what = format!("no device launches a grid of {grid:?} blocks of {block:?} threads");
            return Err(Fault::Refused(what));
        }
        Ok(Checked { grid: grid.map(|n| n as u32), block, shared })
    }
}

/// A type that goes by value into a kernel's parameters.
///
/// # Safety
/// It is laid out as the kernel's own type (`repr(C)` for structures), without padding, and aligned
/// to 8 bytes at most.
pub unsafe trait Parameter: Copy {
    /// As the emulator tells kinds apart: `i` signed, `u` unsigned, `f` floating, `s` structure.
    const KIND: u8;
}

macro_rules! parameter {
    ($($rust:ty => $kind:literal),* $(,)?) => {
        // SAFETY: plain numbers of the same size in CUDA C++.
        $(unsafe impl Parameter for $rust { const KIND: u8 = $kind; })*
    };
}
parameter!(i32 => b'i', i64 => b'i', u32 => b'u', f32 => b'f');

/// Kind and size of one argument; for a pointer the size of what it points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(pub u8, pub usize);

/// An address on a stream's device, and the size of what lies there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointer {
    address: u64,
    size: usize,
}

impl Pointer {
    /// What a kernel takes for an argument that is missing.
    pub const NULL: Self = Self { address: 0, size: 0 };

    pub fn new(address: u64, size: usize) -> Self {
        Self { address, size }
    }

    pub fn address(self) -> u64 {
        self.address
    }

    /// The address `count` elements further on.
    pub fn after(self, count: usize) -> Self {
        Self { address: self.address + (count * self.size) as u64, ..self }
    }
}

impl From<&TensorView> for Pointer {
    fn from(tensor: &TensorView) -> Self {
        Self { address: tensor.ptr() as u64, size: tensor.dtype().size() }
    }
}

impl From<&mut TensorViewMut> for Pointer {
    fn from(tensor: &mut TensorViewMut) -> Self {
        Self { address: tensor.ptr_mut() as u64, size: tensor.dtype().size() }
    }
}

impl<T: Into<Pointer>> From<Option<T>> for Pointer {
    fn from(tensor: Option<T>) -> Self {
        tensor.map_or(Self::NULL, Into::into)
    }
}

/// The arguments of one launch, in the kernel's order. Values are kept here until the launch, which
/// copies them.
#[derive(Default)]
pub struct Args {
    words: Vec<u64>,
    entries: Vec<(usize, Kind)>,
}

impl Args {
    pub fn new() -> Self {
        Self::default()
    }

    /// A value.
    pub fn value<T: Parameter>(self, value: T) -> Self {
        self.bytes(Kind(T::KIND, size_of::<T>()), &[value])
    }

    /// A value that only some kernels take, as their last.
    pub fn value_some<T: Parameter>(self, value: Option<T>) -> Self {
        match value {
            Some(value) => self.value(value),
            None => self,
        }
    }

    /// A truth as the kernels take it.
    pub fn flag(self, value: bool) -> Self {
        self.value(i32::from(value))
    }

    /// A structure with an array of `capacity` entries, of which only the first are there.
    pub fn list<T: Parameter>(self, entries: &[T], capacity: usize) -> Self {
        self.bytes(Kind(b's', capacity.max(entries.len()) * size_of::<T>()), entries)
    }

    /// A tensor, or what else lies on the device; [`Pointer::NULL`] for one that is missing.
    pub fn pointer(self, pointer: impl Into<Pointer>) -> Self {
        let Pointer { address, size } = pointer.into();
        self.bytes(Kind(b'p', size), &[address])
    }

    /// A tensor that is read.
    pub fn read(self, tensor: &TensorView) -> Self {
        self.pointer(tensor)
    }

    /// A tensor that is written.
    pub fn write(self, tensor: &mut TensorViewMut) -> Self {
        self.pointer(tensor)
    }

    /// A tensor that may be missing.
    pub fn read_some(self, tensor: Option<&TensorView>) -> Self {
        self.pointer(tensor)
    }

    /// A written tensor that may be missing.
    pub fn write_some(self, tensor: Option<&mut TensorViewMut>) -> Self {
        self.pointer(tensor)
    }

    /// Appends `values`, with zeros up to the size of the kind where that is greater.
    fn bytes<T: Copy>(mut self, kind: Kind, values: &[T]) -> Self {
        let first = self.words.len();
        let length = size_of_val(values);
        let whole = if kind.0 == b'p' { length } else { length.max(kind.1) };
        self.words.resize(first + whole.div_ceil(8), 0);
        let target = self.words[first..].as_mut_ptr().cast::<u8>();
        // SAFETY: the new words hold at least `length` bytes, and values overlap no fresh memory.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), target, length) };
        self.entries.push((first, kind));
        self
    }

    pub fn kinds(&self) -> impl Iterator<Item = Kind> {
        self.entries.iter().map(|&(_, kind)| kind)
    }

    /// What `cuLaunchKernel` takes: where the value of each argument lies. Valid as long as `self`.
    pub fn pointers(&mut self) -> Vec<*mut c_void> {
        let words = self.words.as_mut_ptr();
        // Every argument begins at one of the words.
        self.entries.iter().map(|&(first, _)| words.wrapping_add(first).cast()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Pair(u32, f32);
    // SAFETY: two numbers without padding.
    unsafe impl Parameter for Pair {
        const KIND: u8 = b's';
    }

    #[test]
    fn values_lie_where_the_pointers_say() {
        let list = [Pair(1, 1.5), Pair(2, 2.5)];
        let args = Args::new()
            .value(-7i32)
            .list(&list, 5)
            .flag(true)
            .pointer(Pointer::NULL)
            .value(1i64 << 40);
        let mut args = args.value(0.5f32);
        let kinds: Vec<_> = args.kinds().collect();
        let want = [(b'i', 4), (b's', 40), (b'i', 4), (b'p', 0), (b'i', 8), (b'f', 4)];
        assert_eq!(kinds, want.map(|(kind, size)| Kind(kind, size)));
        let at = args.pointers();
        // SAFETY: each pointer leads to a value of the type that was put in.
        unsafe {
            assert_eq!(*at[0].cast::<i32>(), -7);
            let entries = std::slice::from_raw_parts(at[1].cast::<[u32; 2]>(), 5);
            assert_eq!(entries[1], [2, 2.5f32.to_bits()]);
            assert_eq!(entries[2..], [[0, 0]; 3]);
            assert_eq!(*at[2].cast::<i32>(), 1);
            assert!(at[3].cast::<*const u8>().read().is_null());
            assert_eq!(*at[4].cast::<i64>(), 1 << 40);
            assert_eq!(*at[5].cast::<f32>(), 0.5);
        }
    }

    #[test]
    fn grids_are_checked_in_64_bits() {
        assert!(Shape::line(0, 256).is_empty());
        assert_eq!(Shape::line(2_147_483_647, 1024).check().unwrap().grid[0], 2_147_483_647);
        for shape in [
            Shape::line(1 << 31, 32),
            Shape::line(1 << 32, 32),
            Shape::line(1, 1025),
            Shape::line(1, 0),
            Shape { grid: [1, 65_536, 1], block: [1, 1, 1], shared: 0 },
        ] {
            assert!(shape.check().unwrap_err().to_string().contains("no device launches"));
        }
    }
}
