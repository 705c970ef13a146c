"""Names of groups and types as file names, in any script."""

import pytest

from mixgf.classification import paths

NAMES = (
    "Zell-Typ δ", "Zell-Typ β", "..", ".", "日本", "日本 2", "клетка", "NK/T", "NK T", "a/../b", "/etc/passwd", "~", "", " ", "-",
    "T cell", "t cell", "con", ".hidden", "a\tb", "a:b", 'say "x"', "%2e%2e", "🧬", "x" * 300, "日" * 300, "e\u0301", "\u00e9",
    ".writing-0", "a?b*c", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_slug_is_one_short_file_name_inside_its_folder(name, tmp_path):
    slug = paths.slug(name)
    assert slug not in {"", ".", ".."}
    assert not set('/\\:*?"<>|%\0\t\n ') & set(slug)
    assert not slug.startswith(".")
    assert len(slug.encode()) <= 60
    (tmp_path / f"{slug}-0123456789.parquet.json").touch()
    assert len(list(tmp_path.iterdir())) == 1


def test_texts_that_share_a_slug_get_names_of_their_own_whatever_the_case():
    names = paths.unique_slugs(NAMES)
    assert len({name.lower() for name in names.values()}) == len(NAMES)
    assert names["日本"] == "日本"
    assert names["NK/T"].startswith("NK-T-")
    assert paths.unique_slugs(["T cell", "T cell", "B cell"]) == {"T cell": "T-cell", "B cell": "B-cell"}


def test_names_of_plain_text_stay_as_they_were():
    assert [paths.slug(t) for t in ("T cell", "baron_human", "random pancreas 0", " x(1) ")] == [
        "T-cell", "baron_human", "random-pancreas-0", "x-1",
    ]  # fmt: skip
