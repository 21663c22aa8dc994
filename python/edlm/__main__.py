"""``python -m edlm``: what ``edlm`` is, for those who start modules, as torchrun does."""

from .cli import main

raise SystemExit(main())
