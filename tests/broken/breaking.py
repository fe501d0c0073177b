"""Ways to break a value, a JSON document, a file of weights, any file. All take a ``random.Random``, none a clock."""
from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

TEXTS = ["", " ", "\t", "null", "~", "0", "-1", "-0", "1", "7", "5000", "1e400", "-1e400", "nan", "inf", "-inf",
         "1e-320", "1e-46", "1e308", "-1e308", "0.5", "1.0", "1,5", "16.5", "1_000", "+5", "0x10", "0b1", "1e3", "٣",
         "１２", "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808",
         "-9223372036854775809", "99999999999999999999", "9" * 5000, "x" * 256, "x" * 5000, "x" * 70_000, "é" * 130,
         "猫", "\udce9", "caf\udce9", "\ud83d", "a\x07b", "\x1b[31m", "\u200b", "\ufeff", "\ufffe", "\u202e", "\n",
         "a\nb", "[", "[]", "[1]", "[[]]", '["a"]', '["a", 1]', "[null]", '[""]', "{}", '{"a": 1}', '[{"a": 1}]',
         "[" * 100_000, "true", "false", "yes", "None", "a,b", ",", ",,", "a:b", "a/b:c", "owner/name:",
         "owner/name:*.safetensors", ":", "/", "//", ".", "..", "../../../../etc", "/etc/passwd", "/dev/null",
         "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/1/root", "*", "?", "[a-", "toy.yaml", "toy.yaml/x", "data",
         "data/000.png", "empty", "emptydir", "pipe", "loop", "dangling", "locked", "lockeddir", "binary", "odd\udcff",
         "models/toy", "models/flux", "models/toy/vae", "models/toy/model_index.json", "lora.safetensors",
         "full.safetensors", "runs/run", "runs/run/checkpoints", "runs/run/checkpoints/step-00000003", "cache",
         "template", "rows.csv", "rows.jsonl", "--x", "-", "--", "'", '"', "$HOME", "~/x", "%s", "{0}", "\\", "a\\b",
         "http://x/y", "file:///etc", "dit", "vae", "vae.decoder", "text_encoder", "auto", "none"]
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 7, 64, 0.5, -0.5, 1e-320, 1e308, -1e308, 2**31, 2**32, 2**63,
                     2**64, 10**30, -(2**63), "", "x", "0.5", "64", "nan", "x" * 70_000, "\ud83d", "a\0b", "../x",
                     "/etc/passwd", [], {}, [None], [0], [1], [-1], [1, 2], [[1]], ["x"], [2**63], {"a": 1},
                     {"": None}, [[[[[[]]]]]], [1] * 100, [0.5] * 4]
RAW = ["null", "[]", "{}", "0", '"x"', "", " ", "{", "[", "nul", "{'a': 1}", '{"a": NaN}', '{"a": Infinity}',
       '{"a": 1, "a": 2}', '{"a": 1e999}', "[" * 100_000, '{"a":' * 50_000, "9" * 5000, '{"a": ' + "9" * 5000 + "}",
       "\ufeff{}", "// x\n{}", "{}{}", "\0" * 64]


def value(random: random.Random) -> Any:
    return random.choice(VALUES)


def broken_json(random: random.Random, document: Any) -> bytes:
    """A document with one or two places of it changed, or its text broken."""
    if random.random() < 0.2:
        return random.choice(RAW).encode("utf-8", "surrogatepass")
    document = json.loads(json.dumps(document))
    for _ in range(random.choice((1, 1, 1, 2))):
        places = list(_places(document))
        if not places:
            break
        outer, key = random.choice(places)
        kind = random.random()
        if kind < 0.12:
            del outer[key]
        elif kind < 0.2 and isinstance(outer, dict):
            outer[random.choice(["later_setting", "", "_x", key.upper(), "x" * 300])] = value(random)
        elif kind < 0.35 and isinstance(outer[key], (int, float)) and not isinstance(outer[key], bool):
            outer[key] = random.choice([outer[key] + 1, outer[key] * 2, -outer[key], outer[key] * 1000,
                                        str(outer[key]), [outer[key]],
                                        outer[key] / 3, float(outer[key])])
        elif kind < 0.45 and isinstance(outer[key], list):
            outer[key] = random.choice([outer[key][1:], outer[key] * 2, outer[key][::-1], {"0": outer[key]}])
        else:
            outer[key] = value(random)
    text = json.dumps(document, ensure_ascii=random.random() < 0.5)
    return text.encode("utf-8", "surrogatepass") if random.random() < 0.85 else broken_bytes(random,
                                                                                             text.encode("utf-8",
                                                                                                         "surrogatepass"))


def _places(document: Any):
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document,
                                                                                                  list) else ()
    for key, inner in list(items):
        yield document, key
        yield from _places(inner)


def broken_bytes(random: random.Random, data: bytes) -> bytes:
    """Bytes cut, flipped, doubled, encoded in another way, or replaced."""
    kind = random.randrange(11)
    at = random.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[at:]
    if kind == 2:
        return b""
    if kind == 3 and data:
        flipped = bytearray(data)
        for _ in range(random.choice((1, 1, 8, 64))):
            flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(flipped)
    if kind == 4:
        return data + random.choice((b"\0", b"\n", b"x", data, bytes(1000)))
    if kind == 5:
        return data[:at] + random.choice((b"\xff", b"\xe9", b"\0", b"\xed\xa0\x80", b"\xef\xbf\xbe", b"\r",
                                          b"\x1b")) + data[at:]
    if kind == 6:
        return random.randbytes(random.choice((1, 100, 10_000)))
    if kind == 7:
        return data.decode("latin-1").encode("utf-16")
    if kind == 8:
        return b"\xef\xbb\xbf" + data
    if kind == 9:
        return bytes(len(data))
    return data.replace(b"\n", b"\r\n") if at % 2 else data[:at] + data[at + random.randrange(64):]


