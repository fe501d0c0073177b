"""Caches of split training: made by other settings, cut short, killed, full, shared.

None is trained on that is not what it should be, and the first stage, run again, gives the bytes of a clean run.
"""
from __future__ import annotations

import errno
import functools
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from damaged_entries import deep, fifo, flip, half, pickled, rename, swap
from faults import FaultyCalls, Killed
from PIL import Image

from ms_diffsynth.cli.main import main
from ms_diffsynth.errors import CacheError, OutputError
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import family
from ms_diffsynth.storage import cache as cache_module, files
from ms_diffsynth.storage.cache import Cache, PlannedRow, digest_of
from ms_diffsynth.training import two_stage

pytestmark = pytest.mark.fault

FINGERPRINT = {"pipeline": "Toy", "dtype": "float32", "row_fields": ["image", "prompt"]}
ROWS = [PlannedRow(digest_of(name), name) for name in ("small.png", "large.png", "last.png")]
SLOTS = {row.key: {"moments": np.arange(size, dtype=np.float32)} for row, size in zip(ROWS, (30, 30_000, 50))}


def fill(folder, rows=ROWS, fingerprint=FINGERPRINT, calls=files.CALLS, slots=SLOTS):
    """Stage one without models: what `training.two_stage` does."""
    with pytest.MonkeyPatch.context() as patch:
        if calls is not files.CALLS:  # threads that write together must not patch each other
            patch.setattr(cache_module, "write_file", functools.partial(files.write_file, calls=calls))
        cache = Cache(folder)
        cache.begin(fingerprint, {}, {"instance": rows})
        for row in rows:
            if not cache.holds(row.key):
                cache.write(row.key, slots[row.key], (16, 16))
        cache.finish()
        return cache


def content(folder):
    """What is in a cache, by name, without what is hidden."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and not path.name.startswith(".")}


def only_sound(folder):
    """What a reader finds there is right or refused. Returns: the cache, and whether it is complete."""
    cache = Cache(folder)
    assert all(np.array_equal(cache.read(path.stem)[0]["moments"], SLOTS[path.stem]["moments"])
               for path in cache.entries())
    try:
        cache.check(FINGERPRINT)
    except CacheError as error:
        assert "is incomplete" in str(error) or "is not a cache" in str(error)
        return cache, False
    return cache, True


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return content(fill(tmp_path_factory.mktemp("clean")).folder)


# ---- C2, C5: killed, or failing, at every system call

def number_of_calls(folder):
    calls = FaultyCalls()
    fill(folder, calls=calls)
    return len(calls.made)


@pytest.mark.parametrize("fault", ["kill", errno.ENOSPC])  # others take the same path: tests/storage/test_files.py
def test_a_fault_at_any_system_call_is_mended_by_the_next_run(tmp_path, clean, fault):
    found = Counter()
    for at in range(number_of_calls(tmp_path / "count")):
        folder = tmp_path / str(at)
        with pytest.raises(Killed if fault == "kill" else OutputError) as caught:
            fill(folder, calls=FaultyCalls(at, fault))
        if fault != "kill":
            assert "cannot be written: ENOSPC " in str(caught.value) and caught.value.exit_code == 74
            assert not list(folder.rglob(".tmp-*")), "nothing half done is left"
        cache, is_complete = only_sound(folder)
        found[len(list(cache.entries())), is_complete] += 1
        assert content(fill(folder).folder) == clean
        shutil.rmtree(folder)
    assert {entries for entries, _ in found} == {0, 1, 2, 3}
    assert {is_complete for _, is_complete in found} == {False, True}  # the last calls only make the manifest durable


def test_a_file_that_may_not_grow(tmp_path, clean):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot be written: EFBIG .* \d+ bytes needed"):
            fill(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cache, is_complete = only_sound(tmp_path)
    assert cache.holds(ROWS[0].key) and not is_complete and not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(CacheError, match=r"is incomplete: 1 of 3 entries are there\. Run --task sft:data_process"):
        cache.check(FINGERPRINT)
    assert content(fill(tmp_path).folder) == clean


def test_what_a_dead_process_left_half_done_is_unused(tmp_path, clean):
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder = fill(tmp_path).folder
    left = [folder / f".tmp-{dead.pid}-01234567", next(folder.glob("entries/*")) / f".tmp-{dead.pid}-89abcdef"]
    mine = folder / f".tmp-{os.getpid()}-01234567"
    for path in (*left, mine):
        path.write_bytes(b"half")
    assert Cache(folder).unused() == sorted(left), "what a living process writes is its own"
    assert content(folder) == clean


# ---- C3: entries that are not what they were

# what is done to an entry -> what stage two says, and whether it is said before the network is loaded
DAMAGE = {
    "missing": (Path.unlink, "lacks the entries of 1.png", True),
    "renamed": (rename, "lacks the entries of 1.png", True),
    "a pipe": (fifo, "lacks the entries of 1.png", True),
    "cut": (half, "has damaged entries for 1.png", True),
    "empty": (lambda path: path.write_bytes(b""), "has damaged entries for 1.png", True),
    "a pickle": (pickled, "has damaged entries for 1.png", True),
    "a wrong bit": (flip, "(1.png) is damaged: its content has another digest", False),
    "of another row": (swap, "is damaged: its content has another digest", False),
    "deep": (deep, "has damaged entries for 1.png", True),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Two models of other weights, a data set, and its cache."""
    base = tmp_path_factory.mktemp("toy")
    for seed in (0, 1):
        family("toy").write_tiny(base / str(seed), seed)
    (base / "data").mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"data/{k}.png")
    (base / "data/metadata.csv").write_text("image,prompt\n0.png,a cat\n1.png,a dog\n2.png,a hat\n")
    assert main([*map(str, words(base)), "--task", "sft:data_process", "--output_path", str(base / "cache")]) == 0
    return base


