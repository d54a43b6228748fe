"""What the benchmark command measures, and how: peers, clocks, memory, operations counted."""
