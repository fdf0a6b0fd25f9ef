"""From raw downloads to prepared folders (`vlabs.data.prepared`). Three packages; imports go one way through them.

`scenes` (the rendered corpus) → `readers` (one module per raw layout) → `engine` (files, tables, images, output).
`vlabs prepare NAME` is `python -m data_prep.NAME`, where NAME is a module of `readers` or `scenes`.
"""

from pathlib import Path

__path__ += [str(Path(__file__).parent / room) for room in ("readers", "scenes")]
