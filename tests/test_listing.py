"""`--list`: what configs can name, a line each."""

import pytest
import tiny

from sparsity_jax import catalog, imports, listing, models, plans, scores


def names(kind: str) -> list[str]:
    return [line.split()[0] for line in listing.listed(kind).splitlines()[1:] if line]


@pytest.mark.parametrize("kind", listing.KINDS)
def test_every_name_has_a_line_of_its_own(kind):
    heading, *lines = listing.listed(kind).splitlines()
    assert heading == kind
    told = [line.split(maxsplit=1) for line in lines if line]
    assert all(len(words) == 2 for words in told), told
    assert max(map(len, lines)) <= 100


def test_names_are_those_of_the_tables():
    assert names("stages") == list(plans.STAGES)
    assert names("measures") == list(scores.MEASURES)
    assert {"quickstart", "toy_cnn"} <= set(names("configs"))
    whole = listing.listed().splitlines()
    assert [line for line in whole if line in listing.KINDS] == list(listing.KINDS)


def test_a_name_of_ones_own_is_listed_by_its_first_sentence(monkeypatch):
    def mine(num_classes, settings, *, width: int = 3):
        """A network of
        mine. It is small.

        width: of its layers.
        """

    monkeypatch.setitem(models.MODELS, "mine", mine)
    assert "  mine             A network of mine." in listing.listed("models").splitlines()


def test_variants_that_are_listed_make_configs():
    files = catalog.files()
    listed = names("variants")
    assert {"toy_cnn:story", "greg:digits", "sfw_oneshot:tau="} <= set(listed)
    for name in listed:
        config, _, variant = name.partition(":")
        if not variant.endswith("="):
            assert imports.load(files[config]).get_config(variant)["pipeline"]


def test_another_kind_is_refused():
    with tiny.refused("--list", "modles", "models"):
        listing.listed("modles")
