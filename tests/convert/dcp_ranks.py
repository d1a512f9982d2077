"""Folders of torch.distributed.checkpoint, read and written by FSDP2 modules on the ranks of a job.

Run as a script in each process: FOLDER. Reads FOLDER/ours, which moeport wrote by its own names, and compares it with
`value_of`; writes FOLDER/flat by the same names, and FOLDER/titan by torchtitan's.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def value_of(name, shape):
    """The values of a tensor, which follow from its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


class Tree(nn.Module):
    """Parameters with dots in their names."""

    def __init__(self, shapes, fill):
        super().__init__()
        for name, shape in shapes.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(torch.from_numpy(fill(name, shape))))


def sharded(shapes, fill, mesh):
    """Such a module, of which each rank holds its rows."""
    module = Tree(shapes, fill)
    fully_shard(module, mesh=mesh)
    return module


def state_of(module):
    """The state of AdamW after a step whose gradients are the values themselves."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    for parameter in module.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return get_optimizer_state_dict(module, optimizer)


def main(folder):
    """Read one folder, and write two."""
    shapes = {
        names: {name: tuple(shape) for name, shape in found.items()}
        for names, found in json.loads((folder / "shapes.json").read_text()).items()
    }
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    zeros = sharded(shapes["flat"], lambda name, shape: np.zeros(shape, np.float32), mesh)
    optim = state_of(zeros)
    read = {"model": get_model_state_dict(zeros), "optim": {"state": optim["state"]}}
    dcp.load(read, checkpoint_id=folder / "ours")
    for name, tensor in read["model"].items():
        assert np.array_equal(tensor.full_tensor().numpy(), value_of(name, shapes["flat"][name])), name
        for moment in ("exp_avg", "exp_avg_sq"):
            found = read["optim"]["state"][name][moment].full_tensor().numpy()
            assert np.array_equal(found, value_of(f"{moment}.{name}", found.shape)), name
        assert read["optim"]["state"][name]["step"].item() == 3

    flat = sharded(shapes["flat"], value_of, mesh)
    dcp.save({"model": get_model_state_dict(flat), "optim": state_of(flat)}, checkpoint_id=folder / "flat")
    titan = sharded(shapes["titan"], value_of, mesh)
    moments = state_of(titan)["state"]
    state = {f"state.{name}.{key}": value for name, own in moments.items() for key, value in own.items()}
    whole = {**get_model_state_dict(titan), "optimizer": state, "train_state": {"step": torch.tensor(7)}, "lr": [0.1]}
    dcp.save(whole, checkpoint_id=folder / "titan")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
