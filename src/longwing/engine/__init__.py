"""From a prompt to tokens: requests, sampling, stopping, and the plain one-sequence path.

No names here, so that the bookkeeping (`request`, `stop`) is imported without torch.
"""
