"""transformers in float64 throughout."""

import torch
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """transformers computes norms, rotary tables and gates in float32; here it does so in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)
