"""Uploaded images are decoded in a separate process, which is killed if an image takes too much time or memory.

`python -m vlabs.page.decoder` is that process. It imports little besides Pillow, cannot write files, and ends with the
page.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from PIL import Image

from vlabs.data.decoding import as_shown
from vlabs.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_KNOWN = ", ".join(FORMATS)
_REMEDY = "save it again, as a plain JPEG or PNG"
# Bytes: a base, and per pixel 4 in the decoder and 4 for each copy.
_MEMORY, _MEMORY_A_PIXEL = 512 * 2**20, 16


class Decoder:
    """Decodes images in another process, which is started on demand, and again after it was killed.

    Args:
        megapixels: largest size of an image.
        seconds: longest time to decode an image.
    """

    def __init__(self, megapixels: float, seconds: float) -> None:
        self.megapixels = megapixels
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(self, content: bytes) -> Image.Image:
        """Decode an image to RGB, rotated by its EXIF; an animation gives its first frame.

        Raises:
            UserError: it is not a complete image of a known format, has too many pixels, or takes too long.
        """
        with self._lock:
            process = self._running()
            late = threading.Event()

            def give_up() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(self.seconds, give_up)
            timer.start()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                _send(process.stdin, content)
                said = json.loads(_receive(process.stdout))
                if "error" in said:
                    raise UserError(said["error"])
                return Image.frombytes("RGB", tuple(said["size"]), _receive(process.stdout))
            except (EOFError, OSError):  # the process was killed by the timer, or ran out of memory
                much = f"more than {self.seconds:g} s" if late.is_set() else "too much memory"
                raise UserError(f"the image takes {much} to decode: {_REMEDY}") from None
            finally:
                timer.cancel()
                if late.is_set() or process.poll() is not None:
                    self._end()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # It must find modules where this process does, and never in the current folder (-P).
            found = os.pathsep.join(os.path.abspath(path) for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vlabs.page.decoder", str(self.megapixels), str(self.seconds)],
                env=os.environ | {"PYTHONPATH": found},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C reaches only the page, which then ends this process
            )
            assert self._process.stdout is not None
            _receive(self._process.stdout)  # wait for its imports, which must not count as decoding time
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def decode(content: bytes, megapixels: float) -> Image.Image:
    """Decode an image inside the process; see `Decoder.decode`."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # Only the header has been read, so a small file with a huge image costs nothing.
            if image.width * image.height > megapixels * 1e6:
                raise UserError(
                    f"the image has {image.width} x {image.height} pixels, but only {megapixels:g} million are"
                    " allowed: make it smaller"
                )
            return as_shown(image)
    except Image.DecompressionBombError:
        raise UserError(f"the image has more than {megapixels:g} million pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"the file is not an image of a known format: use one of {_KNOWN}") from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"the image takes too much memory to decode: {_REMEDY}") from None
    except Exception:  # Pillow's decoders raise many kinds of errors for damaged files
        raise UserError(f"the file is not a complete image: use one of {_KNOWN}") from None


def main(megapixels: float, seconds: float) -> None:
    """Decode images from standard input until it ends."""
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    Image.preinit()
    _bound(resource.RLIMIT_AS, int(_MEMORY + _MEMORY_A_PIXEL * megapixels * 1e6))
    _bound(resource.RLIMIT_FSIZE, 0)
    _bound(resource.RLIMIT_CORE, 0)
    _send(answers, b"ready")
    with suppress(EOFError, BrokenPipeError):
        while True:
            content = _receive(given)
            # A limit by the system, in case the page has died and cannot kill this process.
            spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            _bound(resource.RLIMIT_CPU, math.ceil(spent + seconds) + 1)
            try:
                image = decode(content, megapixels)
            except UserError as error:
                _send(answers, json.dumps({"error": str(error)}).encode())
            else:
                _send(answers, json.dumps({"size": image.size}).encode())
                _send(answers, image.tobytes())


def _bound(what: int, most: int) -> None:
    with suppress(ValueError, OSError):  # the system has no such limit, or a stricter one
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def _send(stream: IO[Any], content: bytes) -> None:
    stream.write(struct.pack(">Q", len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[Any]) -> bytes:
    """Receive what `_send` has sent.

    Raises:
        EOFError: the other side has ended.
    """
    (length,) = struct.unpack(">Q", _whole(stream, 8))
    return _whole(stream, length)


def _whole(stream: IO[Any], length: int) -> bytes:
    content: bytes = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
