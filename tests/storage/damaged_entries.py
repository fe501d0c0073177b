"""What can happen to an entry of a cache: functions of its path."""
from __future__ import annotations

import os


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def rename(path):
    path.rename(path.with_name("0" * 64 + path.suffix))


def swap(path):
    other = next(p for p in path.parents[1].rglob("*.safetensors")
                 if p != path and p.stat().st_size == path.stat().st_size)
    kept = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(kept)


def pickled(path):
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.")


def deep(path):
    """Metadata that no reader should descend into."""
    kept = path.read_bytes()
    length = int.from_bytes(kept[:8], "little")
    header = kept[8:8 + length].replace(b'"size":"[16, 16]"', b'"size":"' + b"[" * 100_000 + b'"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + kept[8 + length:])


def fifo(path):
    path.unlink()
    os.mkfifo(path)
