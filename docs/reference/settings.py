"""Writes the reference of settings for the site, from the recipe's own schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from exalign.run.explain import explain
from exalign.run.familiar import SETTINGS
from exalign.run.recipe import Recipe


def on_files(files: Files, config: Any) -> Files:
    """Add the page, which stands in no file."""
    files.append(File.generated(config, "reference/settings.md", content="\n".join(_page())))
    return files


def _page() -> Iterator[str]:
    yield "# Settings of a recipe\n\n`exalign recipe --explain` prints the same; `--schema` prints it for editors.\n"
    for number, setting in enumerate(explain(Recipe)):
        section = setting.type.startswith(("section", "mapping of sections"))
        if number == 0 or section:
            yield f"\n## {setting.name}\n\n{setting.meaning}\n"
            yield "| setting | type | default | meaning |\n|---|---|---|---|"
        if not section:
            default = f"`{setting.default}`" if setting.default else ""
            cells = (f"`{setting.name}`", setting.type, default, setting.meaning)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield "\n## Names of other trainers\n\n| elsewhere | here |\n|---|---|"
    for names, here in SETTINGS.items():
        yield f"| {', '.join(f'`{name}`' for name in names.split())} | {here} |"
