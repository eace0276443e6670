"""A GPU that is none: tensors say that they are on cuda:0, and the CPU does the work.

So the code for CUDA runs with real values on any machine. Counted is what costs time on a GPU and
does not show on a CPU: launches, waits of the host for the device, copies from the host, operands
on the wrong device. Needs hooks.cpp (hooks.py preloads it) and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from gemoe_ds.moe import monotonic, monotonic_kernel, triton_launch
from gemoe_ds.moe.experts import grouped, kernels, quantised_kernels
from gemoe_ds.moe.experts.quantised import QuantisedWeight
from tests.moe.experts.interpreter import bfloat16_as_on_a_gpu

CUDA = torch.device("cuda", 0)

# No kernel though no view: memory alone, or what only the host does.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
_FREE |= {"lift_fresh", "_local_scalar_dense", "is_same_size", "equal"}
# As torch's CUDA sources have it, where a call is not one launch. Of radix sorts the fewest.
_LAUNCHES = {"nonzero": 4, "nonzero_static": 5, "sort": 4, "argsort": 4, "topk": 2, "cumsum": 2}
_LAUNCHES |= {"index_put": 3, "index_put_": 3, "_unique2": 6, "bincount": 3, "repeat_interleave": 3}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "multinomial"}
_WAITS |= {"_unique2", "unique_dim", "unique_consecutive"}
_MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "lift_fresh"}


class Pretended(Tensor):
    """Says that it is on cuda:0; `host` has the values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Gpu().__torch_dispatch__(function, types, args, kwargs)

    def tolist(self) -> Any:
        for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            if isinstance(mode, Gpu):
                mode.waits[f"tolist {_place()}"] += 1
        return self.host.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.host!r})"