def words(base, model="0"):
    return ("train", "--family", "toy", "--model_paths", base / model, "--height", 16, "--width", 16, "--num_epochs", 1,
            "--lora_rank", 2, "--sample_prompts", "[]", "--mode", "pynative", "--dataset_base_path", base / "data",
            "--dataset_metadata_path", base / "data/metadata.csv")


def stage_one(base):
    return *words(base), "--task", "sft:data_process", "--output_path", "cache"


def stage_two(base, *more, model="0"):
    return *words(base, model), "--task", "sft:train", "--dataset_base_path", "cache", "--output_path", "out", *more


@pytest.fixture
def mine(toy, tmp_path):
    """A copy of the cache, in the current folder."""
    shutil.copytree(toy / "cache", tmp_path / "cache")
    return toy


@pytest.fixture
def loaded(monkeypatch):
    """The names of the models that are loaded during the test."""
    names, load = [], Pipeline.load_models_to_device
    monkeypatch.setattr(Pipeline, "load_models_to_device", lambda self, asked: names.extend(asked) or load(self, asked))
    return names


def was_mended(err, count):
    return f"3 rows, {count} prepared" in err and f"{3 - count} there already" in err


def entry_of(label):
    cache = Cache("cache")
    return cache._path(next(row.key for row in cache.rows("instance") if row.label == label))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused_and_mended(run, mine, loaded, damage):
    change, says, is_early = DAMAGE[damage]
    change(entry_of("1.png"))
    code, err = run(*stage_two(mine))
    assert code == 78 and says in err and "Run --task sft:data_process again" in err, err
    assert loaded == [] or not is_early
    assert not list(Path("out").rglob("*.safetensors")) and not Path("canary").exists()
    code, err = run(*stage_one(mine))
    assert code == 0 and was_mended(err, 2 if damage == "of another row" else 1), err
    found, sound = content("cache"), content(mine / "cache")
    assert {name: found[name] for name in sound} == sound
    assert len(found) == len(sound) + (damage == "renamed")


