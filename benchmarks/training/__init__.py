"""A training step and the rows that it is fed with: ``edlm bench training``. One module a family."""
