"""A hook of MkDocs: the site is made of the repository's own pages, wherever they lie, so that one link is right in both.

MkDocs knows one folder of pages. Here are the pages that the navigation names, by their paths in the repository, and the files that
they link to (recipes, scripts, pictures).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def pages_in(nav: Any) -> Iterator[str]:
    """The paths that a navigation names."""
    for one in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(one, str):
            yield one
        else:
            yield from pages_in(one)


def linked_files(page: str) -> Iterator[str]:
    """What a page links to in the repository that is no page itself, by its path there."""
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent / target
        if path.is_file() and path.suffix != ".md":
            yield path.resolve().relative_to(ROOT).as_posix()


def on_files(files: Files, config: Any) -> Files:
    """All pages and what they link to, and the theme's own files."""
    pages = [*pages_in(config.nav), *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    paths = dict.fromkeys([*pages, *(file for page in pages for file in linked_files(page))])
    made = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    for file in made:
        file.dest_uri = file.dest_uri.removeprefix("docs/")  # the first page is the site's own
        if file.src_uri == "README.md":
            file.dest_uri = "about/index.html"
    return Files([*made, *(file for file in files if not file.src_uri.endswith(".md") and file.src_dir != config.docs_dir)])
