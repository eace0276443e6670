"""Lengths from headers and texts are those of the sequences that are trained on."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

import gemoe_ds.data.lengths as module
from gemoe_ds.data.collate import IGNORE, Collator
from gemoe_ds.data.lengths import Lengths, fingerprint, known_lengths, measured
from gemoe_ds.data.sample import Turn, of_turns, open_samples, write_samples
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.deepseek_vl2.images import DeepseekVl2Images
from gemoe_ds.models.images import SquareImages
from gemoe_ds.models.moe_llava.images import PaddedSquare
from gemoe_ds.models.molmoe.images import MolmoeImages
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.data.ragged import ragged
from tests.models.qwen3_vl.small import layout as qwen3_vl_images
from tests.tiny import write_tokenizer

LAYOUTS = {
    "tiny": (SquareImages(8, 4, 3), ChatTemplate()),
    "moe_llava_qwen": (PaddedSquare(28), Backbone.named("moe_llava_qwen").chat),
    "molmoe": (MolmoeImages(), Backbone.named("molmoe").chat),
    "deepseek_vl2": (DeepseekVl2Images(), Backbone.named("deepseek_vl2").chat),
    "qwen3_vl_moe": (qwen3_vl_images(), Backbone.named("qwen3_vl_moe").chat),
    "olmoe": (None, Backbone.named("olmoe").chat),
}
SIZES = [(1, 1), (7, 500), (500, 7), (336, 336), (384, 1200), (1280, 400), (640, 480), (1000, 3)]


def picture(size, kind="PNG", orientation=1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def write(folder, *, number=30, seed=0, sizes=SIZES):
    """Conversations of 1 to 4 turns, with pictures of every kind of header, some broken."""
    rng = np.random.default_rng(seed)
    pictures = [None, *(picture(size) for size in sizes)]
    if sizes is SIZES:
        pictures += [picture((640, 300), "JPEG", orientation) for orientation in (3, 6, 8)]
        pictures += [picture((300, 640), "TIFF", 6), picture((900, 500), "WEBP", 5)]
    pictures.append(b"none")

    def words(least):
        return " ".join(rng.choice(list("abcdefgh"), rng.integers(least, 30)))

    def sample(i):
        turns = [Turn(words(0), words(int(i % 7 > 0))) for _ in range(rng.integers(1, 5))]
        return of_turns(f"s{i}", pictures[i % len(pictures)], tuple(turns))

    write_samples(map(sample, range(number)), folder, source="test")
    return open_samples(folder)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lengths") / "data")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    names = {token for _, chat in LAYOUTS.values() for token in chat.specials}
    folder = tmp_path_factory.mktemp("tokenizer")
    names.add("<|endoftext|>")
    ids = {token: 40 + i for i, token in enumerate(sorted(names))}
    return load_tokenizer(write_tokenizer(folder, specials=ids))


def collator_of(tokenizer, name, max_length=512):
    return Collator(tokenizer, *LAYOUTS[name], max_length=max_length)


@pytest.mark.parametrize("name", LAYOUTS)
def test_they_are_what_encode_gives(name, samples, tokenizer):
    collator = collator_of(tokenizer, name, 10**6)
    lengths = measured(samples, collator, range(len(samples)))
    for row in range(len(samples)):
        encoded = collator.encode_or_leave_out(row, samples[row])
        if encoded.bad:
            assert lengths.bad_samples(samples, collator.max_length, [row]) == [encoded.bad]
        else:
            assert lengths.whole_N[row] == len(encoded.input_ids), samples[row].messages
            assert lengths.image_N[row] == sum(encoded.is_vision)
    assert lengths.cut(collator.max_length).is_bad_N.sum() == (28 if name == "olmoe" else 2)


def test_cuts_are_those_of_encode(tmp_path, tokenizer):
    """At every length; four tokens of image before the words."""
    samples = write(tmp_path / "data", number=40, sizes=[(8, 8)])
    collator = collator_of(tokenizer, "tiny")
    lengths = measured(samples, collator, range(len(samples)))
    for max_length in range(2, 160, 7):
        collator.max_length, cut = max_length, lengths.cut(max_length)
        for row in range(len(samples)):
            encoded = collator.encode_or_leave_out(row, samples[row])
            targets = sum(label != IGNORE for label in encoded.labels)
            found = cut.length_N[row], cut.targets_N[row], cut.is_bad_N[row]
            assert found == (len(encoded.input_ids), targets, encoded.bad is not None)
            if encoded.bad:
                assert lengths.bad_samples(samples, max_length, [row]) == [encoded.bad]
            else:
                assert cut.cut_answers_N[row] == encoded.cut_answers
        dropped = lengths.cut(max_length, drop=True)
        is_long_N = lengths.whole_N > max_length
        is_long_N[[*lengths.broken]] = False
        assert np.array_equal(dropped.is_dropped_N, is_long_N) and not cut.is_dropped_N.any()
        assert not (dropped.length_N + dropped.cut_answers_N)[is_long_N].any()
        assert not (dropped.is_bad_N & is_long_N).any(), "dropped, and no more bad for it"
        for name in ("length_N", "targets_N", "is_bad_N"):
            kept, all_N = getattr(dropped, name), getattr(cut, name)
            assert np.array_equal(kept[~is_long_N], all_N[~is_long_N])


@pytest.mark.parametrize("name", LAYOUTS)
def test_of_samples_of_every_shape(name, tmp_path, tokenizer):
    """Pictures anywhere, system messages, answers that are not learned, texts; and cuts of them.
    What a model cannot read is bad for both."""
    rng = random.Random(1)
    rows = [ragged(rng, f"s{i}", sizes_known=i % 3 > 0)[0] for i in range(24)]
    write_samples(rows, tmp_path / "data", source="test")
    samples, collator = open_samples(tmp_path / "data"), collator_of(tokenizer, name)
    lengths, refused = measured(samples, collator, range(len(samples))), 0
    for max_length in (10, 60, 2500, 10**6):
        collator.max_length, cut = max_length, lengths.cut(max_length)
        for row in range(len(samples)):
            encoded = collator.encode_or_leave_out(row, samples[row])
            targets = sum(label != IGNORE for label in encoded.labels)
            found = cut.length_N[row], cut.targets_N[row], cut.image_N[row], cut.is_bad_N[row]
            is_bad = encoded.bad is not None
            assert found == (len(encoded.input_ids), targets, sum(encoded.is_vision), is_bad)
            assert encoded.bad or cut.cut_answers_N[row] == encoded.cut_answers
            if is_bad:
                assert lengths.bad_samples(samples, max_length, [row]) == [encoded.bad]
        refused = int(cut.is_bad_N.sum())
    assert (refused > 0) == (name in ("tiny", "molmoe", "olmoe")), "at no length"


def test_answers_of_bad_samples_are_cut_too():
    """The second turn of the first sample does not fit, nor the only one of the second."""
    turns_T4 = np.array([[5, 1, 1, 2], [3, 2, 1, 0], [50, 1, 1, 9]], dtype=np.int32)
    cut = Lengths(np.array([0, 2]), turns_T4, {}).cut(10)
    assert cut.image_N.tolist() == [2, 0]
    assert cut.length_N.tolist() == [7, 1] and cut.targets_N.tolist() == [2, 0]
    assert cut.cut_answers_N.tolist() == [1, 1] and cut.is_bad_N.tolist() == [False, True]


def same(one, other):
    return one.broken == other.broken and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("first_N", "turns_T4")
    )


def test_ranks_divide_the_work(samples, tokenizer):
    """The second of three ranks meets the parts of the others; the first one gets the whole."""
    collator = collator_of(tokenizer, "molmoe")
    whole = measured(samples, collator, range(len(samples)))
    parts = [measured(samples, collator, rows) for rows in (range(10), range(10, 20))]
    parts.append(measured(samples, collator, range(20, len(samples))))
    assert same(Lengths.joined(parts), whole)
    sent = []

    def gather(here):
        sent.append(here)
        return [False] if here is False else parts

    found, file = known_lengths(samples, collator, rank=1, world=3, gather=gather)
    assert (found, file) == (None, None) and same(sent[1], parts[1])


@pytest.fixture
def counted(monkeypatch):
    """Numbers of samples that were measured."""
    calls, original = [], module.measured

    def measured_(samples, collator, rows, **more):
        calls.append(len(rows))
        return original(samples, collator, rows, **more)

    monkeypatch.setattr(module, "measured", measured_)
    return calls


def test_they_are_worked_out_once(tmp_path, tokenizer, counted):
    samples, collator = write(tmp_path / "data", sizes=[(8, 8)]), collator_of(tokenizer, "tiny")
    first, file = known_lengths(samples, collator)
    assert file.parent == samples.path and counted == [30]
    collator.max_length = 17  # is no part of them
    again, _ = known_lengths(samples, collator)
    assert same(again, first) and counted == [30, 16], "and a few to see that they fit"


@pytest.mark.parametrize("harm", ["cut", "text", "empty", "flipped", "foreign", "pickle", "short"])
def test_a_damaged_or_foreign_file_is_worked_out_again(tmp_path, tokenizer, counted, harm):
    samples, collator = write(tmp_path / "data", sizes=[(8, 8)]), collator_of(tokenizer, "tiny")
    first, file = known_lengths(samples, collator)
    whole = file.read_bytes()
    if harm == "foreign":
        other = known_lengths(write(tmp_path / "other", seed=1), collator)[1]
        file.write_bytes(other.read_bytes())
    elif harm == "short":
        module.keep(measured(samples, collator, range(25)), file)
    elif harm == "pickle":
        np.savez(file, first_N=np.array([object()]), broken=np.array("{}"))
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        harms = {"cut": whole[:-100], "text": b"[]", "empty": b"", "flipped": flipped}
        file.write_bytes(harms[harm])
    again, _ = known_lengths(samples, collator)
    assert same(again, first)
    assert counted[-1] == 30 or harm == "flipped", "there are bytes that nothing reads"
    assert file.read_bytes() and same(known_lengths(samples, collator)[0], first)


def test_where_the_data_cannot_be_written_another_folder_is_read(tmp_path, tokenizer, counted):
    samples, collator = write(tmp_path / "data", sizes=[(8, 8)]), collator_of(tokenizer, "tiny")
    name = module.file_name(samples, collator)
    (samples.path / name / "x").mkdir(parents=True)  # nothing can be put in its place
    first, file = known_lengths(samples, collator)
    assert file is None
    kept = module.keep(first, tmp_path / name)
    again, file = known_lengths(samples, collator, others=[tmp_path])
    assert file == kept and same(again, first) and not list(samples.path.glob(".*"))


def test_whatever_lengths_depend_on_is_in_the_fingerprint(tmp_path, samples, tokenizer):
    prints = {fingerprint(samples, collator_of(tokenizer, name)) for name in LAYOUTS}
    other = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", ("more",)))
    prints.add(fingerprint(samples, collator_of(other, "tiny")))
    prints.add(fingerprint(write(tmp_path / "data", seed=2), collator_of(tokenizer, "tiny")))
    for layout in (qwen3_vl_images(merge_size=1), MolmoeImages(max_crops=6)):
        prints.add(fingerprint(samples, Collator(tokenizer, layout, ChatTemplate(), max_length=9)))
    assert len(prints) == len(LAYOUTS) + 4
    once = fingerprint(samples, collator_of(tokenizer, "tiny"))
    tokenizer(["a b"], add_special_tokens=False, split_special_tokens=True)
    assert fingerprint(samples, collator_of(tokenizer, "tiny", 99)) == once
