"""Every family of the installed `transformers` that has a sliding window, on "lact_window_attn".

Each is built by itself, small and random, and compared with eager attention: logits of padded rows, and the
tokens that it generates past its window. `python -m tests.transformers_families` prints what comes of it, and
why; the table of docs/drop_in.md has the same.
"""

import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", minversion="5")

from tests.transformers_families import families, outcome, verdict  # noqa: E402

DOCS = (Path(__file__).parent.parent / "docs" / "drop_in.md").read_text()
VERSION = re.search(r"families of transformers ([\d.]+)", DOCS).group(1)
DOCUMENTED = {
    name: result
    for names, result in re.findall(r"^\| (`.*`) \| (.*) \|$", DOCS, re.M)
    for name in re.findall(r"`([^`]+)`", names)
}
FAMILIES = families()
VERDICTS = {"agrees", "agrees without a window", "refused", "own attention", "not built"}


@pytest.mark.filterwarnings("ignore:.* has a sliding_window of .* and its mask one of")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family, monkeypatch):
    result = outcome(family, monkeypatch)
    print(f"{family.name}: {result}")
    assert verdict(result) in VERDICTS, result
    if transformers.__version__ == VERSION:
        assert verdict(DOCUMENTED[family.name]) == verdict(result)


@pytest.mark.skipif(transformers.__version__ != VERSION, reason="the table is of another version")
def test_the_table_has_every_family():
    assert DOCUMENTED.keys() == {family.name for family in FAMILIES}
