"""What a row of data says: one published format a file, found by its name."""

from gemoe_ds.data.sources.formats.base import RowFormat as RowFormat
from gemoe_ds.registry import import_all

import_all(__name__, list(__path__))
