"""What every operation of `Ops` must give, and a check of any backend against it: values, shapes, types, gradients."""
