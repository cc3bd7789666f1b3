"""Save, load, validate, export and measure compressed checkpoints of every registered format."""

from cospadi.checkpoint.dense_export import export_dense
from cospadi.checkpoint.formats.base import FORMATS, Format, format_for, format_of, is_compressed
from cospadi.checkpoint.formats.grouped import GroupedFormat, storage_dtype
from cospadi.checkpoint.hooks import attach, register
from cospadi.checkpoint.load import load
from cospadi.checkpoint.save import save
from cospadi.checkpoint.sizes import factor_bytes, file_bytes
from cospadi.checkpoint.validate import check_stock, read_config, read_format, validate

__all__ = [
    "FORMATS",
    "Format",
    "GroupedFormat",
    "attach",
    "check_stock",
    "export_dense",
    "factor_bytes",
    "file_bytes",
    "format_for",
    "format_of",
    "is_compressed",
    "load",
    "read_config",
    "read_format",
    "register",
    "save",
    "storage_dtype",
    "validate",
]
