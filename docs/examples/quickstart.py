import torch
from torch import nn

import quartet_compile as quartet

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.Linear(256, 10))
x, target = torch.randn(128, 256), torch.randint(10, (128,))

report = quartet.explain(model, x)  # nothing is compiled for this
print(f"{len(report.rewritten)} of {len(report.linears)} linears in NVFP4")
for linear in report.linears:
    if linear.reason:
        print(f"left: {linear.name}: {linear.reason}")

step = torch.compile(model, backend="quartet")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for i in range(22):
    loss = nn.functional.cross_entropy(step(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if i in (0, 21):
        print(f"step {i + 1}: loss {loss.item():.1f}")
