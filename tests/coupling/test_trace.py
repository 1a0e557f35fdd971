"""Each tensor follows the choice of units of its place: of the model, of its layer, of its expert."""

from __future__ import annotations

import pytest

from llmprune_cli.coupling.trace import Binding, Instance, instance_of
from llmprune_cli.family.widths import Width

TEXTS = {
    "": Instance(),
    "0": Instance(0),
    "3": Instance(3),
    "3.7": Instance(3, (7,)),
    "3.7.0": Instance(3, (7, 0)),
    "3#1": Instance(3, component=1),
    "3.7#12": Instance(3, (7,), 12),
    "#1": Instance(component=1),
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_instance_is_read_from_the_text_that_it_writes(text: str) -> None:
    assert str(TEXTS[text]) == f"{TEXTS[text]}" == text
    assert Instance.parse(text) == TEXTS[text]


@pytest.mark.parametrize(
    "text", ["03", "3.", ".7", "3.07", "3#0", "3#", "-1", " 3", "3\n", "٣", "x", "3#1#1", "9" * 5000]
)
def test_other_text_names_no_instance(text: str) -> None:
    with pytest.raises(ValueError):
        Instance.parse(text)


@pytest.mark.parametrize(
    ("width", "component", "numbers", "expected"),
    [
        (Width.HIDDEN, 0, (3,), Instance()),
        (Width.HIDDEN, 1, (3,), Instance(3, component=1)),
        (Width.NEURONS, 0, (3,), Instance(3)),
        (Width.NEURONS, 0, (3, 7), Instance(3, (7,))),
        (Width.NEURONS, 0, (3, 7, 1), Instance(3, (7, 1))),
        (Width.NEURONS, 2, (3,), Instance(3, component=2)),
        (Width.EXPERTS, 0, (3, 7), Instance(3)),
    ],
)
def test_a_tensor_follows_the_choice_of_its_place(
    width: Width, component: int, numbers: tuple[int, ...], expected: Instance
) -> None:
    assert instance_of(Binding("name", 0, width, component=component), numbers) == expected
