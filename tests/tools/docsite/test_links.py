"""Links of a checkout's pages, turned into links of the site."""

import pytest
from docsite.links import for_site, titles, with_dark_pictures

NAMES = {"design/pages.md": "Pages and bytes", "index.md": "All pages"}


@pytest.mark.parametrize(
    ("page", "link", "on_site"),
    [
        ("index.md", "[pages.md](design/pages.md)", "[Pages and bytes](design/pages.md)"),
        ("index.md", "[these pages](design/pages.md#the-formula)", "[these pages](design/pages.md#the-formula)"),
        ("index.md", "[CHANGELOG.md](../CHANGELOG.md)", "[CHANGELOG.md](CHANGELOG.md)"),
        ("design/pages.md", "[index.md](../index.md)", "[All pages](../index.md)"),
        ("design/pages.md", "[notes](../../CHANGELOG.md#added)", "[notes](../CHANGELOG.md#added)"),
        ("CONTRIBUTING.md", "[docs/design/pages.md](docs/design/pages.md)", "[Pages and bytes](design/pages.md)"),
        ("index.md", "[vLLM](https://example.org/a.md)", "[vLLM](https://example.org/a.md)"),
        ("index.md", "[above](#using-it)", "[above](#using-it)"),
        ("index.md", "`x`, [`y`](../docs/index.md), `z`", "`x`, [`y`](index.md), `z`"),
    ],
)
def test_links_to_pages_stay_links(page, link, on_site):
    assert for_site(link, page, NAMES, None) == on_site


def test_what_is_no_page_is_linked_in_the_repository():
    text = "[results](../../benchmarks/results/cpu/store.json), [the license](../../LICENSE#section)"
    there = for_site(text, "design/pages.md", NAMES, "https://example.org/x/blob/main/")
    assert there == (
        "[results](https://example.org/x/blob/main/benchmarks/results/cpu/store.json), "
        "[the license](https://example.org/x/blob/main/LICENSE#section)"
    )
    assert for_site(text, "design/pages.md", NAMES, None) == "results, the license"


def test_code_stays_as_it_is():
    text = "`[a](../LICENSE)`\n```console\n$ echo '[a](../LICENSE)'\n```\n"
    assert for_site(text, "index.md", NAMES, None) == text


def test_titles_end_at_a_colon_where_that_is_enough():
    pages = {"a.md": "# Hot blocks: keys\n", "b.md": "text\n# GPU kernels: cost\n", "c.md": "# GPU kernels: counts"}
    assert titles(pages) == {"a.md": "Hot blocks", "b.md": "GPU kernels: cost", "c.md": "GPU kernels: counts"}


def test_a_drawing_is_there_for_light_and_for_dark_pages():
    text = "![A page](pictures/page.svg) ![A plot](pictures/plot.png)"
    light, dark = "![A page](pictures/page.svg#only-light)", "![A page](pictures/page-dark.svg#only-dark)"
    assert with_dark_pictures(text) == f"{light}{dark} ![A plot](pictures/plot.png)"
