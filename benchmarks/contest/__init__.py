"""What the benchmarks of a layer and of a whole step share: shapes, contenders, clocks, rounds, tables, charts."""
