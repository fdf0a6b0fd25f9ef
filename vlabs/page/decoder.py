"""Uploaded images are decoded in a process of its own, which is ended where an image takes too long or too much.

`python -m vlabs.page.decoder` is that process. It imports Pillow alone, may write no file, and ends with the page.
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
_REMEDY = "save it anew, as a plain JPEG or PNG"
# A megapixel takes 4 bytes a pixel of the decoder and as much for each of two copies.
_MEMORY, _MEMORY_A_PIXEL = 512 * 2**20, 16


class Decoder:
    """Decodes images in another process, which it starts when it is needed and again after it had to be ended.

    Args:
        megapixels: that an image may have.
        seconds: that it may take.
    """

    def __init__(self, megapixels: float, seconds: float) -> None:
        self.megapixels = megapixels
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(self, content: bytes) -> Image.Image:
        """Decode an image to RGB, turned as its camera says; of an animation the first frame.

        Raises:
            UserError: it is no whole image of a known format, has too many pixels, or takes too long.
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
            except (EOFError, OSError):  # it was ended, by the timer or because it took too much
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
            # It finds modules where this process does, and not in the folder that this happens to be in.
            found = os.pathsep.join(os.path.abspath(path) for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vlabs.page.decoder", str(self.megapixels), str(self.seconds)],
                env=os.environ | {"PYTHONPATH": found},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the page, which ends it
            )
            assert self._process.stdout is not None
            _receive(self._process.stdout)  # imports are no time of an image
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def decode(content: bytes, megapixels: float) -> Image.Image:
    """What the process does with an image; see `Decoder.decode`."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # Only the header is read until here, so a small file of very many pixels costs nothing.
            if image.width * image.height > megapixels * 1e6:
                raise UserError(
                    f"the image has {image.width} x {image.height} pixels, and {megapixels:g} million are"
                    " allowed: make it smaller"
                )
            return as_shown(image)
    except Image.DecompressionBombError:
        raise UserError(f"the image has more than {megapixels:g} million pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"the file is no image that is known here: give one of {_KNOWN}") from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"the image takes too much memory to decode: {_REMEDY}") from None
    except Exception:  # Pillow's decoders raise whatever a damaged file leads them to
        raise UserError(f"the file is no whole image: give one of {_KNOWN}") from None


def main(megapixels: float, seconds: float) -> None:
    """Decode what comes in until there is no more."""
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    Image.preinit()
    _bound(resource.RLIMIT_AS, int(_MEMORY + _MEMORY_A_PIXEL * megapixels * 1e6))
    _bound(resource.RLIMIT_FSIZE, 0)
    _bound(resource.RLIMIT_CORE, 0)
    _send(answers, b"ready")
    with suppress(EOFError, BrokenPipeError):
        while True:
            content = _receive(given)
            # Where nobody is left to end it, the system does.
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
    with suppress(ValueError, OSError):  # where the system does not know it, or is stricter itself
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def _send(stream: IO[Any], content: bytes) -> None:
    stream.write(struct.pack(">Q", len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[Any]) -> bytes:
    """What `_send` has sent.

    Raises:
        EOFError: the other side has ended before.
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
