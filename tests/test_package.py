"""What `pip install` brings: only `lact_kernels`, importable without Triton, and a README that runs."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("package")
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def run_python(code: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment | env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def examples_in(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the built wheel, and nothing else, has been installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run([*pip, *build], cwd=ROOT, check=True, timeout=600)
    wheel = next(folder.glob("lact_kernels-*.whl"))
    install = ["install", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=600)
    return folder / "site"


def test_wheel_contains_the_package_alone(site):
    names = zipfile.ZipFile(next(site.parent.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lact_kernels"}
    assert "lact_kernels/py.typed" in names
    assert "lact_kernels/triton/window_attn/fwd.py" in names
    installed = {
        str(path.relative_to(ROOT)) for path in (ROOT / "lact_kernels").rglob("*.py")
    }  # nothing was left out
    assert installed <= set(names)


def each_on_its_own(examples: list[tuple[Path, str]]) -> str:
    """Code that runs them in one process, as imports take longer than they do."""
    lines = [f"exec(compile({code!r}, {str(path)!r}, 'exec'), {{}})" for path, code in examples]
    return "\n".join(lines)


def test_readme_examples_run_from_the_wheel(site, tmp_path):
    where = "import lact_kernels; print(lact_kernels.__file__)\n"
    examples = [(README, code) for code in examples_in(README)]
    assert len(examples) >= 4
    done = run_python(where + each_on_its_own(examples), cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))


def test_examples_of_the_docs_run():
    docs = sorted((ROOT / "docs").glob("*.md"))
    examples = [(path, code) for path in docs for code in examples_in(path)]
    assert len({path for path, _ in examples}) >= 4
    done = run_python(each_on_its_own(examples))
    assert done.returncode == 0, done.stderr


def test_import_and_first_call_take_no_triton_and_no_transformers():
    """Nor TorchDynamo, whose import takes seconds."""
    done = run_python(
        "import lact_kernels, lact_kernels.compat, sys, torch\n"
        "q = torch.randn(1, 4, 2, 8).requires_grad_()\n"
        "lact_kernels.window_attn(q, q, q, 2).sum().backward()\n"
        "assert not {'triton', 'transformers', 'torch._dynamo'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # as if it were not installed


def test_eager_backend_works_without_triton():
    done = run_python(
        WITHOUT_TRITON
        + examples_in(README)[0]
        + """
try:
    lact_kernels.window_attn(q, k, v, 512, backend="triton")
except ValueError as error:
    assert "needs Triton" in str(error), error
else:
    raise AssertionError("backend='triton' ran without Triton")
"""
    )
    assert done.returncode == 0, done.stderr
