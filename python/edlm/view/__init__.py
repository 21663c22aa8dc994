"""How a text was decoded, step by step: in the terminal, and as one HTML page that needs nothing else."""

from .page import page, write_page
from .terminal import Watch, show
from .trajectory import Frame, Trajectory, trajectory

__all__ = ["Frame", "Trajectory", "Watch", "page", "show", "trajectory", "write_page"]
