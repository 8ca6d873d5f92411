"""Changes to a bundle's record, for tests of bundles that differ from what a training writes."""

import json
from pathlib import Path

from kitlib.atomic import write_json
from kitlib.bundle import record_digest


def edit_record(bundle, **changes) -> dict:
    """Replace keys of a bundle's model.json, or remove those that are None, with a matching digest; return the record."""
    path = Path(bundle) / "model.json"
    record = json.loads(path.read_text()) | changes
    record = {key: value for key, value in record.items() if value is not None}
    record["record_sha256"] = record_digest(record)
    write_json(path, record)
    return record
