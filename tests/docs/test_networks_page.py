"""``docs/networks.md``: its program runs, and its network sustains itself at the rate of the published one."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"


def test_page() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(block, PAGE, "exec"), names)
    spikes = names["spikes"]
    assert isinstance(spikes, torch.Tensor) and spikes.shape == (2000, 1, 4000)
    assert 8 < spikes[1000:].float().mean() / 0.1e-3 < 25
