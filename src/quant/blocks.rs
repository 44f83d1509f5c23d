//! How the CUDA kernels cut tensors into blocks of threads; see `kernels/README.md`.

use crate::cuda::Shape;

/// Elements of one block of the kernels that work on each element by itself.
pub const EACH: u64 = 2048;

/// How groups of elements that share a scale are dealt out to threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Sizes that fit whole warps: a lane has eight elements.
    Plain { size: u64, warps: u32 },
    /// Every other size: a team of threads has a run of elements.
    Any { size: u64, run: u64, team: u32 },
}

/// Whether groups are parts of a warp's 256 elements, or up to eight warps make up one.
fn is_plain(size: u64) -> bool {
    matches!(size, 32 | 64 | 128) || (size.is_multiple_of(256) && (256..=2048).contains(&size))
}

/// A size as the kernels take it: no greater than the largest tensor, so that it never overflows.
fn limited(size: usize, largest: usize) -> u64 {
    let size = size as u64;
    if is_plain(size) { size } else { size.min(largest.max(1) as u64) }
}

impl Cut {
    /// For groups of `size` elements, in tensors of which the largest has `largest`. Two groups make
    /// one run where `shared_bytes` says that codes of 4 bits might share a byte.
    pub fn new(size: usize, largest: usize, shared_bytes: bool) -> Self {
        let limited = limited(size, largest);
        if !is_plain(limited) {
            return Self::any(size, largest, shared_bytes);
        }
        let joined = (limited / 256).max(1) as u32;
        Self::Plain { size: limited, warps: 8 / joined * joined }
    }

    /// The same by teams, whatever the size.
    pub fn any(size: usize, largest: usize, shared_bytes: bool) -> Self {
        let size = (size as u64).min(largest.max(1) as u64);
        let run = if shared_bytes && size % 2 == 1 { 2 * size } else { size };
        let team = if run > 512 { 256 } else { run.next_power_of_two().clamp(2, 32) as u32 };
        Self::Any { size, run, team }
    }

    pub fn size(self) -> i64 {
        let (Self::Plain { size, .. } | Self::Any { size, .. }) = self;
        size as i64
    }

    /// Elements that share no byte with others.
    pub fn run(self) -> usize {
        let (Self::Plain { size: run, .. } | Self::Any { run, .. }) = self;
        run as usize
    }

    /// The number of threads in a team, which the kernels for any size take as their last argument.
    pub fn team(self) -> Option<i32> {
        match self {
            Self::Plain { .. } => None,
            Self::Any { team, .. } => Some(team as i32),
        }
    }

    /// The kernel's name of the two that there are.
    pub fn pick(self, plain: &'static str, any: &'static str) -> &'static str {
        match self {
            Self::Plain { .. } => plain,
            Self::Any { .. } => any,
        }
    }

    pub fn threads(self) -> u32 {
        match self {
            Self::Plain { warps, .. } => 32 * warps,
            Self::Any { .. } => 256,
        }
    }

    /// Blocks of a tensor.
    pub fn blocks(self, numel: usize) -> u64 {
        let numel = numel as u64;
        match self {
            Self::Plain { warps, .. } => numel.div_ceil(256 * u64::from(warps)),
            Self::Any { run, team, .. } => numel.div_ceil(run).div_ceil(256 / u64::from(team)),
        }
    }

    pub fn shape(self, numel: usize) -> Shape {
        Shape::line(self.blocks(numel), self.threads())
    }
}

/// The size and the shape for kernels that only look groups up; true for the kernel that takes
/// every size.
pub fn look_up(size: usize, numel: usize) -> (i64, Shape, bool) {
    let size = limited(size, numel);
    let any = !(is_plain(size) || size.is_multiple_of(256));
    let covered = if any { 512 } else { EACH };
    (size as i64, each(numel, covered), any)
}

/// A grid for kernels that work on each element by itself.
pub fn each(numel: usize, covered: u64) -> Shape {
    Shape::line((numel as u64).div_ceil(covered), 256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_sizes_fill_whole_blocks() {
        for (size, warps) in
            [(32, 8), (256, 8), (512, 8), (768, 6), (1280, 5), (1792, 7), (2048, 8)]
        {
            let cut = Cut::new(size, 1, false);
            assert_eq!(cut, Cut::Plain { size: size as u64, warps });
            assert_eq!(cut.blocks(256 * warps as usize), 1);
            assert_eq!(cut.blocks(256 * warps as usize + 1), 2);
            assert_eq!(cut.blocks(0), 0);
        }
    }

    #[test]
    fn other_sizes_have_teams() {
        let team = |size, largest, shared| match Cut::new(size, largest, shared) {
            Cut::Any { size, run, team } => (size, run, team),
            Cut::Plain { .. } => (0, 0, 0),
        };
        assert_eq!(team(1, 100, false), (1, 1, 2));
        assert_eq!(team(7, 100, true), (7, 14, 16));
        assert_eq!(team(6, 100, true), (6, 6, 8));
        assert_eq!(team(2304, 1 << 20, false), (2304, 2304, 256));
        assert_eq!(team(512 + 1, 1 << 20, false), (513, 513, 256));
        assert_eq!(team(300, 1 << 20, true), (300, 300, 32));
        assert_eq!(team(usize::MAX, 77, true), (77, 154, 32));
        assert_eq!(Cut::new(7, 1000, true).blocks(1000), 5); // 72 runs, 16 teams
        assert_eq!(Cut::new(1 << 40, 0, false).blocks(0), 0);
        // Beyond 32 bits.
        assert_eq!(Cut::new(256, 1 << 50, false).blocks(1 << 50), 1 << 39);
    }

    #[test]
    fn look_ups_take_multiples_of_256_together() {
        assert_eq!((look_up(2304, 9000).0, look_up(2304, 9000).2), (2304, false));
        assert!(!look_up(64, 10).2);
        assert!(look_up(48, 4096).2);
        assert_eq!(look_up(usize::MAX, 256).0, 256);
        assert_eq!(look_up(48, 1025).1.grid, [3, 1, 1]);
        assert_eq!(look_up(64, 2049).1.grid, [2, 1, 1]);
    }
}