class Gpu(TorchDispatchMode):
    """Runs what concerns pretended tensors, and counts. Each counter is by operation and place."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = Counter[str]()
        self.waits = Counter[str]()
        self.uploads = Counter[str]()  # copies from the host to the device
        self.mixed = Counter[str]()  # operands on the wrong device
        self.made: list[ref[Tensor]] = []  # all that came into being meanwhile

    def __enter__(self) -> Gpu:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes here too
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [one for one in tensors if isinstance(one, Pretended)]
        to_gpu = device is not None and device.type == "cuda"
        if not here and not to_gpu:
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        self._count(function, name, args, kwargs, tensors, here, device)
        if to_gpu:
            kwargs["device"] = torch.device("cpu")
        result = function(*tree_map(real, args), **tree_map(real, kwargs))
        if not to_gpu and device is not None:  # to the host
            return result
        known = {id(one.host): one for one in here}  # what was changed in place
        result = tree_map(lambda r: known[id(r)] if id(r) in known else on_gpu(r), result)
        self.made += [ref(one.host) for one in tree_leaves(result) if isinstance(one, Pretended)]
        return result

    def forget(self) -> None:
        """Count launches and waits from here."""
        self.launches.clear()
        self.waits.clear()

    def alive(self) -> int:
        """Tensors that somebody holds, if only a graph."""
        self.made = [one for one in self.made if one() is not None]
        return len(self.made)

    def _count(self, function, name, args, kwargs, tensors, here, device) -> None:
        of_host = [one for one in tensors if not isinstance(one, Pretended)]
        if not function.is_view and name not in _FREE:
            self.launches[name] += _LAUNCHES.get(name, 1)
        if here and name not in _MAY_MIX and any(one.dim() for one in of_host):
            shapes = [tuple(one.shape) for one in of_host]
            self.mixed[f"{name} of {shapes} {_place()}"] += 1
        if self._waits(name, args, kwargs, here, device):
            self.waits[f"{name} {_place()}"] += 1
        if self._uploads(name, args, of_host, device):
            self.uploads[f"{name} {_place()}"] += 1

    @staticmethod
    def _waits(name, args, kwargs, here, device) -> bool:
        if name in _WAITS:
            return True
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_"):  # by a mask: its nonzeros are counted
            by_mask = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            constant = name != "index" and args[2].numel() == 1 and len(args[1]) == 1
            return bool(by_mask) and not constant  # which is masked_fill
        if name == "_to_copy":
            to_host = bool(here) and device is not None and device.type == "cpu"
            return to_host and not kwargs.get("non_blocking")
        to_host = name == "copy_" and not isinstance(args[0], Pretended)
        return to_host and not (kwargs.get("non_blocking") or args[2:] == (True,))

    @staticmethod
    def _uploads(name, args, of_host, device) -> bool:
        if name == "_to_copy":
            return bool(of_host) and device is not None
        if name in ("index", "index_put", "index_put_"):
            return any(one.dim() for one in of_host)
        return name == "copy_" and isinstance(args[0], Pretended) and bool(of_host)


def _swiglu(gate_up, weights, hidden, *_, **__) -> None:
    hidden.copy_(grouped._swiglu(gate_up, weights))


def _swiglu_backward(grad, gate_up, weights, *outputs, **_) -> None:
    want_hidden = outputs[2] is not None
    for output, value in zip(
        outputs, grouped._swiglu_backward(grad, gate_up, weights, want_hidden), strict=False
    ):
        if value is not None:
            output.copy_(value)


def _segment_sum(rows, order, ends, sums, *_, **__) -> None:
    order = order[: int(ends[-1])] if len(ends) else order  # behind it stand spare entries
    sums.copy_(grouped._segment_sum(rows, order, ends, sums.dtype))


def _all_pairs(entropy, k_soft, valid, moved, sums, *_, SLOPE, CONSTANT, **__) -> None:
    total, num_pairs, by_token = monotonic.all_pairs(entropy, k_soft, valid, SLOPE, CONSTANT)
    moved.copy_(by_token)
    if sums.numel():
        sums.zero_()[:, 0] = torch.stack([total, num_pairs])


def _quantised_product(
    rows, codes, scales, levels, ends, out, *sizes, FORMAT, TRANSPOSED, **_
) -> None:
    weight = QuantisedWeight(FORMAT, sizes)
    weight.codes_EMC, weight.scales_EMB = codes, scales
    start = 0
    for expert, end in enumerate(ends.tolist()):
        weight_MK = weight.dequantised(expert, rows.dtype)
        out[start:end] = rows[start:end] @ (weight_MK.t() if TRANSPOSED else weight_MK)
        start = end


_BY_TORCH = {
    kernels._swiglu_kernel: _swiglu,
    kernels._swiglu_backward_kernel: _swiglu_backward,
    kernels._segment_sum_kernel: _segment_sum,
    monotonic_kernel._all_pairs_kernel: _all_pairs,
    quantised_kernels._product_kernel: _quantised_product,
}


def real(value: Any) -> Any:
    return value.host if isinstance(value, Pretended) else value


def on_gpu(value: Any) -> Any:
    """Tensors among these, or parameters and buffers of a module, which is changed, said to be on
    cuda:0."""
    if not isinstance(value, nn.Module):
        return tree_map(lambda t: Pretended(t) if isinstance(t, Tensor) else t, value)
    for module in value.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = Pretended(parameter.data)
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Pretended(buffer)
    return value


@contextmanager
def pretended_gpu(interpret: bool = False) -> Iterator[Gpu]:
    """While this lasts torch.cuda is there as far as the project uses it.

    Kernels are counted, and what they compute comes from the project's way for CPUs; with
    `interpret` from Triton's interpreter, which takes 5 ms a program.
    """
    gpu = Gpu()

    class Stream:
        """The one that there is, whose work is done at once."""

        def record_event(self) -> Stream:
            return self

        def synchronize(self) -> None:
            gpu.waits[f"event {_place()}"] += 1

    def launch(kernel: Any, grid: tuple[int, ...], *tensors: Any, **constants: Any) -> None:
        if 0 not in grid:
            gpu.launches[kernel.__name__] += 1
        with _disable_current_modes():
            run = partial(triton_launch.launch, kernel, grid) if interpret else _BY_TORCH[kernel]
            run(*map(real, tensors), **constants)

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        """By its definition: torch chooses among kernels that a CPU build has not."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # which it takes as numbers
            blank = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = blank.masked_fill(~attn_mask, float("-inf"))
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )[0]

    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.cuda.current_stream", lambda _: Stream()),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch.object(kernels, "launch", launch),
        mock.patch.object(quantised_kernels, "launch", launch),
        bfloat16_as_on_a_gpu() if interpret else nullcontext(),
        mock.patch.object(monotonic_kernel, "launch", launch),
        gpu,
    ):
        yield gpu


def _place() -> str:
    """The nearest line that is not torch's or ours."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(f"/{name}/" in path for name in ("gemoe_ds", "transformers")):
            return f"{path.rpartition('/site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "in autograd"
