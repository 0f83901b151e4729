"""Databases as earlier releases wrote them, kept to be upgraded.

Each holds one study of the toy trainer with two arms and a total of twelve trials: 0, 1, 3 and 4 complete, 5
pruned, 2, 6, 7 and 8 failed, and 9 interrupted after three of its five steps. One of its two workers never signed
off. `schema-v2` has what came with the service, too: the study is in the queue, that worker is one of the service,
the checkpoint of trial 9 was uploaded, there are curves, and somebody was told of a stall.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import psycopg

from storage.database import parse_url

ASSETS = Path(__file__).resolve().parent.parent / "assets"
OLD_VERSIONS = (1, 2)


def load_schema(url: str, version: int) -> None:
    """Fill an empty database with what a version of our tables left."""
    folder = ASSETS / f"schema-v{version}"
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        Path(str(parsed.database)).write_bytes(gzip.decompress((folder / "tuner.db.gz").read_bytes()))
        return
    plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute((folder / "tuner.sql").read_bytes())


def load_schema_1(url: str) -> None:
    load_schema(url, 1)
