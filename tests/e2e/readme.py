"""The commands that the READMEs give."""

import re
from pathlib import Path

_PROGRAMS = "dsq|train|hydra-train|preprocess|generate|validate|interactive|eval-lm|score"
_COMMAND = re.compile(rf"(\w+=\S* )*(scripts/[\w.-]+|fairseq-({_PROGRAMS})|pip3?|python3?)( |$)")
_FENCE = re.compile(r"^ *(?:```|~~~)(\w*)[^\n]*\n(.*?)^ *(?:```|~~~) *$", re.M | re.S)
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)
_SHELLS = ("", "bash", "sh", "shell", "console", "text")


def files(root: Path) -> list[Path]:
    """The READMEs of a clone: its own and those of the rooms."""
    return [root / "README.md", *sorted((root / "fairseq_dsq").rglob("README.md"))]


def commands(text: str) -> list[str]:
    """The command lines of a Markdown text, in fenced blocks and inline, each once, in order.

    A table whose head says ``COMMAND ...`` has a command in each row, whose first cell's flags stand for the dots.
    """
    found: list[str] = []

    def add(line: str) -> None:
        line = " ".join(line.split())
        if _COMMAND.match(line) and line not in found:
            found.append(line)

    for language, block in _FENCE.findall(text):
        if language in _SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                add(re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ ")))
    prose = _FENCE.sub("", text)
    for _, code in _CODE.findall(prose):
        add(code)
    head = ""
    for line in prose.splitlines():
        if not line.startswith("|"):
            head = ""
            continue
        first = line.split("|")[1].strip()
        code = _CODE.fullmatch(first)
        if code and code[2].endswith(" ...") and _COMMAND.match(code[2]):
            head = code[2].removesuffix("...")
        elif head and not set(first) <= set("-: "):
            add(head + (code[2] if code else ""))
    return found


def python_blocks(text: str) -> list[str]:
    """The fenced blocks of Python."""
    return [block for language, block in _FENCE.findall(text) if language in ("python", "py")]
