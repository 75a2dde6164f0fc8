"""What the run of real clients takes for ok: nothing but a case that its program says is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clients.__main__ import cases_of, main
from clients.catalogue import CLIENTS, PROGRAMS, Client

ONE = Client("one", "one.py", ("some-sdk[all]==1.2.3", "other==4"))
SAYS = """import cases
cases.case("good")(lambda: None)
cases.case("bad")(lambda: 1 / 0)
cases.run()
"""


def ran(folder: Path, program: str) -> list[tuple[str, bool]]:
    script = folder / "program.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(PROGRAMS)!r})\n{program}")
    found = cases_of(ONE, [sys.executable, script], "http://127.0.0.1:1", folder / "home")
    return [(case.name, not case.failed) for case in found]


def test_each_case_is_told_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    assert ran(tmp_path, SAYS) == [("good", True), ("bad", False)]


@pytest.mark.parametrize(
    ("program", "good"), [("", 0), ("raise SystemExit(3)", 0), (f"{SAYS}\nraise SystemExit(3)", 1)]
)
def test_a_program_that_ends_badly_or_says_nothing_is_a_failure(
    tmp_path: Path, program: str, good: int
) -> None:
    cases = ran(tmp_path, program)
    assert cases[-1] == ("(the whole program)", False)
    assert sum(ok for _, ok in cases) == good


def test_a_line_names_the_version_that_was_asked_for(tmp_path: Path) -> None:
    assert ONE.version == "1.2.3"
    assert [client.name for client in CLIENTS if not client.version[0].isdigit()] == []
    assert [client.name for client in CLIENTS if not (PROGRAMS / client.program).is_file()] == []


def test_a_client_that_is_not_known_is_a_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "netscape"])
    assert ended.value.code == 2
    assert "openai" in capsys.readouterr().err
