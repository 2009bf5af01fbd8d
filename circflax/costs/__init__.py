"""What adapters cost: parameters, bytes, floating-point operations and memory, from shapes."""

from circflax.costs._costs import Costs, count, estimate
from circflax.costs._program import Program, compile_program, peak_memory

__all__ = ["Costs", "Program", "compile_program", "count", "estimate", "peak_memory"]
