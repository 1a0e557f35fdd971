"""Which tensor axes follow a width: those whose size changes when it takes one step."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llmprune_cli.coupling.twin import Twin, writes_head_dim
from llmprune_cli.errors import LlmpruneError
from llmprune_cli.family.architecture import reconfigure, rotary_changes
from llmprune_cli.family.skeleton import build_skeleton, shapes_of
from llmprune_cli.family.widths import Width, field_changes
from llmprune_cli.folder.tensors import split_name

Place = tuple[str, int]  # (tensor name or template, axis)


@dataclass(frozen=True)
class Followers:
    """The axes whose size follows a width."""

    disk: dict[Place, int]  # (tensor name on disk, axis) → size
    memory: dict[Place, int]
    new: tuple[str, ...]  # tensors on disk that the larger width adds


def followers_of(twin: Twin, width: str, increment: int) -> Followers | None:
    """Compare two skeletons whose configurations differ by the next legal step of one width."""
    config = twin.architecture.config
    before = shapes_of(config)
    for steps in (1, 2, 4, 8):
        changes = field_changes(config, width, getattr(twin.architecture.widths, width) + increment * steps)
        if width == "hidden_size" and twin.architecture.hidden_follows_heads:
            head_dim = twin.architecture.widths.head_dim + steps
            changes.update(rotary_changes(config, head_dim))
            changes.update({"head_dim": head_dim} if writes_head_dim(twin.architecture) else {})
        if width == Width.HEADS and twin.architecture.widths.heads_per_group == 1:  # they have keys of their own
            changes.update(field_changes(config, Width.GROUPS, changes[next(iter(changes))]))
        try:
            after = shapes_of(reconfigure(config, changes))
        except (ValueError, LlmpruneError):
            continue
        new = tuple(name for name in after.disk if name not in before.disk)
        return Followers(changed_axes(before.disk, after.disk), changed_axes(before.memory, after.memory), new)
    return None


def within_layers(bound: Followers, taken: set[Place]) -> Followers:
    """Those axes that lie within layers and are not taken; outside, what reads channels silences the last layer.

    None where no tensor leads from channels to channels: then layers have none of their own.
    """

    def inside(places: dict[Place, int]) -> dict[Place, int]:
        return {place: size for place, size in places.items() if split_name(place[0])[1]}

    free = inside({place: size for place, size in bound.disk.items() if template_place(place) not in taken})
    names = [name for name, _ in free]
    return replace(bound, disk=free if len(set(names)) < len(names) else {}, memory=inside(bound.memory))


def own_rule(twin: Twin, width: str) -> str:
    """Why no other size of a width can be had, in the words of the configuration or the model."""
    config = twin.architecture.config
    try:
        build_skeleton(reconfigure(config, field_changes(config, width, 2 * getattr(twin.architecture.widths, width))))
    except (ValueError, LlmpruneError) as error:
        return f"it cannot change alone ({re.sub(r' [(][0-9]+[)]', '', str(error)).rstrip('.')})"
    return "it cannot change alone"


def changed_axes(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> dict[Place, int]:
    """The axes that two models have with different sizes, and the first one's sizes."""
    return {
        (name, axis): size
        for name, shape in before.items()
        for axis, size in enumerate(shape)
        if name in after and len(after[name]) == len(shape) and after[name][axis] != size
    }


def template_place(place: Place) -> Place:
    """The same axis of a tensor's template."""
    return split_name(place[0])[0], place[1]