def test_further_files_are_told_and_not_read(run, mine):
    sound = entry_of("1.png")
    shutil.copy(sound, sound.with_name("f" * 64 + ".safetensors"))
    (Path("cache") / "note.txt").write_text("mine")
    code, _ = run(*stage_two(mine))
    assert code == 0
    assert run("cache", "inspect", "cache")[0] == 0
    assert [path.name for path in Cache("cache").unused()] == ["f" * 64 + ".safetensors"]


@pytest.mark.parametrize("change", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path)],
                         ids=["pipe", "folder", "loop"])
@pytest.mark.usefixtures("not_for_ever")
def test_a_manifest_that_is_no_file(run, mine, change):
    Path("cache/cache.json").unlink()
    change(Path("cache/cache.json"))
    code, err = run(*stage_two(mine))
    assert code == 78 and "CacheError: cache/cache.json " in err and "Remove it and run --task" in err, err


# ---- C1: made by other settings

FOREIGN = {
    "vae": ((), "models.vae: "),
    "text encoder": ((), "models.text_encoder: "),
    "resolution": (("--height", 32, "--width", 32), "image.ImageCropAndResize.height: 16, expected 32"),
    "buckets": (("--height", "null", "--width", "null", "--max_pixels", 1024), "pictures.instance.image"),
    "dtype": ((), 'dtype: "float32", expected "bfloat16"'),
    "what is trained": (("--trainable_models", "text_encoder"), 'slots: ["moments", "prompt_embeds"], expected'),
    "code": ((), "units.encode_image: "),
    "class images": (("--task", "dreambooth:train", "--with_prior_preservation", "--class_base_path", "c",
                      "--class_prompt", "a"), "pictures.class: null, expected"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_cache_of_other_settings_is_refused_field_by_field(run, mine, tmp_path, monkeypatch, loaded, what):
    flags, says = FOREIGN[what]
    model = shutil.copytree(mine / "0", tmp_path / "model")
    if what in ("vae", "text encoder"):
        name = what.replace(" ", "_")
        shutil.copytree(mine / "1" / name, model / name, dirs_exist_ok=True)
    if what == "dtype":  # the CPU computes in float32 whatever is asked
        monkeypatch.setattr(two_stage, "dtype_name", lambda dtype: "bfloat16")
    if what == "code":
        digest = two_stage._code_digest
        monkeypatch.setattr(two_stage, "_code_digest", lambda cls: digest(cls)[::-1])
    before = content("cache")
    code, err = run(*stage_two(mine, *flags, model=model))
    assert code == 78 and "was made by another configuration: " in err and says in err, err
    assert "Train with the same settings, or make the cache again with --task sft:data_process" in err
    assert loaded == [] and not Path("out").exists() and content("cache") == before


def test_other_captions_and_pictures_are_other_rows(run, mine, tmp_path):
    """Only what changed is prepared, and the result is that of a new cache."""
    data = shutil.copytree(mine / "data", tmp_path / "data")
    (data / "metadata.csv").write_text("image,prompt\n2.png,a hat\n0.png,a cat\n1.png,another dog\n")
    Image.new("RGB", (30, 30), "red").save(data / "2.png")
    flags = ("--dataset_base_path", data, "--dataset_metadata_path", data / "metadata.csv")
    code, err = run(*stage_one(mine), *flags)
    assert code == 0 and was_mended(err, 2)
    assert len(Cache("cache").unused()) == 3, "two rows, and the text of one"
    assert run("cache", "prune", "cache")[0] == 0
    assert run(*stage_one(mine), *flags, "--output_path", "new")[0] == 0
    assert content("cache") == content("new")


# ---- C2, C5 on the command line

KILLED = """
import os, signal, sys
from ms_diffsynth.cli.main import main
from ms_diffsynth.storage import files
write, written = files.Calls.write, []
def dying(file, data):
    written.append(file)
    if len(written) > 6:  # a manifest, and entries of a header and a slot each, of a text and of a row
        write(file, data[:len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, data)
files.Calls.write = staticmethod(dying)
sys.exit(main(sys.argv[1:]))
"""


def test_killed_while_it_writes_an_entry(run, python, toy):
    done = python("-c", KILLED, *stage_one(toy))
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = list(Path("cache").rglob(".tmp-*"))
    assert len(half) == 1 and Cache("cache").unused() == half
    code, err = run(*stage_two(toy))
    assert code == 78 and "is incomplete: 1 of 3 entries are there" in err and "it continues" in err, err
    code, err = run(*stage_one(toy))
    assert code == 0 and was_mended(err, 2), err
    assert content("cache") == content(toy / "cache")
    assert run("cache", "prune", "cache")[0] == 0 and not half[0].exists()


def test_a_disk_that_is_full(run, toy, monkeypatch):
    write, written = files.Calls.write, []

    def full(file, data):
        written.append(file)
        if len(written) > 6:
            write(file, data[:len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(files.Calls, "write", staticmethod(full))
        code, err = run(*stage_one(toy))
    assert code == 74 and "cannot be written: ENOSPC" in err and "Free some space" in err, err
    assert not list(Path("cache").rglob(".tmp-*")) and len(list(Cache("cache").entries())) == 2, "a text and a row"
    assert run(*stage_two(toy))[0] == 78
    code, err = run(*stage_one(toy))
    assert code == 0 and was_mended(err, 2) and content("cache") == content(toy / "cache")


# ---- C4: several at once (two processes: tests/cli/test_split.py)

def together(*jobs):
    """Run functions at the same moment. Returns: what they returned, or raised."""
    start, found = threading.Barrier(len(jobs)), [None] * len(jobs)

    def one(k):
        start.wait()
        try:
            found[k] = jobs[k]()
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=one, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_four_writers_and_a_reader_at_once(tmp_path):
    rows = [PlannedRow(digest_of(k), f"{k}.png") for k in range(40)]
    slots = {row.key: {"moments": np.full(500, k, np.float32)} for k, row in enumerate(rows)}
    seen = Counter()

    def read():
        while not seen["complete"]:
            cache = Cache(tmp_path)
            for path in cache.entries():
                assert np.array_equal(cache.read(path.stem)[0]["moments"], slots[path.stem]["moments"])
                seen["entries"] += 1
            try:
                cache.check(FINGERPRINT)
                seen["complete"] += 1
            except CacheError as error:
                assert "is incomplete" in str(error) or "is not a cache" in str(error), error

    write = functools.partial(fill, tmp_path, rows, slots=slots)
    found = together(read, write, write, write, write)
    assert not [error for error in found if isinstance(error, Exception)] and seen["entries"] and seen["complete"]
    assert content(tmp_path) == content(fill(tmp_path / "alone", rows, slots=slots).folder)


def test_two_writers_of_other_settings_leave_one_whole_cache(tmp_path):
    kinds = [FINGERPRINT | {"dtype": dtype} for dtype in ("float32", "bfloat16")]
    rows = [[PlannedRow(digest_of([k, row.key]), row.label) for row in ROWS] for k in range(2)]
    slots = {row.key: {"moments": np.full(9, k, np.float32)} for k in range(2) for row in rows[k]}
    found = together(*(functools.partial(fill, tmp_path, rows[k], kinds[k], slots=slots) for k in range(2)))
    assert not [error for error in found if isinstance(error, Exception)], found
    refused = 0
    for k in range(2):
        cache = Cache(tmp_path)
        try:
            cache.check(kinds[k])
        except CacheError as error:
            refused += 'dtype: "' in str(error)
            continue
        assert [cache.read(row.key)[0]["moments"][0] for row in cache.rows("instance")] == [k] * 3
    assert refused == 1 and len(list(Cache(tmp_path).entries())) == 6
