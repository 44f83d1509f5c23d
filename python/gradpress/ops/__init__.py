"""Kernels as functions: outputs allocated, seeds passed on, the native core called.

Everything else in the package calls the kernels through these modules; nothing else imports the
native core.
"""
