"""Conversations: LLaVA's and ShareGPT's `conversations`, OpenAI's `messages`, their variants."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from gemoe_ds.data.sources.formats import checks
from gemoe_ds.data.sources.formats.base import Columns, Draft, RowFormat, pictures_of
from gemoe_ds.data.sources.formats.listed import as_list
from gemoe_ds.data.sources.formats.parts import READ, Listed, as_text
from gemoe_ds.data.sources.lost_keys import loss_of, refuse_lost, unread
from gemoe_ds.data.sources.unusable import Unusable, cut, is_empty, short
from gemoe_ds.data.turn import MARK, Message, Role

ROLES: dict[Any, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
}
_SYSTEM = re.compile("system([_ ]?(prompt|message))?", re.I)
_TOOL_SPEAKERS = re.compile(r"(tool|function|observation|ipython|environment)", re.I)
_KEYS = (("from", "value"), ("role", "content"))  # of the speaker and what he says


class Chat(RowFormat):
    """A list of messages under `key`, each of `from` and `value`, or `role` and `content`."""

    key: ClassVar[str]
    moves_picture: ClassVar[bool] = False  # that `image` names: from the end to the start

    @classmethod
    def accepts(cls, row: Mapping[str, Any], columns: Columns) -> bool:
        return row.get(cls.key) is not None

    @classmethod
    def read(cls, row: Mapping[str, Any], columns: Columns, kinds: Any) -> Draft:
        messages = cls._messages(row)
        keys = [_keys_of(index, message) for index, message in enumerate(messages)]
        called = [message[keys[i][0]] for i, message in enumerate(messages)]
        roles = [_role(index, speaker) for index, speaker in enumerate(called)]
        listed = pictures_of(row, columns)
        systems = [key for key, value in row.items() if value and _SYSTEM.fullmatch(key)]
        read = {cls.key, *systems[:1], *columns.around}
        refuse_lost(row, read, has_pictures=bool(listed))
        _refuse_two_lists(row, columns)
        is_learned = [
            roles[i] == "assistant"
            if len(message) == 2  # `keys` alone
            else loss_of(f"message {i}", message, keys[i], is_answer=roles[i] == "assistant")
            for i, message in enumerate(messages)
        ]
        _check_system(roles)
        checks.check_order(roles, [str(name) for name in called])
        contents = [message[keys[i][1]] for i, message in enumerate(messages)]
        texts, pictures = _texts(contents, roles, Listed(listed))
        if systems:
            if roles[0] == "system":
                raise Unusable(
                    "a second system prompt", f"it has {systems[0]!r} and a system message"
                )
            roles, is_learned = ["system", *roles], [False, *is_learned]
            texts = [checks.checked_text(systems[0], row[systems[0]]), *texts]
        if len(pictures) == 1 and isinstance(row.get("image"), str) and cls.moves_picture:
            at = roles.index("user")
            texts[at] = picture_first(texts[at])
        spoken = conversation(roles, texts, is_learned, pictures, kinds)
        return Draft(spoken, tuple(pictures), tuple(_notes(row, read, messages, keys)))

    @classmethod
    def _messages(cls, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages = row.get(cls.key)
        if messages is None:
            raise Unusable(*_other_format(row, cls.key))
        return as_list(cls.key, messages)


class Conversations(Chat):
    """LLaVA, ShareGPT, LLaMA-Factory's `sharegpt`: LLaVA moves a picture before its question."""

    name: ClassVar[str] = "conversations"
    title: ClassVar[str] = "conversations (LLaVA, ShareGPT)"
    key: ClassVar[str] = "conversations"
    moves_picture: ClassVar[bool] = True


class Conversation(Chat):
    """The same under the name that WildChat and LMSYS-Chat have for it."""

    name: ClassVar[str] = "conversation"
    title: ClassVar[str] = "conversation (WildChat, LMSYS-Chat)"
    key: ClassVar[str] = "conversation"


class Messages(Chat):
    """OpenAI's chats, with text or parts; ms-swift's and LLaMA-Factory's with `images`."""

    name: ClassVar[str] = "messages"
    title: ClassVar[str] = "messages (OpenAI's roles and contents)"
    key: ClassVar[str] = "messages"


