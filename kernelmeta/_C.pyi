from typing import Any

def build_info() -> dict[str, Any]:
    """Compiler, flags, instruction sets, CUDA architectures, build type and versions."""
