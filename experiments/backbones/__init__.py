"""The demo's pretrained models, which ship, and the command that makes them from nothing.

Pretraining takes another path on another CPU or thread count: top-8 has been 81.9 and 86.2 %. The
files in this folder make every comparison start from the same weights.

    annealed          seed 0, then annealed with a penalty on gating entropy: the demo's
    annealed_seed_1   the same with another seed, its vision tower too
    plain             seed 0, not annealed: flatter gates
    tokenizer
"""
