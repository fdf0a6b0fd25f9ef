"""From raw downloads to prepared folders (`vlabs.data.prepared`). Three rooms, and imports go one way through them.

`scenes` (what is rendered) → `readers` (a file a raw layout) → `engine` (files, tables, pictures, what is written).
`vlabs prepare NAME` is `python -m data_prep.NAME`, where NAME is a file of `readers` or of `scenes`.
"""

from pathlib import Path

__path__ += [str(Path(__file__).parent / room) for room in ("readers", "scenes")]
