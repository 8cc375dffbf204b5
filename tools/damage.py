#!/usr/bin/env python3
"""Damage files of every kind that is read, and see what becomes of them.

    python tools/damage.py --files 10000

A file is cut short, a bit of it turned, bytes are put in, taken out, set to zero or
overwritten; then it is read as the library reads it. It may be refused in one line, or
read with what it always held. Read with something else is *lost*: for files that carry
checksums there must be none. What other people write has no checksum (pictures, VQA's
JSON, a table): there `other` counts what still is a right file, with another content.
Anything but a ValueError or an OSError is a *crash*, and there must be none at all."""
import argparse
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from hyperclip_nb import Network, Writer
from hyperclip_nb.data.batches import all_texts
from hyperclip_nb.data.files import load_checked
from hyperclip_nb.data.folder import read_folder
from hyperclip_nb.data.images import open_image
from hyperclip_nb.data.metavqa import build_tasks, load_metavqa, save_metavqa
from hyperclip_nb.data.vqa import read_vqa, write_sample
from hyperclip_nb.lab.experiments import _read_grid, read_results, reproduce
from hyperclip_nb.lab.rows import read_rows
from hyperclip_nb.lab.parts import _read_part
from hyperclip_nb.lab.runs import _stored_arguments
from hyperclip_nb.lab.stages import PRESETS, add_preset
from hyperclip_nb.vision.clip import load_clip
from hyperclip_nb.vision.photographs import encode_files, open_features
from hyperclip_nb.writer.writer import load_writer

OURS = True  # carries a checksum
FOREIGN = False


def plain(value):
    "Something that can be compared with =="
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, '__dict__'):
        return plain(vars(value))
    return value


# ---- files of each kind, and how they are read


def run_files(place):
    "What `hyperclip reproduce` keeps"
    sizes = dict(tasks=(30, 10, 12), scenes=(300, 200, 200))
    if 'damage' not in PRESETS:
        add_preset('damage', 'smoke', world=sizes, multitask=dict(epochs=1))
    out = place/'run'
    reproduce('damage', methods=('clip', 'multitask'), out=out)
    stage = out/'stages'/'seed0-multitask.safetensors'
    rows = out/'rows'/'clip-seed0-100.json'
    return [
        (out/'config.json', lambda p: plain(_stored_arguments(out)), OURS),
        (out/'grid.json', lambda p: _read_grid(p), OURS),
        (rows, lambda p: read_rows(p), OURS),
        (stage, lambda p: plain(_read_part(p, None, 'cpu')), OURS),
        (out/'features.safetensors', lambda p: plain(load_checked(p)[0]), OURS),
        (out/'results.json', lambda p: read_rows_of_results(out), OURS),
        (out/'per_task.safetensors', lambda p: read_rows_of_results(out), OURS),
    ]


def read_rows_of_results(out):
    "What tables and figures are made of"
    results = read_results(out)
    names = 'config', 'rows', 'valid', 'test', 'concepts'
    return plain({name: results[name] for name in names})


def data_files(place):
    "What `hyperclip data` reads and keeps"
    vqa, tasks, kept = place/'vqa', place/'tasks', place/'features'
    write_sample(vqa, tasks=8)
    made = build_tasks(read_vqa(vqa))
    save_metavqa(made, tasks)
    texts = all_texts(made.tasks['train'] + made.tasks['test'])
    encode_files(load_clip(), vqa, made.images, texts, kept, shard=400)

    def features(path):
        found, index = open_features(kept, made.images, texts)
        pictures = [plain(shard) for shard in found.image.shards]
        return [pictures, plain(found.text), index['unreadable']]

    ours = [tasks/name for name in ('meta_train.json', 'meta_test.json')]
    ours.append(tasks/'prompt_meta.json')
    files = [(path, lambda p: plain(load_metavqa(tasks)), OURS) for path in ours]
    for path in sorted(kept.iterdir()):
        files.append((path, features, OURS))
    for path in sorted(vqa.glob('*.json')):
        files.append((path, lambda p: plain(read_vqa(vqa)), FOREIGN))
    return files


def writer_files(place):
    "A written network, and a model that writes networks"
    writer = Writer.from_pretrained()
    network, model = place/'network.safetensors', place/'model'
    writer.write('What color is the large star?').save(network)
    writer.save_pretrained(model)
    weights = model/'model.safetensors'

    def read_network(path):
        found = Network.load(path)
        about = {name: found.about[name] for name in ('question', 'prompt', 'answers')}
        return [plain(found.W), about, found.made_by['clip']]

    def read_model(path):
        _, walk, facts = load_writer(path)
        return [walk.digest, facts]

    def read_folder_of_model(path):
        return plain(Writer.from_pretrained(model).facts)

    return [
        (network, read_network, OURS),
        (weights, read_model, OURS),
        (model/'config.json', read_folder_of_model, FOREIGN),
    ]


