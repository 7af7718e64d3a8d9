"""The documentation is a site without a broken link, and every page of it can be found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deploy.observability.navigation import navigation

ROOT = Path(__file__).parents[2]


def test_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runbooks/AppenderErrorBudgetBurn/index.html").is_file()


def test_navigation_has_every_page() -> None:
    found: list[str] = []
    for entry in navigation(ROOT / "docs"):
        found += [entry] if isinstance(entry, str) else next(iter(entry.values()))
    assert sorted(found) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md"))
