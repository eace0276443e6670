"""Write a trained model as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gemoe_ds import __version__
from gemoe_ds.export.code import Code, code_of, image_mark, processor_map, prompt_section
from gemoe_ds.export.code_record import KEY, MADE_FROM, PROVENANCE, checksums
from gemoe_ds.export.saving import ROUTERS
from gemoe_ds.files import whole_folder
from gemoe_ds.hf_io.companions import TEMPLATES, TOKENIZER, companions, write_index
from gemoe_ds.hf_io.hf_config import in_own_format, quantisation_of, read_config
from gemoe_ds.hf_io.renamed import Renamed
from gemoe_ds.hf_io.rewriter import DISK_ERRORS
from gemoe_ds.hf_io.safetensors_reader import INDEX, open_stored
from gemoe_ds.models.images import ImageLayout, SquareImages
from gemoe_ds.models.jinja import chat_jinja
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.tokenizer import load_tokenizer

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def export(
    model: MoEModel,
    trained: Mapping[str, Tensor],
    *,
    base: Path | None,
    tokenizer: Path,
    router: dict[str, Any],
    provenance: dict[str, Any],
    out: Path,
    own_code: bool = True,
    format_of: Mapping[str, str] | None = None,
) -> None:
    """`trained` (by name, experts stacked) over `base`, with routers and model code, in `out`.

    `model` has its routers trained (`load_trained_weights`). Without `own_code` the folder runs as
    the base does, by the base's code if it has some. With `format_of` (name -> format) these are
    in few bits, and there is no own code. Raises ConfigError if `out` exists.
    """
    code = code_of(model) if own_code else None
    with whole_folder(out, DISK_ERRORS) as folder:
        trains = model.trainable()  # what does not stays as the base stores it
        weights = model.stock_tensors(Renamed(trained, {n: n for n in trained if n in trains}))
        if format_of is None:
            model.backbone.save_trained(model.hf, weights, base, folder)
        else:
            assert base is not None and not own_code, "cli/export.py refuses it"
            model.backbone.save_quantised(model.hf, weights, base, folder, format_of)
        if not (folder / INDEX).exists():  # or who takes every *.safetensors takes the routers too
            write_index(folder, {k: t.file.name for k, t in open_stored(folder).items()})
        for path in companions(folder, TOKENIZER):
            path.unlink()
        for path in companions(tokenizer, TOKENIZER):
            shutil.copyfile(path, folder / path.name)
        _write_chat_template(folder, model)
        save_file(_router_tensors(model), folder / ROUTERS)
        of_base = checksums(folder)
        if code is not None:
            code.write(folder)
        _extend_configs(folder, router, model, code, tokenizer)
        ours = {n: sum_ for n, sum_ in checksums(folder).items() if of_base.get(n) != sum_}
        made = {"gemoe_ds": __version__, KEY: ours, MADE_FROM: code and code.made_from}
        _write_json(folder / PROVENANCE, provenance | made)
        card = _card(router, provenance, model, code, _few_bits(folder))
        (folder / "README.md").write_text(card, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _extend_configs(
    folder: Path, router: dict[str, Any], model: MoEModel, code: Code | None, tokenizer: Path
) -> None:
    """What is needed to route as in training, and where transformers finds code that does."""
    _keep_picture_sizes(folder, model)
    section = {"router": router, "blocks": _blocks(model), "image_tokens": _image_tokens(model)}
    if code is None:
        _extend(folder / "config.json", {"gemoe": section})
        return
    if code.has_processor:
        section |= prompt_section(model, tokenizer)
        _name_processor(folder, {"layout": code.layout, "auto_map": processor_map()})
        place = "gemoe_export_own_tokenizer.OwnTokenizer"
        _extend(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, place]}})
    _extend(folder / "config.json", {"gemoe": section, "auto_map": code.auto_map})


def _write_chat_template(folder: Path, model: MoEModel) -> None:
    """That of training, where the tokenizer brings none: or a server has none, or makes one up.

    Where transformers has the processor, what stands for a picture is its business.
    """
    layout, chat = model.image_layout, model.backbone.chat
    described = folder / "tokenizer_config.json"
    brings = described.exists() and _read_json(described).get("chat_template")
    if brings or companions(folder, TEMPLATES) or hasattr(layout, "processor"):
        return
    loaded: Any = load_tokenizer(folder, chat, None if layout is None else layout.token)
    text = chat_jinja(chat, image_mark(chat), (loaded.bos_token, loaded.eos_token))
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def _name_processor(folder: Path, settings: dict[str, Any]) -> None:
    """In every file in which transformers looks for a processor, and finds the base's first."""
    path = folder / PREPROCESSOR
    if not path.exists():
        _write_json(path, {"image_processor_type": "OwnImageProcessor"})
    _change_image_processor(folder, lambda found: settings)
    path = folder / PROCESSOR
    if path.exists():
        _extend(path, {"auto_map": settings["auto_map"]})


