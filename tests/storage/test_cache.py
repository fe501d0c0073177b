"""The cache folder: what is written is read back to the bit, and nothing else is believed."""
from __future__ import annotations

import json

import numpy as np
import pytest
from damaged_entries import deep, flip

from ms_diffsynth.errors import CacheError
from ms_diffsynth.storage import cache as cache_module
from ms_diffsynth.storage.cache import Cache, PlannedRow, differences, digest_of

pytestmark = pytest.mark.fault

SLOTS = {"moments": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "ids": np.array([3, 1, 2], np.int32)}
FINGERPRINT = {"pipeline": "Toy", "dtype": "float32", "models": {"vae": "a" * 64, "text": "b" * 64},
               "pictures": {"instance": {"image": {"Crop": {"height": 16, "width": 16}}}}}
ROWS = {"instance": [PlannedRow(digest_of(k), f"{k}.png") for k in range(3)]}


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.begin(FINGERPRINT, {"vae": {"channels": 4}}, ROWS)
    for k, row in enumerate(ROWS["instance"]):
        cache.write(row.key, {name: array + k for name, array in SLOTS.items()}, (16, 8 * (k + 1)))
    cache.finish()
    return cache


def test_what_is_written_is_read_back(cache):
    again = Cache(cache.folder)
    again.check(FINGERPRINT)
    assert again.rows("instance") == ROWS["instance"] and again.rows("class") == []
    assert again.manifest["configs"] == {"vae": {"channels": 4}} and again.unused() == []
    for k, row in enumerate(again.rows("instance")):
        slots, size = again.read(row.key)
        assert size == (16, 8 * (k + 1)) and set(slots) == set(SLOTS)
        for name, array in SLOTS.items():
            assert slots[name].dtype == array.dtype and np.array_equal(slots[name], array + k)


def test_a_slot_without_elements_is_read_back(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.begin(FINGERPRINT, {}, ROWS)
    slots = SLOTS | {"edit_latents": np.zeros((1, 0, 64), np.float32), "length": np.array(3, np.int32)}
    cache.write(ROWS["instance"][0].key, slots, (16, 8))
    found, _ = Cache(cache.folder).read(ROWS["instance"][0].key)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        name: (array.shape, array.dtype) for name, array in slots.items()}


def test_the_same_content_gives_the_same_bytes(cache, tmp_path):
    other = Cache(tmp_path / "other")
    other.begin(FINGERPRINT, {"vae": {"channels": 4}}, ROWS)
    for k, row in enumerate(ROWS["instance"]):
        other.write(row.key, {name: array + k for name, array in reversed(SLOTS.items())}, (16, 8 * (k + 1)))
    other.finish()
    files = sorted(p.relative_to(cache.folder) for p in cache.folder.rglob("*") if p.is_file())
    assert len(files) == 4
    assert all((cache.folder / f).read_bytes() == (other.folder / f).read_bytes() for f in files)


def test_sixty_four_flipped_bits_are_sixty_four_found(cache):
    key = ROWS["instance"][0].key
    path = cache._path(key)
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    blanks = sound.index(b"}}") + 2  # a header is padded with blanks, which mean nothing
    header_end = 8 + int.from_bytes(sound[:8], "little")
    places = [p for p in generator.permutation(len(sound)) if not blanks <= p < header_end][:64]
    for place in (*places, sound.index(b"format") + 2):
        broken = bytearray(sound)
        broken[place] ^= 1 << generator.integers(8)
        path.write_bytes(broken)
        with pytest.raises(CacheError, match="damaged"):
            cache.read(key)
        assert not cache.holds(key)
    path.write_bytes(sound)
    assert cache.holds(key)


def test_metadata_that_no_reader_should_descend_into(cache):
    deep(cache._path(ROWS["instance"][1].key))
    with pytest.raises(CacheError, match=r"\(1.png\) is damaged \(is nested deeper than"):
        cache.read(ROWS["instance"][1].key, "1.png")


