"""A ChatTemplate as the Jinja that tokenizers and processors carry: the same prompts, as text."""

from __future__ import annotations

import json

from gemoe_ds.models.chat import ChatTemplate

_NAMES = {"{text}": "part.text", "{image}": "images", "{bos}": "bos_token", "{eos}": "eos_token"}
_LAYOUT = """\
{%- set ns = namespace(begun=false) -%}
{%- for message in messages -%}
{%- set content, role = message['content'], message['role'] -%}
{%- set part = namespace(text='', leading=0, inside=0) -%}
{%- if content is string -%}
{%- set part.text = content -%}
{%- else -%}
{%- for item in content -%}
{%- if item['type'] == 'text' -%}
{%- set part.text = part.text ~ item['text'] -%}
{%- elif item['type'] in ('image', 'image_url') and (@ALWAYS_FIRST or part.text == '') -%}
{%- set part.leading = part.leading + 1 -%}
{%- elif item['type'] in ('image', 'image_url') -%}
{%- set part.text = part.text ~ @MARK -%}
{%- set part.inside = part.inside + 1 -%}
{%- else -%}
{{- raise_exception('this model reads text and pictures, no ' ~ item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if @ALWAYS_FIRST and part.leading > 1 -%}
{{- raise_exception('this model reads one picture at a time') -}}
{%- endif -%}
{%- if role == 'system' -%}
@SYSTEM
{%- set ns.begun = true -%}
{%- else -%}
{%- if not ns.begun -%}
{{- @START -}}
{%- set ns.begun = true -%}
{%- endif -%}
{%- if role == 'user' -%}
{%- set images = [@MARK] * part.leading -%}
{%- if part.inside -%}
{%- set part.text = (images | join) ~ part.text -%}
{%- set part.text = @STRIP -%}
{{- @QUESTION -}}
{%- elif part.leading -%}
{%- set images = images | join(@BETWEEN) -%}
{%- set part.text = @RSTRIP -%}
{{- @ONLY_IMAGE if part.text == '' else @WITH_IMAGE -}}
{%- else -%}
{%- set part.text = @STRIP -%}
{{- @NO_QUESTION if part.text == '' else @QUESTION -}}
{%- endif -%}
{%- else -%}
{%- set part.text = @STRIP -%}
{{- @ANSWER -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""


def chat_jinja(chat: ChatTemplate, image_mark: str, ends: tuple[str, str] | None = None) -> str:
    """For `apply_chat_template`; `image_mark` stands where a picture does.

    `ends`: bos and eos as text, for a tokenizer whose own may be others than those of training.

    Messages are OpenAI's: role system, user or assistant, and content that is text or a list of
    {"type": "text", "text": ...} and {"type": "image"}. The question ends where an answer begins,
    with or without `add_generation_prompt`.
    """
    usual = _expression(chat, chat.question)
    with_image = _expression(chat, chat.question_with_image)
    refusal = "{{- raise_exception('this model knows no system message') -}}"
    found = {
        "SYSTEM": refusal if chat.system is None else _stripped(chat, chat.system),
        "START": _expression(chat, chat.start),
        "QUESTION": usual,
        "WITH_IMAGE": with_image,
        "ONLY_IMAGE": with_image if chat.only_image is None else _expression(chat, chat.only_image),
        "NO_QUESTION": usual if chat.no_question is None else _expression(chat, chat.no_question),
        "ANSWER": _expression(chat, chat.answer),
        "BETWEEN": json.dumps(chat.between_images),
        "RSTRIP": "part.text.rstrip()" if chat.stripped else "part.text",
        "STRIP": "part.text.strip()" if chat.stripped else "part.text",
        "ALWAYS_FIRST": "true" if chat.one_image else "false",
        "MARK": json.dumps(image_mark),
    }
    text = _LAYOUT
    for name, expression in found.items():
        text = text.replace(f"@{name}", expression)
    if ends is not None:
        for name, token in zip(("bos_token", "eos_token"), ends, strict=True):
            text = text.replace(name, json.dumps(token, ensure_ascii=False))
    return text


def _expression(chat: ChatTemplate, template: str) -> str:
    """A template as a Jinja expression."""
    template = template.replace("{end}", "")
    pieces = []
    for part in chat.pieces(template):
        before, has_text, after = part.partition("{text}")
        for piece in (before, "{text}" if has_text else "", after):
            if piece:
                pieces.append(_NAMES.get(piece) or json.dumps(piece, ensure_ascii=False))
    return f"({' ~ '.join(pieces)})" if pieces else '""'


def _stripped(chat: ChatTemplate, template: str) -> str:
    strip = "{%- set part.text = part.text.strip() -%}\n" if chat.stripped else ""
    return f"{strip}{{{{- {_expression(chat, template)} -}}}}"
