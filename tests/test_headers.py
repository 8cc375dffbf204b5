"""A header that claims an absurd size is refused before the memory is taken.

A child process reads each file, and says the error and by how much its peak memory
grew; in this process the peak of an earlier test would hide it."""
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

MEGABYTES = 48 # that a refusal may take: decoders have buffers of their own
READ = '''
import json, resource, sys
from hyperclip_nb.data.files import read_json, read_tensors
from hyperclip_nb.data.images import open_image

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

readers = dict(safetensors=read_tensors, json=read_json)
for path in sys.argv[1:]:
    read = readers.get(path.rpartition('.')[2], open_image)
    before = peak()
    try:
        read(path)
        error = None
    except Exception as problem:
        error = str(problem)
    print(json.dumps(dict(path=path, error=error, growth=peak() - before)))
'''


def png(width, height, pixels=b'0', color=2):
    "A PNG that says it has so many pixels, and has one byte of them, or those given"
    def chunk(name, data):
        sum_ = zlib.crc32(name + data)
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', sum_)

    header = struct.pack('>IIBBBBB', width, height, 8, color, 0, 0, 0)
    parts = dict(IHDR=header, IDAT=zlib.compress(pixels, 1), IEND=b'')
    chunks = [chunk(name.encode(), data) for name, data in parts.items()]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def bomb(width, height):
    "A small PNG of gray that really becomes so many pixels"
    return png(width, height, bytes((width + 1)*height), color=0)


def bmp(width, height):
    header = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b'BM' + struct.pack('<IHHI', 60, 0, 0, 54) + header + b'0'*6


def gif(width, height):
    screen = b'GIF89a' + struct.pack('<HHBBB', width, height, 0, 0, 0)
    frame = b',' + struct.pack('<HHHHB', 0, 0, width, height, 0)
    return screen + frame + b'\x02\x02\x4c\x01\x00;'


def tiff(width, height):
    "Little endian, one strip of one byte"
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8)]
    entries += [(277, 1), (278, height), (279, 1)]
    rows = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in entries)
    return b'II*\x00' + struct.pack('<IH', 8, len(entries)) + rows + b'\x00'*4


def tensors(header, claimed=None):
    "A file of safetensors with a header, which may claim another length than it has"
    text = json.dumps(header).encode()
    return (claimed or len(text)).to_bytes(8, 'little') + text + b'\x00'*64


def tensor(shape, end):
    return dict(x=dict(dtype='F32', shape=shape, data_offsets=[0, end]))


FILES = {
    'pixels.png': png(60_000, 60_000), 'bomb.png': bomb(12_000, 10_000),
    'widest.png': png(2**31 - 1, 2**31 - 1), 'wide.png': png(2**31 - 1, 1),
    'pixels.bmp': bmp(60_000, 60_000), 'wide.bmp': bmp(2**31 - 1, 2**31 - 1),
    'pixels.gif': gif(65_535, 65_535), 'pixels.tif': tiff(60_000, 60_000),
    'wide.tif': tiff(2**32 - 1, 2**32 - 1),
    'length.safetensors': tensors({}, 2**60),
    'length2.safetensors': tensors({}, 90_000_000),
    'shape.safetensors': tensors(tensor([2**40], 2**42)),
    'shape2.safetensors': tensors(tensor([2**40], 64)),
    'shape3.safetensors': tensors(tensor([2**62, 2**62], 64)),
    'deep.json': b'{"rows": ' + b'['*1_000_000,
    'digits.json': b'{"rows": [' + b'9'*1_000_000 + b']}',
}


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What the child says of each file, by its name"
    folder = tmp_path_factory.mktemp('headers')
    paths = [folder/name for name in FILES]
    for path in paths:
        path.write_bytes(FILES[path.name])
    child = subprocess.run(
        [sys.executable, '-c', READ, *map(str, paths)],
        capture_output=True, text=True, encoding='utf-8', check=True, timeout=300,
    )
    rows = map(json.loads, child.stdout.splitlines())
    return {Path(row['path']).name: row for row in rows}


@pytest.mark.parametrize('name', FILES)
def test_an_absurd_size_is_refused_before_memory_is_taken(found, name):
    row = found[name]
    assert row['error'], 'it was read'
    assert '\n' not in row['error']
    assert row['growth'] < MEGABYTES, f'{row["growth"]:.0f} MB for {row["error"]}'
