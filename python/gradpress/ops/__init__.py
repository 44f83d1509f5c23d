"""Kernels as functions: outputs allocated, seeds passed on, the native core called.

Everything else in the package calls the kernels through these modules; nothing else imports the
native core. The same kernels are operators of ``torch.ops.gradpress``, for compiled programs.
"""

from gradpress.ops import (  # noqa: F401, registered when imported
    _library_lowrank,
    _library_optim,
    _library_quant,
)
