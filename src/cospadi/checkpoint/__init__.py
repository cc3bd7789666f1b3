"""Save, load, validate, export and measure compressed checkpoints."""

from cospadi.checkpoint.convert import (
    install,
    install_packed,
    quantization_config,
    replace_by_dense,
    replace_modules,
    storage_dtype,
)
from cospadi.checkpoint.dense_export import export_dense
from cospadi.checkpoint.formats.factored import parse_config, read_config, validate
from cospadi.checkpoint.formats.factored_hf import attach, register
from cospadi.checkpoint.load import load
from cospadi.checkpoint.save import save
from cospadi.checkpoint.sizes import factor_bytes, file_bytes

__all__ = [
    "attach",
    "export_dense",
    "factor_bytes",
    "file_bytes",
    "install",
    "install_packed",
    "load",
    "parse_config",
    "quantization_config",
    "read_config",
    "register",
    "replace_by_dense",
    "replace_modules",
    "save",
    "storage_dtype",
    "validate",
]
