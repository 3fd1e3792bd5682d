# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Measured numbers stand beside a command, commands in documents are accepted as written, and figures have makers."""

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from latte_flow_cli import app


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "integrations").rglob("*.md")),
]
# Comments with commands.
OTHERS = [*sorted((ROOT / "recipes").rglob("*.yaml")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]

# Environment variables may stand before a command.
COMMAND = r"(?:[A-Z_]+=\S+ )*(?:python |latte-flow |pytest |make \w|accelerate launch |jupyter )"
INLINE = re.compile(rf"`({COMMAND}[^`]+)`")
LINE = re.compile(rf"^(?:#? *)({COMMAND}.+)$", re.MULTILINE)
# Words that stand for what a reader has.
PLACEHOLDERS = {"SEED": "1"}

MEASURED = re.compile(
    r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?: ?%| (?:ms|s|seconds?|minutes?|hours?|min|processor seconds|MB|GB|points?)\b)"
    r"|\b\d+ of \d+\b|\b\d+\.\d+ times\b"
)
LINK_TO_RESULTS = re.compile(r"\]\([./]*(?:benchmarks\.md|benchmarks/RESULTS\.md)")
TEST_FILE = re.compile(r"`(?:\w+ )*tests/[\w/]+\.py|`notebooks/\w+\.ipynb`")

# Sections with numbers that are no measurements.
NOT_MEASURED = {
    ("docs/guides/reproducing_the_paper.md", "How a verdict is found"): "thresholds",
    ("docs/tinyworld.md", "The oracle"): "how the oracle is defined",
    ("docs/guides/serve.md", "Several machines"): "computed in the text",
    ("docs/guides/train_your_own.md", "3. The recipe"): "computed, as the page says",
}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_of(path: Path) -> list[str]:
    text = re.sub(r"\\\n#? *", " ", path.read_text())
    found = [*INLINE.findall(text), *LINE.findall(text)]
    return list(dict.fromkeys(re.sub(r"\s+", " ", command.split("  #")[0]).strip() for command in found))


COMMANDS = sorted({command for path in [*PAGES, *OTHERS] for command in commands_of(path)})


class ParsedError(Exception):
    """The parser of a script has accepted its arguments."""


def check_script(path: Path, arguments: list[str], monkeypatch) -> None:
    """The script exists, and its own parser takes the arguments."""
    assert path.is_file(), path
    if "argparse" not in path.read_text():
        assert not arguments
        return
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(package, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, package, module)
    spec.loader.exec_module(module)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    with pytest.raises(ParsedError):
        module.main()


def check_latte_flow(arguments: list[str]) -> None:
    """The verbs and their options exist. Values are left to the tests of the guides, which run the commands."""
    command = get_command(app)
    for number, word in enumerate(arguments):
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        if word.startswith("-") and not re.fullmatch(r"-[\d.]+", word):
            assert word.split("=")[0] in known | {"--help"}, word
        elif word in getattr(command, "commands", {}):
            command = command.commands[word]
        elif number == 0:
            assert word in ("COMMAND", "..."), word


def check_tests(arguments: list[str]) -> None:
    for word in arguments:
        if word.startswith("tests"):
            path, _, name = word.partition("::")
            assert (ROOT / path).exists(), word
            assert not name or f"def {name}" in (ROOT / path).read_text(), word


def is_of_others(script: str) -> bool:
    """Whether a page lets its reader make the script, or clone the repository that it is in."""
    texts = [path.read_text() for path in PAGES]
    cloned = {name for text in texts for name in re.findall(r"git clone https://[\w./-]+/([\w-]+)", text)}
    return script.split("/")[0] in cloned or any(f"\n# {script}\n" in text for text in texts)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_are_accepted(command, monkeypatch):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    while "=" in words[0]:
        del words[0]
    program, *arguments = words
    if program == "accelerate":
        # Only what comes after accelerate's own options is ours.
        _, _, ours = command.partition(" -m latte_flow_hf.cli ")
        check_latte_flow(shlex.split(ours))
    elif program == "latte-flow":
        check_latte_flow(arguments)
    elif program == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "pytest" or arguments[:2] == ["-m", "pytest"]:
        check_tests(arguments)
    elif arguments[0] == "-m" and arguments[1].startswith("benchmarks."):
        check_script(ROOT / f"{arguments[1].replace('.', '/')}.py", arguments[2:], monkeypatch)
    elif arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), command
    elif arguments[0] == "-c":
        ast.parse(arguments[1])
    elif not is_of_others(arguments[0]):
        check_script(ROOT / arguments[0], arguments[1:], monkeypatch)


def sections_of(path: Path) -> list[tuple[str, str]]:
    """Headings with the text below them, without fenced blocks in the text that is searched for numbers."""
    text = re.sub(r"^```.*?^```$", fenced, path.read_text(), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^#{1,6} (.+)$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def fenced(block: re.Match) -> str:
    """The commands of a fenced block; its other lines may have comments that look like headings, and numbers."""
    return "\n".join(f"`{command}`" for command in LINE.findall(block[0]))


def is_a_report(path: Path) -> bool:
    """Whether a page says at its beginning that a command has made all of it."""
    return any("Made by `latte-flow " in text for _, text in sections_of(path)[:1])


@pytest.mark.parametrize("path", [path for path in PAGES if not is_a_report(path)], ids=page_name)
def test_measured_numbers_have_a_command_or_a_link_to_the_results(path):
    page = page_name(path)
    without = {}
    for heading, text in sections_of(path):
        numbers = MEASURED.findall(re.sub(r"`[^`]*`", "", text))
        named = INLINE.search(text) or LINE.search(text) or LINK_TO_RESULTS.search(text) or TEST_FILE.search(text)
        if numbers and not named:
            without[heading] = numbers
    excused = {heading for excused_page, heading in NOT_MEASURED if excused_page == page}
    assert without.keys() == excused, without


def test_excused_pages_exist():
    assert all((ROOT / page).is_file() for page, _ in NOT_MEASURED)


@pytest.mark.parametrize("page", ["README.md", "docs/settings.md"])
def test_percentages_are_those_of_the_results(page):
    """With one decimal: others are rounded."""
    percentages = re.compile(r"\b\d+\.\d%")
    results = set(percentages.findall(RESULTS.read_text()))
    stated = set(percentages.findall((ROOT / page).read_text()))
    assert stated <= results and len(stated) > 3


def test_the_readme_quotes_the_verdicts_of_the_report():
    """All of them, in words and in order."""
    report = (ROOT / "docs" / "reproduction" / "report.md").read_text()
    judged = re.findall(r"^\| \d+ \| (.+?) \| \*\*(.+?)\*\* \|", report, re.MULTILINE)
    quoted = re.findall(
        r"^\| (.+?) \| (holds here|does not hold here|cannot tell) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert quoted == judged and len(judged) == 11


def test_all_figures_have_a_maker():
    table = (ROOT / "docs" / "contributing.md").read_text()
    named = set(re.findall(r"`([\w*-]+\.(?:png|svg))`", table))
    files = {path.name for path in (ROOT / "docs" / "figures").iterdir() if path.suffix in (".png", ".svg")}
    patterns = {name: re.compile(re.escape(name).replace(r"\*", r"\w+")) for name in named}
    without = [file for file in files if not any(pattern.fullmatch(file) for pattern in patterns.values())]
    unused = [name for name, pattern in patterns.items() if not any(pattern.fullmatch(file) for file in files)]
    assert without == unused == []
