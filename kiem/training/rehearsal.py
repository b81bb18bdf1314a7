"""How long an update takes here: true passes of a model of the same shape with fewer layers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.utils import clip_grad_norm_

from kiem.model.gemma3 import Gemma3
from kiem.training.devices import Devices
from kiem.training.optimizer import make_optimizers
from kiem.training.plan import Seconds, Setting
from kiem.training.probe import shortest_seconds

# Layers take the same time each, so the time of more follows from one and so many.
_MOST_LAYERS = 7
_SECONDS_EACH = 1.0


def rehearse_seconds(setting: Setting, devices: Devices) -> Seconds:
    """Returns the time of a pass and of an update on this process's device.

    Args:
        setting: what is trained how.
        devices: where, and in which precision.
    """
    num_layers = setting.config.num_hidden_layers
    most = min(num_layers, _MOST_LAYERS)
    several = _time(setting, devices, most)
    if most == num_layers:
        return several
    one = _time(setting, devices, 1)
    more = (num_layers - most) / (most - 1)
    return Seconds(
        several.forward_backward + more * (several.forward_backward - one.forward_backward),
        several.update + more * (several.update - one.update),
    )


def _time(setting: Setting, devices: Devices, num_layers: int) -> Seconds:
    config = replace(setting.config, num_hidden_layers=num_layers)
    generator = torch.Generator().manual_seed(0)
    size = (setting.batch_size, setting.chunk_size)
    ids = torch.randint(config.vocab_size, size, generator=generator).to(devices.device)
    with devices.device:
        model = Gemma3(config)
    model.recompute = setting.recompute
    optimizers = make_optimizers(model, setting.optimizer, 0.1)
    bos_id = 0 if setting.document_mask else None

    def forward_backward() -> None:
        with devices.autocast():
            loss, _ = model(ids, ids, bos_id, 1e-5)
        (loss / ids.numel()).backward()

    def update() -> None:
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return Seconds(
        shortest_seconds(forward_backward, devices.device, _SECONDS_EACH),
        shortest_seconds(update, devices.device, _SECONDS_EACH),
    )
