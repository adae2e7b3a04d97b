"""Gates of Fast KVzip (arXiv 2601.17668): a small network in each attention layer that tells from a token's normalised input alone
how much attention the token will get. kv_policy=kvzip keeps what they value.

The engine reads their file (file.py) and computes them in the model's graph; here they are made: trained on the model's own attention
(train.py), or converted from published ones (convert.py). PyTorch is needed for both, and for nothing else in this package.
"""
