"""The decode loop, end to end: ``edlm bench decode``, against the loop as it was published."""
