"""Every `gemmaqat` command that the README and the experiments show can be parsed as it stands."""

import re
import shlex
from pathlib import Path

import pytest

from gemmaqat import config as configs
from gemmaqat import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.py"))]


def commands_in(document: Path) -> list[list[str]]:
    """The shown commands, continuation lines joined; the last part of a chain of them."""
    text = document.read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        line = re.sub(r"\s+#.*", "", line.strip())
        start = re.search(r"(?:^|/)gemmaqat (?=[a-z]+ +--\w)", line)
        if start:
            found.append(["gemmaqat", *shlex.split(line[start.end() :])])
    return found


def overrides_in(document: Path) -> list[str]:
    """The `--config.x=y` arguments that a docstring shows by themselves, after a colon."""
    lines = re.findall(r"^.*?: +(--config\..*)$", document.read_text(), flags=re.MULTILINE)
    return [word for line in lines for word in shlex.split(line.replace("`", ""))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:the load_module.*:DeprecationWarning")
def test_shown_commands_parse(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = commands_in(document)
    assert shown, f"{document.name} shows no command"
    for override in overrides_in(document):
        shown.append(["gemmaqat", "plan", f"--config=experiments/{document.name}", override])
    for command in shown:
        verb = main._find_verb(command[1])
        options = main._parse_flags(verb, [command[0], *command[2:]])
        if "config" in verb.flags and options.config is not None:
            configs.parse(options.config)
