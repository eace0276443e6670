"""Messages become the text that the folder's own tokenizer makes of them."""

from __future__ import annotations

import itertools

import pytest
from transformers import AutoTokenizer

from gemoe_ds.data.chat_template import FolderTemplate
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from tests.models.published import GOLDEN, write_published

ROLES = (  # of the kind that OLMoE-Instruct has
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + ROLES
USER, SYSTEM = ({"role": role, "content": f"{role} says\n<b>"} for role in ("user", "system"))
BEGUN = {"role": "assistant", "content": "It is"}
CONVERSATIONS = [[USER], [SYSTEM, USER], [SYSTEM, USER, BEGUN, USER]]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("template", [ROLES, REFUSES])
def test_it_is_the_folders_own(tmp_path, name, template):
    folder = write_published(name, tmp_path, chat_template=template)
    own = AutoTokenizer.from_pretrained(folder)
    ours = FolderTemplate(folder)
    assert ours.drops_system == (template == REFUSES)
    told = TaskOptions(chat_template=ours).template
    assert told == "examples as turns" + ", system messages left out" * ours.drops_system
    for messages, ends in itertools.product(CONVERSATIONS, (True, False)):
        kept = [m for m in messages if m != SYSTEM] if ours.drops_system else messages
        asked = kept if ends else [*kept, BEGUN]
        expected = own.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=ends, continue_final_message=not ends
        )
        assert ours(messages if ends else [*messages, BEGUN], ends) == expected


@pytest.mark.parametrize("token", [None, "<|endoftext|>"])
def test_a_first_token_that_training_adds_is_not_in_it(tmp_path, token):
    """OLMoE's tokenizer may say that it has none; `load_tokenizer` takes the last one for it."""
    folder = write_published("olmoe", tmp_path, chat_template=ROLES, bos_token=token)
    assert FolderTemplate(folder)([USER]).startswith(f"{token or ''}<|user|>")


def test_a_folder_without_one_is_refused(tmp_path):
    folder = write_published("deepseek_vl2", tmp_path)
    with pytest.raises(ConfigError, match="has no chat template; leave --apply-chat-template out"):
        FolderTemplate(folder)
    for broken in ("{% if %}", "{{ raise_exception('no users') }}"):
        (folder / "chat_template.jinja").write_text(broken)
        with pytest.raises(ConfigError, match="its chat template: "):
            FolderTemplate(folder)
    with pytest.raises(ConfigError, match="its chat template: "):
        FolderTemplate(tmp_path / "none")
