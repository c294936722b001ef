"""γ and β of all layers of a network together: the values that each generator gives by itself."""

from __future__ import annotations

import pytest
import torch

import fastfilm
from fastfilm.nn import generator as generators


@pytest.mark.parametrize("preset", ["paper", "identity"])
@pytest.mark.parametrize("layers", [None, [1, 0, 1, 0, 0, 1]])
def test_generators_together_give_what_each_gives(preset: str, layers: list[int] | None) -> None:
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(
        1, 1, depth=2, base_filters=4, metadata_size=3, film_layers=layers, generator=preset
    )
    for parameter in net.film.parameters():
        torch.nn.init.normal_(parameter)
    metadata, image = torch.randn(5, 3), torch.zeros(5, 1, 8, 8)
    own = [g for g in net.film if isinstance(g, fastfilm.FiLMGenerator)]
    with torch.no_grad():
        assert generators._alike(own)
        found = net.modulation(metadata, image)
        for g, film in zip(net.film, found, strict=True):
            if g not in own:
                assert film == (None, None)
                continue
            for ours, theirs in zip(film, g(metadata), strict=True):
                torch.testing.assert_close(ours, theirs)
    trained = net.modulation(metadata, image)
    assert all(gamma.requires_grad for gamma, _ in trained if gamma is not None)


def test_a_hook_or_weights_of_its_own_make_each_run_by_itself() -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=3)
    own = list(net.film)
    called: list[object] = []
    handle = own[2].last.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        net.modulation([[0, 1, 0]], torch.zeros(1, 1, 8, 8))
        assert called == [1]
        handle.remove()
        assert generators._alike(own)
        own[1].hidden[0].weight = torch.nn.Parameter(torch.randn(64, 3))
        assert not generators._alike(own)
        found = net.modulation([[0, 1, 0]], torch.zeros(1, 1, 8, 8))
        torch.testing.assert_close(found[1], own[1](torch.tensor([[0.0, 1.0, 0.0]])))
