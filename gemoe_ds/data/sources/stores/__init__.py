"""How rows lie on disk: one way a file, found by its name; `open_store` sees which it is."""

from gemoe_ds.data.sources.stores.base import Store as Store
from gemoe_ds.data.sources.stores.base import open_store as open_store
from gemoe_ds.registry import import_all

import_all(__name__, list(__path__))
