"""The chat template that a tokenizer's folder brings, applied as lm-eval's `hf` does it.

Language tasks alone use it, with `--apply-chat-template`; what is asked about pictures, and what
trains, goes through models/chat.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from gemoe_ds.errors import ConfigError

Message = dict[str, str]  # role and content


class FolderTemplate:
    """A `chat_template` for lm-eval's tasks.

    By the class that the folder names, as lm-eval reads it, not by `load_tokenizer`: the text that
    stands for the first token, which templates have, is another there.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of any kind, from files that may hold anything
            raise ConfigError(f"data.tokenizer={folder}: its chat template: {error}") from error
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"data.tokenizer={folder} has no chat template; leave --apply-chat-template out, "
                "or put the model's own tokenizer_config.json or chat_template.jinja there"
            )
        try:
            self._render([{"role": "user", "content": "a"}], True)
        except TemplateError as error:
            raise ConfigError(f"data.tokenizer={folder}: its chat template: {error}") from error
        self.drops_system = not self._takes([{"role": "system", "content": "a"}])

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where an answer begins, or goes on.

        System messages are left out if the template refuses them, as lm-eval does; say so first:
        `drops_system`.
        """
        if self.drops_system:
            messages = [message for message in messages if message["role"] != "system"]
        return self._render(messages, add_generation_prompt)

    def _takes(self, before: list[Message]) -> bool:
        try:
            self._render([*before, {"role": "user", "content": "a"}], True)
        except TemplateError:
            return False
        return True

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
