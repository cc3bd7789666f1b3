"""The exceptions that cospadi raises on purpose.

CospadiError                 the base class; the command line prints it as one line and exits with code 1
├── ModelError               the model cannot be read, or its architecture is not supported
├── CalibrationError         the calibration or evaluation text cannot be used
├── NumericalError           NaN or Inf in weights or activations (names the layer)
├── BudgetError              the requested size cannot be reached (names the smallest possible)
├── RecipeError              a recipe or an option is wrong (suggests the nearest valid one)
├── OutputError              the output directory cannot be used, or the disk is full
├── CheckpointError          a compressed checkpoint is damaged (names file and tensor)
└── ResourceError            out of memory, or an optional package is missing
"""


class CospadiError(Exception):
    """Base class of every exception that cospadi raises on purpose."""


class ModelError(CospadiError):
    """The model cannot be read, or its architecture is not supported."""


class CalibrationError(CospadiError):
    """The calibration or evaluation text cannot be used."""


class NumericalError(CospadiError):
    """NaN or Inf in weights or activations."""


class BudgetError(CospadiError):
    """The requested size cannot be reached."""


class RecipeError(CospadiError):
    """A recipe or an option is wrong."""


class OutputError(CospadiError):
    """The output directory cannot be used, or the disk is full."""


class CheckpointError(CospadiError):
    """A compressed checkpoint is damaged or contradicts its own description."""


class ResourceError(CospadiError):
    """Out of memory, or an optional package is missing."""


for _error in (CospadiError, *CospadiError.__subclasses__()):
    _error.__module__ = "cospadi"  # where users import them from