def broken_weights(random: random.Random, data: bytes) -> bytes:
    """A safetensors file with its header, a length or some bytes broken."""
    if random.random() < 0.25 or len(data) < 100:
        return broken_bytes(random, data)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return broken_bytes(random, data)
    kind, name = random.randrange(14), random.choice(names)
    entry = header[name]
    if kind == 0:
        entry["dtype"] = random.choice(["U32", "I32", "F64", "BF16", "F16", "BOOL", "I64", "F8_E4M3", "F8_E5M2", "F4",
                                        "", "x", None, 1])
    elif kind == 1:
        sizes = {"F32": ("U32", "I32"), "F16": ("I16", "BF16", "U16"), "F64": ("I64", "U64")}
        for other in names:
            header[other]["dtype"] = random.choice(sizes.get(header[other]["dtype"], ("F32",)))
    elif kind == 2:
        entry["shape"] = random.choice([[], [-1], [0], [2**63], entry["shape"][::-1], [*entry["shape"], 1], None, "x",
                                        [1.5], [None]])
    elif kind == 3:
        entry["data_offsets"] = random.choice([[0, 0], [0], [], [-1, 4], [0, 2**63], None, "x",
                                               entry["data_offsets"][::-1]])
    elif kind == 4:
        header["__metadata__"] = random.choice([None, [], {}, 1, "x", {"a": 1}, {"a": None}, {"a": {}},
                                                {"lora_adapter_metadata": "x"}])
    elif kind == 5:
        del header[name]
    elif kind == 6:
        header[random.choice(["x", "", name + ".x", "lora_unet_x", "a\0b", "\ud83d", "x" * 5000])] = header.pop(name)
    elif kind == 7:
        header[name] = value(random)
    elif kind == 8:
        del entry[random.choice(list(entry))]
    elif kind == 9:
        names_by_size = [n for n in names if header[n]["shape"] == entry["shape"]]
        other = random.choice(names_by_size)
        header[name], header[other] = header[other], header[name]
    elif kind == 10:
        start, end = entry["data_offsets"]
        filler = random.choice((struct.pack("<f", float("nan")), struct.pack("<f", float("inf")), b"\xff\xff\xff\x7f"))
        body = body[:start] + (filler * ((end - start) // 4 + 1))[:end - start] + body[end:]
    elif kind == 11:
        metadata = header.setdefault("__metadata__", {})
        adapter = random.choice([
            {"lora_alpha": v} for v in (0, -4, 10**400, "x", None, 1e308, 1e-320, True, [1])] + [
            {"alpha_pattern": v} for v in ({"layer_1": 10**400}, [], "x", {"layer_1": None}, {"layer_1": -1})] + [
            {"use_dora": True}, {"use_rslora": "x"}, {"r": 0}, [], 1, "x", None])
        metadata["lora_adapter_metadata"] = json.dumps(adapter)
        if random.random() < 0.3:
            metadata["ms_diffsynth.family"] = random.choice(["flux", "x", ""])
    elif kind == 12:
        text = json.dumps(header).encode()
        return struct.pack("<Q", random.choice([0, 1, len(text) - 1, len(text) + 1, 2**40, 2**63])) + text + body
    else:
        text = broken_bytes(random, json.dumps(header).encode())
        return struct.pack("<Q", len(text)) + text + body
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def break_file(random: random.Random, path: Path, others: list[Path] = ()) -> str:
    """Break a file in place, which may be a hard link to a sound one. Returns: how."""
    kind = random.random()
    data = path.read_bytes()
    path.unlink()
    if kind < 0.3:
        return replace_file(random, path, others)
    if path.suffix == ".json" and kind < 0.95:
        try:
            path.write_bytes(broken_json(random, json.loads(data)))
            return "json"
        except ValueError:
            pass
    path.write_bytes(broken_weights(random, data) if path.suffix == ".safetensors" else broken_bytes(random, data))
    return "bytes"


def replace_file(random: random.Random, path: Path, others: list[Path] = ()) -> str:
    """Something else than the file where it was."""
    kind = random.randrange(10)
    if kind == 0:
        return "missing"
    if kind == 1:
        path.mkdir()
        return "folder"
    if kind == 2:
        path.symlink_to(path.name)
        return "link to itself"
    if kind == 3:
        path.symlink_to("nowhere")
        return "dangling link"
    if kind == 4:
        os.mkfifo(path)
        return "pipe"
    if kind == 5:
        path.symlink_to(random.choice(("/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/etc/passwd")))
        return "link to a device"
    if kind == 6:
        path.write_bytes(b"x")
        path.chmod(0)
        return "not readable"
    if kind == 7:
        path.touch()
        return "empty"
    if kind == 8 and others:
        other = random.choice(others)
        if other.is_file():
            path.write_bytes(other.read_bytes())
            return f"{other.name} in its place"
    path.write_bytes(random.randbytes(1000))
    return "noise"
