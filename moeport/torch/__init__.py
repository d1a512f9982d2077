"""The mixture-of-experts layer as an ordinary PyTorch module, and the recording of any module for parity.

import moeport.torch
ffn = moeport.torch.MoE(d_model=512, num_experts=8, expert_hidden=1024, router="topk", router_options={"top_k": 2})
y = ffn(x)                                # x: (..., 512)
loss = loss + ffn.auxiliary_loss          # load balancing and router z-loss of this call

with moeport.torch.record(model, "bundles/mine") as recording:
    loss = model(x).square().mean()
    recording.add("loss", loss)
    loss.backward()
"""

from __future__ import annotations

from moeport.ascend.trouble import EXTENSION, guarded

with guarded("torch", [EXTENSION]):
    from moeport.torch.layer import MoE
    from moeport.torch.options import MoEOptions
    from moeport.torch.recording import ModuleRecording, record

__all__ = ["MoE", "MoEOptions", "ModuleRecording", "record"]
