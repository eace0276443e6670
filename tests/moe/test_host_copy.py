"""What the host keeps of the device's numbers is what they are now."""

import torch
from torch import nn

from gemoe_ds.moe.host_copy import HostCopy, Remembered


def test_a_changed_buffer_is_read_again():
    module, remembered = nn.Module(), Remembered()
    module.register_buffer("number", torch.tensor(0.0))
    assert remembered.of(module.number) == 0
    module.number.fill_(1.0)
    assert remembered.of(module.number) == 1
    module.load_state_dict({"number": torch.tensor(2.0)})
    assert remembered.of(module.number) == 2
    module.double()  # another tensor
    assert remembered.of(module.number) == 2
    module.number = torch.tensor(3.0)
    assert remembered.of(module.number) == 3


def test_changes_that_are_not_counted_are_seen():
    remembered = Remembered()
    with torch.inference_mode():
        number = torch.tensor(1.0)
        assert remembered.of(number) == 1
        number.fill_(2.0)
        assert remembered.of(number) == 2


def test_it_is_read_no_more_than_once(monkeypatch):
    number, remembered = torch.tensor(1.0), Remembered()
    remembered.of(number)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: 1 / 0)
    assert remembered.of(number) == 1


def test_a_copy_on_a_cpu_is_the_tensor():
    numbers = torch.arange(3)
    assert HostCopy(numbers).value is numbers
