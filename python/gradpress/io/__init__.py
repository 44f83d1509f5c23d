"""Files of models: as small as their zeros and integers allow, or dense for any reader."""

from gradpress.io._load import IncompatibleKeys, load
from gradpress.io._report import SavedFile, SizeTable, StoredTensor
from gradpress.io._save import save, size_table

__all__ = [
    "IncompatibleKeys",
    "SavedFile",
    "SizeTable",
    "StoredTensor",
    "load",
    "save",
    "size_table",
]
