"""Models with shared attention matrices, trained from scratch.

The model classes are registered with transformers when the first configuration is created, not when this package is
imported: that may happen while transformers is half imported and has no models yet.
"""

from cospadi.masa.models.configuration import when_created
from cospadi.masa.models.registration import register_models

when_created(register_models)