def picture_files(place):
    "Pictures of many formats, and a table of questions about them"
    folder = place/'pictures'
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = []
    for ending in 'png', 'jpg', 'gif', 'webp', 'bmp', 'tif':
        noise = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        path = folder/f'{ending}.{ending}'
        Image.fromarray(noise).save(path)
        files.append((path, lambda p: open_image(p).tobytes(), FOREIGN))
    for i in range(8):
        Image.new('RGB', (8, 8), (20*i, 0, 0)).save(folder/f'{i}.png')
    lines = ['question,picture,answer']
    for question in range(5):
        for i in range(8):
            lines.append(f'What is {question}?,{i}.png,{("red", "blue")[i//4]}')
    table = place/'table.csv'
    table.write_text('\n'.join(lines) + '\n')
    options = dict(smallest=8, leave_out=True)
    read = (table, lambda p: plain(read_folder(folder, p, **options).data), FOREIGN)
    return [*files, read]


# ---- damage


def cut(data, rng):
    return data[:rng.randrange(len(data))]


def turn_bit(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at+1:]


def turn_bit_in_head(data, rng):
    at = rng.randrange(min(200, len(data)))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at+1:]


def put_in(data, rng):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def take_out(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 64):]


def set_to_zero(data, rng):
    at, n = rng.randrange(len(data)), rng.randint(1, 512)
    return data[:at] + bytes(min(n, len(data) - at)) + data[at+n:]


def overwrite(data, rng):
    at, n = rng.randrange(len(data)), rng.randint(1, 64)
    return data[:at] + rng.randbytes(min(n, len(data) - at)) + data[at+n:]


def swap_digit(data, rng):
    "Another digit for one of a text: what no parser can notice"
    digits = [i for i, byte in enumerate(data[:100_000]) if 48 <= byte < 58]
    if not digits:
        return turn_bit(data, rng)
    at = rng.choice(digits)
    return data[:at] + bytes([48 + (data[at] - 47)%10]) + data[at+1:]


WAYS = (
    cut, turn_bit, turn_bit_in_head, put_in, take_out, set_to_zero, overwrite,
    swap_digit,
)


def outcome(path, read, ours, expected):
    "What becomes of a damaged file, and the words about it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = read(path)
    except (ValueError, OSError) as refusal:
        text = str(refusal)
        is_short = '\n' not in text.strip() or 'mistakes:\n' in text # a list of them
        return ('refused' if is_short else 'many lines'), text
    except BaseException as crash:
        return 'crash', f'{type(crash).__name__}: {crash}'
    if found == expected:
        return 'same', ''
    return ('lost' if ours else 'other'), ''


def damage(place, n, seed=0):
    "Damage n files, one after the other: a line for each, with what became of it"
    rng = random.Random(seed)
    makers = run_files, data_files, writer_files, picture_files
    kinds = [kind for make in makers for kind in make(place)]
    expected = [read(path) for path, read, _ in kinds]
    lines = []
    for number in range(n):
        which = number % len(kinds)
        path, read, ours = kinds[which]
        way = WAYS[number//len(kinds) % len(WAYS)]
        whole = path.read_bytes()
        broken = way(whole, rng)
        path.write_bytes(broken)
        if broken == whole:
            continue
        what, text = outcome(path, read, ours, expected[which])
        path.write_bytes(whole)
        lines.append(dict(
            kind=path.name, ours=ours, way=way.__name__, outcome=what, text=text,
        ))
    return pd.DataFrame(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--files', type=int, default=10_000)
    parser.add_argument('--seed', type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix='damage-'))
    lines = damage(place, asked.files, asked.seed)
    counts = lines.groupby(['kind', 'ours']).outcome.value_counts()
    counts = counts.unstack(fill_value=0)
    print(counts.to_string())
    print(json.dumps(Counter(lines.outcome)))
    bad = lines[lines.outcome.isin(['crash', 'lost', 'many lines'])]
    for line in bad.head(20).itertuples():
        print(line.kind, line.way, line.outcome, line.text[:300])
    sys.exit(len(bad) > 0)


if __name__ == '__main__':
    main()
