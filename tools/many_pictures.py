#!/usr/bin/env python3
"""Features of a million pictures: time, memory, and a stop in the middle.

    python tools/many_pictures.py --pictures 1000000

A hundred small files stand for a million, by links, and two small encoders for CLIP:
what is measured is the way from files to features, which is kept in shards. The first
process is killed when half of the shards are there; the second one goes on, and must
leave every shard of the first as it is."""
import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from hyperclip_nb.vision.encoders import wrap_clip
from hyperclip_nb.vision.photographs import encode_files, open_features

TEXTS = ['a star', 'a ring']


class Small(nn.Module):
    "Two encoders of ten numbers"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.picture = nn.Linear(3*64, 10)
        self.words = nn.Embedding(50, 10)

    def encode_image(self, pixels):
        return self.picture(pixels.flatten(1))

    def encode_text(self, tokens):
        return self.words(tokens).mean(1)


def small_clip():
    def transform(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)/255

    def tokens(texts):
        return torch.tensor([[len(text) % 50] for text in texts])

    return wrap_clip(Small(), lambda image: transform(image.resize((8, 8))), tokens)


def write_pictures(folder, n):
    "A hundred files, and links to them: a thousand in a folder"
    rng = np.random.default_rng(0)
    names = []
    for i in range(n):
        place = folder/f'{i//1000:04d}'
        if i % 1000 == 0:
            place.mkdir(parents=True)
        name = f'{place.name}/{i:07d}.png'
        if i < 100:
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder/name)
        elif i < 100_000:  # a file system allows some 65,000 links to a file
            os.link(folder/names[i % 100], folder/name)
        else:
            os.symlink(folder/names[i % 100], folder/name)
        names.append(name)
    return names


def encode(pictures, names, kept):
    encode_files(small_clip(), pictures, names, TEXTS, kept, batch=256)


def peak():
    "Most memory that this process has held, in MiB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def in_fork(work):
    "Run something in a process of its own, which prints its time and memory"
    child = os.fork()
    if child == 0:
        start, before = time.time(), peak()
        work()
        print(f'{time.time() - start:.0f} s, memory {before:.0f} → {peak():.0f} MiB')
        sys.stdout.flush()
        os._exit(0)
    return child


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pictures', type=int, default=1_000_000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix='pictures-'))
    names = write_pictures(place/'pictures', asked.pictures)
    kept = place/'kept'
    shards = -(-len(names)//2048)
    print(f'{len(names)} pictures in {shards} shards', flush=True)
    first = in_fork(lambda: encode(place/'pictures', names, kept))
    while len(list(kept.glob('images-*'))) < shards//2:
        time.sleep(.05)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    before = {path: path.stat().st_mtime_ns for path in kept.glob('images-*')}
    print(f'killed with {len(before)} shards; the rest:', flush=True)
    second = in_fork(lambda: encode(place/'pictures', names, kept))
    assert os.waitpid(second, 0)[1] == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    start = time.time()
    features, _ = open_features(kept, names, TEXTS)
    assert len(features.image) == len(names)
    rows = torch.arange(100)
    assert features.image[rows].equal(features.image[rows + 100])
    print(f'opened in {time.time() - start:.1f} s')


if __name__ == '__main__':
    main()
