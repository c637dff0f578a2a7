"""Results that are kept from one run to the next, for as long as nothing that decides them changes."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import triton

from benchmarks.report import ROOT

FOLDER = ROOT / ".compile-report"


class Kept:
    """Objects for JSON by key, a file each. Whoever lacks the right to write keeps nothing."""

    def __init__(self, folder: Path = FOLDER):
        self.folder = folder
        modules = sorted(Path(__file__).parent.glob("[a-z]*.py"))
        code = b"".join(path.read_bytes() for path in modules)
        self._version = f"{triton.__version__} {hashlib.sha256(code).hexdigest()}"

    def get(self, key: str) -> dict | None:
        try:
            return json.loads(self._path(key).read_text())
        except (OSError, ValueError):
            return None

    def put(self, key: str, value: dict) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
                json.dump(value, file)
            os.replace(file.name, self._path(key))
        except OSError:
            pass

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(f"{self._version} {key}".encode()).hexdigest()
