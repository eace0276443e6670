"""What no real tokenizer of the golden file does: a longer text of fewer tokens."""

from __future__ import annotations

from gemoe_ds.data.conversation import ConversationTokenizer, _Text
from gemoe_ds.models.chat import ChatTemplate


class Merging:
    """ "ab" is two tokens and "abc" is one."""

    ids = {"ab": [1, 2], "abc": [3], "abcd": [3, 4]}

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.ids[text] for text in texts]}


def test_no_token_comes_twice_where_the_next_text_merges_with_one_before():
    run = [_Text("ab"), _Text("c"), _Text("d")]
    ConversationTokenizer(Merging(), ChatTemplate())._tokenize([run])  # type: ignore[arg-type]
    assert [piece.ids for piece in run] == [[3, 4], [], []]
