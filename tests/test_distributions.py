"""Plugins of others: real distributions, installed into a fresh environment laid over this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTSIDERS = ROOT / "tests" / "plugins"

PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "{distribution}"
version = "1.2"
[project.entry-points."pipeline.optimizers"]
{name} = "{module}:Thing"
[tool.setuptools]
py-modules = ["{module}"]
"""

# distribution → the optimizer it offers, and the module behind it
BAD = {
    "broken-import": ("broken", "import no_such_module_at_all\n"),
    "leaves-at-once": ("leaver", "raise SystemExit('good bye')\n"),
    "from-the-future": ("future", "class Thing:\n    api_version = 99\n"),
    "neither-nor": ("neither", "def Thing(problem):\n    return 3\n"),
    "a-second-spsa": ("spsa", "class Thing:\n    pass\n"),
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment that also finds what this one has."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Environment:
        venv.create(folder, with_pip=False)
        made = cls(folder)
        layer = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        site = made.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        Path(site, "layer.pth").write_text(layer, encoding="utf-8")
        return made

    def run(self, *arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        own = {"PIPELINE_HOME": str(home or self.folder), "PIPELINE_TRACKING": "off"}
        python = self.folder / "bin" / "python"
        return subprocess.run(
            [str(python), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**os.environ, **own},
        )

    def pipeline(self, *arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pipeline", *arguments, home=home)

    def install(self, *distributions: Path) -> None:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--python", str(self.folder / "bin" / "python"), "install"),
                *("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"),
                *map(str, distributions),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def outsiders(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with every distribution of ``tests/plugins``, built from copies of their folders."""
    environment = Environment.made(tmp_path_factory.mktemp("outsiders"))
    copies = tmp_path_factory.mktemp("sources")
    for folder in sorted(OUTSIDERS.iterdir()):
        subprocess.run(["cp", "-r", str(folder), str(copies)], check=True)
    environment.install(*copies.iterdir())
    return environment


@pytest.fixture(scope="module")
def beset(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with a distribution for each way in which a plugin can be broken."""
    sources = tmp_path_factory.mktemp("bad")
    for distribution, (name, code) in BAD.items():
        module = distribution.replace("-", "_")
        (folder := sources / distribution).mkdir()
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
        text = PYPROJECT.format(distribution=distribution, name=name, module=module)
        (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    environment = Environment.made(tmp_path_factory.mktemp("beset"))
    environment.install(*sources.iterdir())
    return environment


@pytest.mark.parametrize("distribution", sorted(folder.name for folder in OUTSIDERS.iterdir()))
def test_an_outsider_keeps_the_contract(distribution: str, outsiders: Environment) -> None:
    tests = str(OUTSIDERS / distribution)
    done = outsiders.run("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tests, tests)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_outsiders_are_listed_and_verified_with_their_distributions(outsiders: Environment) -> None:
    done = outsiders.pipeline("plugins", "--verify", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout) if row["kind"] == "optimizer"}
    assert done.returncode == 0
    assert {row["error"] for row in rows.values()} == {""}
    assert rows["cyberagent"]["distribution"] == "gradient-free-cyberagent"
    assert rows["zo"]["version"] == "0.1.0"
    assert {"spsa", "es", "cmaes", "nevergrad", "adamw"} < set(rows)
    shown = outsiders.pipeline("plugins", "zo", "--json")
    assert "zo:lion" in [row["optimizer"] for row in json.loads(shown.stdout)]


@pytest.mark.parametrize("spec", ["cyberagent:SepCMA,sigma=0.05", "zo:adam,learning_rate=0.001"])
def test_an_outsider_trains_a_model_and_its_run_replays(
    spec: str, outsiders: Environment, bert: Path, table: Path, tmp_path: Path
) -> None:
    done = outsiders.pipeline(*_small_run(spec, bert, table), home=tmp_path)
    assert done.returncode == 0, done.stderr
    replayed = outsiders.pipeline("replay", "mine", "--stage", "finetune", home=tmp_path)
    assert "identical to the run's" in replayed.stdout, replayed.stderr


def test_a_written_plugin_installs_passes_and_trains_as_it_stands(
    outsiders: Environment, bert: Path, table: Path, tmp_path: Path
) -> None:
    made = outsiders.pipeline("plugins", "new", "my-method", "--into", str(tmp_path))
    assert made.returncode == 0, made.stderr
    outsiders.install(tmp_path / "my-method")
    assert "my-method" in outsiders.pipeline("plugins").stdout
    tested = outsiders.run("-m", "pytest", "-q", str(tmp_path / "my-method"))
    assert tested.returncode == 0, tested.stdout[-3000:]
    done = outsiders.pipeline(*_small_run("my-method", bert, table), home=tmp_path)
    assert done.returncode == 0, done.stderr
    taken = outsiders.pipeline("plugins", "new", "my-method", "--into", str(tmp_path / "nowhere"))
    assert taken.returncode == 2
    assert "installed already" in taken.stderr


def _small_run(spec: str, bert: Path, table: Path) -> list[str]:
    data = ["--train", str(table), "--text", "review", "--label", "verdict", "--model", str(bert)]
    budget = ["--forward-passes", "60", "-S", "pretrain.enabled=false", "--no-baselines"]
    return ["run", "--optimizer", spec, "--name", "mine", *data, *budget]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "'broken' (broken-import 1.2) failed to import: ModuleNotFoundError: No module named"),
        ("leaver", "'leaver' (leaves-at-once 1.2) failed to import: SystemExit: good bye"),
        ("future", "is written for version 99 of the plugin interface, this pipeline has 1"),
        ("neither", "built a int, which is neither Optimizer nor AskTell"),
        ("spsa", "is offered by a-second-spsa 1.2 and gradient-free-pipeline"),
    ],
)
def test_a_broken_plugin_is_one_line_and_only_when_chosen(
    name: str, said: str, beset: Environment, bert: Path, table: Path, tmp_path: Path
) -> None:
    done = beset.pipeline(*_small_run(name, bert, table), "--dry-run", home=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_broken_plugins_are_rows_and_everything_else_works(
    beset: Environment, bert: Path, table: Path, tmp_path: Path
) -> None:
    verified = beset.pipeline("plugins", "--verify", "--json")
    assert verified.returncode == 1
    failed = {row["distribution"] for row in json.loads(verified.stdout) if row["error"]}
    assert set(BAD) <= failed <= {*BAD, "gradient-free-pipeline"}
    assert all(row["distribution"] for row in json.loads(verified.stdout))
    assert beset.pipeline("plugins").returncode == 0
    done = beset.pipeline(*_small_run("cmaes", bert, table), home=tmp_path)
    assert done.returncode == 0, done.stderr