def conversation(
    roles: Sequence[Role],
    texts: list[str],
    is_learned: Sequence[bool],
    pictures: Sequence[Any],
    kinds: Any,
) -> tuple[Message, ...]:
    """Messages in order, checked as a whole; an empty system prompt is none.

    Texts stay as they are, but for white space before a picture that a question begins with.
    """
    checks.check_markers(roles, texts, len(pictures))
    texts = [bare if (bare := text.lstrip()).startswith(MARK) else text for text in texts]
    spoken = list(zip(roles, texts, is_learned, strict=True))
    if not all(text.strip() for role, text, _ in spoken if role == "assistant"):
        raise Unusable("empty answer", "an answer is empty")
    if not any(is_learned):
        raise Unusable("weights of the loss", "none of its answers is to be learned")
    names = iter(checks.checked_kinds(kinds, roles.count("assistant")))
    return tuple(
        Message(role, text, loss, next(names) if role == "assistant" else None)
        for role, text, loss in spoken
        if text.strip() or role != "system"
    )


def picture_first(question: str) -> str:
    """A marker at either end of a question goes before it, and white space around that question
    goes, as in LLaVA's own loader.

    A marker within a text stays where it stands.
    """
    bare = question.strip()
    at_an_end = bare.startswith(MARK) or bare.endswith(MARK)
    if question.count(MARK) != 1 or not at_an_end:
        return question
    return f"{MARK}\n{question.replace(MARK, '').strip()}"


def _texts(
    contents: Sequence[Any], roles: Sequence[Role], listed: Listed
) -> tuple[list[str], list[Any]]:
    """Of all messages, and the pictures in the order of their markers."""
    texts: list[str] = []
    pictures: list[Any] = []
    for index, (content, role) in enumerate(zip(contents, roles, strict=True)):
        where = f"message {index}"
        if isinstance(content, list):
            content, own = as_text(where, content, listed)
            if own and role != "user":
                raise Unusable("marker in an answer", f"{where}, from the {role}, has a picture")
            pictures += own
        texts.append(checks.checked_text(where, content))
    if not pictures:
        return texts, listed.left
    if listed.left:
        raise Unusable(
            "picture without a marker",
            f"{len(listed.left)} of its {len(listed.pictures)} pictures stand in no message",
        )
    if sum(text.count(MARK) for text in texts) != len(pictures):
        raise Unusable("parts", f"it has pictures as parts, and {MARK} in a text as well")
    return texts, pictures


def _keys_of(index: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise Unusable("not conversations", f"message {index} is {short(message)}, not an object")
    for keys in _KEYS:
        if message.get(keys[0]) not in (None, ""):
            break
    else:
        raise Unusable("other speakers", f"message {index} is from nobody: {short(message)}")
    if keys[1] not in message:
        raise Unusable("no text", f"message {index} has no text")
    return keys


def _role(index: int, speaker: Any) -> Role:
    if isinstance(speaker, str) and (role := ROLES.get(speaker.lower())):
        return role
    if _TOOL_SPEAKERS.match(str(speaker)):
        raise Unusable(
            "tools", f"message {index} is from {speaker!r}; calls of tools are not supported"
        )
    raise Unusable(
        "other speakers",
        f"message {index} is from {short(speaker)}; the speakers are called system, human (or "
        "user) and gpt (or assistant)",
    )


def _check_system(roles: Sequence[Role]) -> None:
    if "system" in roles[1:]:
        raise Unusable(
            "a later system prompt",
            f"message {roles.index('system', 1)} is from the system; only the first one may be",
        )


def _refuse_two_lists(row: Mapping[str, Any], columns: Columns) -> None:
    found = [key for key in columns.pictures() if not is_empty(row.get(key))]
    as_lists = [v if isinstance(v, list) else [v] for v in (row[key] for key in found)]
    if any(pictures != as_lists[0] for pictures in as_lists[1:]):
        raise Unusable(
            "a second list of pictures", f"it has other pictures under {' and '.join(found)}"
        )


def _other_format(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    way_out = f"write it as {key!r}: a list of messages, or convert these rows by themselves"
    for other in RowFormat.known():
        if other.accepts(row, Columns()):
            return other.name, f"it is a row of {other.title}, not of {key!r}; {way_out}"
    keys = cut(", ".join(map(str, row))) if row else "none"
    return f"no {key}", f"it has no {key!r} (its keys: {keys}); {way_out}"


def _notes(
    row: Mapping[str, Any],
    read: set[str],
    messages: Sequence[Mapping[str, Any]],
    keys: Sequence[tuple[str, str]],
) -> Iterator[str]:
    for key in unread(row, read):
        yield f"the key {key!r} is ignored"
    pairs = list(zip(messages, keys, strict=True))
    of_messages = (key for m, own in pairs if len(m) > 2 for key in unread(m, own))
    for key in dict.fromkeys(of_messages):
        yield f"the key {key!r} of a message is ignored"
    contents = (m[own[1]] for m, own in pairs if isinstance(m[own[1]], list))
    of_parts = (key for c in contents for p in c if isinstance(p, dict) for key in unread(p, READ))
    for key in dict.fromkeys(of_parts):
        yield f"the key {key!r} of a part is ignored"
