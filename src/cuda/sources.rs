//! The CUDA sources, embedded, so that a wheel needs neither files nor a toolkit.

/// A file under `kernels/`.
pub struct Source {
    /// Its path there, which is what an `#include` and a message call it.
    pub file: &'static str,
    pub text: &'static str,
}

macro_rules! sources {
    ($folder:literal: $($file:literal),* $(,)?) => {
        &[$(Source {
            file: $file,
            text: include_str!(concat!("../../kernels/", $folder, $file)),
        }),*]
    };
}

/// One compiled module each, for every set of defines.
pub static KERNELS: &[Source] = sources!["":
    "direction.cu",
    "dynamic.cu",
    "lowrank/eigen.cu",
    "lowrank/orthonormal.cu",
    "lowrank/project.cu",
    "lowrank/project_back.cu",
    "lowrank/project_back_add.cu",
    "lowrank/project_back_requantize.cu",
    "lowrank/refresh.cu",
    "lowrank/requantize_span.cu",
    "optim.cu",
    "prune.cu",
    "prune_columns.cu",
    "prune_gradients.cu",
    "prune_matrix.cu",
    "quant.cu",
    "update.cu",
];

/// What they include; NVRTC brings no headers of its own.
pub static HEADERS: &[Source] = sources!["include/":
    "adamw.cuh",
    "back.cuh",
    "basis.cuh",
    "change.cuh",
    "element.cuh",
    "flag.cuh",
    "friction.cuh",
    "gemm.cuh",
    "grid.cuh",
    "linalg.cuh",
    "list.cuh",
    "map4bit.cuh",
    "map8bit.cuh",
    "map_tables.cuh",
    "maps.cuh",
    "mma.cuh",
    "operand.cuh",
    "pack.cuh",
    "philox.cuh",
    "random.cuh",
    "reduce.cuh",
    "run.cuh",
    "score.cuh",
    "state.cuh",
    "tile.cuh",
];

/// The source of a module.
pub fn find(file: &str) -> Option<&'static Source> {
    KERNELS.iter().find(|source| source.file == file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_include_is_embedded() {
        for source in KERNELS.iter().chain(HEADERS) {
            for line in source.text.lines().filter_map(|line| line.strip_prefix("#include ")) {
                let name = line.trim_matches('"');
                let found = HEADERS.iter().any(|header| header.file == name);
                assert!(found, "{} includes {line}", source.file);
            }
        }
    }

    #[test]
    fn sources_are_found_by_name() {
        assert!(find("quant.cu").is_some_and(|source| source.text.contains("__global__")));
        assert!(find("nothing.cu").is_none());
    }
}