def _keep_picture_sizes(folder: Path, model: MoEModel) -> None:
    """What the run has set of the base's own image processor (Qwen3-VL's pixels)."""
    options = model.backbone.config.model_dump(exclude_none=True)
    wanted = {k: v for k, v in options.items() if k in ("min_pixels", "max_pixels")}
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    sizes = {edges[name]: value for name, value in wanted.items()}

    def change(found: dict[str, Any]) -> dict[str, Any]:
        stated = {name: value for name, value in wanted.items() if name in found}
        return {"size": found.get("size", {}) | sizes} | stated

    if wanted:
        _change_image_processor(folder, change)


def _change_image_processor(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """In both files that may describe it: transformers prefers what is nested in the second."""
    path = folder / PREPROCESSOR
    if path.exists():
        _extend(path, change(_read_json(path)))
    path = folder / PROCESSOR
    inner = _read_json(path).get("image_processor") if path.exists() else None
    if isinstance(inner, dict):
        _extend(path, {"image_processor": inner | change(inner)})


def _extend(path: Path, content: dict[str, Any]) -> None:
    """A JSON file of the base, or a new one, with these keys changed."""
    found = _read_json(path) if path.exists() else {}
    _write_json(path, found | content)


def _image_tokens(model: MoEModel) -> list[int]:
    """The ids that stand for images alone, as a router saw them in training; [] if there are none.

    Code that is told where images stand does not need them.
    """
    layout: Any = model.image_layout
    if layout is None or layout.token is None:
        return []
    return sorted({layout.token[1], *getattr(layout, "frame", {}).values()})


def _router_tensors(model: MoEModel) -> dict[str, Tensor]:
    return {
        f"{slot}.{name}": tensor.detach().clone().contiguous()
        for slot, layer in enumerate(model.moe_layers)
        for name, tensor in layer.router.state_dict().items()
    }


def _blocks(model: MoEModel) -> list[dict[str, Any]]:
    """Where each block is in the stock model, and which of its parameters are the experts."""
    return [
        {"path": path, "gate_up": gate_up, "down": down}
        | ({} if shared is None else {"shared": shared})
        | {"routing": asdict(routing)}
        for path, (gate_up, down, shared), routing in zip(
            model.block_paths, model.expert_names, model.routing, strict=True
        )
    ]


def _card(
    router: dict[str, Any],
    provenance: dict[str, Any],
    model: MoEModel,
    code: Code | None,
    few_bits: str | None,
) -> str:
    options = "\n".join(f"    {key}: {value}" for key, value in router.items())
    return f"""# {router["name"]} on {provenance["base"]}

Trained with gemoe_ds. Router:

{options}

{few_bits or f"{_use(model, code)}{chr(10)}{_SERVERS}"}
{_about_images(model.image_layout, code)}`provenance.json` says what this was made from.
"""


def _few_bits(folder: Path) -> str | None:
    """Who reads the folder, if its weights are in few bits."""
    if in_own_format(folder):
        return _IN_OWN_FORMAT
    return _IN_FLOAT8 if quantisation_of(read_config(folder)) else None


def _use(model: MoEModel, code: Code | None) -> str:
    if code is None:
        return _WITHOUT_CODE
    auto_class = "AutoModelForImageTextToText" if model.image_layout else "AutoModelForCausalLM"
    uses = _WITH_PROCESSOR if code.has_processor else _WITH_CODE
    static = _STATIC_OF_OURS if "AutoConfig" in code.auto_map else _STATIC_OF_STOCK
    needs = "pydantic, pillow and" if code.has_processor else "pydantic and"
    return uses.format(auto_class=auto_class, needs=needs) + static.format(auto_class=auto_class)


def _about_images(layout: ImageLayout | None, code: Code | None) -> str:
    if layout is None:
        return ""
    if isinstance(layout, SquareImages):
        return (
            f"An image is {layout.size} x {layout.size} pixels in [-1, 1] and stands for "
            f"{layout.tokens} tokens of id {layout.token_id} after the first token. "
        )
    if code is not None and code.has_processor:
        return "Its AutoProcessor prepares images and prompts as in training. "
    return "Images were prepared in training as this model's own processor does. "


_WITH_CODE = """\
With its own routing (needs torch, transformers, {needs} safetensors):

    from transformers import {auto_class}
    model = {auto_class}.from_pretrained(FOLDER, trust_remote_code=True)
    model.k_per_layer  # after a forward: how many experts every token got
"""
_WITH_PROCESSOR = (
    _WITH_CODE.replace("import {auto_class}", "import {auto_class}, AutoProcessor")
    + """\
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    content = [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]
    prompt = processor.apply_chat_template([{{"role": "user", "content": content}}])
    model.generate(**processor(text=prompt, images=[picture]), max_new_tokens=32)
"""
)
_STATIC_OF_STOCK = """
As a stock model with the base model's fixed number of experts: the same without
`trust_remote_code`.
"""
_STATIC_OF_OURS = """
With the base model's fixed number of experts: set `gemoe.enabled` to false in config.json, or

    config = AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
    config.gemoe["enabled"] = False
    model = {auto_class}.from_pretrained(FOLDER, config=config, trust_remote_code=True)
"""
_WITHOUT_CODE = """\
Anything that runs the base model runs this folder: base layout, trained gates, and the base
model's fixed number of experts. `routers.safetensors` holds the state of the routers. To route as
in training, use the run with gemoe_ds (`gemoe generate RECIPE --trained RUN`), or export it again
without `--code base`.
"""
_ROUTES_IN_A_RUN = """\
The number of experts is the base model's. To route as in training, give the folder as
`model.checkpoint` beside `--trained RUN`: `gemoe generate RUN/config.yaml --trained RUN
model.checkpoint=FOLDER`.
"""
_IN_OWN_FORMAT = f"""\
Its weights are in 8 and 4 bits in a format that gemoe_ds alone reads (docs/few_bits.md there).
transformers and servers stop at the shape of its codes. {_ROUTES_IN_A_RUN}"""
_IN_FLOAT8 = f"""\
Its weights are in float8 with scales for blocks of 128 x 128, as Qwen and DeepSeek publish it. Not
every class of transformers reads that (docs/few_bits.md of gemoe_ds): some leave out the scales of
experts with no more than a report of unexpected keys. {_ROUTES_IN_A_RUN}"""
_SERVERS = """\
A server that has the base model's class of its own, such as vLLM, loads this folder as the base
model: without a plugin it serves the fixed number of experts, with no warning. With the plugin
`gemoe-vllm` vLLM serves the trained routing. `gemoe serve-check FOLDER` shows which of the two a
server does.
"""
