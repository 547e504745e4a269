"""A start without torch's compiler changes nothing that an optimizer does."""

import subprocess
import sys

import pytest

CODE = """
import sys
import torch
from cnntrain.train.lean import spare_the_compiler

if sys.argv[1] == "lean":
    spare_the_compiler()
torch.manual_seed(0)
for make in (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam,
):
    net = torch.nn.Linear(3, 2)
    optimizer = make([{"params": [net.weight]}], lr=0.1)
    optimizer.add_param_group({"params": [net.bias], "lr": 0.01})
    grads = []
    optimizer.register_step_post_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(4, 3)).square().sum().backward()
        told = optimizer.step(lambda: torch.ones((), requires_grad=True).mul(2).requires_grad)
    other = make(net.parameters(), lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    print(make.__name__, net.weight.tolist(), net.bias.tolist(), grads, told, net.weight.requires_grad)
linear = torch.nn.Linear(3, 2, device="meta")
print(torch.relu(linear(torch.empty(4, 3, device="meta"))).shape)
print("compiler:", "torch._dynamo" in sys.modules)
compiled = torch.compile(torch.nn.Linear(3, 2), backend="eager")
print(compiled(torch.ones(1, 3)).shape, "torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_optimizers_do_the_same_and_the_compiler_is_there_when_it_is_wanted() -> None:
    plain, lean = (
        subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout
        for how in ("plain", "lean")
    )
    assert "compiler: True" in plain
    assert lean == plain.replace("compiler: True", "compiler: False")
