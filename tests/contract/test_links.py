"""Every link of a page leads to a file that is there, and every anchor to a heading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import links


def test_links_inside_lead_somewhere() -> None:
    assert not links.broken()


def test_every_kind_of_page_is_read() -> None:
    found = {page: links.links(page) for page in links.pages()}
    for page in ("README.md", "docs/index.md", "docs/howto/attribute.md", "docs/concepts/roles.py"):
        assert found[page], page
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "rules/README.md", "docs/tutorials/text.py"} <= {*found}
    assert links.outside()


PAGE = """# A page

[a file](other.md), [a heading](other.md#two-words), [here](#a-page), ![a picture](no.png),
[`code`](gone.md),
[![linked](here.png)](other.md#three), `[code](of.md)`, [out](https://example.org/x)

```
[code](block.md)
```
"""


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs/tutorials").mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/site.py").write_text('COPIED = {"made.md": "docs/other.md"}\n')
    (tmp_path / "docs/page.md").write_text(PAGE)
    (tmp_path / "docs/other.md").write_text(
        "## Two words\n[made](made.md#two-words) [cli](reference/cli.md)\n"
    )
    (tmp_path / "docs/tutorials/n.py").write_text(
        "# %% [markdown]\n# # Notes\n# [up](../page.md)\n# [no](gone.md)\n\n# %%\nx = 1  # [not](a.md)\n"
    )
    monkeypatch.setattr(links, "ROOT", tmp_path)
    assert links.broken() == [
        "docs/page.md: there is no docs/no.png",
        "docs/page.md: there is no docs/gone.md",
        "docs/page.md: there is no docs/here.png",
        "docs/page.md: docs/other.md has no heading #three",
        "docs/tutorials/n.py: there is no docs/tutorials/gone.md",
    ]
    assert links.outside() == ["https://example.org/x"]
