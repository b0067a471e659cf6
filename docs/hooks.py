"""What mkdocs does not do by itself: pages that lie outside of docs/, and links to them.

The Markdown files are read on code hosts too, so they link as files of the repository do: ``../tutorials/1.py``. On the
site such a link leads to the page made of that file, and one to a file that the site has not becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS, TUTORIALS = ROOT / "docs", ROOT / "tutorials"
BROUGHT = ("CONTRIBUTING.md", "CHANGELOG.md")

_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def scripts() -> list[Path]:
    """The tutorials, in their order."""
    return sorted(TUTORIALS.glob("*.py"))


def title(script: str) -> str | None:
    """The first heading of a script; without one, mkdocs finds a title."""
    found = re.search(r"^# # (.+)$", script, flags=re.M)
    return found and found[1].replace("`", "")


def tutorial_page(script: str) -> str:
    """Markdown of a script in the percent format: cells of text and of code, and committed pictures that code names."""
    parts: list[str] = []
    for cell in re.split(r"^(?=# %%)", script, flags=re.M):
        head, _, body = cell.partition("\n") if cell.startswith("# %%") else ("", "", cell)
        if not body.strip():
            continue
        if "[markdown]" in head:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.M))
            continue
        parts.append(f"```python\n{body.strip()}\n```")
        said = "".join(re.findall(r"!\[.*?\]\(.*?\)", script))
        drawn = dict.fromkeys(re.findall(r"[\w-]+\.png", body))
        parts += [f"![{name}]({name})" for name in drawn if name not in said and (TUTORIALS / name).exists()]
    return "\n\n".join(parts) + "\n"


def place_on_site(path: Path) -> str | None:
    """Where the site has a file or folder of the repository, relative to its root; None if it has not."""
    if path == TUTORIALS:
        return next((place_on_site(script) for script in scripts()), None)
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if path.parent == TUTORIALS and path.suffix in (".py", ".png"):
        return path.relative_to(ROOT).as_posix().replace(".py", ".md")
    return path.name if path.parent == ROOT and path.name in BROUGHT else None


def site_links(markdown: str, folder: Path, place: str) -> str:
    """Links of a page, in ``folder`` of the repository and at ``place`` of the site, as the site needs them."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        found = (folder / target).resolve()
        if not found.exists():
            return match[0]  # mkdocs warns of it
        there = place_on_site(found)
        return text if there is None else f"[{text}]({os.path.relpath(there, os.path.dirname(place))}{anchor or ''})"

    return _LINK.sub(link, markdown)


def on_config(config: Any) -> None:
    """A page in the navigation for each tutorial."""
    for section in config.nav:
        if "Tutorials" in section:
            section["Tutorials"] = [{title(script.read_text("utf-8")): place_on_site(script)} for script in scripts()]


def on_files(files: Any, config: Any) -> None:
    """Files from outside of docs/."""
    from mkdocs.structure.files import File

    for name in BROUGHT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for script in scripts():
        files.append(File.generated(config, place_on_site(script), content=tutorial_page(script.read_text("utf-8"))))
    for picture in TUTORIALS.glob("*.png"):
        files.append(File.generated(config, place_on_site(picture), abs_src_path=str(picture)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site needs them."""
    place = page.file.src_uri
    home = ROOT if page.file.generated_by else DOCS
    return site_links(markdown, (home / place).parent, place)
