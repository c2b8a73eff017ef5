"""README.md and the results pages: every command parses, every link leads somewhere, every limit of length is kept."""
import re
import shlex
from pathlib import Path

import pytest

import likelihood
import reproduce
import run
import sample
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "ERRATA.md", *sorted(ROOT.glob("results/**/README.md")), ROOT / "results/speed.md"]


def blocks(text):
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """The command lines of a page, in blocks and in the text."""
    lines = "\n".join(body for _, body in blocks(text)).replace("\\\n", " ").splitlines() \
        + re.findall(r"`(python [^`]+)`", text)
    return [line for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses_and_every_link_leads_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for line in commands(text):
        _, script, *arguments = shlex.split(line.replace("NAME", "fig3.2"))
        if script in ("-m", "-c") or "..." in arguments:
            continue
        assert (ROOT / script).exists(), line
        parse = {"train.py": train.parse, "sample.py": sample.parse, "likelihood.py": likelihood.parse,
                 "reproduce.py": reproduce.parse}.get(script)
        if parse:
            parse(arguments)                       # SystemExit with 2 if it is wrong


def test_the_readme_is_short_and_narrow():
    assert len(README.split()) <= 2000
    assert max(len(line) for line in README.splitlines()) <= 110
    rows = [line for page in PAGES for line in page.read_text().splitlines()
            if line.startswith("|") and page.name == "README.md"]
    assert rows and max(line.count("|") for line in rows) <= 7          # six columns


def test_the_lines_of_the_notebook_run(tmp_path, monkeypatch):
    code, = (body for language, body in blocks(README) if language == "python")
    train.main(["--data", "rings", "--target", "v", "--epochs", "1", "--batch-size", "25000", "--width", "8",
                "--device", "cpu", "--out", str(tmp_path / "runs")])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["x_hat"].shape == names["eps_hat"].shape == (5, 2) and isinstance(names["r"], run.Run)


def test_the_make_targets_are_those_of_the_makefile():
    for name in set(re.findall(r"make (\w+)", README)) - {"has"}:
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M), name
