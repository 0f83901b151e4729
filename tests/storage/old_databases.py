"""Databases as an earlier release wrote them, kept to be upgraded.

`schema-v1` holds one study of the toy trainer with two arms and a total of twelve trials: 0, 1, 3 and 4 complete, 5
pruned, 2, 6, 7 and 8 failed, and 9 interrupted after three of its five steps. One of its two workers never signed
off.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import psycopg

from storage.database import parse_url

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "schema-v1"


def load_schema_1(url: str) -> None:
    """Fill an empty database with what schema 1 left."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        Path(str(parsed.database)).write_bytes(gzip.decompress((ASSETS / "tuner.db.gz").read_bytes()))
        return
    plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute((ASSETS / "tuner.sql").read_bytes())
