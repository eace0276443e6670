"""What processes of tests would import one after the other; their fork server does it once."""

import gc

import deepspeed.ops.op_builder.all_ops  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  ZeRO's own; brings torch._dynamo
import deepspeed.runtime.zero.stage3  # noqa: F401
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
from PIL import Image

import gemoe_ds.train.run  # noqa: F401
import tests.train.resuming  # noqa: F401
from gemoe_ds.data.stream import _import_grain

_import_grain()
Image.preinit()
gc.collect()
gc.freeze()  # a process that collects its garbage copies no page of this