def test_rows_of_one_text_name_its_entry_and_no_entry_is_opened_to_check(tmp_path, monkeypatch):
    cache, text, embeds = Cache(tmp_path), digest_of("a cat"), np.arange(6, dtype=np.float32).reshape(3, 2)
    cache.begin(FINGERPRINT, {}, ROWS)
    cache.write(text, {"embeds": embeds})
    for k, row in enumerate(ROWS["instance"]):
        cache.write(row.key, {"moments": np.full(4, k, np.float32)}, (16, 8), text)
    cache.finish()
    for name in ("read_header", "open_checkpoint"):
        monkeypatch.setattr(cache_module, name, lambda *a, **k: pytest.fail("opened"))
    again = Cache(tmp_path)
    again.check(FINGERPRINT)
    assert again.kind(ROWS["instance"][1].key) == (
        (16, 8), {"embeds": ("float32", (3, 2)), "moments": ("float32", (4,))})
    monkeypatch.undo()
    assert np.array_equal(again.read(ROWS["instance"][2].key)[0]["embeds"], embeds) and again.unused() == []
    assert len(list(again.entries())) == 4
    flip(again._path(text))
    assert not again.holds(ROWS["instance"][0].key)
    again._path(text).unlink()
    with pytest.raises(CacheError, match=r"lacks the entries of the text of"):
        Cache(tmp_path).check(FINGERPRINT)


def test_an_interrupted_cache_says_how_far_it_came(tmp_path):
    cache = Cache(tmp_path)
    cache.begin(FINGERPRINT, {}, ROWS)
    cache.write(ROWS["instance"][0].key, SLOTS, (16, 16))
    with pytest.raises(CacheError, match="incomplete: 1 of 3 entries are there"):
        Cache(tmp_path).check(FINGERPRINT)
    with pytest.raises(CacheError, match=r"lacks the entries of 1\.png, 2\.png"):
        cache.finish()


def test_fields_nobody_asks_for_are_not_compared(cache):
    cache.check({"dtype": "float32", "models": {"vae": "a" * 64}})
    assert differences({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": [1, 2]}}) == [
        "a.b: 1, expected 2", "a.c: [1], expected [1, 2]"]


def test_what_is_no_cache_says_what_it_is(tmp_path):
    with pytest.raises(CacheError, match="no such folder"):
        Cache(tmp_path / "none").check({})
    with pytest.raises(CacheError, match="the folder is empty"):
        Cache(tmp_path).check({})
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(CacheError, match=r"has no cache\.json"):
        Cache(tmp_path).check({})
    (tmp_path / "0.pth").write_bytes(b"\x80\x04")
    with pytest.raises(CacheError, match=r"0\.pth, pickled caches of DiffSynth-Studio. Loading a pickle runs whatever"):
        Cache(tmp_path).check({})


@pytest.mark.parametrize("damage, expected", [
    (lambda text: text[:50], "damaged"), (lambda text: "[]", "damaged"), (lambda text: "\x00", "damaged"),
    (lambda text: text.replace("float32", "float64"), "digest is wrong"),
    (lambda text: json.dumps((lambda m: m | {"digest": digest_of(m)})({"format": 9})), "its format is 9, expected 2"),
])
def test_a_damaged_manifest_is_refused(cache, damage, expected):
    path = cache.folder / "cache.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CacheError, match=expected):
        Cache(cache.folder)


def test_beginning_again_keeps_a_complete_cache_and_tells_what_changed(cache):
    assert cache.begin(FINGERPRINT, {"vae": {"channels": 4}}, ROWS) == [] and cache.manifest["complete"]
    changed = cache.begin(FINGERPRINT | {"dtype": "bfloat16"}, {}, ROWS)
    assert changed == ['dtype: "float32", expected "bfloat16"'] and not cache.manifest["complete"]
    assert cache.begin(FINGERPRINT, {}, {"instance": ROWS["instance"][:1]}) and len(cache.unused()) == 2
