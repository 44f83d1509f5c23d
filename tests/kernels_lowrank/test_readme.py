"""The parameter lists of kernels/lowrank/README.md are those of the kernels."""

import re

from tests.kernels_lowrank.launcher import KERNELS, module

README = (KERNELS / "lowrank" / "README.md").read_text()
PRODUCT = {"ELEM": "f32", "BASIS_BITS": 32, "TENSOR": 0}
MODULES = [
    module("project", **PRODUCT, BASIS_PARTS=2), module("project_back_add", **PRODUCT),
    module("project_back_requantize", BASIS_BITS=32, TENSOR=1),
    module("project_back", BASIS_BITS=32, TENSOR=1), module("requantize_span"),
    module("orthonormal"), module("eigen"), module("refresh", ELEM="f32"),
]  # fmt: skip
#: As the emulator tells parameters: kind and bytes, of pointers what they point to. ELEM and BASIS
#: are float here.
KINDS = {"i64": "i8", "int": "i4", "float": "f4", "Key": "s16"}
BYTES = {"ELEM": 4, "BASIS": 4, "u8": 1, "u32": 4, "int": 4, "float": 4, "double": 8}


def kind(parameter: str) -> str:
    words = parameter.removeprefix("const ").split()
    assert len(words) == 2, parameter
    return f"p{BYTES[words[0][:-1]]}" if words[0].endswith("*") else KINDS[words[0]]


def documented() -> dict[str, list[str]]:
    text = "\n".join(re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    factors = re.search(r"^FACTORS = (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    text = text.replace(factors[0], "").replace("FACTORS", factors[1])
    found = re.findall(r"^(\w+) +\(((?:const )?\w+\*? \w+,[^()]*)\)", text, re.MULTILINE)
    return {name: [kind(p.strip()) for p in words.split(",")] for name, words in found}


def test_parameters_are_those_of_the_readme():
    signatures = {name: s for kernels in MODULES for name, s in kernels._signatures.items()}
    assert documented() == signatures


def test_every_kernel_stands_in_its_modules_row():
    for kernels in MODULES:
        row = next(r for r in README.splitlines() if f"`{kernels.kernels[0]}`" in r and r[0] == "|")
        assert sorted(re.findall(r"`(\w+)`", row.split("|")[-2])) == sorted(kernels.kernels)
