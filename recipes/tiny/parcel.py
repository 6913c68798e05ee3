"""Weights made small to carry, and made whole again to the byte.

    python recipes/tiny/parcel.py --parts DIR --tokenizer FILE --name long --out runs/long
    python recipes/tiny/parcel.py --parts DIR --tokenizer FILE --name long --cut DIR/tiny \
        --out runs/tiny

Three quarters of longwing-tiny's weights are its embedding. When a training ends, its rows are
rounded to 8 bits and one scale each, before anything is saved or measured: 0.7 % of their size, the
layers' 4 bits cost ten times that. So a folder of 45 MB is carried as 28, and nothing is lost.

`wrap` makes of a folder a parcel, `write_parts` cuts it into files of a given size; `unwrap` is the
way back. Of a quantised folder, whose embedding is the dense one's, everything else is carried
(`cut`), and put together with the parcel of the dense one (`mend`).

Shape key: V vocabulary, D model dim.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import EMBEDDING, write_tokenizer
from prepare import read_tokenizer
from safetensors.torch import load, save
from torch import Tensor

ROUNDED = "embedding.rounded"
"""Beside a model that was trained: the embedding's rows in 8 bits, and their scales."""

_WEIGHTS = "model.safetensors"


def round_rows(table_VD: Tensor) -> tuple[Tensor, Tensor]:
    """(V, D) int8 and (V, 1) float32, whose product is about the table."""
    scale_V1 = table_VD.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / 127
    return (table_VD / scale_V1).round().to(torch.int8), scale_V1


def rounded(q_VD: Tensor, scale_V1: Tensor) -> Tensor:
    """The table that is saved and measured, (V, D) float16."""
    return (q_VD.float() * scale_V1).half()


def wrap(folder: Path) -> bytes:
    """A folder that train.py made, its tokenizer left out."""
    settings = {
        file.name: file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".jinja") and file.name != "tokenizer.json"
    }
    rest = torch.frombuffer(bytearray(cut((folder / _WEIGHTS).read_bytes())), dtype=torch.uint8)
    parts = load((folder / ROUNDED).read_bytes())
    return save({"rest": rest, **parts}, metadata={"settings": json.dumps(settings)})


def unwrap(parcel: bytes, folder: Path) -> None:
    """Write the folder again; its tokenizer is for the caller to add."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = load(parcel)
    header_len = int.from_bytes(parcel[:8], "little")
    settings = json.loads(json.loads(parcel[8 : 8 + header_len])["__metadata__"]["settings"])
    for name, text in settings.items():
        (folder / name).write_text(text, encoding="utf-8")
    table = rounded(parts["q"], parts["scale"]).numpy().tobytes()
    (folder / _WEIGHTS).write_bytes(mend(parts["rest"].numpy().tobytes(), table))
    (folder / ROUNDED).write_bytes(save({"q": parts["q"], "scale": parts["scale"]}))


def cut(weights: bytes) -> bytes:
    """A safetensors file without the bytes of the embedding; its header stays as it is."""
    start, end = _place(weights)
    return weights[:start] + weights[end:]


def mend(rest: bytes, table: bytes) -> bytes:
    """The file again, from what `cut` left and the embedding's bytes."""
    start, end = _place(rest)
    if len(table) != end - start:
        raise SystemExit(f"an embedding of {len(table)} bytes; {end - start} were cut out")
    return rest[:start] + table + rest[start:]


def _place(weights: bytes) -> tuple[int, int]:
    """Where the embedding's bytes lie."""
    header_len = int.from_bytes(weights[:8], "little")
    start, end = json.loads(weights[8 : 8 + header_len])[EMBEDDING]["data_offsets"]
    return 8 + header_len + start, 8 + header_len + end


def write_parts(parcel: bytes, folder: Path, name: str, most: int) -> list[Path]:
    """NAME.00, NAME.01 and so on, of at most so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, start in enumerate(range(0, len(parcel), most)):
        files.append(folder / f"{name}.{number:02}")
        files[-1].write_bytes(parcel[start : start + most])
    return files


def read_parts(folder: Path, name: str) -> bytes:
    """What `write_parts` wrote."""
    files = sorted(folder.glob(f"{name}.[0-9][0-9]"))
    if not files:
        raise SystemExit(f"{folder} holds no {name}.00")
    return b"".join(file.read_bytes() for file in files)


def cut_folder(folder: Path, target: Path) -> None:
    """A quantised folder without its embedding and tokenizer, for a parcel's other half."""
    left_out = shutil.ignore_patterns("tokenizer.json", _WEIGHTS)
    shutil.copytree(folder, target, ignore=left_out, dirs_exist_ok=True)
    (target / _WEIGHTS).write_bytes(cut((folder / _WEIGHTS).read_bytes()))


def main() -> None:
    """Restore a folder from its parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("parts", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the parts")
    parser.add_argument("--cut", type=Path, help="a quantised folder whose embedding was cut out")
    given = parser.parse_args()
    parcel = read_parts(given.parts, given.name)
    if given.cut is None:
        unwrap(parcel, given.out)
    else:
        parts = load(parcel)
        table = rounded(parts["q"], parts["scale"]).numpy().tobytes()
        shutil.copytree(given.cut, given.out, dirs_exist_ok=True)
        whole = mend((given.cut / _WEIGHTS).read_bytes(), table)
        (given.out / _WEIGHTS).write_bytes(whole)
    write_tokenizer(given.out, read_tokenizer(given.tokenizer))


if __name__ == "__main__":
    main()
