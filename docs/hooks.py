"""Hooks of mkdocs: pages that lie outside of docs/, the pages of the API, and links between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "measurements.md",
}
"""Pages outside of docs/, and their places in the site."""
API = {
    "objectives": ("Objectives", ("objective", "preference", "supervised", "protocol", "mixing", "methods")),
    "batches": ("Batches", ("rollouts", "spans", "groups", "trajectories", "turns", "selection", "inputs", "prepared")),
    "credit": (
        "tc.credit",
        tuple(f"stages.credit.{x}" for x in ("group", "returns", "values", "influence", "distilled")),
    ),
    "filters": ("tc.filters and tc.token_weights", ("stages.filters", "stages.token_weights", "stages.within")),
    "ratios": ("tc.ratio, tc.clip and tc.scale", ("stages.ratio", "stages.clip", "stages.scale")),
    "losses": (
        "tc.aggregation and tc.term",
        ("stages.aggregation", "stages.term", "stages.token_score", "from_hidden"),
    ),
    "pairs": ("tc.link and tc.pair", ("stages.link", "stages.pair")),
    "stages": ("Stages of your own", ("stages.base", "settings", "schedule")),
    "rows": ("tc.scan and tc.segment", ("blocks.scan", "blocks.segment")),
    "select": ("tc.select", tuple(f"blocks.select{x}" for x in ("", ".ranks", ".words", ".diverse", ".frequency"))),
    "tree": ("tc.tree, tc.values and tc.length", ("blocks.tree", "blocks.values", "blocks.length")),
    "models": ("tc.log_probs, tc.head and tc.divergence", ("blocks.log_probs", "blocks.head", "blocks.divergence")),
    "mismatch": ("tc.mismatch and tc.rollout_correction", ("blocks.mismatch", "rollout_correction")),
    "packing": ("tc.packing", ("packing", "packing.predictions", "packing.tree_attention", "blocks.tree_pack")),
    "attribution": (
        "tc.attribution",
        tuple(
            f"attribution{x}"
            for x in ("", ".gradient", ".reagent", ".globenc", ".decompx", ".replacement", ".faithfulness")
        ),
    ),
    "decoding": ("tc.decoding", ("decoding.temperature", "decoding.length")),
    "rewards": ("tc.rewards", ("rewards.matching", "rewards.mathematics")),
    "train": ("The trainer", ("train.settings", "train.tasks", "report")),
    "kernels": ("Kernels", ("kernels",)),
}
"""Pages of the API: title, and modules of tokcredit."""


def _api(title: str, modules: tuple[str, ...]) -> str:
    sections = []
    for name in modules:
        section = f"## {name}\n\n::: tokcredit.{name}\n    options:\n      heading_level: 3\n"
        if any(other.startswith(f"{name}.") for other in modules):
            section += "      members: false\n"  # of a package whose modules have sections
        sections.append(section)
    return "\n".join([f"# {title}\n", *sections])


def on_config(config: Any) -> Any:
    """Put the pages of the API into the navigation.

    Args:
        config: Configuration of mkdocs.
    """
    for part in config.nav:
        for items in part.values():
            for item in items:
                if isinstance(item, dict) and "API" in item:
                    item["API"] = [{title: f"api/{name}.md"} for name, (title, _) in API.items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/, and the examples.

    Args:
        files: Files of the site.
        config: Configuration of mkdocs.
    """
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "scaling.png", abs_src_path=str(ROOT / "bench/scaling.png")))
    for name, (title, modules) in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=_api(title, modules)))
    for path in sorted(p for p in (ROOT / "examples").rglob("*") if p.suffix in (".py", ".sh")):
        place = str(path.relative_to(ROOT))
        files.append(File.generated(config, place, abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links lead to the places that files have in the site.

    Args:
        markdown: The page.
        page: Page of mkdocs.
    """
    markdown = re.sub(r"\]\(\s*\.\./examples/", "](examples/", markdown)
    if page.file.src_uri in OUTSIDE.values():
        markdown = markdown.replace("](docs/", "](").replace("](bench/README.md", "](measurements.md")
    return markdown
